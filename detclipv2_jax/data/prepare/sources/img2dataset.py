"""Read the output of img2dataset: images with captions in shards of tar, folder or parquet format.

    DIR/00000.tar      KEY.jpg, KEY.txt (the caption) and KEY.json of each downloaded image
    DIR/00000/         the same as files
    DIR/00000.parquet  one row per URL, also of failed downloads; in the parquet format with "jpg"

Nothing is unpacked: an image in a tar is read as a range of its bytes. Entries that failed, lack
their image or caption, or repeat an earlier image are dropped and counted. Repeated images are
found by 8 bytes of a hash: of the hash that img2dataset recorded for the download, or else of the
stored bytes. They are common, because sites answer dead URLs with one placeholder image.
"""

import contextlib
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

from detclipv2_jax.common import lfs_pointer
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import shorten, text
from detclipv2_jax.common.printable import printable
from detclipv2_jax.common.text_file import decode_text
from detclipv2_jax.data.prepare.examples import Archive, Drops, Example, ImageFile
from detclipv2_jax.data.prepare.sources.entries import MALFORMED, describe
from detclipv2_jax.data.prepare.sources.shard_members import Entry, join_fields, put, split_name

LONGEST_CAPTION = 10_000  # characters; longer alt texts are whole pages
_COLUMNS = ("key", "url", "caption", "status", "error_message", "sha256", "md5")
_LARGEST_TEXT = 1 << 20  # bytes of a .txt or .json
_BLOCK = tarfile.BLOCKSIZE
#: What pandas, SQL and people write where there is no caption.
_NO_CAPTION = {"nan", "none", "null", "nil", "n/a", "na", "<na>", "undefined"}
_COMPRESSED = {  # first bytes of a file -> program
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "unzstd",
    b"BZh": "bunzip2",
    b"\xfd7zXZ": "unxz",
}
_COMPRESSED_NAME = re.compile(r"\.(tar\.(gz|zst|bz2|xz)|tgz|tbz2?|txz|tzst)$")
_FAILED = {
    "failed_to_download": "images: failed to download",
    "failed_to_resize": "images: failed to resize",
}


@dataclasses.dataclass(frozen=True)
class ParquetImage:
    """An encoded image that is a value of a parquet file; it has the methods of `ImageFile`."""

    path: Path
    group: int  # row group
    row: int  # in the row group

    def read(self) -> bytes:
        """Return the encoded image; pyarrow may raise any exception if it cannot be read."""
        return _read_jpg_column(self.path, self.group)[self.row].as_py() or b""

    def __str__(self) -> str:
        return f"{self.path}, row group {self.group}, row {self.row}"


class SeenHashes:
    """A set of 8-byte hashes that takes 8 bytes each: 0.1 GB for 13 million images."""

    _BATCH = 1 << 20  # new hashes that are collected before they are sorted in

    def __init__(self):
        self._sorted, self._new = np.empty(0, np.uint64), set()

    def add(self, key: int) -> bool:
        """Add a hash, and return whether it is new."""
        at = np.searchsorted(self._sorted, np.uint64(key))
        if key in self._new or (at < len(self._sorted) and self._sorted[at] == np.uint64(key)):
            return False
        self._new.add(key)
        if len(self._new) == self._BATCH:
            batch = np.fromiter(self._new, np.uint64, len(self._new))
            self._sorted, self._new = np.sort(np.concatenate([self._sorted, batch])), set()
        return True


def shards(directory: Path) -> list[Path]:
    """Return the shards in a folder and its folders, sorted, as paths without suffix."""
    found = {
        path.with_suffix("")
        for pattern in ("*.tar", "*/*.tar", "*.parquet", "*/*.parquet")
        for path in directory.glob(pattern)
    }
    folders = (path for path in directory.glob("*") if re.fullmatch(r"\d{5,}", path.name))
    found |= {path for path in folders if path.is_dir()}
    return sorted(path for path in found if not path.name.startswith("."))


def read(directory: str | Path) -> Archive:
    """Open an output folder of img2dataset, or a folder of several: image-text examples.

    A shard that is damaged is counted, and what comes before the damage is used.

    Raises:
        UserError: there is no shard.
    """
    directory, drops = Path(directory), Drops()
    found = shards(directory)
    for path in compressed_shards(directory):
        drops.drop("shards: compressed", f"{path}: {compression(path) or 'it is compressed'}")
    if not found:
        refuse_compressed(directory)
        raise UserError(
            f"{directory}: no shard (00000.tar, 00000.parquet) in it. Check the folder."
        )
    return Archive(
        path=directory,
        kind="image_text",
        total=_estimate_entries(found),
        examples=_examples(directory, found, drops),
        drops=drops,
    )


def refuse_compressed(directory: Path) -> None:
    """Raise `UserError` if a folder has compressed tars."""
    if paths := compressed_shards(directory):
        why = compression(paths[0]) or "it is compressed"
        raise UserError(
            f"{paths[0]}: {why}. Pictures are read where they lie in a tar, which compression "
            "prevents."
        )


def _estimate_entries(found: list[Path]) -> int:
    """Estimate the number of entries: assume as many per shard as in the first one."""
    return sum(map(len, _read_shard(found[0], Drops()))) * len(found)


def _examples(directory: Path, found: Iterable[Path], drops: Drops) -> Iterator[Example]:
    seen = SeenHashes()
    for shard in found:
        name = shard.relative_to(directory)
        for entries in _read_shard(shard, drops):
            for key, entry in entries.items():
                # File names in tars and folders may be bytes that are not valid text.
                image_id = f"{name}/{key}".encode("utf-8", "backslashreplace").decode()
                example = _example(image_id, entry, seen, drops)
                if example is not None:
                    yield example


def _read_shard(shard: Path, drops: Drops) -> Iterator[dict[str, Entry]]:
    """Yield the entries of a shard by key: all at once, or one row group at a time for parquet."""
    tar, parquet = shard.with_name(shard.name + ".tar"), shard.with_name(shard.name + ".parquet")
    if tar.is_file():
        yield _add_rows(_read_tar(tar, drops), parquet, drops)
    elif shard.is_dir():
        yield _add_rows(_read_folder(shard, drops), parquet, drops)
    else:
        yield from _read_parquet(parquet, drops)


def _add_rows(entries: dict[str, Entry], parquet: Path, drops: Drops) -> dict[str, Entry]:
    """Add the rows of the shard's parquet file; rows without another entry come last."""
    if parquet.is_file():
        for rows in _read_rows(parquet, drops):
            for _, _, row in rows:
                entries.setdefault(str(row["key"]), Entry()).row = row
    join_fields(entries, drops)
    return entries


def _example(name: str, entry: Entry, seen: SeenHashes, drops: Drops) -> Example | None:
    """Return the example of an entry, or None (counted) if it is not usable."""
    where = f"{name}" if entry.image is None else f"{entry.image} ({name})"
    metadata = _read_metadata(entry, where, drops)
    status = metadata.get("status")
    if status is not None and status != "success":
        reason = _FAILED.get(str(status), "images: failed")
        drops.drop(reason, f"{where}: {shorten(metadata.get('error_message') or status)}")
        return None
    if entry.image is None:
        why = entry.lost or "it has a caption or a row, but no image"
        drops.drop("images: missing", f"{where}: {why}")
        return None
    try:
        caption = _read_caption(entry, metadata)
    except MALFORMED as error:
        drops.drop("captions: empty", f"{where}: {describe(error)}")
        return None
    try:
        new = seen.add(_hash(entry.image, metadata))
    except Exception as error:  # pyarrow raises many types of errors for a damaged file
        drops.drop("images: unreadable", f"{where}: {shorten(str(error))}")
        return None
    if not new:
        drops.drop("images: duplicate", f"{where}: the same picture came before")
        return None
    return Example(image=entry.image, image_id=name, size=None, caption=caption)


def _read_metadata(entry: Entry, where: str, drops: Drops) -> Mapping[str, Any]:
    """Return what img2dataset recorded of an entry: its parquet row, else its .json, else {}."""
    if entry.row is not None or entry.metadata is None:
        return entry.row or {}
    try:
        metadata = json.loads(decode_text(entry.metadata))
        if not isinstance(metadata, dict):
            raise ValueError("not a JSON object")
        return metadata
    except MALFORMED as error:
        drops.change("images: metadata not read", f"{where}: its .json: {describe(error)}")
        return {}


def _read_caption(entry: Entry, metadata: Mapping[str, Any]) -> str:
    """Return the caption of an entry; see `check_caption` and `decode_text` for errors."""
    if entry.caption is None and "caption" not in metadata:
        raise ValueError('it has no caption (KEY.txt, or "caption" in KEY.json or its row)')
    return check_caption(
        metadata.get("caption") if entry.caption is None else decode_text(entry.caption)
    )


def check_caption(caption: Any) -> str:
    """Return `caption`; raise `ValueError` if it is blank, too long, or not a text."""
    text({"caption": caption}, "caption")
    if caption.strip().lower() in _NO_CAPTION:
        raise ValueError(f"its caption is {shorten(caption)}, which stands for a missing one")
    if len(caption) > LONGEST_CAPTION:
        raise ValueError(f"its caption has {len(caption):,} characters")
    return caption


def _hash(image: ImageFile | ParquetImage, metadata: Mapping[str, Any]) -> int:
    """Return 8 bytes of a hash that identifies the image, as a number."""
    recorded = metadata.get("sha256") or metadata.get("md5")
    identity = recorded.encode() if isinstance(recorded, str) else image.read()
    return int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest(), "little")


def _read_folder(folder: Path, drops: Drops) -> dict[str, Entry]:
    """Return the entries of a folder. A text file that cannot be read counts as empty."""
    entries: dict[str, Entry] = {}
    for name in sorted(os.listdir(folder)):
        key, field = split_name(name)
        if field == "image":
            put(entries, key, field, ImageFile(folder / name), drops)
        elif field:
            put(entries, key, field, _read_text(folder / name), drops)
    return entries


def _read_text(path: Path) -> bytes:
    try:
        return ImageFile(path, size=_LARGEST_TEXT).read()
    except OSError:
        return b""


def _read_tar(path: Path, drops: Drops) -> dict[str, Entry]:
    """Return the entries of a tar up to its end or its first damage; images as byte ranges."""
    entries: dict[str, Entry] = {}
    places: dict[str, tuple[int, int]] = {}  # name of a file -> its first byte, and size in bytes
    try:
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
            for member in _members(file):
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                key, field = split_name(member.name)
                if not field:
                    continue
                if (place := _place(member, places)) is None:
                    if field == "image":
                        lost = f"{printable(member.name)} is a link or no plain file"
                        entries.setdefault(key, Entry()).lost = lost
                    continue
                value: Any = ImageFile(path, *place)
                if field != "image":
                    file.seek(place[0])
                    value = file.read(min(place[1], _LARGEST_TEXT))
                put(entries, key, field, value, drops)
    except Exception as error:  # tarfile raises many types of errors for damaged headers
        why = compression(path) or f"{shorten(str(error))} behind {len(entries)} images"
        drops.drop("shards: damaged", f"{path}: {why}")
    return entries


def _place(member: tarfile.TarInfo, places: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first byte and the size of a file in a tar, None if it has no bytes of its own.

    A hard link stands for an earlier file of the tar. Other links may lead out of it.
    """
    if member.islnk():
        return places.get(member.linkname)
    if not member.isreg() or member.issparse():
        return None
    places[member.name] = member.offset_data, member.size
    return places[member.name]


def compression(path: Path) -> str:
    """Return that a file is compressed or not downloaded and what to do, "" if it is neither."""
    if lfs_pointer.is_pointer_file(path):
        return lfs_pointer.REASON
    with contextlib.suppress(OSError):
        start = ImageFile(path, size=8).read()
        for magic, program in _COMPRESSED.items():
            if start.startswith(magic):
                return f"it is compressed; decompress it with {program}"
    return ""


def compressed_shards(directory: Path) -> list[Path]:
    """Return the compressed tars in a folder and its folders, which cannot be read."""
    found = (path for place in ("*.t*z*", "*/*.t*z*") for path in directory.glob(place))
    return sorted(path for path in found if _COMPRESSED_NAME.search(path.name.lower()))


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar in order; raise at damage, which tarfile takes for the end."""
    previous = -1  # offset of the last header
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if not previous < member.offset < member.offset_data or member.size < 0:
                raise tarfile.ReadError("a header that points backwards")
            previous, tar.members = member.offset, []  # the list would grow without bound
            yield member
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("no valid header")


def _read_rows(
    path: Path, drops: Drops, *needed: str
) -> Iterator[list[tuple[int, int, dict[str, Any]]]]:
    """Yield each row group of a parquet file: (group, row, fields of _COLUMNS that exist).

    A file that is damaged or lacks a `needed` column is counted.
    """
    try:
        import pyarrow.parquet  # takes 0.2 s; only this source needs it

        file = pyarrow.parquet.ParquetFile(path)
        has = set(file.schema_arrow.names)
        for name in ("key", *needed):
            if name not in has:
                raise ValueError(f'no column "{name}"')
        columns = [name for name in _COLUMNS if name in has]
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=columns).to_pylist()
            yield [(group, number, row) for number, row in enumerate(rows)]
    except Exception as error:  # pyarrow raises many types of errors for damaged files
        why = compression(path) or shorten(str(error))
        drops.drop("shards: damaged", f"{path}: {why}")


def _read_parquet(path: Path, drops: Drops) -> Iterator[dict[str, Entry]]:
    """Yield the entries of img2dataset's parquet format, one row group at a time."""
    for rows in _read_rows(path, drops, "jpg"):
        entries: dict[str, Entry] = {}
        for group, number, row in rows:
            entry = Entry(ParquetImage(path, group, number), row=row)
            if str(row["key"]) in entries:
                drops.drop("images: key given twice", f"{entry.image}: a second {row['key']}")
            else:
                entries[str(row["key"])] = entry
        yield entries


@functools.lru_cache(maxsize=2)
def _read_jpg_column(path: Path, group: int) -> Any:
    """Return the images of a row group. Cached: they are read one after the other."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=["jpg"]).column(0)
