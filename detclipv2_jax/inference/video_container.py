"""What the headers of video files claim: whether bytes are missing, and whether a count is exact.

Only the outermost structure is read: RIFF chunks (AVI), boxes (MP4 and MOV, ISO/IEC 14496-12),
EBML elements (Matroska and WebM, RFC 8794 and RFC 9559), tags (FLV, Adobe's specification 10.1,
annex E), and the file's size in the header of WMV (ASF specification 01.20.06, 3.2).
"""

import pathlib
from typing import BinaryIO

_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")


def exact_count(path: pathlib.Path, count: int) -> int | None:
    """Return `count`, which FFmpeg says of a file, if the file's header has it.

    In other files, such as Matroska, it is an estimate: the duration times the mean rate.
    """
    start = _start(path)
    return count or None if _is_avi(start) or start[4:8] in _BOXES else None


def is_cut_off(path: pathlib.Path) -> bool:
    """Return whether the file is shorter than its own headers say; False if they do not say it."""
    start, size = _start(path), path.stat().st_size
    try:
        if _is_avi(start):
            claimed = int.from_bytes(start[4:8], "little")
            return 0 < claimed < 0xFFFFFFFF and claimed + 8 > size + 1
        with open(path, "rb") as file:
            if start[4:8] in _BOXES:
                return _boxes_are_cut_off(file, size)
            if start[:4] == _EBML:
                return _segment_is_cut_off(file, size)
            if start[:3] == b"FLV":
                return _tags_are_cut_off(file, size)
            if start == _ASF[:12]:
                header = file.read(1 << 16)
                at = header.find(_ASF_FILE_PROPERTIES)
                return at > 0 and size < int.from_bytes(header[at + 40 : at + 48], "little")
    except (OSError, ValueError):
        pass
    return False


def _start(path: pathlib.Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)


def _is_avi(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"AVI "


def _boxes_are_cut_off(file: BinaryIO, size: int) -> bool:
    position = 0
    while position + 8 <= size:
        file.seek(position)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1 and len(header) == 16:
            length = int.from_bytes(header[8:16], "big")
        if length < 8:  # 0: to the end of the file; others are no box
            return False
        position += length
    return position > size


def _tags_are_cut_off(file: BinaryIO, size: int) -> bool:
    file.seek(5)
    position = int.from_bytes(file.read(4), "big") + 4  # behind the size of no tag
    while position + 11 <= size:
        file.seek(position)
        position += 11 + int.from_bytes(file.read(4)[1:], "big") + 4
    return position > size


def _segment_is_cut_off(file: BinaryIO, size: int) -> bool:
    file.seek(len(_EBML))
    length = _read_size(file)
    if length is None:
        return False
    file.seek(length, 1)
    if file.read(4) != _SEGMENT:
        return False
    length = _read_size(file)  # not known while a program still writes, or streams
    return length is not None and file.tell() + length > size


def _read_size(file: BinaryIO) -> int | None:
    """Read the size of an EBML element; None if it says that it is not known."""
    first = file.read(1)
    if not first or not first[0]:
        raise ValueError("not a size")
    width = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> width)]) + file.read(width - 1), "big")
    return None if value == (1 << 7 * width) - 1 else value
