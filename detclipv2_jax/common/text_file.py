"""Reader of text files that people and other tools wrote: JSON, JSON lines, tables, lists of names.

Every command reads such files here, so that all of them accept the same ones: UTF-8, UTF-16 and
UTF-32, with or without a byte order mark, each also compressed with gzip, whatever the suffix. Text
of another encoding is refused, because a guess would change names without a word.
"""

import codecs
import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from detclipv2_jax.common import lfs_pointer
from detclipv2_jax.common.errors import UserError

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP = b"\x1f\x8b"
# First bytes of files that hold other files -> what they are.
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf": "a 7z archive",
}


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[BinaryIO]:
    """Open a text file for reading bytes, unpacked if it is compressed with gzip.

    Raises:
      UserError: the file is missing or cannot be read, is another archive, or, also within the
        block, its gzip data are damaged.
    """
    path = Path(path)
    try:
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            start = file.read(lfs_pointer.LENGTH)
            file.seek(0)
            if lfs_pointer.is_pointer(start):
                raise UserError(f"{path}: {lfs_pointer.REASON}.")
            for magic, what in _ARCHIVES.items():
                if start.startswith(magic):
                    raise UserError(f"{path}: {what}. Unpack it and give the file in it.")
            if start.startswith(_GZIP):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = "ends too early" if isinstance(error, EOFError) else str(error)
        raise UserError(
            f"{path}: its gzip data are damaged ({reason}). Download or export the file again."
        ) from error
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error


class TextDecoder:
    """Decodes the bytes of one file piece by piece; the first piece shows the encoding.

    Attributes:
      encoding: name of the codec.
    """

    def __init__(self, path: str | Path, start: bytes):
        """Choose the encoding; `start`, which is not yet decoded, must have 4 bytes if possible."""
        self._path, self._taken = path, 0
        self.encoding = json.detect_encoding(start)
        self._decoder = codecs.getincrementaldecoder(self.encoding)("surrogatepass")

    def decode(self, data: bytes, final: bool) -> str:
        """Return the text of the next bytes; `UserError` names the byte that is not text."""
        self._taken += len(data)
        try:
            return self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._path}, byte {self._taken - len(error.object) + error.start}: "
                f"{not_text(error)}."
            ) from error


def not_text(error: UnicodeDecodeError) -> str:
    """Return why bytes are not text, and what to do, without the place and the full stop."""
    encoding = "-".join(error.encoding.upper().replace("_", "-").split("-")[:2])  # without "-LE"
    value = error.object[error.start]
    shown = f"0x{value:02x} is not {encoding} text"
    if encoding != "UTF-8" or error.reason == "unexpected end of data":
        return f"{shown} ({error.reason}). Save or download the file again, as UTF-8"
    with contextlib.suppress(UnicodeDecodeError):
        character = bytes([value]).decode("cp1252")
        if character.isprintable():
            shown += f" (in Windows-1252 it is {character!r})"
    return (
        f"{shown}. Save the file as UTF-8, for example with `iconv -f WINDOWS-1252 -t UTF-8 FILE`"
    )


def read_text(path: str | Path) -> str:
    """Return the content of a text file, with line ends as they are.

    Raises:
      UserError: the file cannot be read or its encoding is unknown; names the byte.
    """
    with open_bytes(path) as file:
        data = file.read()
    return TextDecoder(path, data).decode(data, final=True)


def read_lines(path: str | Path) -> Iterator[tuple[int, str | ValueError]]:
    """Yield (number, line) of the lines that are not blank, from 1, without their ends.

    UTF-16 and UTF-32 need a byte order mark. Only \\n and \\r\\n end a line. A line of UTF-8 that
    is not text is yielded as the error that says so, because the lines after it are still good.

    Raises:
      UserError: the file cannot be read, or is UTF-16 or UTF-32 that is damaged.
    """
    with open_bytes(path) as file:
        start = file.read(4)
        file.seek(0)
        # Damaged UTF-8 may begin with zeros, as UTF-16 does: only a byte order mark decides.
        encoding = json.detect_encoding(start) if start.startswith(_MARKS) else "utf-8"
        if encoding.startswith("utf-8"):
            lines = (_decoded(line, encoding if n == 0 else "utf-8") for n, line in enumerate(file))
        else:
            lines = io.TextIOWrapper(file, encoding, newline="\n")
        try:
            for number, line in enumerate(lines, 1):
                if isinstance(line, ValueError) or line.strip():
                    yield number, line if isinstance(line, ValueError) else line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {not_text(error)}.") from error


def _decoded(line: bytes, encoding: str) -> str | ValueError:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        return ValueError(f"byte {error.start} of the line: {not_text(error)}")


def decode_text(data: bytes) -> str:
    """Return the text of bytes: UTF-8, or what a byte order mark says.

    Raises:
      ValueError: it is not text; says which byte.
    """
    encoding = json.detect_encoding(data[:4]) if data.startswith(_MARKS) else "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start}: {not_text(error)}") from error
