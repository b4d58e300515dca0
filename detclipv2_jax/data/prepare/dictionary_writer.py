"""Making the concept dictionary of prepared sources (its format: data/dictionary.py)."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common import digests
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_json
from detclipv2_jax.data.dictionary import FILE, FORMAT, Dictionary, letters
from detclipv2_jax.data.index import Source
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.definitions import (
    Definition,
    Embed,
    Knowledge,
    define,
    origins,
    synsets_of,
)


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often the names and phrases of some sources occur."""

    counts: Mapping[str, int]  # normalized text → mentions; no captions
    categories: frozenset[str]  # the category names of detection sources
    # Normalized name → what its source says that it means; of two meanings the first source's.
    own: Mapping[str, Meaning] = dataclasses.field(default_factory=dict)

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
    own: dict[str, Meaning] = {}
    for source in sources:
        for row in source.read_concepts(source.vocabulary):
            counts[row["name"]] += row["count"]
            if source.kind == "detection":
                categories.add(row["name"])
            if (meaning := Meaning.of_category(row)).gloss:
                own.setdefault(row["name"], meaning)
    return Counts(counts, frozenset(categories), own)


def build(
    directory: str | Path,
    names: Sequence[str],
    counts: Mapping[str, int],
    known: Knowledge = Knowledge(),  # noqa: B008 - frozen
    *,
    embed: Embed | None = None,
    created_from: Mapping[str, Any] | None = None,
) -> Dictionary:
    """Write the dictionary of `names` atomically, and open it.

    Args:
        directory: of the file.
        names: different concepts, normalized.
        counts: name → mentions.
        known: what is known of the names' meanings.
        embed: embeds texts to choose among a name's senses and to find the nearest concept
            (`definitions.define`).
        created_from: written to the first line.

    Raises:
        UserError: the file cannot be written.
    """
    found = define(names, known, embed=embed, choose=embed)
    meanings = [_marks(name, definition, known) for name, definition in zip(names, found)]
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
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = lines.encode("utf-8", "replace")
    info = {"format": FORMAT, "concepts": len(rows), "created_from": dict(created_from or {})}
    info["digest"] = digests.of_bytes(content)
    with replacing(Path(directory) / FILE) as temporary:
        temporary.write_bytes(json.dumps(info).encode() + b"\n" + content)
    return Dictionary.open(directory)


def _marks(name: str, definition: Definition, known: Knowledge) -> list[str]:
    """Return the synsets that a name is a synonym by: the chosen one first."""
    chosen = [definition.synset] if definition.synset else []
    return list(dict.fromkeys(chosen + synsets_of(name, known)))


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
        for mark in (letters(name), *synsets[i]):
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
    content = read_json(path)
    rows = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("synset"), str) for row in rows
    ):
        raise UserError(f'{path}: has no list of categories with a "synset". Give LVIS\'s file.')
    found: dict[str, set[str]] = {}
    for row in rows:
        for spelling in (row.get("name"), *(row.get("synonyms") or ())):
            name = tokenizer_lib.normalize(str(spelling).replace("_", " "))
            for variant in {name, " ".join(re.sub(r"\([^)]*\)", " ", name).split())}:
                found.setdefault(variant, set()).add(row["synset"])
    return {name: synsets.pop() for name, synsets in found.items() if len(synsets) == 1}


_TITLES = {
    "own": "defined by their dataset",
    "corrected": "by your table",
    "checked": "by a hand-checked sense",
    "synset": "by a given synset",
    "wordnet": "by WordNet",
    "nearest": "like the nearest concept",
    "head": "like their head noun",
    "none": "not defined: bare names",
}


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


def _example(row: Mapping[str, Any]) -> str:
    text = tokenizer_lib.fitted([row["name"]], [row["definition"]])[0]
    return f"{text}  (like {row['like']})" if row["like"] else text
