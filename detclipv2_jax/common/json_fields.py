"""Typed fields of JSON entries: the one place that turns values into ids, numbers, flags and texts.

Files pass through spreadsheets, pandas and MATLAB, which turn 1 into "1" or 1.0 and true into
"true". Where that is certain, the value is restored; any other value is a `FieldError` that quotes
it. `null` is "not given". NaN and infinity are never values, also where a field is optional.
"""

import json
import math
import re
from collections.abc import Container, Mapping
from typing import Any

_MISSING = object()
_WHOLE = re.compile(r"[+-]?(?:0|[1-9][0-9]*)(?:\.0*)?")
_DIGITS = re.compile(r"([+-]?[0-9]+)(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_BYTES = re.compile("[\udc80-\udcff]")
_FLAGS = {"": False, "0": False, "0.0": False, "false": False, "no": False}
_FLAGS |= {"1": True, "1.0": True, "true": True, "yes": True}
_EXACT = 2**53  # larger whole floats may have lost their last digits
_LONGEST_SHOWN = 60  # characters of a value that messages quote

#: The canonical form of an id: a whole number, or a text that is not one.
Identifier = int | str


class FieldError(ValueError):
    """A field is missing or invalid. The message begins with its name, and quotes the value."""

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field} {problem}")


def locate(where: str, error: Exception) -> str:
    """Return the sentence of an error of an entry: `FILE: images[3].height is null, not ...`.

    Args:
      where: the entry, as "FILE: images[3]".
      error: why it is invalid.
    """
    return f"{where}{'.' if isinstance(error, FieldError) else ': '}{error}"


def shorten(value: Any) -> str:
    """Return a value as JSON has it, in at most 60 ASCII characters, for a message."""
    try:
        shown = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        shown = ascii(value) if not isinstance(value, dict | list) else type(value).__name__
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[: _LONGEST_SHOWN - 3]}..."


def _get(entry: Mapping[str, Any], field: str) -> Any:
    value = entry.get(field, _MISSING)
    if value is _MISSING:
        raise FieldError(field, "is missing")
    return value


def _invalid(field: str, value: Any, expected: str) -> FieldError:
    return FieldError(field, f"is {shorten(value)}, not {expected}")


def entry_object(value: Any) -> dict[str, Any]:
    """Return an entry that is a JSON object; otherwise raise `ValueError`."""
    if isinstance(value, dict):
        return value
    raise ValueError(f"{shorten(value)} is not an object")


def identifier(entry: Mapping[str, Any], field: str) -> Identifier:
    """Return an id in its canonical form.

    1, 1.0, "1" and "1.0" are the number 1. A text with leading zeros ("000123") is not the number
    123, because files have both; nor is any other text a number.

    Raises:
      FieldError: the field is missing, or is null, a boolean, a fraction, NaN, a blank text, or a
        float whose last digits may be lost.
    """
    value = _get(entry, field)
    if type(value) is int:
        return value
    found = as_identifier(value)
    if found is None:
        raise _invalid(field, value, "a whole number or a text")
    return found


def as_identifier(value: Any) -> Identifier | None:
    """Return the canonical form of an id (see `identifier`); None if it is not an id."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return int(value) if abs(value) <= _EXACT and value == int(value) else None
    if not isinstance(value, str) or not (text := value.strip()) or not _is_unicode(text):
        return None
    return int(text.partition(".")[0]) if _WHOLE.fullmatch(text) and len(text) < 1000 else text


def identifiers(entry: Mapping[str, Any], field: str) -> tuple[Identifier, ...] | None:
    """Return a list of ids in canonical form; None if the field is missing or null.

    Raises:
      FieldError: the field is anything else.
    """
    value = entry.get(field)
    if value is None:
        return None
    found = tuple(map(as_identifier, value)) if isinstance(value, list) else (None,)
    if None in found:
        raise _invalid(field, value, "a list of ids")
    return found


def similar_identifier(wanted: Identifier, known: Container[Identifier]) -> str:
    """Return a hint at a known id that differs from an unknown one in leading zeros only, or ""."""
    number = int(wanted) if re.fullmatch(r"-?[0-9]{1,30}", str(wanted)) else None
    if number is None:
        return ""
    others = [number, *(f"{number:0{digits}d}" for digits in range(2, 31))]
    found = next((one for one in others if one != wanted and one in known), None)
    if found is None:
        return ""
    return f" ({shorten(found)} is; a text with leading zeros is another id than the number)"


def integer(entry: Mapping[str, Any], field: str) -> int:
    """Return a whole number, also from 480.0, "480" or "480.0".

    Raises:
      FieldError: the field is missing or anything else.
    """
    value = _get(entry, field)
    if type(value) is int:
        return value
    if isinstance(value, str) and (match := _DIGITS.fullmatch(value.strip())):
        if len(match[1]) < 1000:
            return int(match[1])
    elif isinstance(value, float) and abs(value) <= _EXACT and value == int(value):
        return int(value)
    raise _invalid(field, value, "a whole number")


def size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) in pixels; None if one of them is missing or null.

    Raises:
      FieldError: one of them is not a positive whole number.
    """
    if entry.get("height") is None or entry.get("width") is None:
        return None
    for field in ("height", "width"):
        if integer(entry, field) <= 0:
            raise _invalid(field, entry[field], "a positive number of pixels")
    return integer(entry, "height"), integer(entry, "width")


def number(entry: Mapping[str, Any], field: str) -> float:
    """Return a finite number, also from the text of one.

    Raises:
      FieldError: the field is missing or anything else.
    """
    value = _get(entry, field)
    found = _as_float(value)
    if found is None or not math.isfinite(found):
        raise _invalid(field, value, "a finite number")
    return found


def _as_float(value: Any) -> float | None:
    """Return a number or the text of one as a float, which may be NaN or infinite; or None."""
    if isinstance(value, str):
        return float(value) if _NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:  # an int of more than 308 digits
        return None


def box(
    entry: Mapping[str, Any], field: str = "bbox", *, finite: bool = True
) -> tuple[float, float, float, float]:
    """Return four numbers, [x, y, width, height] in COCO's format, also from texts of numbers.

    Of a rotated box (see `rotation`) it is the upright box around it.

    Args:
      entry: the entry.
      field: the field.
      finite: whether NaN and infinity are errors; otherwise they are returned.

    Raises:
      FieldError: the field is missing or anything else.
    """
    value = entry.get(field)
    if isinstance(value, list) and len(value) == 4:
        a, b, c, d = value
        if type(a) is type(b) is type(c) is type(d) is float:
            found = (a, b, c, d)
        else:
            found = (_as_float(a), _as_float(b), _as_float(c), _as_float(d))
        if None not in found and (not finite or all(map(math.isfinite, found))):
            degrees = rotation(entry) if "attributes" in entry else 0.0
            # pyright: None is excluded
            return _around(found, degrees) if degrees else found  # pyright: ignore
    if field not in entry or value in (None, []):
        problem = "is missing" if field not in entry else f"is {shorten(value)}"
        if entry.get("segmentation"):
            problem += " (the segmentation is not read)"
        raise FieldError(field, f"{problem}; expected four numbers [x, y, width, height]")
    raise _invalid(field, value, f"four {'finite ' * finite}numbers [x, y, width, height]")


def rotation(entry: Mapping[str, Any]) -> float:
    """Return the degrees by which the box of an annotation is turned clockwise about its center.

    CVAT lets people turn boxes. It exports the box before turning, with `attributes.rotation`.
    With a segmentation the box is the one around that, and 0 is returned.

    Raises:
      FieldError: the rotation is not a finite number.
    """
    attributes = entry.get("attributes")
    found = attributes.get("rotation") if isinstance(attributes, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        return 0.0  # an attribute of the user's own, such as "left"
    if entry.get("segmentation"):
        return 0.0
    if not math.isfinite(found):
        raise _invalid("attributes.rotation", found, "a finite number of degrees")
    return found % 360


def _around(
    xywh: tuple[float, float, float, float], degrees: float
) -> tuple[float, float, float, float]:
    """Return the upright box around a box that is turned about its center."""
    x, y, width, height = xywh
    if degrees == 180 or not (width > 0 and height > 0):
        return xywh
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    if degrees % 180 == 90:
        cos = 0.0  # exactly
    wide, high = width * cos + height * sin, width * sin + height * cos
    return x + (width - wide) / 2, y + (height - high) / 2, wide, high


def flag(entry: Mapping[str, Any], field: str) -> bool:
    """Return a boolean, also from 0, 1, 0.0, "0", "false" or "no"; missing and null are false.

    Raises:
      FieldError: the field is anything else.
    """
    value = entry.get(field)
    if value is None or value is False or (type(value) is int and value == 0):
        return False
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in _FLAGS:
        return _FLAGS[value.strip().lower()]
    raise _invalid(field, value, "0 or 1")


def text(entry: Mapping[str, Any], field: str) -> str:
    """Return a text that is not blank, as it is.

    Raises:
      FieldError: the field is missing, blank, not a text, or not valid Unicode.
    """
    value = _get(entry, field)
    if not isinstance(value, str):
        raise _invalid(field, value, "a text")
    if not value.strip():
        raise FieldError(field, f"is {shorten(value)}, which is blank")
    if not _is_unicode(value):
        raise FieldError(field, f"is {shorten(value)}, not valid Unicode")
    return value


def file_name(entry: Mapping[str, Any], field: str) -> str:
    """Return a text that names a file, as it is.

    Half surrogates that stand for bytes (PEP 383) are allowed: Python writes them for file names
    that are not UTF-8.

    Raises:
      FieldError: as `text`.
    """
    value = _get(entry, field)
    if isinstance(value, str) and not _is_unicode(value):
        text({field: _BYTES.sub("x", value)}, field)
        return value
    return text(entry, field)


def optional_text(entry: Mapping[str, Any], field: str) -> str | None:
    """Return a text (see `text`); None if the field is missing, null or empty."""
    return None if entry.get(field) in (None, "") else text(entry, field)


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, such as "\ud800"
        return False
    return True
