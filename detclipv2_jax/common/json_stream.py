"""A JSON object read list by list, entry by entry: annotation files have gigabytes.

Python's own JSON scanner does the work, one entry of a top-level list at a time, so NaN, numbers as
texts and whatever else `json.loads` takes is taken here too. docs/data.md has what it saves.
"""

import codecs
import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detclipv2_jax.common.errors import UserError

_CHUNK = 1 << 22  # bytes read at once, and more where one value is longer
_SPACE = re.compile(r"[ \t\n\r]*")
# A value that is cut off at the end of what was read fails within its last token or, a text that
# has no end yet, at that text's start.
_TOKEN = 16  # characters; "-Infinity" has 9, an escaped surrogate pair 12


def read_lists(path: Path, fields: Collection[str]) -> Iterator[tuple[str, int, Any]]:
    """Entries of the lists that a JSON object has under `fields`: (field, number, entry).

    They come in the file's order, of lists and of entries. `UserError` where the file cannot be
    read or is no JSON object, and at the end where one of `fields` is missing or no list.
    """
    with _open(path) as scanner:
        yield from _lists(scanner, path, fields)


def read_entries(path: Path) -> Iterator[Any]:
    """Entries of a JSON list; `UserError` where the file cannot be read or is no JSON list."""
    with _open(path) as scanner:
        if scanner.peek() != "[":
            value = scanner.value()
            kind = "object" if isinstance(value, dict) else type(value).__name__
            raise UserError(
                f"{path}: holds a JSON {kind}, not a list; give a file of the right kind"
            )
        yield from scanner.entries()
        scanner.end()


def read_json(path: Path) -> Any:
    """A JSON file whole, whatever it holds; `UserError` where it cannot be read or is no JSON."""
    with _open(path) as scanner:
        value = scanner.value()
        scanner.end()
        return value


@contextlib.contextmanager
def _open(path: Path) -> "Iterator[_Scanner]":
    """A scanner of a file; what goes wrong while it is used becomes a `UserError`."""
    try:
        with open(path, "rb") as file:
            yield _Scanner(file)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check the path") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (_Malformed, UnicodeDecodeError, RecursionError) as error:
        reason = f", {error}" if isinstance(error, _Malformed) else ": not JSON text"
        raise UserError(f"{path}{reason}; download or export the file again") from error


def _lists(
    scanner: "_Scanner", path: Path, fields: Collection[str]
) -> Iterator[tuple[str, int, Any]]:
    is_list: dict[str, bool] = {}
    if scanner.peek() != "{":
        scanner.value()
    else:
        for field in scanner.fields():
            if field in is_list:
                raise UserError(f'{path}: its top level has "{field}" twice; export the file again')
            is_list[field] = scanner.peek() == "["
            if not is_list[field]:
                scanner.value()
                continue
            # The lists that nobody asked for are read entry by entry too: they may be long.
            for number, entry in enumerate(scanner.entries()):
                if field in fields:
                    yield field, number, entry
    scanner.end()
    for field in fields:
        if is_list.get(field):
            continue
        raise UserError(
            f'{path}: its top level has no list "{field}"; give the file in the format that '
            "`python scripts/prepare_data.py --help` describes"
        )


class _Malformed(ValueError):
    """Not JSON; the message says where."""


class _Scanner:
    """A JSON text of which only a window is in memory: `text`, read up to `at`."""

    def __init__(self, file: BinaryIO):
        start = file.read(_CHUNK)
        encoding = json.detect_encoding(start)
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._scan = json.JSONDecoder().scan_once
        self._text, self._at = self._decoder.decode(start, not start), 0
        self._line, self._column = 1, 1  # of the text's first character
        self._ended = not start

    def peek(self) -> str:
        """The next character that is no space, not taken; empty at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self) -> Any:
        """The next value."""
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
                # A number at the window's end may go on behind it: 1, 1.|5, 1e|5.
                if len(self._text) - end < _TOKEN and self._more():
                    continue
                self._at = end
                return value
            cut = problem.startswith("Unterminated") or position >= len(self._text) - _TOKEN
            if not cut or not self._more():
                raise self._malformed(problem, position)

    def fields(self) -> Iterator[str]:
        """The keys of the next object, each at its value, which is to be taken before the next."""
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._malformed("Expecting property name enclosed in double quotes", self._at)
            key = self.value()
            self._take(":")
            yield key

    def entries(self) -> Iterator[Any]:
        """The entries of the next list."""
        for _ in self._items("[", "]"):
            yield self.value()

    def end(self) -> None:
        """Make sure that nothing follows."""
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
        """Read on, dropping what was taken; False at the end."""
        if self._ended:
            return False
        taken, rest = self._text[: self._at], self._text[self._at :]
        self._line, self._column = self._place(len(taken))
        # As much again as is left, so that a long value is not scanned a thousand times.
        data = self._file.read(max(_CHUNK, len(rest)))
        self._ended = not data
        self._text, self._at = rest + self._decoder.decode(data, self._ended), 0
        return True

    def _place(self, position: int) -> tuple[int, int]:
        """Line and column of a position in the text."""
        lines = self._text.count("\n", 0, position)
        if not lines:
            return self._line, self._column + position
        return self._line + lines, position - self._text.rfind("\n", 0, position)

    def _malformed(self, problem: str, position: int) -> _Malformed:
        line, column = self._place(position)
        return _Malformed(f"line {line}, column {column}: not valid JSON ({problem})")
