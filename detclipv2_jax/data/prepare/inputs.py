"""Remember the pictures that a source was made from, to notice later that they changed.

`TO/pictures.jsonl.gz` has a line per picture: [path, bytes, time of change in ns, digest, used], or
[names] of a picture that was missing. Paths are relative to the folder of the archive, so that it
may be moved. The annotation files are compared by `registry.fingerprint`.
"""

import gzip
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable
from detclipv2_jax.data.prepare.examples import ImageFile, ImageFolder

FILE = "pictures.jsonl.gz"
_SHOWN = 3  # changed pictures that a sentence names


class Picture(NamedTuple):
    """A picture file as preparation found it."""

    path: str
    size: int  # bytes
    changed: int  # time of the last change in ns
    digest: str  # of the content
    used: bool  # False: it was left out

    @property
    def is_unchanged(self) -> bool:
        """Whether the file is as it was; one that is gone counts as unchanged."""
        try:
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) == (self.size, self.changed):
                return True
            if status.st_size != self.size:
                return False
            return digest(Path(self.path).read_bytes()) == self.digest  # a copy is newer
        except OSError:
            return True


class Recorded:
    """An image of an example that remembers what was read; has the methods of `ImageFile`."""

    def __init__(self, image: Any):
        """Record the reading of `image`."""
        self._image, self._read = image, b""

    def read(self) -> bytes:
        """Return the encoded image; raises what the image raises."""
        self._read = self._image.read()
        return self._read

    def __str__(self) -> str:
        return str(self._image)

    def picture(self, used: bool) -> Picture | None:
        """Return what was read, or None if the image is not a file of its own."""
        if not isinstance(self._image, ImageFile) or self._image.size is not None:
            return None
        try:
            changed = os.stat(self._image.path).st_mtime_ns
        except OSError:
            changed = 0
        data, self._read = self._read, b""
        return Picture(os.fsdecode(self._image.path), len(data), changed, digest(data), used)


def digest(data: bytes) -> str:
    """Return 8 bytes of a hash of a picture's content, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def write(
    directory: Path,
    origin: Path,
    pictures: Iterable[Picture],
    missing: Iterable[tuple[Sequence[str], ImageFolder]],
) -> None:
    """Write the file of a source.

    Args:
        directory: of the source.
        origin: folder of the archive.
        pictures: the pictures that were opened.
        missing: (names of a picture, where it was looked for) of those that do not exist.
    """
    with (
        replacing(directory / FILE) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0, compresslevel=5) as file,
    ):
        for row in _rows(origin, pictures, missing):
            file.write(json.dumps(row).encode() + b"\n")


def _rows(origin: Path, pictures: Iterable[Picture], missing: Iterable) -> Iterator[Any]:
    last, folders = None, {}
    for one in pictures:
        if one.path != last:  # captions of one picture follow each other
            yield [os.path.relpath(one.path, origin), *one[1:]]
        last = one.path
    for names, searched in missing:
        relative = tuple(os.path.relpath(folder, origin) for folder in searched.folders)
        if relative not in folders:
            folders[relative] = len(folders)
            yield {"folders": relative}
        yield {"missing": list(names), "in": folders[relative]}


def read(directory: Path, origin: Path) -> tuple[list[Picture], list[tuple[list[str], list[str]]]]:
    """Return what `write` wrote, with paths under `origin`; nothing if it cannot be read."""
    pictures: list[Picture] = []
    folders: list[list[str]] = []
    missing: list[tuple[list[str], list[str]]] = []
    try:
        with gzip.open(directory / FILE, "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if isinstance(row, list):
                    path, *rest = row
                    pictures.append(Picture(os.path.join(origin, path), *rest))
                elif "folders" in row:
                    folders.append([os.path.join(origin, folder) for folder in row["folders"]])
                else:
                    missing.append((row["missing"], folders[row["in"]]))
    except (OSError, ValueError, EOFError, TypeError, KeyError, IndexError):
        return [], []  # made by an older version, or damaged
    return pictures, missing


def refuse_changes(directory: Path, origin: Path) -> None:
    """Raise `UserError` if pictures that `directory` was made from appeared or changed since."""
    if found := list(changes(directory, origin)):
        raise UserError(
            f"{directory}: was made from other pictures; {'; '.join(found)}. Add --overwrite to "
            "prepare it again, or choose another directory with --to."
        )


def in_common(directories: Sequence[Path], origin: Path) -> int:
    """Return how many pictures all of some sources of one archive have, by their files."""
    paths = [{one.path for one in read(path, origin)[0] if one.used} for path in directories]
    return len(set.intersection(*paths)) if paths else 0


def same_content(directory: Path, others: Sequence[Path], origin: Path) -> list[tuple[str, str]]:
    """Return the pictures of a set whose content other sources have: (path, path of the other)."""
    known = {one.digest: one.path for path in others for one in read(path, origin)[0] if one.used}
    pictures = read(directory, origin)[0] if known else []
    return [(one.path, known[one.digest]) for one in pictures if one.used and one.digest in known]


def changes(directory: Path, origin: Path) -> Iterator[str]:
    """Yield what changed in the pictures since `write`, in words; nothing if none did."""
    pictures, missing = read(directory, origin)
    lists = {
        "were missing and exist now": _exist_now(pictures, missing, origin),
        "were left out and have changed": [
            one.path for one in pictures if not one.used and not one.is_unchanged
        ],
        "have changed": [one.path for one in pictures if one.used and not one.is_unchanged],
    }
    for what, paths in lists.items():
        if paths:
            shown = ", ".join(map(printable, paths[:_SHOWN])) + ", …" * (len(paths) > _SHOWN)
            yield f"pictures that {what}: {len(paths):,} ({shown})"


def _exist_now(
    pictures: Sequence[Picture], missing: Sequence[tuple[list[str], list[str]]], origin: Path
) -> list[str]:
    """Return the names of missing pictures that exist now."""
    known = [(os.path.relpath(one.path, origin),) for one in pictures]
    known += [tuple(names) for names, _ in missing]
    searched: dict[tuple[str, ...], ImageFolder] = {}
    found = []
    for names, folders in missing:
        existing = tuple(folder for folder in folders if os.path.isdir(folder))
        if not existing:
            continue
        if existing not in searched:
            searched[existing] = ImageFolder(*existing)
            searched[existing].expect(lambda: known)
        if searched[existing].find(*names).path is not None:
            found.append(names[0])
    return found
