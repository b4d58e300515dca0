"""Read COCO's `instances` JSON, which Objects365, LVIS and most labeling tools write too."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_lists
from detclipv2_jax.data.prepare.examples import Archive, Drops, Example, ImageFolder, parse_xywh
from detclipv2_jax.data.prepare.sources.entries import (
    MALFORMED,
    BoxTable,
    ImageEntries,
    ImageEntry,
    add_folders,
    annotation_label,
    check_text,
    describe,
    find_image,
    shorten,
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
    searched for in `images`, then next to the file. Crowd boxes (`iscrowd` 1) are dropped: they are
    not single objects. The lists of federated annotation (LVIS) are kept.

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
    category_names = _read_categories(path, categories, names or {})
    left_out = _leave_out(path, entries, choose, drops) if choose else frozenset()
    boxes = _read_boxes(path, category_names, entries, left_out, drops)
    return Archive(
        path=path,
        kind="detection",
        total=len(entries),
        examples=_examples(
            path, category_names, entries, boxes, add_folders(images, path.parent), drops
        ),
        drops=drops,
        names=tuple(category_names.values()),
        meanings=_read_meanings(categories, category_names),
    )


def _leave_out(path: Path, entries: ImageEntries, choose: Callable, drops: Drops) -> set:
    """Remove the entries that are not chosen, and return their ids."""
    chosen = choose(entries)
    left_out = [image_id for image_id in entries if image_id not in chosen]
    for image_id in left_out:
        del entries[image_id]
        drops.drop("images: not in the subset", f"{path}: image {shorten(image_id)}")
    return set(left_out)


def _read_categories(path: Path, categories: list, names: Mapping[str, str]) -> dict[Any, str]:
    """Return the categories' names by id."""
    found = {}
    for number, category in enumerate(categories):
        where = f"{path}: categories[{number}]"
        if not isinstance(category, dict) or not isinstance(category.get("name"), str):
            raise UserError(f'{where} has no "name" that is a string. Add one.')
        if not isinstance(category.get("id"), int | str):
            raise UserError(f'{where} has no "id" that is a number or string. Add one.')
        if category["id"] in found:
            raise UserError(
                f'{where}: "id" {shorten(category["id"])} is already used. Give each category its '
                "own id."
            )
        try:
            # LVIS has "hot_dog" and "mouse_(computer_equipment)"; the text tower expects words.
            name = check_text(category["name"], "name").replace("_", " ").strip()
        except ValueError as error:
            raise UserError(f"{where}: {error}. Fix the name.") from error
        if not name:
            raise UserError(f'{where} has an empty "name". Add a name.')
        found[category["id"]] = names.get(name.lower(), name)
    return found


def _read_meanings(categories: list, names: Mapping[Any, str]) -> dict[str, Meaning]:
    """Return the meanings that the file gives its categories' names; of equal names the first."""
    found: dict[str, Meaning] = {}
    for category in categories:
        meaning = Meaning.of_category(category)
        if meaning.gloss:
            found.setdefault(normalize(names[category["id"]]), meaning)
    return found


def _read_boxes(
    path: Path, names: dict[Any, str], entries: ImageEntries, left_out: set, drops: Drops
) -> BoxTable:
    boxes = BoxTable()

    def drop(reason: str, why: str) -> None:
        drops.drop(f"boxes: {reason}", f"{path}: {annotation_label(number, place)}: {why}")

    for _, place, entry in read_lists(path, ("annotations",)):
        number = None
        try:
            number, category, image = entry.get("id"), entry["category_id"], entry["image_id"]
            if entry.get("iscrowd"):
                drop("crowd", "a crowd (iscrowd 1)")
            elif category not in names:
                drop(
                    "unknown category", f'"category_id" {shorten(category)} is not in "categories"'
                )
            elif image in entries:
                xywh = parse_xywh(entry["bbox"])
                boxes.add(entries[image].row, xywh, names[category], number, place)
            elif image not in left_out:
                drop("unknown image", f'"image_id" {shorten(image)} is not among "images"')
        except MALFORMED as error:
            drops.drop("boxes: malformed entry", f"{path}: annotations[{place}]: {describe(error)}")
    return boxes


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
                boxes=boxes,
                absent=absent,
                partial=partial,
            )


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
