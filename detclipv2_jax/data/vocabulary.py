"""The concepts of several prepared sources merged under global ids, without their strings."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int, Int32

from detclipv2_jax.text.tokenizer import CONTEXT, TEMPLATE, keys

if TYPE_CHECKING:
    from detclipv2_jax.data.dictionary import Dictionary
    from detclipv2_jax.data.index import Source


class Vocabulary:
    """The concepts of several sources, each once, under global ids 0 … len - 1.

    Ids depend on the set of texts alone (they follow the order of the keys), so every process,
    and every order of the sources, gives the same. Only arrays are made: 15 million concepts take
    seconds. The concepts of a prepared dictionary, where there is one, have ids as well.
    """

    def __init__(
        self,
        sources: Mapping[str, "Source"],
        dictionary: "Dictionary | None" = None,
        *,
        defined: Collection[str] = (),
        template: str = TEMPLATE,
    ):
        """Merge the concepts of `sources` (name → opened source) and of `dictionary`.

        `defined`: the kinds whose names are encoded with their definitions, as `template` says; it
        takes a dictionary.
        """
        self.sources = dict(sources)
        self._lexicon = dictionary
        tables = [*self.sources.values(), *([] if dictionary is None else [dictionary])]
        everything = np.concatenate([s.keys for s in tables] or [np.zeros(0, np.uint64)])
        self.keys, first, inverse = np.unique(everything, return_index=True, return_inverse=True)
        starts = np.cumsum([0] + [len(s.keys) for s in tables])
        #: local id → global id, an int32 array a source
        self.local_to_global: dict[str, Int32[np.ndarray, " n"]] = {
            name: inverse[start : start + len(source.keys)].astype(np.int32)
            for start, (name, source) in zip(starts, self.sources.items())
        }
        # Where each concept is found first: tokens and names stay in the sources' files.
        self._tables = tables
        self._source = (np.searchsorted(starts, first, side="right") - 1).astype(np.int32)
        self._local = (first - starts[self._source]).astype(np.int64)
        #: synonyms and definitions of the concepts; None without a dictionary
        self.meanings = None if dictionary is None else dictionary.meanings(self, defined, template)

    def __len__(self) -> int:
        return len(self.keys)

    def definitions(self, kind: str) -> Mapping[str, str]:
        """Name → definition, where names of a kind are encoded with theirs; else nothing."""
        used = self.meanings is not None and kind in self.meanings.kinds
        return self.meanings.definitions if used else {}

    def tokens(
        self, ids: Int[np.ndarray, " m"], kind: str | None = None
    ) -> Int32[np.ndarray, "m 16"]:
        """Token ids of concepts; a row of zeros where the id is -1 (padding).

        With their definitions, where a kind is named that is encoded so.
        """
        ids = np.asarray(ids)
        rows = np.zeros((len(ids), CONTEXT), np.int32)
        for source, locals_, where in self._located(ids):
            rows[where] = source.tokens[locals_]
        if self.meanings is not None and kind in self.meanings.kinds:
            known, places = self.meanings.places(ids)
            rows[known] = self.meanings.tokens[places]
        return rows

    def names(self, ids: Int[np.ndarray, " m"]) -> list[str]:
        """The concepts' texts, for people, from `concepts.jsonl`; "" where the id is -1."""
        ids = np.asarray(ids)
        result = [""] * len(ids)
        for source, locals_, where in self._located(ids):
            for i, local in zip(np.flatnonzero(where), locals_):
                result[i] = source.concepts[local]["name"]
        return result

    def lookup(self, names: Sequence[str]) -> Int32[np.ndarray, " n"]:
        """Global ids of names; -1 for those that no source has."""
        wanted = keys(names)
        if not len(self):
            return np.full(len(names), -1, np.int32)
        at = np.minimum(np.searchsorted(self.keys, wanted), len(self) - 1)
        return np.where(self.keys[at] == wanted, at, -1).astype(np.int32)

    def pool(self, kind: str, names: Collection[str] | None = None) -> Int32[np.ndarray, " p"]:
        """Sorted global ids that may be drawn as negatives for a kind, or for its sources `names`.

        These are the names and phrases of its sources, not their captions; grounding, whose
        phrases are anything, draws from the prepared dictionary where there is one.
        """
        if kind == "grounding" and self._lexicon is not None:
            return np.unique(self.lookup(self._lexicon.names))
        chosen = [
            self.local_to_global[name][source.vocabulary]
            for name, source in self.sources.items()
            if source.kind == kind and (names is None or name in names)
        ]
        return np.unique(np.concatenate(chosen or [np.zeros(0, np.int32)]))

    def _located(
        self, ids: Int[np.ndarray, " m"]
    ) -> Iterable[tuple["Source | Dictionary", Int[np.ndarray, " k"], Bool[np.ndarray, " m"]]]:
        """For each source of some of `ids`: it, their local ids, which of `ids` they are."""
        if ids.size and (ids.min() < -1 or ids.max() >= len(self)):
            raise IndexError(f"concept id out of range: ids lie in -1 … {len(self) - 1}")
        present = ids >= 0
        owner = np.full(len(ids), -1)
        owner[present] = self._source[ids[present]]
        for number, source in enumerate(self._tables):
            where = owner == number
            if where.any():
                yield source, self._local[ids[where]], where
