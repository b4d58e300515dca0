"""The concept dictionary of a run: names and frequent phrases, what they mean, which are one thing.

scripts/prepare_concepts.py writes it once for all prepared sources, to DIR/dictionary.jsonl. The
first line tells what it was made of; each other line is a concept, the most frequent first:

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
    """A dictionary, opened. Its n concepts are in the order of the file."""

    directory: Path
    info: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def open(cls, directory: str | Path) -> "Dictionary":
        """Read a prepared dictionary; `UserError` if it is missing, damaged, of another format."""
        directory = Path(directory)
        path = directory / FILE
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; {_remedy(directory)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {_remedy(directory)}") from None
        info = _parse(path, 1, lines[0], {"format": int, "concepts": int})
        if info["format"] != FORMAT:
            raise UserError(
                f"{path}: format {info['format']}, this version reads {FORMAT}; "
                f"{_remedy(directory)}"
            )
        rows = [_row(path, number, line) for number, line in enumerate(lines[1:], 2)]
        if len(rows) != info["concepts"]:
            raise UserError(
                f"{path}: has {len(rows)} concepts, its first line says {info['concepts']}; "
                f"{_remedy(directory)}"
            )
        return cls(directory, info, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def names(self) -> list[str]:
        """The concepts, normalized."""
        return [row["name"] for row in self.rows]

    @functools.cached_property
    def definitions(self) -> dict[str, str]:
        """Name → definition, of those that have one."""
        return {row["name"]: row["definition"] for row in self.rows if row["definition"]}

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, " n"]:
        """`concepts.key` of each name."""
        return tokenizer_lib.keys(self.names)

    @functools.cached_property
    def tokens(self) -> UInt16[np.ndarray, "n 16"]:
        """Token ids of the bare names."""
        return tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(self.names))

    @functools.cached_property
    def groups(self) -> Int32[np.ndarray, " n"]:
        """The group of each concept; no two things that are the same are in different ones."""
        return np.array([row["group"] for row in self.rows], np.int32)

    def groups_of(self, names: Iterable[str]) -> Int32[np.ndarray, " m"]:
        """The group that each of other names would be in; -1 where it is like no concept."""
        return np.array([self._group_of(name) for name in names], np.int32)

    @property
    def concepts(self) -> Sequence[Mapping[str, Any]]:
        """The rows, under the name that a source has for them."""
        return self.rows

    def meanings(
        self, vocabulary: Vocabulary, defined: Collection[str], template: str
    ) -> "Meanings":
        """What is known of a run's concepts, those that the dictionary lacks included.

        Their synonyms in the dictionary are looked up for every kind that has negatives; their
        definitions, as `definitions.define` finds them without embeddings, for kinds of `defined`.
        """
        drawn = self._beside(vocabulary, {"detection", "grounding", *defined})
        groups = np.full(len(vocabulary), -1, np.int32)
        groups[vocabulary.lookup(self.names)] = self.groups
        groups[vocabulary.lookup(drawn)] = self.groups_of(drawn)
        names: list[str] = []
        texts: list[str] = []
        if defined:
            asked = self._beside(vocabulary, defined)
            own = define(asked, dictionary=self.definitions)
            known = self.definitions | {n: d.text for n, d in zip(asked, own) if d.text}
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

    def _beside(self, vocabulary: Vocabulary, kinds: Collection[str]) -> list[str]:
        """Names and phrases of sources of some kinds that the dictionary lacks."""
        sources = [source for source in vocabulary.sources.values() if source.kind in kinds]
        wanted = [source.vocabulary & ~np.isin(source.keys, self.keys) for source in sources]
        rows = itertools.chain.from_iterable(map(rows_where, sources, wanted))
        return list(dict.fromkeys(row["name"] for row in rows))

    @functools.cached_property
    def _by_mark(self) -> dict[str, int]:
        """What marks a concept → its group: its synsets, and its letters."""
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
    """What is known of the n concepts of a run; e of them have a definition."""

    groups: Int32[np.ndarray, " n"]  # concepts of one group are synonyms; -1: none known
    kinds: frozenset[str]  # those whose names are encoded with their definitions
    definitions: Mapping[str, str]  # name → definition; none where no kind uses them
    ids: Int32[np.ndarray, " e"]  # ascending
    tokens: Int32[np.ndarray, "e 16"]  # of the name with its definition

    def places(
        self, ids: Int[np.ndarray, " m"]
    ) -> tuple[Int[np.ndarray, " k"], Int[np.ndarray, " k"]]:
        """Which of `ids` have a definition, and their rows of `tokens`."""
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

    counts: Mapping[str, int]  # normalized text → mentions, captions left out
    categories: frozenset[str]  # those that detection sources call their categories

    def chosen(self, *, min_count: int, size: int) -> list[str]:
        """The concepts of a dictionary, the most frequent first.

        All categories, and phrases of at least `min_count` mentions, the most frequent ones, until
        there are `size` concepts.
        """
        ranked = sorted(self.counts, key=lambda name: (-self.counts[name], name))
        phrases = [n for n in ranked if self.counts[n] >= min_count and n not in self.categories]
        room = max(size - len(self.categories), 0)
        kept = self.categories.union(phrases[:room])
        return [name for name in ranked if name in kept]


def count(sources: Iterable[Source]) -> Counts:
    """Reads the names, phrases and their counts of prepared sources."""
    counts: Counter[str] = Counter()
    categories: set[str] = set()
    for source in sources:
        for row in rows_where(source, source.vocabulary):
            counts[row["name"]] += row["count"]
            if source.kind == "detection":
                categories.add(row["name"])
    return Counts(counts, frozenset(categories))


def rows_where(source: Source, wanted: Bool[np.ndarray, " c"]) -> Iterator[dict[str, Any]]:
    """Some rows of a source's concepts.jsonl; the file may be too large to hold all of it."""
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
    """Writes the dictionary of `names`, whole or not at all, and opens it.

    Args:
        directory: where the file goes.
        names: different concepts, normalized.
        counts: mentions of each, as told in the file.
        synsets: normalized name → synset, where one is known to be meant.
        embed: for the nearest concept (`definitions.define`).
        created_from: goes to the first line as it is.
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
    """A number for each name; names that are the same thing, be it through a third, have one.

    The same are two names with a synset in common, or that differ only in how their words are
    joined and in a plural's s.
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
    """Normalized name → synset, from an LVIS annotation file or the list of its categories.

    Names and synonyms, as LVIS spells them and without what it adds in brackets; a bare name that
    categories of several synsets share is left out.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); give LVIS's file") from None
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("synset"), str) for row in rows
    ):
        raise UserError(f'{path}: holds no list of categories with a "synset"; give LVIS\'s file')
    found: dict[str, set[str]] = {}
    for row in rows:
        for spelling in (row.get("name"), *(row.get("synonyms") or ())):
            name = tokenizer_lib.normalize(str(spelling).replace("_", " "))
            for variant in {name, " ".join(re.sub(r"\([^)]*\)", " ", name).split())}:
                found.setdefault(variant, set()).add(row["synset"])
    return {name: synsets.pop() for name, synsets in found.items() if len(synsets) == 1}


def report(dictionary: Dictionary, examples: int = 3) -> str:
    """For people: how many concepts have their definition from where, and some of each."""
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
    "nearest": "as the nearest concept",
    "head": "as their head noun",
    "none": "not defined: bare names",
}


def _example(row: Mapping[str, Any]) -> str:
    text = tokenizer_lib.fitted([row["name"]], [row["definition"]])[0]
    return f"{text}  (like {row['like']})" if row["like"] else text


def _letters(name: str) -> str:
    """A name's letters and digits, without a plural's s; the name itself where it has none."""
    letters = re.sub(r"[\W_]+", "", name)
    return letters[:-1] if letters.endswith("s") and not letters.endswith("ss") else letters or name


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    """A concept's line; somebody may have edited it."""
    row = _parse(path, number, line, _FIELDS)
    row["name"] = tokenizer_lib.normalize(row["name"])
    for field, holds in (
        ("name", row["name"]),
        ("synsets", all(isinstance(synset, str) for synset in row["synsets"])),
        ("group", 0 <= row["group"] < 2**31),
    ):
        if not holds:
            raise UserError(f"{path}, line {number}: no valid {field!r}; {_remedy(path.parent)}")
    return row


def _parse(path: Path, number: int, line: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the file, whose `fields` are of these types."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    wrong = [
        field
        for field, kind in fields.items()
        if not isinstance(row, dict) or field not in row or not isinstance(row[field], kind)
    ]
    if wrong:
        raise UserError(
            f"{path}, line {number}: "
            f"{'no JSON object' if not isinstance(row, dict) else f'no valid {wrong[0]!r}'}; "
            f"{_remedy(path.parent)}"
        )
    return row


def _remedy(directory: Path) -> str:
    return f"make it with `python scripts/prepare_concepts.py --from=DATA --to={directory}`"
