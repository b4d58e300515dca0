"""How a name in an annotation file can be read as the path of a file."""

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DRIVE = re.compile(r"[A-Za-z]:(?=[/\\])")
_ESCAPED = re.compile(r"\\x([89a-f][0-9a-f])")  # as `printable.valid_text` writes bytes
_LABEL_STUDIO = re.compile(r"[0-9a-f]{8}-(?=.)")  # hash in front of an uploaded file's name


class Spelling(NamedTuple):
    """One way to read a name as a path."""

    parts: tuple[str, ...]  # folders and file, without "." and ".."
    is_absolute: bool = False
    ups: int = 0  # number of leading ".."
    is_literal: bool = True  # False: the name as it stands is another path
    distance: int = 0  # from the name as it stands


def is_url(name: str) -> bool:
    """Return whether a name is an address on the web."""
    return bool(_URL.match(name)) and not name.lower().startswith("file:")


def readings(name: str) -> Iterator[Spelling]:
    """Yield the ways to read a name as a path, the most literal first, each once."""
    seen: set[tuple] = set()
    for distance, text in enumerate(_texts(name)):
        if not _can_be_path(text):
            continue
        spelling = _split(text, distance)
        key = spelling[:3]
        if spelling.parts and key not in seen:
            seen.add(key)
            yield spelling


def loose(name: str, is_file: bool) -> str:
    """Return a form that is equal for names that differ in accents' composition or suffix case."""
    name = unicodedata.normalize("NFC", name)
    if not is_file:
        return name
    stem, suffix = os.path.splitext(name)
    return stem + suffix.lower()


def base_name(name: str) -> str:
    """Return a form that is equal for all names that may be the same file."""
    last = unquote(name).replace("\\", "/").rstrip("/ \r\n").rpartition("/")[2]
    return without_hash(unicodedata.normalize("NFC", last).lower())


def without_hash(name: str) -> str:
    """Return a file name without the hash that Label Studio puts in front of uploads."""
    return _LABEL_STUDIO.sub("", name, count=1)


def _texts(name: str) -> Iterator[str]:
    """Yield a name and what it may stand for, with "/" between folders."""
    yield name
    text = name.strip()
    if "?d=" in text:  # Label Studio's local files: /data/local-files/?d=FILE
        text = unquote(text.split("?d=", 1)[1].split("&")[0])
    elif _URL.match(text):
        scheme, _, rest = text.partition("://")
        if scheme.lower() == "file":  # encoded; the host "localhost" is this machine
            text = unquote(rest.removeprefix("localhost"), errors="surrogateescape")
            text = text[1:] if _DRIVE.match(text[1:]) else text
        else:  # the host is a folder, as where wget or a crawler puts the file
            text = re.split(r"[?#]", rest)[0]
    if "\\" in text:
        yield _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
    text = _DRIVE.sub("", text.replace("\\", "/"))
    yield text
    if "%" in text:
        yield unquote(text, errors="surrogateescape")


def _can_be_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _split(text: str, distance: int) -> Spelling:
    """Return the path that a text stands for; folders followed by ".." cancel out."""
    parts, ups = [], 0
    for part in text.split("/"):
        if part == "..":
            if parts:
                parts.pop()
            else:
                ups += 1
        elif part not in ("", "."):
            parts.append(part)
    is_absolute = text.startswith("/")
    return Spelling(tuple(parts), is_absolute, 0 if is_absolute else ups, not distance, distance)
