"""Images with captions, no boxes: JSON lines, TSV (Conceptual Captions), COCO's captions JSON.

An image with several captions gives several examples: the paper's image-text data are pairs.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detclipv2_jax.data.examples import (
    Archive,
    Drops,
    ImageFile,
    ImageFolder,
    RawExample,
    load_json,
)
from detclipv2_jax.data.sources.coco import image_entries, missing_image
from detclipv2_jax.errors import UserError

# Where a JSON line may name its image and its captions; the first field that is there counts.
IMAGE_FIELDS = ("image", "file_name", "path")
CAPTION_FIELDS = ("caption", "captions", "text")


def read_json_lines(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of lines {"image": FILE, "caption": TEXT} or {…, "captions": [TEXT, …]}.

    The fields may also be called as IMAGE_FIELDS and CAPTION_FIELDS say. Broken lines are dropped
    and counted; `UserError` where the file cannot be read.
    """
    return _read_lines(Path(path), images, _parse_json)


def read_tsv(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of "caption<TAB>image file" lines, Conceptual Captions' order."""
    return _read_lines(Path(path), images, _parse_tsv)


def read_coco_captions(path: str | Path, images: ImageFolder) -> Archive:
    """Open COCO's `captions` JSON: "annotations" with "image_id" and "caption"."""
    path = Path(path)
    document = load_json(path, ("images", "annotations"))
    drops = Drops()
    entries = image_entries(path, document["images"], drops)
    annotations = document["annotations"]
    return Archive(
        path=path,
        kind="image_text",
        total=len(annotations),
        examples=_from_annotations(path, entries, annotations, images, drops),
        drops=drops,
    )


def _read_lines(
    path: Path, images: ImageFolder, parse: Callable[[str], tuple[str, list]]
) -> Archive:
    drops = Drops()
    return Archive(
        path=path,
        kind="image_text",
        total=_count(path, parse),
        examples=_from_lines(path, parse, images, drops),
        drops=drops,
    )


def _count(path: Path, parse: Callable[[str], tuple[str, list]]) -> int:
    """Captions in a file, about: each line is taken to have as many as the first."""
    try:
        with open(path, "rb") as file:
            first = file.readline()
            lines = (1 if first.strip() else 0) + sum(1 for line in file if line.strip())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    try:
        return lines * len(parse(first.decode("utf-8"))[1])
    except ValueError:
        return lines


def _from_lines(
    path: Path, parse: Callable[[str], tuple[str, list]], images: ImageFolder, drops: Drops
) -> Iterator[RawExample]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            where = f"{path}, line {number}"
            try:
                name, captions = parse(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # of which undecodable text is one
                drops.drop("images: malformed line", f"{where}: {error}")
                continue
            found = images.find(name)
            if found is None:
                drops.drop("images: missing", missing_image(where, name, images))
                continue
            for i, caption in enumerate(captions):
                image_id = name if len(captions) == 1 else f"{name}#{i}"
                yield from _example(found, image_id, None, caption, where, drops)


def _from_annotations(
    path: Path, entries: dict[Any, dict], annotations: list, images: ImageFolder, drops: Drops
) -> Iterator[RawExample]:
    for number, annotation in enumerate(annotations):
        where = f"{path}: annotations[{number}]"
        try:
            image_id, caption = annotation["image_id"], annotation["caption"]
            entry = entries.get(image_id)
        except (KeyError, TypeError) as error:
            problem = f"no field {error}" if isinstance(error, KeyError) else str(error)
            drops.drop("captions: malformed entry", f"{where}: {problem}")
            continue
        if entry is None:
            why = f'{where}: "image_id" {image_id} is not among "images"'
            drops.drop("captions: unknown image", why)
            continue
        found = images.find(entry["file_name"])
        if found is None:
            drops.drop("images: missing", missing_image(where, entry["file_name"], images))
            continue
        full_id = f"{image_id}#{annotation.get('id', number)}"
        yield from _example(found, full_id, entry["size"], caption, where, drops)


def _example(
    found: Path, image_id: str, size: tuple[int, int] | None, caption: Any, where: str, drops: Drops
) -> Iterator[RawExample]:
    if not isinstance(caption, str) or not caption.strip():
        drops.drop("captions: empty", f"{where}: its caption is {caption!r}, not a text")
        return
    image = ImageFile(found)
    yield RawExample(image=image, image_id=image_id, size=size, caption=caption)


def _parse_json(line: str) -> tuple[str, list]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object with an image and a caption")
    image = next((row[field] for field in IMAGE_FIELDS if field in row), None)
    captions = next((row[field] for field in CAPTION_FIELDS if field in row), None)
    if not isinstance(image, str) or not image:
        raise ValueError(f"no field {' or '.join(IMAGE_FIELDS)} that names a file")
    if captions is None:
        raise ValueError(f"no field {' or '.join(CAPTION_FIELDS)}")
    return image, captions if isinstance(captions, list) else [captions]


def _parse_tsv(line: str) -> tuple[str, list]:
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) < 2 or not cells[1].strip():
        raise ValueError("not caption<TAB>image file")
    return cells[1].strip(), [cells[0]]
