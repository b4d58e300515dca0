"""Streaming reader of large JSON files: it holds one entry of a top-level list at a time.

Python's own JSON scanner parses each entry, so everything that `json.loads` accepts (such as NaN)
is accepted here. docs/data.md says how much memory it saves on annotation files of gigabytes.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detclipv2_jax.common.errors import UserError

_CHUNK = 1 << 22  # bytes per read; more where one value is longer
_SPACE = re.compile(r"[ \t\n\r]*")
# If the end of the window cuts a value, the scanner fails within this many characters of the end,
# or at the start of an unterminated string.
_TOKEN = 16  # the longest token: "-Infinity" has 9 characters, an escaped surrogate pair 12


def read_lists(path: Path, fields: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Yield (field, number, entry) for each entry of some top-level lists of a JSON object.

    Lists and entries come in the order of the file. The number counts the entries of a list from 0.

    Args:
      path: the file.
      fields: names of the lists to read.

    Raises:
      UserError: the file cannot be read or is not a JSON object; or, after the last entry, one of
        `fields` is missing or is not a list.
    """
    with _open(path) as scanner:
        yield from _lists(scanner, path, fields)


def read_entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list; `UserError` if the file cannot be read or is not one."""
    with _open(path) as scanner:
        if scanner.peek() != "[":
            value = scanner.value()
            found = "object" if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"{path}: holds a JSON {found}, not a list. Give a file of the right format."
            )
        yield from scanner.entries()
        scanner.end()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; `UserError` if it cannot be read or is not JSON."""
    with _open(path) as scanner:
        value = scanner.value()
        scanner.end()
        return value


@contextlib.contextmanager
def _open(path: Path) -> "Iterator[_Scanner]":
    """Yield a scanner of a file; reading and syntax errors in the block become `UserError`."""
    try:
        with open(path, "rb") as file:
            yield _Scanner(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Check the path.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except (_Malformed, UnicodeDecodeError, RecursionError) as error:
        reason = f", {error}" if isinstance(error, _Malformed) else ": not JSON text"
        raise UserError(f"{path}{reason}. Download or export the file again.") from error


def _lists(
    scanner: "_Scanner", path: Path, fields: Collection[str]
) -> Iterator[tuple[str, int, Any]]:
    is_list: dict[str, bool] = {}
    if scanner.peek() != "{":
        scanner.value()
    else:
        for field in scanner.fields():
            if field in is_list:
                raise UserError(f'{path}: its top level has "{field}" twice. Export it again.')
            is_list[field] = scanner.peek() == "["
            if not is_list[field]:
                scanner.value()
                continue
            # Other lists are also read entry by entry, because they may be long.
            for number, entry in enumerate(scanner.entries()):
                if field in fields:
                    yield field, number, entry
    scanner.end()
    for field in fields:
        if is_list.get(field):
            continue
        raise UserError(
            f'{path}: its top level has no list "{field}". Give a file in the format that '
            "`detclip prepare --help` describes."
        )


class _Malformed(ValueError):
    """The text is not JSON; the message gives line and column."""


class _Scanner:
    """A JSON parser that holds only a window of the text: `_text`, parsed up to `_at`."""

    def __init__(self, file: BinaryIO):
        start = file.read(_CHUNK)
        encoding = json.detect_encoding(start)
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._scan = json.JSONDecoder().scan_once
        self._text, self._at = self._decoder.decode(start, not start), 0
        self._line, self._column = 1, 1  # of the window's first character
        self._ended = not start

    def peek(self) -> str:
        """Return the next character that is not a space, without consuming it; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Parse and return the next value."""
        self.peek()
        while True:
            try:
                value, end = self._scan(self._text, self._at)
            except StopIteration as stop:
                problem, position = "Expecting value", stop.value
            except json.JSONDecodeError as error:
                problem, position = error.msg, error.pos
            except RecursionError:
                raise
            except ValueError as error:  # a number of thousands of digits
                raise self._malformed(str(error), self._at) from error
            else:
                # A number at the end of the window may continue after it: 1|2, 1.|5, 1e|5.
                if len(self._text) - end < _TOKEN and self._more():
                    continue
                self._at = end
                return value
            cut = problem.startswith("Unterminated") or position >= len(self._text) - _TOKEN
            if not cut or not self._more():
                raise self._malformed(problem, position)

    def fields(self) -> Iterator[str]:
        """Yield the keys of the next object; the caller consumes each value before the next key."""
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._malformed("Expecting property name enclosed in double quotes", self._at)
            key = self.value()
            self._take(":")
            yield key

    def entries(self) -> Iterator[Any]:
        """Yield the entries of the next list."""
        for _ in self._items("[", "]"):
            yield self.value()

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek():
            raise self._malformed("Extra data", self._at)

    def _items(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            yield
            if self.peek() == closing:
                self._at += 1
                return
            self._take(",")

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._malformed(f"Expecting '{character}'", self._at)
        self._at += 1

    def _more(self) -> bool:
        """Read the next chunk and drop the consumed text; False at the end of the file."""
        if self._ended:
            return False
        taken, rest = self._text[: self._at], self._text[self._at :]
        self._line, self._column = self._place(len(taken))
        # The window at least doubles, so that a long value is not scanned again for every chunk.
        data = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not data
        self._text, self._at = rest + self._decoder.decode(data, self._ended), 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        """Return line and column of a position in the window."""
        lines = self._text.count("\n", 0, position)
        if not lines:
            return self._line, self._column + position
        return self._line + lines, position - self._text.rfind("\n", 0, position)

    def _malformed(self, problem: str, position: int) -> _Malformed:
        line, column = self._place(position)
        return _Malformed(f"line {line}, column {column}: not valid JSON ({problem})")
