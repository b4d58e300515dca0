"""Examples: the entries of an annotation file, before their images are opened.

The readers in `sources/` yield `Example`s. `shards.py` turns them into records. `Drops` counts what
both of them leave out.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.common.find_file import ImageFolder as ImageFolder
from detclipv2_jax.text.checked import Meaning

# Reason of an image that is not lost: it is in the validation set.
HELD_OUT = "images: held out for validation"

_MAX_EXPLANATIONS = 3  # explanations that are kept for each reason,
_MAX_NAMES = 100  # and for reasons of names, of which a file has few


@dataclasses.dataclass(frozen=True)
class Box:
    """A box as annotated: not yet clipped or checked against the image."""

    xywh: tuple[float, float, float, float]  # left, top, width, height in pixels
    name: str
    origin: str  # "annotation 17", for messages


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An encoded image on disk: a file, or a range of bytes of one (a member of a tar)."""

    path: Path
    offset: int = 0  # bytes
    size: int | None = None  # bytes; None: to the end of the file

    def read(self) -> bytes:
        """Return the encoded image.

        Raises:
            OSError: the file cannot be read.
        """
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read() if self.size is None else file.read(self.size)

    def __str__(self) -> str:
        return str(self.path) if self.size is None else f"{self.path}, byte {self.offset}"


@dataclasses.dataclass(frozen=True)
class Example:
    """One image with its annotation: `boxes`, or as `caption` a caption or the name of a class."""

    image: ImageFile
    image_id: str
    size: tuple[int, int] | None  # annotated (height, width) in pixels, if the file has it
    boxes: tuple[Box, ...] = ()
    caption: str = ""
    # Federated annotation (LVIS): names that are not in the image, and names of which not every
    # object has a box. `absent` None: what has no box is not in the image.
    absent: tuple[str, ...] | None = None
    partial: tuple[str, ...] = ()
    archive: int = 0  # number of its annotation file, where a source has several


class Drops:
    """Counts what is dropped, changed or doubtful, by reason, with the first explanations."""

    def __init__(self):
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.explained: dict[str, list[str]] = {}
        #: (names of a picture, where it was looked for) of the pictures that do not exist
        self.missing: list[tuple[tuple[str, ...], ImageFolder]] = []

    def drop(self, reason: str, explanation: str) -> None:
        """Count one thing that is left out. `reason` starts with its type: "images: missing"."""
        self.dropped[reason] += 1
        self._explain(reason, explanation)

    def change(self, reason: str, explanation: str) -> None:
        """Count one thing that is kept, but not as it was in the archive."""
        self.changed[reason] += 1
        self._explain(reason, explanation)

    def note(self, reason: str, explanation: str) -> None:
        """Count one thing that is kept as it was, but is probably not what the user wants."""
        self.noted[reason] += 1
        self._explain(reason, explanation)

    def add(self, other: "Drops") -> None:
        """Add the counts of another shard or archive of the same source."""
        self.noted.update(other.noted)
        self.dropped.update(other.dropped)
        self.changed.update(other.changed)
        for reason, sentences in other.explained.items():
            for sentence in sentences:
                self._explain(reason, sentence)

    def to_json(self) -> dict[str, Any]:
        """Return the counts under the names that info.json has for them."""
        return {
            "dropped": dict(self.dropped),
            "mended": dict(self.changed),  # the stored name of `changed`
            "noted": dict(self.noted),
            "explained": self.explained,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Drops":
        """Return the counts that `to_json` gave."""
        drops = cls()
        drops.dropped.update(content["dropped"])
        drops.changed.update(content["mended"])
        drops.noted.update(content.get("noted", {}))
        drops.explained.update(content["explained"])
        return drops

    def first(self) -> str:
        """Return an explanation of the most frequent reason, or "" if nothing was dropped."""
        if not self.dropped:
            return ""
        return self.explained[self.dropped.most_common(1)[0][0]][0]

    def _explain(self, reason: str, explanation: str) -> None:
        sentences = self.explained.setdefault(reason, [])
        limit = _MAX_NAMES if reason.startswith("names") else _MAX_EXPLANATIONS
        if len(sentences) < limit:
            # An explanation may quote the file: line ends, escapes, halves of surrogate pairs.
            sentences.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in explanation))


@dataclasses.dataclass(frozen=True)
class Archive:
    """An opened annotation file. `drops` fills up while `examples` is consumed."""

    path: Path
    kind: str  # one of `KINDS`
    total: int  # approximate number of examples, for the progress bar
    examples: Iterator[Example]
    drops: Drops
    names: tuple[str, ...] = ()  # detection: all categories in the file's order, used or not
    # Normalized name → definition and synset, where the file has one (LVIS, V3Det).
    meanings: Mapping[str, Meaning] = dataclasses.field(default_factory=dict)
