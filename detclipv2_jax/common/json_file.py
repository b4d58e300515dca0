"""Reader of JSON files. All commands read JSON here, so they all accept the same files.

Large files are streamed: one entry of a top-level list is held at a time. Python's own JSON scanner
parses each entry, so everything that `json.loads` accepts (such as NaN) is accepted here, but not
two values for one key. text_file.py opens and decodes the files, json_fields.py checks the values.
docs/data.md says how much memory streaming saves on annotation files of gigabytes.
"""

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.text_file import TextDecoder, open_bytes

_CHUNK = 1 << 22  # bytes per read; more where one value is longer
_SPACE = re.compile(r"[ \t\n\r]*")
_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_SPACES = ("", " ", "\t", "\n", "\r")
# If the end of the window cuts a value, the scanner fails within this many characters of the end,
# or at the start of an unterminated string.
_TOKEN = 16  # the longest token: "-Infinity" has 9 characters, an escaped surrogate pair 12


def read_lists(
    path: Path,
    fields: Collection[str],
    fix: str = "Give a file in the format that `detclip prepare --help` describes.",
) -> Iterator[tuple[str, int, Any]]:
    """Yield (field, number, entry) for each entry of some top-level lists of a JSON object.

    Lists and entries come in the order of the file. The number counts the entries of a list from 0.

    Args:
      path: the file.
      fields: names of the lists to read.
      fix: what to do if one of them is missing.

    Raises:
      UserError: the file cannot be read or is not a JSON object; or, after the last entry, one of
        `fields` is missing or is not a list.
    """
    with _open(path) as scanner:
        yield from _lists(scanner, path, fields, fix)


def read_entries(path: Path) -> Iterator[Any]:
    """Yield the entries of a JSON list; `UserError` if the file cannot be read or is not one."""
    with _open(path) as scanner:
        if scanner.peek() != "[":
            raise UserError(
                f"{path}: holds a JSON {scanner.type()}, not a list. Give a file of the right "
                "format."
            )
        yield from scanner.entries()
        scanner.end()


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file; `UserError` if it cannot be read or is not JSON."""
    with _open(path) as scanner:
        value = scanner.document()
        scanner.end()
        return value


def read_object(path: str | Path) -> dict[str, Any]:
    """Return the content of a JSON file that is an object; `UserError` if it is not one."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: holds a JSON {json_type(value)}, not an object. Give a file of the right "
            "format."
        )
    return value


def first_character(path: str | Path) -> str:
    """Return the first character of a JSON file that is not a space, such as "{" or "["."""
    with _open(path) as scanner:
        return scanner.peek()


def parse_line(line: str) -> Any:
    """Return the value of a line of JSON lines; `ValueError` says what is wrong."""
    try:
        return _STRICT.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("not valid JSON (nested too deeply)") from error


def json_type(value: Any) -> str:
    """Return what JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "text", type(None): "null"}
    return names.get(type(value), "boolean" if isinstance(value, bool) else "number")


class _TwoValuesError(ValueError):
    """An object has two values for one key."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; a key may occur again with the same value."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and repr(found[key]) != repr(value):
            raise _TwoValuesError(f"an object has two values for {json.dumps(key)}")
        found[key] = value
    return found


_STRICT = json.JSONDecoder(object_pairs_hook=_unique)


@contextlib.contextmanager
def _open(path: str | Path) -> "Iterator[_Scanner]":
    """Yield a scanner of a file; reading and syntax errors in the block become `UserError`."""
    try:
        with open_bytes(path) as file:
            yield _Scanner(path, file)
    except _Malformed as error:
        raise UserError(f"{path}, {error}") from error
    except RecursionError as error:
        raise UserError(
            f"{path}: not valid JSON (nested too deeply). Export the file again."
        ) from error


def _lists(
    scanner: "_Scanner", path: Path, fields: Collection[str], fix: str
) -> Iterator[tuple[str, int, Any]]:
    is_list: dict[str, bool] = {}
    if scanner.peek() != "{":
        raise UserError(
            f"{path}: holds a JSON {scanner.type()}, expected an object with the lists "
            f"{', '.join(map(json.dumps, fields))}. Give a file of the right format."
        )
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
        raise UserError(f'{path}: its top level has no list "{field}". {fix}')


class _Malformed(ValueError):
    """The text is not JSON; the message gives line and column."""


class _Scanner:
    """A JSON parser that holds only a window of the text: `_text`, parsed up to `_at`."""

    def __init__(self, path: str | Path, file: BinaryIO):
        start = file.read(_CHUNK)
        self._file, self._decoder = file, TextDecoder(path, start)
        self._scan = json.JSONDecoder().scan_once
        self._text, self._at = self._decoder.decode(start, not start), 0
        self._line, self._column = 1, 1  # of the window's first character
        self._ended = not start
        if not self.peek():
            raise UserError(f"{path}: empty. Download or export the file again.")

    def peek(self) -> str:
        """Return the next character that is not a space, without consuming it; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def type(self) -> str:
        """Return the type of the next value, which is read unless it is a list or an object."""
        return {"[": "list", "{": "object"}.get(self.peek()) or json_type(self.value())

    def value(self) -> Any:
        """Parse and return the next value."""
        if self._text[self._at : self._at + 1] in _SPACES:  # also at the end of the window
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
                raise self._invalid(str(error), self._at) from error
            else:
                # A number at the end of the window may continue after it: 1|2, 1.|5, 1e|5.
                if len(self._text) - end < _TOKEN and self._more():
                    continue
                if not isinstance(value, dict) or self._text.count('":', self._at, end) != len(
                    value
                ):
                    self._check_keys(value, end)
                self._at = end
                return value
            cut = problem.startswith("Unterminated") or position >= len(self._text) - _TOKEN
            if not cut or not self._more():
                raise self._invalid(problem, position)

    def _check_keys(self, value: Any, end: int) -> None:
        """Raise if an object in the value that ends at `end` has two values for a key.

        Python's scanner keeps the last one. A scanner that sees both takes twice as long, so it
        reads only values of which the number of keys differs from the number of colons.
        """
        if isinstance(value, dict):
            keys = len(value) + sum(len(v) for v in value.values() if isinstance(v, dict))
            if keys == self._text.count('":', self._at, end):
                return
        elif not isinstance(value, list) or self._text.find(":", self._at, end) < 0:
            return
        try:
            _STRICT.raw_decode(self._text, self._at)
        except _TwoValuesError as error:
            raise self._malformed(str(error), self._at, "Export the file again") from None

    def document(self) -> Any:
        """Parse and return the next value; lists of the top level are read entry by entry."""
        first = self.peek()
        if first == "[":
            return list(self.entries())
        if first != "{":
            return self.value()
        found: dict[str, Any] = {}
        for field in self.fields():
            value = list(self.entries()) if self.peek() == "[" else self.value()
            if field in found and repr(found[field]) != repr(value):
                problem = f"the top level has two values for {json.dumps(field)}"
                raise self._malformed(problem, self._at, "Export the file again")
            found[field] = value
        return found

    def fields(self) -> Iterator[str]:
        """Yield the keys of the next object; the caller consumes each value before the next key."""
        for _ in self._items("{", "}"):
            if self.peek() != '"':
                raise self._invalid("Expecting property name enclosed in double quotes", self._at)
            key = self.value()
            self._take(":")
            yield key

    def entries(self) -> Iterator[Any]:
        """Yield the entries of the next list."""
        for _ in self._items("[", "]"):
            yield self.value()
            # Faster than `_items`, which a large file would enter millions of times.
            while (comma := _COMMA.match(self._text, self._at)) and comma.end() < len(self._text):
                self._at = comma.end()
                yield self.value()

    def end(self) -> None:
        """Check that nothing follows."""
        if self.peek() in ("{", "["):
            problem = "a second JSON value begins here, the file must have one"
            raise self._malformed(
                problem, self._at, "Give one document; only files of captions are JSON lines"
            )
        if self.peek():
            raise self._malformed("not valid JSON (Extra data)", self._at)

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
            raise self._invalid(f"Expecting '{character}'", self._at)
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

    def _malformed(
        self, problem: str, position: int, fix: str = "Download or export the file again"
    ) -> _Malformed:
        line, column = self._place(position)
        return _Malformed(f"line {line}, column {column}: {problem}. {fix}.")

    def _invalid(self, problem: str, position: int) -> _Malformed:
        """Return the error of text that is not JSON."""
        is_end = self._ended and _SPACE.match(self._text, position).end() == len(self._text)
        is_cut = is_end or problem.startswith("Unterminated")
        reason = ", because the file ends too early" if is_cut else ""
        return self._malformed(f"not valid JSON ({problem}){reason}", position)
