"""Captioned images as img2dataset left them: shards of tars, of folders, or of parquet alone.

    DIR/00000.tar      KEY.jpg, KEY.txt (the caption) and KEY.json of each image that was fetched
    DIR/00000/         the same as files
    DIR/00000.parquet  a row an address, the dead ones too; in the parquet format also "jpg"

Nothing is unpacked: an image in a tar is a range of bytes of it. Entries that failed, that lack
their image or caption, and pictures that came before are dropped and counted. What came before is
told by 8 bytes of the picture's hash: the one that img2dataset noted of what it fetched, or else
one of the bytes here. Sites answer dead addresses with one and the same placeholder.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.examples import Archive, Drops, ImageFile, RawExample
from detclipv2_jax.data.prepare.sources.entries import BROKEN, problem, shortly, text

LONGEST_CAPTION = 10_000  # characters; alt texts that are longer are whole pages
_FIELDS = dict.fromkeys(("jpg", "jpeg", "png", "webp"), "image")
_FIELDS |= {"txt": "caption", "json": "metadata"}  # by the ends of files' names
_COLUMNS = ("key", "url", "caption", "status", "error_message", "sha256", "md5")
_LARGEST_TEXT = 1 << 20  # bytes of a .txt or .json
_BLOCK = tarfile.BLOCKSIZE
_FAILED = {
    "failed_to_download": "images: failed to download",
    "failed_to_resize": "images: failed to resize",
}


@dataclasses.dataclass(frozen=True)
class ParquetImage:
    """An image that is a value in a parquet file: what `ImageFile` is for a file."""

    path: Path
    group: int
    row: int

    def read(self) -> bytes:
        """The image as it is stored; raises what pyarrow raises where it cannot be read."""
        return _jpg_column(self.path, self.group)[self.row].as_py() or b""

    def __str__(self) -> str:
        return f"{self.path}, row group {self.group}, row {self.row}"


@dataclasses.dataclass
class _Entry:
    """What a shard has of one key."""

    image: ImageFile | ParquetImage | None = None
    caption: bytes | None = None  # .txt
    metadata: bytes | None = None  # .json
    row: Mapping[str, Any] | None = None  # of the parquet beside


class Seen:
    """Which 8-byte hashes came before, in 8 bytes each: 13 million pictures are 0.1 GB."""

    _BATCH = 1 << 20

    def __init__(self):
        self._sorted, self._new = np.empty(0, np.uint64), set()

    def add(self, key: int) -> bool:
        """Whether a hash is new; from now on it is not."""
        at = np.searchsorted(self._sorted, np.uint64(key))
        if key in self._new or (at < len(self._sorted) and self._sorted[at] == np.uint64(key)):
            return False
        self._new.add(key)
        if len(self._new) == self._BATCH:
            batch = np.fromiter(self._new, np.uint64, len(self._new))
            self._sorted, self._new = np.sort(np.concatenate([self._sorted, batch])), set()
        return True


def shards(directory: Path) -> list[Path]:
    """Shards in a folder or in its folders, in order, each by its path without the suffix."""
    found = {
        path.with_suffix("")
        for pattern in ("*.tar", "*/*.tar", "*.parquet", "*/*.parquet")
        for path in directory.glob(pattern)
    }
    folders = (path for path in directory.glob("*") if re.fullmatch(r"\d{5,}", path.name))
    found |= {path for path in folders if path.is_dir()}
    return sorted(found)


def read(directory: str | Path) -> Archive:
    """Open an output folder of img2dataset, or a folder of several: image-text examples.

    `UserError` where there is no shard. A shard that cannot be read, or not to its end, is counted;
    what came before the damage is good.
    """
    directory, drops = Path(directory), Drops()
    found = shards(directory)
    if not found:
        raise UserError(f"{directory}: no shard (00000.tar, 00000.parquet) in it; check the folder")
    return Archive(
        path=directory,
        kind="image_text",
        total=_estimate(found),
        examples=_examples(directory, found, drops),
        drops=drops,
    )


def _estimate(found: list[Path]) -> int:
    """Entries of all shards, about: each is taken to have as many as the first."""
    return sum(map(len, _shard(found[0], Drops()))) * len(found)


def _examples(directory: Path, found: Iterable[Path], drops: Drops) -> Iterator[RawExample]:
    seen = Seen()
    for shard in found:
        name = shard.relative_to(directory)
        for entries in _shard(shard, drops):
            for key, entry in entries.items():
                # Names in tars and folders may be bytes that are no text.
                image_id = f"{name}/{key}".encode("utf-8", "backslashreplace").decode()
                example = _example(image_id, entry, seen, drops)
                if example is not None:
                    yield example


def _shard(shard: Path, drops: Drops) -> Iterator[dict[str, _Entry]]:
    """The entries of a shard by key, in one piece or, of the parquet format, in several."""
    tar, parquet = shard.with_name(shard.name + ".tar"), shard.with_name(shard.name + ".parquet")
    if tar.is_file():
        yield _joined(_in_tar(tar, drops), parquet, drops)
    elif shard.is_dir():
        yield _joined(_in_folder(shard, drops), parquet, drops)
    else:
        yield from _in_parquet(parquet, drops)


def _joined(entries: dict[str, _Entry], parquet: Path, drops: Drops) -> dict[str, _Entry]:
    """Entries with their rows of the parquet beside, those that have nothing else behind them."""
    if parquet.is_file():
        for rows in _rows(parquet, drops):
            for _, _, row in rows:
                entries.setdefault(str(row["key"]), _Entry()).row = row
    return entries


def _example(name: str, entry: _Entry, seen: Seen, drops: Drops) -> RawExample | None:
    """The example of an entry, or None (counted)."""
    where = f"{name}" if entry.image is None else f"{entry.image} ({name})"
    facts = _facts(entry, where, drops)
    status = facts.get("status")
    if status is not None and status != "success":
        reason = _FAILED.get(str(status), "images: failed")
        drops.drop(reason, f"{where}: {shortly(facts.get('error_message') or status)}")
        return None
    if entry.image is None:
        drops.drop("images: missing", f"{where}: there is a caption or a row, but no image")
        return None
    try:
        caption = _caption(entry, facts)
    except BROKEN as error:
        drops.drop("captions: empty", f"{where}: {problem(error)}")
        return None
    try:
        new = seen.add(_hash(entry.image, facts))
    except Exception as error:  # a parquet file that is broken here: pyarrow raises all there is
        drops.drop("images: unreadable", f"{where}: {shortly(str(error))}")
        return None
    if not new:
        drops.drop("images: duplicate", f"{where}: the same picture came before")
        return None
    return RawExample(image=entry.image, image_id=name, size=None, caption=caption)


def _facts(entry: _Entry, where: str, drops: Drops) -> Mapping[str, Any]:
    """What is noted of an entry: its parquet row, else its .json, else nothing."""
    if entry.row is not None or entry.metadata is None:
        return entry.row or {}
    try:
        facts = json.loads(entry.metadata.decode())
        if not isinstance(facts, dict):
            raise ValueError("not a JSON object")
        return facts
    except BROKEN as error:
        drops.mend("images: metadata not read", f"{where}: its .json: {problem(error)}")
        return {}


def _caption(entry: _Entry, facts: Mapping[str, Any]) -> str:
    """The caption; `ValueError` where it is empty, too long, or no text."""
    return checked_caption(
        facts.get("caption") if entry.caption is None else entry.caption.decode()
    )


def checked_caption(caption: Any) -> str:
    """`caption` if it is one; `ValueError` where it is empty, too long, or no text."""
    if not text(caption, "caption").strip():
        raise ValueError(f"its caption is {shortly(caption)}, not a text")
    if len(caption) > LONGEST_CAPTION:
        raise ValueError(f"its caption has {len(caption):,} characters")
    return caption


def _hash(image: ImageFile | ParquetImage, facts: Mapping[str, Any]) -> int:
    """8 bytes of the picture's hash as a number."""
    noted = facts.get("sha256") or facts.get("md5")
    told = noted.encode() if isinstance(noted, str) else image.read()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def _part_of(name: str) -> tuple[str, str]:
    """What a file of a shard is: its key, which ends at the first dot, and its field of _Entry."""
    folder, slash, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return folder + slash + key, _FIELDS.get(suffix.lower(), "") if key else ""


def _put(entries: dict[str, _Entry], key: str, field: str, value: Any, drops: Drops) -> None:
    entry = entries.setdefault(key, _Entry())
    if getattr(entry, field) is None:
        setattr(entry, field, value)
    elif field == "image":
        drops.drop("images: key given twice", f"{value}: a second {shortly(key)}")


def _in_folder(folder: Path, drops: Drops) -> dict[str, _Entry]:
    """What a folder has; a text that cannot be read is taken for empty."""
    entries: dict[str, _Entry] = {}
    for name in sorted(os.listdir(folder)):
        key, field = _part_of(name)
        if field == "image":
            _put(entries, key, field, ImageFile(folder / name), drops)
        elif field:
            _put(entries, key, field, _start_of(folder / name), drops)
    return entries


def _start_of(path: Path) -> bytes:
    try:
        return ImageFile(path, size=_LARGEST_TEXT).read()
    except OSError:
        return b""


def _in_tar(path: Path, drops: Drops) -> dict[str, _Entry]:
    """What a tar has, up to its end or its first damage; of images only where they are."""
    entries: dict[str, _Entry] = {}
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for member in _members(file):
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                key, field = _part_of(member.name)
                value: Any = ImageFile(path, member.offset_data, member.size)
                if field and field != "image":
                    file.seek(member.offset_data)
                    value = file.read(min(member.size, _LARGEST_TEXT))
                if field:
                    _put(entries, key, field, value, drops)
    except Exception as error:  # tarfile raises all there is on damaged headers
        told = f"{path}: {shortly(str(error))} behind {len(entries)} images"
        drops.drop("shards: damaged", told)
    return entries


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Files of a tar in order; raises at damage, which tarfile would take for the end."""
    before = -1
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if not before < member.offset < member.offset_data or member.size < 0:
                raise tarfile.ReadError("a header that leads back")
            before, tar.members = member.offset, []  # which grows otherwise
            if member.isreg() and not member.issparse():
                yield member
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no valid header")


def _rows(path: Path, drops: Drops, *needed: str) -> Iterator[list]:
    """A parquet file by row groups: (group, row, the fields of _COLUMNS that it has) of each."""
    try:
        import pyarrow.parquet  # 0.2 s, needed by this source alone

        file = pyarrow.parquet.ParquetFile(path)
        has = set(file.schema_arrow.names)
        for name in ("key", *needed):
            if name not in has:
                raise ValueError(f'no column "{name}"')
        columns = [name for name in _COLUMNS if name in has]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns).to_pylist()
            yield [(group, number, row) for number, row in enumerate(rows)]
    except Exception as error:  # pyarrow raises all there is on damaged files
        drops.drop("shards: damaged", f"{path}: {shortly(str(error))}")


def _in_parquet(path: Path, drops: Drops) -> Iterator[dict[str, _Entry]]:
    """Entries of img2dataset's parquet format, a row group at a time."""
    for rows in _rows(path, drops, "jpg"):
        entries: dict[str, _Entry] = {}
        for group, number, row in rows:
            entry = _Entry(ParquetImage(path, group, number), row=row)
            if str(row["key"]) in entries:
                drops.drop("images: key given twice", f"{entry.image}: a second {row['key']}")
            else:
                entries[str(row["key"])] = entry
        yield entries


@functools.lru_cache(maxsize=2)
def _jpg_column(path: Path, group: int) -> Any:
    """The images of a row group: whoever reads one, reads the next ones soon."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=["jpg"]).column(0)
