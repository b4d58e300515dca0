"""The concept dictionary: names and frequent phrases, with their definitions and synonyms.

`detclip prepare concepts` writes it once for all prepared sources, to DIR/dictionary.jsonl. The
first line says what it was made from. Each other line is a concept, the most frequent first:

    {"name", "count", "definition", "origin", "like", "synsets", "group"}

`origin` and `like` are those of `definitions.Definition`; concepts of one `group` are synonyms.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, UInt16, UInt64

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.definitions import Definition, Embed, define, origins, synsets_of

FILE = "dictionary.jsonl"
FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """An open dictionary of n concepts, in the order of its file."""

    directory: Path
    info: Mapping[str, Any]  # the first line
    rows: Sequence[Mapping[str, Any]]  # the other lines

    @classmethod
    def open(cls, directory: str | Path) -> "Dictionary":
        """Read a prepared dictionary.

        Raises:
            UserError: it is missing, damaged or of another format.
        """
        directory = Path(directory)
        path = directory / FILE
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file. {_remedy(directory)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}). {_remedy(directory)}") from None
        info = _parse(path, 1, lines[0], {"format": int, "concepts": int})
        if info["format"] != FORMAT:
            raise UserError(
                f"{path}: format {info['format']}, this version reads {FORMAT}. "
                f"{_remedy(directory)}"
            )
        rows = [_row(path, number, line) for number, line in enumerate(lines[1:], 2)]
        if len(rows) != info["concepts"]:
            raise UserError(
                f"{path}: has {len(rows)} concepts, its first line says {info['concepts']}. "
                f"{_remedy(directory)}"
            )
        return cls(directory, info, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def names(self) -> list[str]:
        """The concepts' texts, normalized."""
        return [row["name"] for row in self.rows]

    @functools.cached_property
    def definitions(self) -> dict[str, str]:
        """Name → definition, for concepts that have one."""
        return {row["name"]: row["definition"] for row in self.rows if row["definition"]}

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, " n"]:
        """`tokenizer.key` of each name."""
        return tokenizer_lib.keys(self.names)

    @functools.cached_property
    def tokens(self) -> UInt16[np.ndarray, "n 16"]:
        """Token ids of the names without definitions."""
        return tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(self.names))

    @functools.cached_property
    def groups(self) -> Int32[np.ndarray, " n"]:
        """The group of each concept; synonyms have the same group."""
        return np.array([row["group"] for row in self.rows], np.int32)

    def groups_of(self, names: Iterable[str]) -> Int32[np.ndarray, " m"]:
        """Return the group that each name belongs to; -1 for one that is no concept's synonym."""
        return np.array([self._group_of(name) for name in names], np.int32)

    @property
    def concepts(self) -> Sequence[Mapping[str, Any]]:
        """The rows, by the name that `Source` uses for them."""
        return self.rows

    def meanings(
        self, vocabulary: Vocabulary, defined: Collection[str], template: str
    ) -> "Meanings":
        """Return synonyms and definitions of a run's concepts.

        Args:
            vocabulary: the run's concepts. Those that are not in the dictionary are included: their
                synonyms are looked up for every kind that has negatives.
            defined: kinds whose names get definitions. A name that is not in the dictionary gets
                what `definitions.define` finds without embeddings.
            template: how a name and its definition are joined.
        """
        others = self._other_names(vocabulary, {"detection", "grounding", *defined})
        groups = np.full(len(vocabulary), -1, np.int32)
        groups[vocabulary.lookup(self.names)] = self.groups
        groups[vocabulary.lookup(others)] = self.groups_of(others)
        names: list[str] = []
        texts: list[str] = []
        if defined:
            others = self._other_names(vocabulary, defined)
            found = define(others, dictionary=self.definitions)
            known = self.definitions | {n: d.text for n, d in zip(others, found) if d.text}
            names, texts = list(known), list(known.values())
        ids = vocabulary.lookup(names)
        order = np.argsort(ids)
        return Meanings(
            groups=groups,
            kinds=frozenset(defined),
            definitions=dict(zip(names, texts)),
            ids=ids[order],
            tokens=tokenizer_lib.tokenize(tokenizer_lib.fitted(names, texts, template))[order],
        )

    def _other_names(self, vocabulary: Vocabulary, kinds: Collection[str]) -> list[str]:
        """Return names and phrases of some kinds' sources that are not in the dictionary."""
        sources = [source for source in vocabulary.sources.values() if source.kind in kinds]
        wanted = [source.vocabulary & ~np.isin(source.keys, self.keys) for source in sources]
        rows = itertools.chain.from_iterable(map(rows_where, sources, wanted))
        return list(dict.fromkeys(row["name"] for row in rows))

    @functools.cached_property
    def _by_mark(self) -> dict[str, int]:
        """Mark → group. The marks of a concept are its synsets and its letters."""
        return {
            mark: row["group"]
            for row in self.rows
            for mark in (*row["synsets"], _letters(row["name"]))
        }

    def _group_of(self, name: str) -> int:
        marks = (_letters(name), *synsets_of(name))
        return next((self._by_mark[mark] for mark in marks if mark in self._by_mark), -1)


@dataclasses.dataclass(frozen=True, eq=False)
class Meanings:
    """Synonyms and definitions of the n concepts of a run; e of them have a definition."""

    groups: Int32[np.ndarray, " n"]  # concepts of one group are synonyms; -1: no group
    kinds: frozenset[str]  # kinds whose names are encoded with their definitions
    definitions: Mapping[str, str]  # name → definition; empty if no kind uses them
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


_FIELDS = {
    "name": str,
    "count": int,
    "definition": str | None,
    "origin": str,
    "like": str | None,
    "synsets": list,
    "group": int,
}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often the names and phrases of some sources occur."""

    counts: Mapping[str, int]  # normalized text → mentions; no captions
    categories: frozenset[str]  # the category names of detection sources

    def chosen(self, *, min_count: int, size: int) -> list[str]:
        """Return the concepts of a dictionary, the most frequent first.

        These are all categories, then the most frequent phrases of at least `min_count` mentions,
        up to `size` concepts together.
        """
        ranked = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        phrases = [n for n in ranked if self.counts[n] >= min_count and n not in self.categories]
        room = max(size - len(self.categories), 0)
        kept = self.categories.union(phrases[:room])
        return [name for name in ranked if name in kept]


def count(sources: Iterable[Source]) -> Counts:
    """Read the names, phrases and their counts of prepared sources."""
    counts: Counter[str] = Counter()
    categories: set[str] = set()
    for source in sources:
        for row in rows_where(source, source.vocabulary):
            counts[row["name"]] += row["count"]
            if source.kind == "detection":
                categories.add(row["name"])
    return Counts(counts, frozenset(categories))


def rows_where(source: Source, wanted: Bool[np.ndarray, " c"]) -> Iterator[dict[str, Any]]:
    """Yield the wanted rows of a source's concepts.jsonl, which may be too large for memory."""
    if wanted.any():
        with open(source.directory / "concepts.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, itertools.compress(lines, wanted))


def build(
    directory: str | Path,
    names: Sequence[str],
    counts: Mapping[str, int],
    *,
    synsets: Mapping[str, str] | None = None,
    embed: Embed | None = None,
    created_from: Mapping[str, Any] | None = None,
) -> Dictionary:
    """Write the dictionary of `names` atomically, and open it.

    Args:
        directory: of the file.
        names: different concepts, normalized.
        counts: name → mentions.
        synsets: normalized name → synset, for names whose meaning is known.
        embed: embeds texts to find the nearest concept (`definitions.define`).
        created_from: written to the first line.

    Raises:
        UserError: the file cannot be written.
    """
    synsets = synsets or {}
    found = define(names, synsets=synsets, embed=embed)
    meanings = [synsets_of(name, synsets) for name in names]
    rows = [
        {
            "name": name,
            "count": counts.get(name, 0),
            "definition": definition.text,
            "origin": definition.origin,
            "like": definition.like,
            "synsets": meaning,
            "group": group,
        }
        for name, definition, meaning, group in zip(names, found, meanings, group(names, meanings))
    ]
    info = {"format": FORMAT, "concepts": len(rows), "created_from": dict(created_from or {})}
    with replacing(Path(directory) / FILE) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) for row in (info, *rows))
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
    return Dictionary.open(directory)


def group(names: Sequence[str], synsets: Sequence[Sequence[str]]) -> list[int]:
    """Return the number of each name's group of synonyms.

    Two names are synonyms if they have a synset in common, or differ only in spaces, punctuation
    and a plural's s. Synonyms of synonyms are in the same group.
    """
    parent = list(range(len(names)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[str, int] = {}
    for i, name in enumerate(names):
        for mark in (_letters(name), *synsets[i]):
            parent[root(i)] = root(first.setdefault(mark, i))
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(names))]


def lvis_synsets(path: str | Path) -> dict[str, str]:
    """Return normalized name → synset, from an LVIS annotation file or a list of its categories.

    Names and synonyms are included as LVIS spells them, and without the words in brackets. A name
    that several synsets share is left out.

    Raises:
        UserError: the file cannot be read or has no categories with synsets.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Name LVIS's file.") from None
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("synset"), str) for row in rows
    ):
        raise UserError(f'{path}: has no list of categories with a "synset". Name LVIS\'s file.')
    found: dict[str, set[str]] = {}
    for row in rows:
        for spelling in (row.get("name"), *(row.get("synonyms") or ())):
            name = tokenizer_lib.normalize(str(spelling).replace("_", " "))
            for variant in {name, " ".join(re.sub(r"\([^)]*\)", " ", name).split())}:
                found.setdefault(variant, set()).add(row["synset"])
    return {name: synsets.pop() for name, synsets in found.items() if len(synsets) == 1}


def report(dictionary: Dictionary, examples: int = 3) -> str:
    """Return lines for people: how many definitions have each origin, with examples."""
    found = [Definition(r["definition"], r["origin"], like=r["like"]) for r in dictionary.rows]
    sizes = Counter(row["group"] for row in dictionary.rows)
    several = [size for size in sizes.values() if size > 1]
    lines = [f"{dictionary.directory / FILE}: {len(dictionary):,} concepts"]
    for origin, number in origins(found).items():
        lines.append(f"  {_TITLES[origin]:<32}{number:>9,}")
        shown = [row for row in dictionary.rows if row["origin"] == origin][:examples]
        lines += [f"      {_example(row)}" for row in shown]
    lines.append(f"  {'with synonyms among the others':<32}{sum(several):>9,}")
    return "\n".join(lines)


_TITLES = {
    "synset": "defined by a given synset",
    "wordnet": "by WordNet's first sense",
    "nearest": "like the nearest concept",
    "head": "like their head noun",
    "none": "not defined: bare names",
}


def _example(row: Mapping[str, Any]) -> str:
    text = tokenizer_lib.fitted([row["name"]], [row["definition"]])[0]
    return f"{text}  (like {row['like']})" if row["like"] else text


def _letters(name: str) -> str:
    """Return a name's letters and digits without a plural's s; the name itself if it has none."""
    letters = re.sub(r"[\W_]+", "", name)
    return letters[:-1] if letters.endswith("s") and not letters.endswith("ss") else letters or name


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return a concept's line, checked, because users may edit the file."""
    row = _parse(path, number, line, _FIELDS)
    row["name"] = tokenizer_lib.normalize(row["name"])
    for field, holds in (
        ("name", row["name"]),
        ("synsets", all(isinstance(synset, str) for synset in row["synsets"])),
        ("group", 0 <= row["group"] < 2**31),
    ):
        if not holds:
            raise UserError(
                f"{path}, line {number}: {field!r} is not valid. {_remedy(path.parent)}"
            )
    return row


def _parse(path: Path, number: int, line: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the file as an object; `fields`: its required fields and their types."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    is_object = isinstance(row, dict)
    wrong = [
        field
        for field, kind in fields.items()
        if not is_object or field not in row or not isinstance(row[field], kind)
    ]
    if wrong:
        raise UserError(
            f"{path}, line {number}: "
            f"{f'{wrong[0]!r} is missing or not valid' if is_object else 'not a JSON object'}. "
            f"{_remedy(path.parent)}"
        )
    return row


def _remedy(directory: Path) -> str:
    return f"Make it with `detclip prepare concepts --from=DATA --to={directory}`."
