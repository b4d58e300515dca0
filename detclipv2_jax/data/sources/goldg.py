"""MDETR's JSON (GoldG: Flickr30k Entities, GQA): boxes tied to spans of their image's caption."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detclipv2_jax.data.examples import (
    Archive,
    Drops,
    ImageFile,
    ImageFolder,
    RawBox,
    RawExample,
    load_json,
    parse_xywh,
)
from detclipv2_jax.data.phrases import spanned_phrase
from detclipv2_jax.data.sources.coco import image_entries, missing_image


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open an MDETR file: grounding examples, one a caption, as the file has its image entries.

    A box is named by the text under its `tokens_positive`, its spans joined and cleaned. What the
    published files are known for is taken as it comes: sizes as strings, several spans a phrase,
    empty `categories`. `UserError` where the file is no such JSON; broken entries are dropped and
    counted.
    """
    path = Path(path)
    document = load_json(path, ("images", "annotations"))
    drops = Drops()
    entries = image_entries(path, document["images"], drops)
    boxes = _boxes_by_image(path, document["annotations"], entries, drops)
    return Archive(
        path=path,
        kind="grounding",
        total=len(entries),
        examples=_examples(path, entries, boxes, images, drops),
        drops=drops,
    )


def _boxes_by_image(
    path: Path, annotations: list, entries: dict, drops: Drops
) -> dict[Any, list[RawBox]]:
    boxes: dict[Any, list[RawBox]] = {}
    for number, annotation in enumerate(annotations):
        try:
            origin = f"annotation {annotation.get('id', f'number {number}')}"
            image_id, spans = annotation["image_id"], annotation["tokens_positive"]
            if image_id not in entries:
                drops.drop(
                    "boxes: unknown image",
                    f'{path}: {origin}: "image_id" {image_id} is not among "images"',
                )
                continue
            caption = entries[image_id]["caption"]
            if not isinstance(caption, str):
                drops.drop(
                    "boxes: no caption", f"{path}: {origin}: image {image_id} has no caption"
                )
                continue
            xywh = parse_xywh(annotation["bbox"])
            phrase = spanned_phrase(caption, spans)
            if not phrase:
                why = f'{path}: {origin}: "tokens_positive" {spans} marks no noun in "{caption}"'
                drops.drop("boxes: no phrase", why)
                continue
            boxes.setdefault(image_id, []).append(RawBox(xywh, phrase, origin))
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
