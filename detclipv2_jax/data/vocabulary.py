"""The concepts of all prepared sources of a run, under one set of ids, without their strings."""

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32

from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.general_names import GeneralNames
from detclipv2_jax.data.index import TEXT_KINDS, Source
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.definitions import Knowledge, define
from detclipv2_jax.text.tokenizer import CONTEXT, TEMPLATE, fitted, keys, tokenize
from detclipv2_jax.text.wordnet import wordnet

_Table = Source | Dictionary | GeneralNames  # what concepts are read from


class Vocabulary:
    """The concepts of several sources, each once, under global ids 0 … len - 1.

    Ids depend on the set of texts alone (they follow the order of the keys), so every process gets
    the same ids, in whatever order the sources are given. Only arrays are made: 15 million concepts
    take seconds. The concepts of the prepared dictionary, if there is one, have ids too.

    Attributes:
        sources: the sources by name.
        keys: the key of each concept, ascending.
        local_to_global: for each source its concepts' global ids, by local id.
        general: ids of the general names, ascending.
        meanings: synonyms and definitions of the concepts; None without a dictionary.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        dictionary: Dictionary | None = None,
        *,
        defined: Collection[str] = (),
        corrections: Mapping[str, Meaning] = MappingProxyType({}),
        template: str = TEMPLATE,
        general: GeneralNames | None = None,
    ):
        """Merge the concepts of all sources and of the dictionary.

        Args:
            sources: the open sources by name.
            dictionary: the prepared dictionary.
            defined: kinds whose names are encoded with their definitions; needs a dictionary.
            corrections: a user's meanings of names, used before those of the dictionary.
            template: how a name and its definition are joined.
            general: names that are negatives where a source has few of its own.
        """
        self.sources = dict(sources)
        self._dictionary = dictionary
        tables: list[_Table] = [*self.sources.values()]
        tables += [one for one in (dictionary, general) if one is not None]
        everything = np.concatenate([s.keys for s in tables] or [np.zeros(0, np.uint64)])
        self.keys, first, inverse = np.unique(everything, return_index=True, return_inverse=True)
        starts = np.cumsum([0] + [len(s.keys) for s in tables])
        self.local_to_global: dict[str, Int32[np.ndarray, " n"]] = {
            name: inverse[start : start + len(source.keys)].astype(np.int32)
            for start, (name, source) in zip(starts, self.sources.items())
        }
        # Where each concept occurs first: tokens and names stay in the sources' files.
        self._tables = tables
        self._table_of = (np.searchsorted(starts, first, side="right") - 1).astype(np.int32)
        self._local_of = (first - starts[self._table_of]).astype(np.int64)
        names = [] if general is None else general.names
        self.general: Int32[np.ndarray, " g"] = np.unique(self.lookup(names))
        self.meanings = None
        if dictionary is not None:
            self.meanings = meanings_of(self, dictionary, defined, corrections, template)

    def __len__(self) -> int:
        return len(self.keys)

    def definitions(self, kind: str) -> Mapping[str, str]:
        """Return name → definition for a kind whose names are encoded with them; else nothing.

        It is "" for names that are encoded without.
        """
        used = self.meanings is not None and kind in self.meanings.kinds
        return self.meanings.definitions if used else {}

    def tokens(
        self,
        ids: Int[np.ndarray, " m"],
        kind: str | None = None,
        bare: Bool[np.ndarray, " m"] | None = None,
    ) -> Int32[np.ndarray, "m 16"]:
        """Return the token ids of concepts, zeros where the id is -1 (padding).

        If `kind` is one whose names are encoded with their definitions, the tokens are those of
        name and definition, except where `bare` is True.
        """
        ids = np.asarray(ids)
        rows = np.zeros((len(ids), CONTEXT), np.int32)
        for found in self._located(ids):
            rows[found.mask] = found.table.tokens[found.local]
        if self.meanings is not None and kind in self.meanings.kinds:
            known, places = self.meanings.places(ids if bare is None else np.where(bare, -1, ids))
            rows[known] = self.meanings.tokens[places]
        return rows

    def names(self, ids: Int[np.ndarray, " m"]) -> list[str]:
        """Return the concepts' texts, read from `concepts.jsonl`; "" where the id is -1."""
        ids = np.asarray(ids)
        result = [""] * len(ids)
        for found in self._located(ids):
            for i, local in zip(np.flatnonzero(found.mask), found.local):
                result[i] = found.table.concepts[local]["name"]
        return result

    def lookup(self, names: Sequence[str]) -> Int32[np.ndarray, " n"]:
        """Return the global ids of names; -1 for names that are not in the vocabulary."""
        wanted = keys(names)
        if not len(self):
            return np.full(len(names), -1, np.int32)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self) - 1)
        return np.where(self.keys[at] == wanted, at, -1).astype(np.int32)

    def pool(self, kind: str, names: Collection[str] | None = None) -> Int32[np.ndarray, " p"]:
        """Return the global ids that may be drawn as negatives, ascending.

        These are the names and phrases of the kind's sources, not their captions. Grounding, whose
        phrases may be anything, draws from the prepared dictionary if there is one.

        Args:
            kind: the kind of data.
            names: only these sources of the kind; None for all.
        """
        if kind == "grounding" and self._dictionary is not None:
            return np.unique(self.lookup(self._dictionary.names))
        chosen = [
            self.local_to_global[name][source.vocabulary]
            for name, source in self.sources.items()
            if source.kind == kind and (names is None or name in names)
        ]
        return np.unique(np.concatenate(chosen or [np.zeros(0, np.int32)]))

    def with_synonyms(
        self, ids: Int[np.ndarray, " n"], pool: Int[np.ndarray, " p"]
    ) -> Int[np.ndarray, " m"]:
        """Return `ids` and their synonyms among `pool`; all three ascending and unique.

        Synonyms are known from the prepared dictionary; without one the result is `ids`.
        """
        if self.meanings is None:
            return ids
        groups = self.meanings.groups
        present = np.unique(groups[ids])
        return np.union1d(ids, pool[np.isin(groups[pool], present[present >= 0])])

    def groups(self, likeness: Literal["synonyms", "heads"]) -> Int32[np.ndarray, " n"]:
        """Return the group of each concept; concepts of a group are alike. -1: of no group.

        "synonyms": by the prepared dictionary; without one no concepts are. "heads": names and
        phrases of the same head noun; captions have none.
        """
        if likeness == "heads":
            return self._heads
        return np.full(len(self), -1, np.int32) if self.meanings is None else self.meanings.groups

    @functools.cached_property
    def _heads(self) -> Int32[np.ndarray, " n"]:
        """The number of each name's head noun; 9 µs for each name of boxes and phrases."""
        names = [] if self._dictionary is None else list(self._dictionary.names)
        for source in self.sources.values():
            if source.kind not in TEXT_KINDS:
                names += [row["name"] for row in source.read_concepts(source.vocabulary)]
        numbers: dict[str, int] = {}
        groups = np.full(len(self), -1, np.int32)
        heads = [wordnet().head(name) or name for name in names]
        groups[self.lookup(names)] = [numbers.setdefault(head, len(numbers)) for head in heads]
        return groups

    def _located(self, ids: Int[np.ndarray, " m"]) -> Iterator["_Located"]:
        """Yield the concepts of `ids` table by table; tables without any are left out."""
        if ids.size and (ids.min() < -1 or ids.max() >= len(self)):
            raise IndexError(f"a concept id is out of range: ids must be in -1 … {len(self) - 1}")
        present = ids >= 0
        owner = np.full(len(ids), -1)
        owner[present] = self._table_of[ids[present]]
        for number, table in enumerate(self._tables):
            mask = owner == number
            if mask.any():
                yield _Located(table, self._local_of[ids[mask]], mask)


class _Located(NamedTuple):
    """Some of m concepts, found in one table: a source or the dictionary."""

    table: _Table
    local: Int[np.ndarray, " k"]  # their local ids there
    mask: Bool[np.ndarray, " m"]  # which of the m they are


@dataclasses.dataclass(frozen=True, eq=False)
class Meanings:
    """Synonyms and definitions of the n concepts of a run; e of them have a definition."""

    groups: Int32[np.ndarray, " n"]  # concepts of one group are synonyms; -1: no group
    kinds: frozenset[str]  # kinds whose names are encoded with their definitions
    definitions: Mapping[str, str]  # name → definition or ""; empty if no kind uses them
    ids: Int32[np.ndarray, " e"]  # global ids of the concepts that have one, ascending
    tokens: Int32[np.ndarray, "e 16"]  # of each of these, with its definition

    def places(
        self, ids: Int[np.ndarray, " m"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """Return which of `ids` have a definition, and their rows of `tokens`."""
        if not len(self.ids):
            return np.zeros((2, 0), int)
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        known = np.flatnonzero(self.ids[at] == ids)
        return known, at[known]


def meanings_of(
    vocabulary: Vocabulary,
    dictionary: Dictionary,
    defined: Collection[str],
    corrections: Mapping[str, Meaning],
    template: str,
) -> Meanings:
    """Return synonyms and definitions of a run's concepts.

    Args:
        vocabulary: the run's concepts. Those that are not in the dictionary are included: their
            synonyms are looked up for every kind that has negatives.
        dictionary: the prepared dictionary.
        defined: kinds whose names get definitions. A source's own definition is used first, as in
            evaluation. A name that is not in the dictionary gets what `definitions.define` finds
            without embeddings.
        corrections: a user's meanings of names.
        template: how a name and its definition are joined.
    """
    others = _other_names(vocabulary, dictionary, {"detection", "grounding", *defined})
    groups = np.full(len(vocabulary), -1, np.int32)
    groups[vocabulary.lookup(dictionary.names)] = dictionary.groups
    groups[vocabulary.lookup(others)] = dictionary.groups_of(others)
    definitions: dict[str, str] = {}
    if defined:
        names = [*dictionary.names, *_other_names(vocabulary, dictionary, defined)]
        own = _own_meanings(vocabulary, defined)
        known = Knowledge(own=own, corrections=corrections, dictionary=dictionary.definitions)
        found = define(names, known)
        definitions = {name: one.text or "" for name, one in zip(names, found)}
    texts = {name: text for name, text in definitions.items() if text}
    ids = vocabulary.lookup(list(texts))
    order = np.argsort(ids)
    return Meanings(
        groups=groups,
        kinds=frozenset(defined),
        definitions=definitions,
        ids=ids[order],
        tokens=tokenize(fitted(list(texts), list(texts.values()), template))[order],
    )


def _own_meanings(vocabulary: Vocabulary, kinds: Collection[str]) -> dict[str, Meaning]:
    """Return what the sources of some kinds say that their names mean.

    Of two meanings of a name, that of the source whose name sorts first: a concept has one text.
    """
    found: dict[str, Meaning] = {}
    for _, source in sorted(vocabulary.sources.items()):
        if source.kind in kinds:
            for row in source.read_concepts(source.vocabulary):
                if (meaning := Meaning.of_category(row)).gloss:
                    found.setdefault(row["name"], meaning)
    return found


def _other_names(
    vocabulary: Vocabulary, dictionary: Dictionary, kinds: Collection[str]
) -> list[str]:
    """Return names and phrases of some kinds' sources that are not in the dictionary."""
    sources = [source for source in vocabulary.sources.values() if source.kind in kinds]
    wanted = [source.vocabulary & ~np.isin(source.keys, dictionary.keys) for source in sources]
    rows = itertools.chain.from_iterable(map(Source.read_concepts, sources, wanted))
    return list(dict.fromkeys(row["name"] for row in rows))
