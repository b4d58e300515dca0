"""Read COCO's `instances` JSON, which Objects365, LVIS and most labeling tools write too."""

import dataclasses
import os.path
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.common import json_fields
from detclipv2_jax.common.file_names import base_name
from detclipv2_jax.common.json_fields import shorten
from detclipv2_jax.common.json_file import read_lists
from detclipv2_jax.data.prepare.examples import Archive, Box, Drops, Example, ImageFolder
from detclipv2_jax.data.prepare.sources import categories as categories_lib
from detclipv2_jax.data.prepare.sources.entries import (
    MALFORMED,
    BoxTable,
    ImageEntries,
    ImageEntry,
    annotation_label,
    explain,
    find_image,
    near,
)
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.tokenizer import normalize


def read(
    path: str | Path,
    images: ImageFolder,
    *,
    names: Mapping[str, str] | None = None,
    choose: Callable[[Iterable[Any]], set] | None = None,
) -> Archive:
    """Open an `instances` file: one detection example per image, also for images without boxes.

    The file is read twice, entry by entry, because boxes may come before their images. Images are
    searched for in `images` and next to the file (Roboflow: next to the file first). Crowd boxes
    (`iscrowd` 1) are dropped: they are not single objects. The lists of federated annotation (LVIS)
    are kept.

    A picture that several entries name is one example with the boxes of all of them; a box that
    occurs twice is taken once. categories.py says which categories are names.

    Args:
      path: the JSON file.
      images: where its images are.
      names: replacements for category names, by the file's name in lower case.
      choose: returns the image ids to keep, of all ids; the others are dropped and counted.

    Raises:
      UserError: the file is not such JSON. Single malformed entries are dropped instead.
    """
    path, drops = Path(path), Drops()
    entries, categories = ImageEntries(path, drops), []
    for field, number, entry in read_lists(path, ("images", "annotations", "categories")):
        if field == "images":
            entries.add(number, entry)
        elif field == "categories":
            categories.append(entry)
    found = categories_lib.read(path, categories, names or {})
    names = categories_lib.merge_spellings(path, found, drops)
    left_out = _leave_out(path, entries, choose, drops) if choose else frozenset()
    boxes, boxed = _read_boxes(path, names, entries, left_out, drops)
    if boxes.seem_corners(entries):
        why = "most boxes leave their images, all would fit as [x_min, y_min, x_max, y_max]"
        drops.note("boxes: perhaps corners", f"{path}: {why}; bbox is [x, y, width, height]")
    no_names = categories_lib.left_out(found, boxed | _listed(entries))
    for reason, why in no_names.values():
        drops.drop(reason, f"{path}: {why}")
    kept = [names[category.id] for category in found if category.id not in no_names]
    categories_lib.note_doubtful(path, kept, drops)
    images = near(path, entries, images)
    boxes.move(_merge_entries(path, entries, images, drops))
    return Archive(
        path=path,
        kind="detection",
        total=len(entries),
        examples=_examples(path, names, entries, boxes, images, drops),
        drops=drops,
        names=tuple(kept),
        meanings=_read_meanings(categories, names),
    )


def _listed(entries: ImageEntries) -> set:
    """Return the category ids in the lists of federated annotation."""
    lists = (ids for entry in entries.values() for ids in (entry.absent, entry.partial) if ids)
    return set().union(*lists)


def _merge_entries(
    path: Path, entries: ImageEntries, images: ImageFolder, drops: Drops
) -> dict[int, int]:
    """Remove the entries whose file an earlier entry has, and return their rows and its row.

    Only entries whose files have the same name are compared, because looking for files takes time.
    Entries of different sizes stay apart: at least one of them does not fit the file.
    """
    base_names = Counter(base_name(entry.file_names[0]) for entry in entries.values())
    if len(base_names) == len(entries):
        return {}
    first: dict[str, Any] = {}
    rows = {}
    for image_id, entry in list(entries.items()):
        if base_names[base_name(entry.file_names[0])] == 1:
            continue
        file = find_image(entry, str(path), images, Drops())
        if file is None:
            continue
        other_id = first.setdefault(os.path.realpath(file.path), image_id)
        other = entries[other_id]
        if other is entry or (other.size and entry.size and other.size != entry.size):
            continue
        why = f"{path}: image {shorten(image_id)} is the file of image {shorten(other_id)}: {file}"
        if (other.absent, other.partial) == (entry.absent, entry.partial):
            rows[entry.row] = other.row
            entries[other_id] = dataclasses.replace(other, size=other.size or entry.size)
            why += "; it is one image with the boxes of both"
        del entries[image_id]
        drops.drop("images: the same picture came before", why)
    return rows


def _leave_out(path: Path, entries: ImageEntries, choose: Callable, drops: Drops) -> set:
    """Remove the entries that are not chosen, and return their ids."""
    chosen = choose(entries)
    left_out = [image_id for image_id in entries if image_id not in chosen]
    for image_id in left_out:
        del entries[image_id]
        drops.drop("images: not in the subset", f"{path}: image {shorten(image_id)}")
    return set(left_out)


def _read_meanings(categories: list, names: Mapping[Any, str]) -> dict[str, Meaning]:
    """Return the meanings that the file gives its categories' names; of equal names the first."""
    found: dict[str, Meaning] = {}
    for category in categories:
        meaning = Meaning.of_category(category)
        if meaning.gloss:
            found.setdefault(normalize(names[json_fields.identifier(category, "id")]), meaning)
    return found


def _read_boxes(
    path: Path, names: dict[Any, str], entries: ImageEntries, left_out: set, drops: Drops
) -> tuple[BoxTable, set]:
    """Return the usable boxes, and the ids of the categories that any box has."""
    boxes, boxed = BoxTable(), set()

    def drop(reason: str, why: str) -> None:
        drops.drop(f"boxes: {reason}", f"{path}: {annotation_label(number, place)}: {why}")

    for _, place, entry in read_lists(path, ("annotations",)):
        number = None
        try:
            number = json_fields.entry_object(entry).get("id")
            category = json_fields.identifier(entry, "category_id")
            image = json_fields.identifier(entry, "image_id")
            boxed.add(category)
            if json_fields.flag(entry, "iscrowd"):
                drop("crowd", f"a crowd (iscrowd {shorten(entry['iscrowd'])})")
            elif category not in names:
                drop(
                    "unknown category", f'"category_id" {shorten(category)} is not in "categories"'
                )
            elif image in entries:
                xywh = json_fields.box(entry, finite=False)
                boxes.add(entries[image].row, xywh, names[category], number, place)
                if degrees := json_fields.rotation(entry):
                    why = f"turned by {degrees:g} degrees (attributes.rotation)"
                    label = annotation_label(number, place)
                    drops.change(
                        "boxes: upright around a turned box",
                        f"{path}: {label}: {why}; the record has the upright box around it",
                    )
            elif image not in left_out:
                drop(*entries.why_missing(image))
        except MALFORMED as error:
            drops.drop("boxes: malformed entry", explain(f"{path}: annotations[{place}]", error))
    return boxes, boxed


def _examples(
    path: Path,
    names: Mapping[Any, str],
    entries: ImageEntries,
    table: BoxTable,
    images: ImageFolder,
    drops: Drops,
) -> Iterator[Example]:
    for image_id, entry, boxes in table.by_image(entries):
        image = find_image(entry, str(path), images, drops)
        if image is not None:
            absent, partial = _lists(path, names, image_id, entry, drops)
            yield Example(
                image=image,
                image_id=str(image_id),
                size=entry.size,
                boxes=_once(boxes, f"{image} (image {image_id})", drops),
                absent=absent,
                partial=partial,
            )


def _once(boxes: tuple[Box, ...], where: str, drops: Drops) -> tuple[Box, ...]:
    """Return the boxes without those that equal an earlier one, with the same name."""
    kept = {}
    for box in boxes:
        same = kept.setdefault((box.name, box.xywh), box)
        if same is not box:
            why = f"{where}, {box.origin}: the same as {same.origin}"
            drops.drop("boxes: given twice", why)
    return tuple(kept.values())


def _lists(
    path: Path, names: Mapping[Any, str], image_id: Any, entry: ImageEntry, drops: Drops
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the names that an image is listed to lack, and those without a box for each object."""
    if entry.absent is None and entry.partial is None:
        return None, ()
    found = []
    for ids in (entry.absent or (), entry.partial or ()):
        for unknown in (one for one in ids if one not in names):
            why = f"{path}: image {shorten(image_id)}: category {shorten(unknown)}"
            drops.change("images: unknown category in a list", why)
        found.append(tuple(names[one] for one in ids if one in names))
    return found[0], found[1]
