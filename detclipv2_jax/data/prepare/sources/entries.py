"""Shared by the readers of COCO-like files: image entries by id, and boxes stored compactly."""

import dataclasses
import posixpath
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from detclipv2_jax.common.json_fields import (
    FieldError,
    Identifier,
    entry_object,
    file_name,
    identifier,
    identifiers,
    locate,
    optional_text,
    shorten,
    similar_identifier,
    size,
)
from detclipv2_jax.data.prepare.examples import Box, Drops, ImageFile, ImageFolder

ROBOFLOW_FILE = "_annotations.coco.json"
_BOXES_PER_CHECK = 1 << 16  # in `seem_corners`
# What a malformed entry may raise while it is read: a field is missing, of another type, too large,
# or nested too deeply.
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@dataclasses.dataclass(frozen=True, slots=True)
class ImageEntry:
    """The fields of one entry of "images" that are needed."""

    row: int  # position among the valid entries
    file_names: tuple[str, ...]  # where its file may be, in search order
    size: tuple[int, int] | None  # (height, width) in pixels, if the file has it
    caption: str | None
    collection: str | None  # MDETR: the archive that the image comes from
    absent: tuple[Identifier, ...] | None = None  # LVIS: category ids in "neg_category_ids"
    partial: tuple[Identifier, ...] | None = None  # and in "not_exhaustive_category_ids"


class ImageEntries(dict[Identifier, ImageEntry]):
    """Image entries by id (see `json_fields.identifier`), in the order of the file.

    Entries without a valid id, name or size are dropped and counted. Of two entries with one id,
    the first stays if both describe the same picture. Otherwise nobody can tell which of the two
    pictures a box of that id was drawn on: both are dropped, and the id is in `ambiguous`.
    """

    def __init__(self, path: Path, drops: Drops):
        super().__init__()
        self.ambiguous: set[Any] = set()  # ids that were given to several pictures
        self._path, self._drops = path, drops
        self._rows = 0

    def add(self, number: int, entry: Any) -> None:
        """Add entry `number` of the file, or drop and count it."""
        where = f"{self._path}: images[{number}]"
        try:
            image_id = identifier(entry_object(entry), "id")
            new = ImageEntry(
                row=self._rows,
                file_names=file_names(entry),
                size=size(entry),
                caption=optional_text(entry, "caption"),
                collection=_collection(entry),
                absent=identifiers(entry, "neg_category_ids"),
                partial=identifiers(entry, "not_exhaustive_category_ids"),
            )
            if image_id in self or image_id in self.ambiguous:
                self._add_again(image_id, new, where)
            else:
                self[image_id] = new
                self._rows += 1
        except MALFORMED as error:
            self._drops.drop("images: malformed entry", explain(where, error))

    def _add_again(self, image_id: Identifier, new: ImageEntry, where: str) -> None:
        """Count a further entry of an id; drop the first one too if it is another picture's."""
        first, name = self.get(image_id), shorten(new.file_names[0])
        if first is not None and _same_picture(first, new):
            why = f'{where}: "id" {shorten(image_id)} came before, for the same file {name}'
            self._drops.drop("images: entry given twice", why)
            return
        if first is not None:
            other = shorten(first.file_names[0])
            why = f'{where}: "id" {shorten(image_id)} is that of {name} and of {other}'
            self._drops.drop("images: one id for two files", why)  # for the first entry
            self.ambiguous.add(image_id)
            del self[image_id]
        why = f'{where}: "id" {shorten(image_id)} of {name} is that of another file too'
        self._drops.drop("images: one id for two files", why)

    def why_missing(self, image_id: Identifier) -> tuple[str, str]:
        """Return why no entry has the "image_id" of an annotation: the reason, and in words."""
        if image_id in self.ambiguous:
            why = f'"image_id" {shorten(image_id)} is the id of two files'
            return "image id of two files", why
        hint = similar_identifier(image_id, self)
        return "unknown image", f'"image_id" {shorten(image_id)} is not among "images"{hint}'


def _same_picture(first: ImageEntry, second: ImageEntry) -> bool:
    """Return whether two entries name the same file and have the same caption."""
    names = ([plain_name(name) for name in entry.file_names] for entry in (first, second))
    return all(a == b for a, b in zip(*names)) and first.caption == second.caption


def plain_name(name: str) -> str:
    """Return a file name as written in annotations, with `/` and without `.` and `..` parts."""
    return posixpath.normpath(name.replace("\\", "/"))


def _collection(entry: dict[str, Any]) -> str | None:
    fields = [entry.get(field) for field in ("data_source", "dataset_name")]
    return next((name for name in fields if isinstance(name, str)), None)


def file_names(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the file names of an image entry.

    COCO has `file_name` "000000391895.jpg" and a `coco_url` with the folder; LVIS has only
    `coco_url`.
    """
    names, url = [], entry.get("coco_url") or None
    if url is None or entry.get("file_name") not in (None, ""):
        names.append(file_name(entry, "file_name"))
    if url is not None:
        names.append("/".join(file_name(entry, "coco_url").split("/")[-2:]))
    return tuple(dict.fromkeys(names))


def near(path: Path, entries: ImageEntries, images: ImageFolder) -> ImageFolder:
    """Return where the images of an annotation file are: `images` and the file's own folder.

    Roboflow puts the images next to the file, so these go before others of the same name.
    """
    own = images.before if path.name == ROBOFLOW_FILE else images.also
    result = own(path.parent)
    result.expect(lambda: (entry.file_names for entry in entries.values()))
    return result


def find_image(
    entry: ImageEntry, where: str, images: ImageFolder, drops: Drops
) -> ImageFile | None:
    """Return the file of an image, or None (counted) if there is none that is certain."""
    return find_file(entry.file_names, where, images, drops)


def find_file(
    names: tuple[str, ...], where: str, images: ImageFolder, drops: Drops
) -> ImageFile | None:
    """Return the file with one of these names, or None (counted) if there is none."""
    found = images.find(*names)
    if found.path is None:
        reason = "ambiguous file name" if found.problem == "ambiguous" else found.problem
        drops.drop(f"images: {reason}", f"{where}: {found.why}")
        drops.missing.append((names, images))
        return None
    if found.spelled:
        drops.change("images: file name spelled differently", f"{where}: {found.spelled}")
    return ImageFile(found.path)


def seem_corners(xywh: Float[np.ndarray, "n 4"], sizes: Float[np.ndarray, "n 2"]) -> bool:
    """Return whether boxes are probably [x_min, y_min, x_max, y_max] where width and height belong.

    That is so if most of them leave their images, but all fit as corners.

    Args:
        xywh: the boxes as annotated, in pixels.
        sizes: (height, width) of the image of each box; 0 where it is not known.
    """
    count = leaving = 0
    for start in range(0, len(xywh), _BOXES_PER_CHECK):  # most files end at the first
        part = slice(start, start + _BOXES_PER_CHECK)
        known = sizes[part].min(axis=1) > 0
        boxes, limits = xywh[part][known], sizes[part][known][:, ::-1] + 1  # a pixel of slack
        if not ((boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits)).all():
            return False
        count += len(boxes)
        leaving += int((boxes[:, :2] + boxes[:, 2:] > limits).any(axis=1).sum())
    return leaving > count / 2


def seem_relative(boxes: Float[np.ndarray, "n 4"]) -> bool:
    """Return whether boxes are probably in parts of their images, from 0 to 1, not in pixels."""
    return len(boxes) > 0 and bool(((boxes >= 0) & (boxes <= 1)).all() and (boxes % 1).any())


class BoxTable:
    """The boxes of many images, 48 bytes each. Objects365 has 25 million, of 700 bytes in JSON."""

    def __init__(self):
        self._rows, self._names, self._numbers = array("i"), array("i"), array("q")
        self._xywh = array("d")
        self._name_ids: dict[str, int] = {}

    def add(self, row: int, xywh: Sequence[float], name: str, number: Any, place: int) -> None:
        """Add a box.

        Args:
            row: of its image entry.
            xywh: left, top, width and height in pixels.
            name: of the object.
            number: "id" of the annotation, or anything if it has none.
            place: position of the annotation in its list.
        """
        has_id = isinstance(number, int) and 0 <= number < 1 << 62
        self._numbers.append(number if has_id else -1 - place)
        self._rows.append(row)
        self._names.append(self._name_ids.setdefault(name, len(self._name_ids)))
        self._xywh.extend(xywh)

    def move(self, rows: Mapping[int, int]) -> None:
        """Move the boxes of some image entries to others: row of an entry -> row of the other."""
        if rows:
            self._rows = array("i", [rows.get(row, row) for row in self._rows])

    def seem_corners(self, entries: ImageEntries) -> bool:
        """Return `seem_corners` of the first boxes, with the annotated sizes of their images."""
        sizes = {entry.row: entry.size for entry in entries.values()}
        rows = self._rows[:_BOXES_PER_CHECK]
        of_boxes = [sizes.get(row) or (0, 0) for row in rows]
        if not of_boxes:
            return False
        xywh = np.asarray(self._xywh[: 4 * len(rows)], np.float64).reshape(-1, 4)
        return seem_corners(xywh, np.asarray(of_boxes, np.float64))

    def by_image(self, entries: ImageEntries) -> Iterator[tuple[Any, ImageEntry, tuple[Box, ...]]]:
        """Yield (id, entry, boxes) of every image entry in the file's order, also without boxes."""
        rows, wanted = np.frombuffer(self._rows, np.int32), [e.row for e in entries.values()]
        order = np.argsort(rows, kind="stable")
        starts, ends = (
            np.searchsorted(rows, wanted, side, sorter=order).tolist() for side in ("left", "right")
        )
        xywh = np.frombuffer(self._xywh, np.float64).reshape(-1, 4)
        names = list(self._name_ids)
        for (image_id, entry), start, end in zip(entries.items(), starts, ends):
            boxes = []
            for i in order[start:end].tolist():
                number = self._numbers[i]
                origin = annotation_label(number if number >= 0 else None, -1 - number)
                boxes.append(Box(tuple(xywh[i].tolist()), names[self._names[i]], origin))
            yield image_id, entry, tuple(boxes)


def annotation_label(number: Any, place: int) -> str:
    """Return what messages call an annotation: its "id" or, without one, its place in the list."""
    if type(number) is int:  # of most boxes
        return f"annotation {number}"
    return f"annotation number {place}" if number is None else f"annotation {shorten(number)}"


def explain(where: str, error: Exception) -> str:
    """Return one of MALFORMED as a sentence; `where` is the entry, as "FILE: images[3]"."""
    if isinstance(error, FieldError):
        return locate(where, error)
    return f"{where}: {describe(error)}"


def describe(error: Exception) -> str:
    """Return one of MALFORMED in words."""
    return f"no field {error}" if isinstance(error, KeyError) else str(error)
