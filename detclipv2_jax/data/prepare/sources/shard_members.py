"""Sort the files of a shard into entries: a picture with its texts under one key.

webdataset ends a key at the first dot of a name, and img2dataset's keys are numbers. Other tools
put file names into shards, and these have dots: `photo.v2.jpg`, `IMG_2021.05.01.jpg`. So here a key
ends at the last dot, before a known suffix. Afterwards `join_fields` finds what webdataset means by
a field of several parts: the `000.seg.png` next to `000.jpg`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from detclipv2_jax.common.printable import printable
from detclipv2_jax.data.prepare.examples import Drops

_IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic")
_FIELDS = dict.fromkeys(_IMAGES, "image") | {"txt": "caption", "json": "metadata"}
_IMAGE_WORDS = {"image", "img", "picture", "photo", "rgb", "input"}
_CAPTION_WORDS = {"caption", "captions", "cap", "text", "alt"}
FURTHER = "images: further picture of a key"


@dataclasses.dataclass
class Entry:
    """What a shard has for one key."""

    image: Any = None  # an `ImageFile` or the like
    caption: bytes | None = None  # .txt
    metadata: bytes | None = None  # .json
    row: Mapping[str, Any] | None = None  # of the shard's parquet file
    lost: str = ""  # why its picture cannot be read

    @property
    def has_text(self) -> bool:
        """Whether something may hold its caption."""
        return not self.caption is self.metadata is self.row is None


def split_name(name: str) -> tuple[str, str]:
    """Return the key of a file in a shard and its field of `Entry`, "" for any other file.

    The copies that macOS makes (`._000.jpg`) and files without a key are other files.
    """
    folders = [part for part in name.split("/") if part not in ("", ".")]
    base = folders.pop() if folders else ""
    key, _, suffix = base.rpartition(".")
    if not key or base.startswith("._") or "__MACOSX" in folders:
        return "", ""
    return "/".join((*folders, key)), _FIELDS.get(suffix.lower(), "")


def put(entries: dict[str, Entry], key: str, field: str, value: Any, drops: Drops) -> None:
    """Add a field of an entry; a second picture of a key is counted."""
    entry = entries.setdefault(key, Entry())
    if getattr(entry, field) is None:
        setattr(entry, field, value)
    elif field == "image":
        drops.drop("images: key given twice", f"{value}: a second {printable(key)}")


def join_fields(entries: dict[str, Entry], drops: Drops) -> None:
    """Join the entries of keys that go on behind a dot with the entry of the shorter key.

    A picture without texts next to the picture of the shorter key (`000.seg.png`) is counted as
    `FURTHER`. A picture and its caption are one entry if one of them has the shorter key and the
    other one says what it is (`000.img.jpg`, `000.caption.txt`). Texts of other fields next to a
    complete entry are ignored. Other entries stay apart: they are file names with dots.
    """
    for key in [key for key in entries if "." in key.rpartition("/")[2]]:
        for shorter in _shorter(key):
            if (first := entries.get(shorter)) is None or key not in entries:
                continue
            own, word = entries[key], key[len(shorter) + 1 :].lower()
            if own.image is not None and not own.has_text and first.image is not None:
                drops.drop(FURTHER, f"{own.image}: {printable(key)} next to {printable(shorter)}")
            elif own.image is not None and not own.has_text and word in _IMAGE_WORDS:
                first.image = own.image
            elif own.image is None and first.image is not None and first.has_text:
                pass  # a class, boxes and the like
            elif own.image is None and first.image is not None and word in _CAPTION_WORDS:
                first.caption, first.metadata, first.row = own.caption, own.metadata, own.row
            else:
                continue
            del entries[key]


def _shorter(key: str) -> list[str]:
    """Return the key up to each of its dots, the shortest first."""
    folder, slash, base = key.rpartition("/")
    places = [at for at, character in enumerate(base) if character == "." and at]
    return [folder + slash + base[:at] for at in places]
