"""COCO's `instances` JSON, which Objects365, LVIS and most exporters write too: named boxes."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from detclipv2_jax.data.examples import (
    Archive,
    Drops,
    ImageFile,
    ImageFolder,
    RawBox,
    RawExample,
    annotated_size,
    load_json,
    parse_xywh,
)
from detclipv2_jax.errors import UserError


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open an `instances` file: detection examples, one an image, boxless images too.

    Crowd boxes (`iscrowd` 1) are dropped: they are no single object. `UserError` where the file
    is no such JSON; entries that are broken one by one are dropped and counted.
    """
    path = Path(path)
    document = load_json(path, ("images", "annotations", "categories"))
    names = _categories(path, document["categories"])
    drops = Drops()
    entries = image_entries(path, document["images"], drops)
    boxes = _boxes_by_image(path, document["annotations"], names, entries, drops)
    return Archive(
        path=path,
        kind="detection",
        total=len(entries),
        examples=_examples(path, entries, boxes, images, drops),
        drops=drops,
        names=tuple(names.values()),
    )


def image_entries(path: Path, images: list, drops: Drops) -> dict[Any, dict[str, Any]]:
    """Image entries by id, in the file's order, those without a usable id, name or size dropped."""
    entries: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(images):
        where = f"{path}: images[{number}]"
        try:
            if entry["id"] in entries:
                drops.drop(
                    "images: id given twice", f'{where}: "id" {entry["id"]} is taken already'
                )
                continue
            entries[entry["id"]] = {
                "file_name": file_name(entry),
                "size": annotated_size(entry),
                "caption": entry.get("caption"),
            }
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
            drops.drop("images: malformed entry", f"{where}: {problem}")
    return entries


def file_name(entry: dict[str, Any]) -> str:
    """Where an image entry says its file is; LVIS says it by the end of `coco_url` alone."""
    if "file_name" not in entry and "coco_url" in entry:
        return str(PurePosixPath(*PurePosixPath(entry["coco_url"]).parts[-2:]))
    if not isinstance(entry["file_name"], str):
        raise ValueError(f'"file_name" is {entry["file_name"]!r}, not a text')
    return entry["file_name"]


def missing_image(path: Path, example_name: str, images: ImageFolder) -> str:
    """The sentence for an image that is not there."""
    if "://" in example_name:
        return f"{path}: {example_name} is an address, not a file; download it and name the file"
    return f"{path}: no file {example_name} under {images}"


def _categories(path: Path, categories: list) -> dict[Any, str]:
    names = {}
    for number, category in enumerate(categories):
        if not isinstance(category, dict) or not isinstance(category.get("name"), str):
            raise UserError(f'{path}: categories[{number}] has no text "name"; give it one')
        if not isinstance(category.get("id"), int | str):
            raise UserError(f'{path}: categories[{number}] has no "id"; give it one')
        if category["id"] in names:
            raise UserError(
                f'{path}: categories[{number}]: "id" {category["id"]} is taken already; '
                "give each category its own"
            )
        # LVIS writes "hot_dog" and "mouse_(computer_equipment)": the text tower reads words.
        names[category["id"]] = category["name"].replace("_", " ").strip()
        if not names[category["id"]]:
            raise UserError(f'{path}: categories[{number}] has an empty "name"; give it one')
    return names


def _boxes_by_image(
    path: Path, annotations: list, names: dict, entries: dict, drops: Drops
) -> dict[Any, list[RawBox]]:
    boxes: dict[Any, list[RawBox]] = {}
    for number, annotation in enumerate(annotations):
        try:
            origin = f"annotation {annotation.get('id', f'number {number}')}"
            if annotation.get("iscrowd"):
                drops.drop("boxes: crowd", f"{path}: {origin}: a crowd (iscrowd 1)")
            elif annotation["category_id"] not in names:
                category = annotation["category_id"]
                drops.drop(
                    "boxes: unknown category",
                    f'{path}: {origin}: "category_id" {category} is not among "categories"',
                )
            elif annotation["image_id"] not in entries:
                image = annotation["image_id"]
                drops.drop(
                    "boxes: unknown image",
                    f'{path}: {origin}: "image_id" {image} is not among "images"',
                )
            else:
                xywh = parse_xywh(annotation["bbox"])
                box = RawBox(xywh, names[annotation["category_id"]], origin)
                boxes.setdefault(annotation["image_id"], []).append(box)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
            drops.drop("boxes: malformed entry", f"{path}: annotations[{number}]: {problem}")
    return boxes


def _examples(
    path: Path, entries: dict, boxes: dict, images: ImageFolder, drops: Drops
) -> Iterator[RawExample]:
    for image_id, entry in entries.items():
        found = images.find(entry["file_name"])
        if found is None:
            drops.drop("images: missing", missing_image(path, entry["file_name"], images))
            continue
        yield RawExample(
            image=ImageFile(found),
            image_id=str(image_id),
            size=entry["size"],
            boxes=tuple(boxes.get(image_id, ())),
        )
