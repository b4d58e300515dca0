"""What a reader of `sources/` yields before any image is opened, and what it leaves out."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError

_EXPLAINED = 3  # of each reason for dropping something, so many are told in full


@dataclasses.dataclass(frozen=True)
class RawBox:
    """An annotated box as its file has it: not yet clipped, not yet checked against the picture."""

    xywh: tuple[float, float, float, float]  # left, top, width, height in pixels
    name: str
    origin: str  # "annotation 17", for messages


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """Where an image's bytes are: a file, or a range of one (a member of a tar)."""

    path: Path
    offset: int = 0
    size: int | None = None  # bytes; None: to the end

    def read(self) -> bytes:
        """The image as it is stored; `OSError` where the file cannot be read."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def __str__(self) -> str:
        return str(self.path) if self.size is None else f"{self.path}, byte {self.offset}"


@dataclasses.dataclass(frozen=True)
class RawExample:
    """One image with its annotation. `caption` is for image_text, `boxes` for the other kinds."""

    image: ImageFile
    image_id: str
    size: tuple[int, int] | None  # annotated (height, width), where the file tells
    boxes: tuple[RawBox, ...] = ()
    caption: str = ""


class Drops:
    """Counts what is left out or mended, by reason, and keeps the first few of each in words."""

    def __init__(self):
        self.dropped: Counter[str] = Counter()
        self.mended: Counter[str] = Counter()
        self.explained: dict[str, list[str]] = {}

    def drop(self, reason: str, explanation: str) -> None:
        """Count one thing left out. `reason` starts with what it is: "images: missing"."""
        self.dropped[reason] += 1
        self._explain(reason, explanation)

    def mend(self, reason: str, explanation: str) -> None:
        """Count one thing kept in another form than it came."""
        self.mended[reason] += 1
        self._explain(reason, explanation)

    def add(self, other: "Drops") -> None:
        """Take in the counts of another part of the same source."""
        self.dropped.update(other.dropped)
        self.mended.update(other.mended)
        for reason, sentences in other.explained.items():
            for sentence in sentences:
                self._explain(reason, sentence)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Drops":
        """The inverse of `vars`, which is as JSON takes it."""
        drops = cls()
        drops.dropped.update(content["dropped"])
        drops.mended.update(content["mended"])
        drops.explained.update(content["explained"])
        return drops

    def first(self) -> str:
        """An explanation of the most frequent reason; empty if nothing was dropped."""
        if not self.dropped:
            return ""
        return self.explained[self.dropped.most_common(1)[0][0]][0]

    def _explain(self, reason: str, explanation: str) -> None:
        told = self.explained.setdefault(reason, [])
        if len(told) < _EXPLAINED:
            # It may quote the file, which may hold line ends, escapes, halves of characters.
            told.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in explanation))


@dataclasses.dataclass(frozen=True)
class Archive:
    """An annotation file, opened: examples to come, and `drops` that fill while they come."""

    path: Path
    kind: str  # "detection" | "grounding" | "image_text"
    total: int  # examples, about: for the progress bar
    examples: Iterator[RawExample]
    drops: Drops
    names: tuple[str, ...] = ()  # detection: all categories, in the file's order, seen or not


class ImageFolder:
    """Finds the files that annotations name, in folders laid out a little unlike the original."""

    def __init__(self, *roots: str | Path):
        """Search `roots` in order; `UserError` where none of them is a directory."""
        self.roots = [Path(root) for root in roots if Path(root).is_dir()]
        if not self.roots:
            tried = " or ".join(str(root) for root in roots)
            raise UserError(
                f"{tried}: no such directory; name the images' folder with --images=DIR"
            )
        # Each place is looked for once and not for each image: on a network that would take hours.
        self._places = functools.lru_cache(maxsize=4096)(self._existing)

    def find(self, file_name: str) -> Path | None:
        """Path of an image, or None.

        Leading folders of `file_name` are taken off one by one: Objects365's
        "images/v1/patch8/a.jpg" is found as ROOT/images/v1/patch8/a.jpg, ROOT/v1/patch8/a.jpg,
        ROOT/patch8/a.jpg or ROOT/a.jpg.
        """
        if not file_name or "\0" in file_name:
            return None
        *folders, name = Path(file_name).parts or ("",)
        try:
            paths = (place / name for place in self._places(tuple(folders)))
            return next((path for path in paths if path.is_file()), None)
        except OSError:  # a name longer than the file system allows
            return None

    def _existing(self, folders: tuple[str, ...]) -> list[Path]:
        """Where a file in these folders may be, in the order to look."""
        ends = (folders[first:] for first in range(len(folders) + 1))
        places = (root.joinpath(*end) for end in ends for root in self.roots)
        return [place for place in places if place.is_dir()]

    def __str__(self) -> str:
        return " or ".join(str(root) for root in self.roots)


def annotated_size(entry: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image entry, numbers or strings of numbers; None if not told.

    `ValueError` or `TypeError` where they are there but are no sizes.
    """
    if entry.get("height") is None or entry.get("width") is None:
        return None
    size = int(float(entry["height"])), int(float(entry["width"]))
    if min(size) <= 0:
        raise ValueError(f"height {size[0]}, width {size[1]}")
    return size


def parse_xywh(value: Any) -> tuple[float, float, float, float]:
    """A COCO "bbox". `ValueError` where it is no list of four numbers; NaN and infinity pass."""
    if not isinstance(value, list) or len(value) != 4:
        raise ValueError(f'"bbox" is {str(value)[:60]}, not [x, y, width, height]')
    try:
        return tuple(float(number) for number in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f'"bbox" is {str(value)[:60]}, not four numbers') from error
