"""Decide what the "categories" of a COCO-like file mean as names for a model that reads them.

Preparation and evaluation take the same decisions (`left_out`). Nothing here imports TensorFlow.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import (
    Identifier,
    entry_object,
    identifier,
    locate,
    shorten,
    text,
)
from detclipv2_jax.data.prepare.examples import Drops
from detclipv2_jax.text import tokenizer
from detclipv2_jax.text.tokenizer import normalize

#: Names that stand for no kind of object. Label maps fill gaps with them.
_PLACEHOLDERS = {"background", "bg", "n/a", "na", "none", "null", "nil", "undefined", "nan"}
#: Names of Roboflow's root category 0 where no other category refers to it.
_ROOTS = {"object", "objects"}
_NO_WORD = re.compile(r"[\W\d]*|(class|label|category|cls|id|object)[ \-#]*\d+")
_NO_KIND = {"unknown", "unlabeled", "unlabelled", "ignore", "ignored", "void", "misc", "other"}


class Category(NamedTuple):
    """A category as its file has it, with the name in words."""

    id: Identifier
    name: str
    parent: Any = None  # "supercategory"; only a text counts


def read(path: Path, entries: Sequence[Any], names: Mapping[str, str]) -> list[Category]:
    """Return the categories of a file, each id once.

    Args:
        path: the file, for messages.
        entries: its "categories".
        names: replacements for names, by the file's name in lower case.

    Raises:
        UserError: an entry has no id or no name, or an id has two names.
    """
    found: dict[Identifier, Category] = {}
    for number, entry in enumerate(entries):
        where = f"{path}: categories[{number}]"
        category = _read_one(where, entry, names)
        first = found.setdefault(category.id, category)
        if normalize(first.name) != normalize(category.name):
            raise UserError(
                f'{where}: "id" {shorten(category.id)} is already used: it is both '
                f"{shorten(first.name)} and {shorten(category.name)}. Give each category its own "
                "id; if two files were merged, also in their annotations."
            )
    return list(found.values())


def _read_one(where: str, entry: Any, names: Mapping[str, str]) -> Category:
    try:
        category_id = identifier(entry_object(entry), "id")
        # LVIS has "hot_dog" and "mouse_(computer_equipment)"; the text tower expects words.
        name = text(entry, "name").replace("_", " ").strip()
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. Fix the entry.") from error
    if not name:
        raise UserError(f"{where}.name is {shorten(entry['name'])}, which has no word. Add a name.")
    parent = entry.get("supercategory")
    return Category(category_id, names.get(name.lower(), name), parent)


def left_out(
    categories: Sequence[Category], used: Collection[Identifier]
) -> dict[Identifier, tuple[str, str]]:
    """Return the categories that are no names: id -> reason, and in words.

    A category without boxes is a negative of every image. That is wrong for the root that Roboflow
    adds ("animals", of which "cat" and "dog" are kinds), and for placeholders ("background").
    All categories stay if none would be left.

    Args:
        categories: of a file.
        used: ids that boxes have, or that images list.
    """
    plain = {category.id: normalize(category.name) for category in categories}
    parents = {category.id: _parent(category) for category in categories}
    kinds = {parent for key, parent in parents.items() if parent != plain[key]}
    found: dict[Identifier, tuple[str, str]] = {}
    for category in categories:
        name, shown = plain[category.id], shorten(category.name)
        if category.id in used:
            continue
        is_first = str(category.id) == "0" and parents[category.id] in ("", "none")
        if name in kinds:
            why = f"no box is {shown}; it is the supercategory of other categories"
            found[category.id] = "names: root without boxes", why
        elif name in _ROOTS and is_first:
            why = f"no box is {shown}; as Roboflow's category 0, it stands for all objects"
            found[category.id] = "names: root without boxes", why
        elif name.strip() in _PLACEHOLDERS:
            why = f"no box is {shown}, which names no kind of object"
            found[category.id] = "names: placeholder without boxes", why
    return found if len(found) < len(categories) else {}


def _parent(category: Category) -> str:
    """Return a category's "supercategory" as `normalize` gives it, "" without one."""
    parent = category.parent
    return normalize(parent.replace("_", " ")) if isinstance(parent, str) else ""


def merge_spellings(path: Path, categories: Iterable[Category], drops: Drops) -> dict[Any, str]:
    """Return the names by id. Names with one normal form get one spelling, the first; counted."""
    first: dict[str, Category] = {}
    names = {}
    for category in categories:
        same = first.setdefault(normalize(category.name), category)
        names[category.id] = same.name
        if same is not category:
            both = " and ".join(f"{shorten(c.name)} (id {shorten(c.id)})" for c in (same, category))
            why = f"{path}: {both} are one name, {normalize(category.name)!r}"
            drops.change("names: the same as another", why)
    return names


def note_doubtful(path: Path, names: Iterable[str], drops: Drops) -> None:
    """Count the names that are kept, but that a model cannot learn or tell apart."""
    names = list(dict.fromkeys(map(normalize, names)))
    for name in names:
        if _NO_WORD.fullmatch(name) or name in _NO_KIND | _PLACEHOLDERS:
            why = f"{path}: {shorten(name)} says nothing of what the objects are; rename it"
            drops.note("names: no word for an object", why)
    rows = [tuple(row) for row in tokenizer.tokenize(names).tolist()]
    first: dict[Any, str] = {}
    for row, name in zip(rows, names):
        same = first.setdefault(row, name)
        alike = first.setdefault(_alike(name), name)
        if same is not name:
            why = f"{path}: {shorten(same)} and {shorten(name)} have the same tokens"
            drops.note("names: equal for the model", why)
        elif alike is not name:
            why = f"{path}: {shorten(alike)} and {shorten(name)} stay two names"
            drops.note("names: nearly the same as another", why)


def _alike(name: str) -> str:
    """Return a name without punctuation and the plural's "s"."""
    letters = re.sub(r"[\W_]+", "", name)
    return letters.removesuffix("s") if not letters.endswith("ss") else letters
