"""COCO's `instances` JSON, which Objects365, LVIS and most exporters write too: named boxes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_stream import read_lists
from detclipv2_jax.data.prepare.examples import Archive, Drops, ImageFolder, RawExample, parse_xywh
from detclipv2_jax.data.prepare.sources.entries import (
    BROKEN,
    Boxes,
    ImageEntries,
    annotation,
    find,
    problem,
    shortly,
    text,
    widened,
)


def read(
    path: str | Path,
    images: ImageFolder,
    *,
    names: Mapping[str, str] | None = None,
    choose: Callable[[Iterable[Any]], set] | None = None,
) -> Archive:
    """Open an `instances` file: detection examples, one an image, boxless images too.

    The file is read twice, entry by entry: boxes may stand before the images they are of. Images
    are looked for under `images`, then beside the file. Crowd boxes (`iscrowd` 1) are dropped: they
    are no single object.

    Args:
      path: the JSON.
      images: where its images are.
      names: other names for categories, by the file's own in lower case.
      choose: the ids to keep, of all ids of images; the others are dropped and counted.

    Raises:
      UserError: the file is no such JSON; entries that are broken one by one are dropped.
    """
    path, drops = Path(path), Drops()
    entries, categories = ImageEntries(path, drops), []
    for field, number, entry in read_lists(path, ("images", "annotations", "categories")):
        if field == "images":
            entries.read(number, entry)
        elif field == "categories":
            categories.append(entry)
    category_names = _categories(path, categories, names or {})
    left_out = _leave_out(path, entries, choose, drops) if choose else frozenset()
    boxes = _boxes(path, category_names, entries, left_out, drops)
    return Archive(
        path=path,
        kind="detection",
        total=len(entries),
        examples=_examples(path, entries, boxes, widened(images, path.parent), drops),
        drops=drops,
        names=tuple(category_names.values()),
    )


def _leave_out(path: Path, entries: ImageEntries, choose: Callable, drops: Drops) -> set:
    chosen = choose(entries)
    left_out = [image_id for image_id in entries if image_id not in chosen]
    for image_id in left_out:
        del entries[image_id]
        drops.drop("images: not in the subset", f"{path}: image {shortly(image_id)}")
    return set(left_out)


def _categories(path: Path, categories: list, names: Mapping[str, str]) -> dict[Any, str]:
    found = {}
    for number, category in enumerate(categories):
        if not isinstance(category, dict) or not isinstance(category.get("name"), str):
            raise UserError(f'{path}: categories[{number}] has no text "name"; give it one')
        if not isinstance(category.get("id"), int | str):
            raise UserError(f'{path}: categories[{number}] has no "id"; give it one')
        if category["id"] in found:
            raise UserError(
                f'{path}: categories[{number}]: "id" {shortly(category["id"])} is taken already; '
                "give each category its own"
            )
        try:
            # LVIS has "hot_dog" and "mouse_(computer_equipment)": the text tower reads words.
            name = text(category["name"], "name").replace("_", " ").strip()
        except ValueError as error:
            raise UserError(f"{path}: categories[{number}]: {error}; mend it") from error
        if not name:
            raise UserError(f'{path}: categories[{number}] has an empty "name"; give it one')
        found[category["id"]] = names.get(name.lower(), name)
    return found


def _boxes(path: Path, names: dict, entries: ImageEntries, left_out: set, drops: Drops) -> Boxes:
    boxes = Boxes()

    def drop(reason: str, why: str) -> None:
        drops.drop(f"boxes: {reason}", f"{path}: {annotation(number, place)}: {why}")

    for _, place, entry in read_lists(path, ("annotations",)):
        number = None
        try:
            number, category, image = entry.get("id"), entry["category_id"], entry["image_id"]
            if entry.get("iscrowd"):
                drop("crowd", "a crowd (iscrowd 1)")
            elif category not in names:
                drop(
                    "unknown category", f'"category_id" {shortly(category)} is not in "categories"'
                )
            elif image in entries:
                xywh = parse_xywh(entry["bbox"])
                boxes.add(entries[image].row, xywh, names[category], number, place)
            elif image not in left_out:
                drop("unknown image", f'"image_id" {shortly(image)} is not among "images"')
        except BROKEN as error:
            drops.drop("boxes: malformed entry", f"{path}: annotations[{place}]: {problem(error)}")
    return boxes


def _examples(
    path: Path, entries: ImageEntries, boxes: Boxes, images: ImageFolder, drops: Drops
) -> Iterator[RawExample]:
    for image_id, entry, of_it in boxes.by_image(entries):
        image = find(entry, str(path), images, drops)
        if image is not None:
            yield RawExample(image=image, image_id=str(image_id), size=entry.size, boxes=of_it)
