"""Read images with captions: JSON lines, TSV (Conceptual Captions), COCO's captions JSON.

An image with several captions gives several examples: the paper's image-text data are pairs.
The output of img2dataset is read by img2dataset.py.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detclipv2_jax.common.json_fields import as_identifier, entry_object, file_name, identifier
from detclipv2_jax.common.json_file import parse_line, read_lists
from detclipv2_jax.common.printable import valid_text
from detclipv2_jax.common.text_file import open_bytes, read_lines
from detclipv2_jax.data.prepare.examples import Archive, Drops, Example, ImageFile, ImageFolder
from detclipv2_jax.data.prepare.sources.entries import (
    MALFORMED,
    ImageEntries,
    describe,
    explain,
    find_file,
    find_image,
    near,
)
from detclipv2_jax.data.prepare.sources.img2dataset import check_caption

# Fields of a JSON line that may hold the image and the captions; the first one present is used.
IMAGE_FIELDS = ("image", "file_name", "path")
CAPTION_FIELDS = ("caption", "captions", "text")
_SUFFIX = re.compile(r"\.\w{3,4}$")  # of a text that may be the name of a file


def read_json_lines(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of lines {"image": FILE, "caption": TEXT} or {…, "captions": [TEXT, …]}.

    IMAGE_FIELDS and CAPTION_FIELDS list other accepted field names. Malformed lines are dropped and
    counted.

    Raises:
        UserError: the file cannot be read.
    """
    return _read_lines(Path(path), images, _parse_json)


def read_tsv(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of "caption<TAB>image file" lines, the order of Conceptual Captions."""
    return _read_lines(Path(path), images, _parse_tsv)


def read_coco_captions(path: str | Path, images: ImageFolder) -> Archive:
    """Open COCO's `captions` JSON: "annotations" with "image_id" and "caption"."""
    path, drops = Path(path), Drops()
    entries, total = ImageEntries(path, drops), 0
    for field, number, entry in read_lists(path, ("images", "annotations")):
        if field == "images":
            entries.add(number, entry)
        else:
            total += 1
    return Archive(
        path=path,
        kind="image_text",
        total=total,
        examples=_from_annotations(path, entries, near(path, entries, images), drops),
        drops=drops,
    )


def _read_lines(
    path: Path, images: ImageFolder, parse: Callable[[str], tuple[str, list]]
) -> Archive:
    drops, images = Drops(), images.also(path.parent)
    images.expect(lambda: _file_names(path, parse))
    return Archive(
        path=path,
        kind="image_text",
        total=_estimate_captions(path, parse),
        examples=_from_lines(path, parse, images, drops),
        drops=drops,
    )


def _estimate_captions(path: Path, parse: Callable[[str], tuple[str, list]]) -> int:
    """Estimate the number of captions in a file: assume as many per line as in the first line."""
    with open_bytes(path) as file:
        lines = sum(1 for line in file if line.strip(b" \t\r\n\0"))
    try:
        _, first = next(iter(read_lines(path)), (0, ""))
        return lines * len(parse(first)[1]) if isinstance(first, str) else lines
    except MALFORMED:
        return lines


def _from_lines(
    path: Path, parse: Callable[[str], tuple[str, list]], images: ImageFolder, drops: Drops
) -> Iterator[Example]:
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        try:
            if isinstance(line, ValueError):
                raise line
            name, captions = parse(line)
        except MALFORMED as error:
            drops.drop("images: malformed line", f"{where}: {describe(error)}")
            continue
        if _is_swapped(name, captions, images):
            why = "the image file stands where the caption belongs: caption<TAB>image file"
            drops.drop("images: malformed line", f"{where}: {why}")
            continue
        image = find_file((name,), where, images, drops)
        if image is None:
            continue
        for i, caption in enumerate(captions):
            image_id = valid_text(name if len(captions) == 1 else f"{name}#{i}")
            yield from _example(image, image_id, None, caption, where, drops)


def _is_swapped(name: str, captions: list, images: ImageFolder) -> bool:
    """Return whether the caption of a line is a file and its file is none."""
    caption = captions[0].strip() if len(captions) == 1 and isinstance(captions[0], str) else ""
    if not _SUFFIX.search(caption) or images.find(name).path is not None:
        return False
    return images.find(caption).path is not None


def _file_names(path: Path, parse: Callable[[str], tuple[str, list]]) -> Iterator[tuple[str]]:
    """Yield the file name of each line that has one."""
    for _, line in read_lines(path):
        if isinstance(line, str):
            with contextlib.suppress(*MALFORMED):
                yield (parse(line)[0],)


def _from_annotations(
    path: Path, entries: ImageEntries, images: ImageFolder, drops: Drops
) -> Iterator[Example]:
    for _, place, annotation in read_lists(path, ("annotations",)):
        where = f"{path}: annotations[{place}]"
        try:
            image_id = identifier(entry_object(annotation), "image_id")
            entry, caption = entries.get(image_id), annotation["caption"]
            number = as_identifier(annotation.get("id"))
            full_id = f"{image_id}#{place if number is None else number}"
        except MALFORMED as error:
            drops.drop("captions: malformed entry", explain(where, error))
            continue
        if entry is None:
            reason, why = entries.why_missing(image_id)
            drops.drop(f"captions: {reason}", f"{where}: {why}")
            continue
        image = find_image(entry, where, images, drops)
        if image is not None:
            yield from _example(image, full_id, entry.size, caption, where, drops)


def _example(
    image: ImageFile,
    image_id: str,
    size: tuple[int, int] | None,
    caption: Any,
    where: str,
    drops: Drops,
) -> Iterator[Example]:
    """Yield an example, or nothing (counted) if the caption is not usable."""
    try:
        caption = check_caption(caption)
    except ValueError as error:
        drops.drop("captions: empty", f"{where}: {error}")
        return
    yield Example(image=image, image_id=image_id, size=size, caption=caption)


def _parse_json(line: str) -> tuple[str, list]:
    row = entry_object(parse_line(line))
    image = next((row[field] for field in IMAGE_FIELDS if field in row), None)
    captions = next((row[field] for field in CAPTION_FIELDS if field in row), None)
    if not isinstance(image, str) or not image:
        raise ValueError(f"no field {' or '.join(IMAGE_FIELDS)} that names a file")
    if captions is None:
        raise ValueError(f"no field {' or '.join(CAPTION_FIELDS)}")
    image = file_name({"image": image}, "image")
    return image, captions if isinstance(captions, list) else [captions]


def _parse_tsv(line: str) -> tuple[str, list]:
    cells = line.rstrip("\r\n").split("\t")
    if len(cells) < 2 or not cells[1].strip():
        raise ValueError("not caption<TAB>image file")
    return cells[1].strip(), [cells[0]]
