"""Text that can always be printed and stored, such as a file name in another encoding.

Linux stores file names as bytes. Python stands in "half surrogates" for bytes that are not UTF-8
(PEP 383), and neither a terminal nor a UTF-8 file takes those. They are shown as `caf\\xe9.jpg`.
"""

import codecs
import re
import sys

_LONE = "escape_lone_surrogates"  # name of the error handler below
# A JSON escape; a pair of surrogates is one character, and only a single half needs a change.
_JSON_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([0-9a-fA-F]{4})|.)"
)


def valid_text(text: str) -> str:
    """Return `text` as valid Unicode: bytes that were not UTF-8 are written as `\\xe9`.

    Other halves of surrogate pairs are written as `\\ud800`. Everything else stays as it is.
    """
    return text.encode("utf-8", _LONE).decode("utf-8")


def printable(text: object) -> str:
    """Return `str(text)` on one line, without control characters, as valid Unicode."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in valid_text(str(text)))


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the plural unless it is 1: "1 name", "1,200 names"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def valid_json(text: str) -> str:
    """Return ASCII JSON text whose strings are `valid_text`; strict parsers refuse half a pair."""
    return _JSON_ESCAPE.sub(_escape_half, text) if "\\ud" in text else text


def print_any_text() -> None:
    """Let `print` escape what the terminal's encoding lacks instead of raising an error.

    Every command calls it first.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_LONE)


def _escape_half(match: re.Match) -> str:
    number = int(match[1] or "0", 16)
    return "\\" + _escape(number) if 0xD800 <= number < 0xE000 else match[0]


def _escape(number: int) -> str:
    if 0xDC80 <= number <= 0xDCFF:  # a byte, see PEP 383
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _on_error(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = map(ord, error.object[error.start : error.end])
    shown = (_escape(n) if n < 65536 else f"\\U{n:08x}" for n in characters)
    return "".join(shown), error.end


codecs.register_error(_LONE, _on_error)
