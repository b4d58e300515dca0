"""What the COCO-like files share: image entries by id, and boxes by image in little memory."""

import dataclasses
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.prepare.examples import (
    Drops,
    ImageFile,
    ImageFolder,
    RawBox,
    annotated_size,
)

# What looking into a broken entry may raise: a field that is missing, of another type, too large,
# nested too deep.
BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageEntry:
    """One entry of "images", as far as it is needed."""

    row: int  # its place among the entries
    file_names: tuple[str, ...]  # where its file may be, in the order to look
    size: tuple[int, int] | None  # (height, width), where the file tells
    caption: str | None
    collection: str | None  # MDETR's files: which archive the picture is of


def problem(error: Exception) -> str:
    """One of BROKEN in words."""
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def text(value: Any, field: str) -> str:
    """`value` if it is a text that can be written; else `ValueError`."""
    if not isinstance(value, str):
        raise ValueError(f'"{field}" is {shortly(value)}, not a text')
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as "\\ud800" gives
        raise ValueError(f'"{field}" is {shortly(value)}, not valid Unicode') from error
    return value


def shortly(value: Any) -> str:
    """A value for a message."""
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


class ImageEntries(dict[Any, ImageEntry]):
    """Image entries by id, in the file's order; those without a usable id, name or size dropped."""

    def __init__(self, path: Path, drops: Drops):
        super().__init__()
        self._path, self._drops = path, drops

    def read(self, number: int, entry: Any) -> None:
        """Take in entry `number` of the file, or drop and count it."""
        where = f"{self._path}: images[{number}]"
        try:
            if entry["id"] in self:
                told = f'{where}: "id" {shortly(entry["id"])} is taken already'
                self._drops.drop("images: id given twice", told)
                return
            text(str(entry["id"]), "id")
            caption = entry.get("caption")
            self[entry["id"]] = ImageEntry(
                row=len(self),
                file_names=file_names(entry),
                size=annotated_size(entry),
                caption=None if caption is None else text(caption, "caption"),
                collection=_collection(entry),
            )
        except BROKEN as error:
            self._drops.drop("images: malformed entry", f"{where}: {problem(error)}")


def _collection(entry: dict[str, Any]) -> str | None:
    told = [entry.get(field) for field in ("data_source", "dataset_name")]
    return next((name for name in told if isinstance(name, str)), None)


def file_names(entry: dict[str, Any]) -> tuple[str, ...]:
    """Where an image entry says its file is.

    COCO names "000000391895.jpg" and by its `coco_url` tells the folder too; LVIS has that alone.
    """
    names, address = [], entry.get("coco_url")
    if "file_name" in entry or not address:
        names.append(text(entry["file_name"], "file_name"))
    if address:
        names.append("/".join(text(address, "coco_url").split("/")[-2:]))
    return tuple(dict.fromkeys(names))


def widened(images: ImageFolder, *folders: str) -> ImageFolder:
    """The same roots, and behind them these folders of theirs."""
    return ImageFolder(*images.roots, *(root / name for root in images.roots for name in folders))


def find(entry: ImageEntry, where: str, images: ImageFolder, drops: Drops) -> ImageFile | None:
    """The file of an image, or None (counted)."""
    for name in entry.file_names:
        path = images.find(name)
        if path is not None:
            return ImageFile(path)
    drops.drop("images: missing", missing_image(where, entry.file_names[0], images))
    return None


def missing_image(where: str, name: str, images: ImageFolder) -> str:
    """The sentence for an image that is not there."""
    if "://" in name:
        return f"{where}: {name} is an address, not a file; download it and name the file"
    shown = shortly(name).strip("'")
    return f"{where}: no file {shown} under {images}"


class Boxes:
    """The boxes of many images, 48 bytes each: Objects365 has 25 million, 700 bytes in its JSON."""

    def __init__(self):
        self._rows, self._names, self._numbers = array("i"), array("i"), array("q")
        self._xywh = array("d")
        self._texts: dict[str, int] = {}

    def add(self, row: int, xywh: Sequence[float], name: str, number: Any, place: int) -> None:
        """A box of the image entry `row`; `number` is its "id", `place` where it is in the list."""
        told = isinstance(number, int) and 0 <= number < 1 << 62
        self._numbers.append(number if told else -1 - place)
        self._rows.append(row)
        self._names.append(self._texts.setdefault(name, len(self._texts)))
        self._xywh.extend(xywh)

    def by_image(self, entries: "ImageEntries") -> Iterator[tuple[Any, ImageEntry, tuple]]:
        """(id, entry, its boxes) of each image entry, boxless ones too, in the file's order."""
        rows, wanted = np.frombuffer(self._rows, np.int32), [e.row for e in entries.values()]
        order = np.argsort(rows, kind="stable")
        starts, ends = (
            np.searchsorted(rows, wanted, side, sorter=order).tolist() for side in ("left", "right")
        )
        xywh = np.frombuffer(self._xywh, np.float64).reshape(-1, 4)
        names = list(self._texts)
        for (image_id, entry), start, end in zip(entries.items(), starts, ends):
            boxes = []
            for i in order[start:end].tolist():
                number = self._numbers[i]
                origin = annotation(number if number >= 0 else None, -1 - number)
                boxes.append(RawBox(tuple(xywh[i].tolist()), names[self._names[i]], origin))
            yield image_id, entry, tuple(boxes)


def annotation(number: Any, place: int) -> str:
    """How messages call a box: by its "id" or, where it has none, by its place in the list."""
    return f"annotation number {place}" if number is None else f"annotation {shortly(number)}"
