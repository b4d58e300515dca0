"""The names that a user asks for: reading them from a command line, and checking them."""

import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from detclipv2_jax.common import text_file
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text.tokenizer import CONTEXT, normalize

if TYPE_CHECKING:
    from detclipv2_jax.inference.predictor import EncodedNames

_LISTED = 3  # names that a warning quotes
# "0: cat", "1<tab>cat" and "0 cat" of label maps; "1 euro coin" is a name.
_NUMBER_AND_MARK = re.compile(r"(\d{1,5})(?:\s*[:;,=)]|\t)\s*\S")
_NUMBER_AND_SPACE = re.compile(r"(\d{1,5})\s+\S")
_LINE = re.compile(r"\r\n|\r|\n")  # str.splitlines also splits at characters inside names


def names_from_flags(names: str | None, names_file: str | None) -> list[str]:
    """Return the names given with `--names` or `--names_file`.

    Args:
      names: as `names_from_text` reads them; not used if `names_file` is given.
      names_file: path of a text file with one name per line, whatever is in the line.

    Raises:
      UserError: there is no name, or the file cannot be read, is JSON or YAML, or numbers its
        lines, as label maps do.
    """
    if names_file is None:
        found = names_from_text(names or "")
        if not found:
            raise UserError(
                f"--names={names!r} contains no name. Give for example 'cat, traffic light'."
            )
        return found
    found = _stripped(_LINE.split(text_file.read_text(names_file)))
    if problem := _not_names(names_file, found):
        raise UserError(f"{names_file}: {problem}.")
    if not found:
        raise UserError(f"{names_file}: contains no name. Write one name per line.")
    return found


def _not_names(path: str, lines: Sequence[str]) -> str:
    """Return what is wrong if the lines of a file are no plain names, "" if they may be."""
    suffix = pathlib.Path(path).suffix.lower()
    if suffix in (".yaml", ".yml", ".json") or (lines and lines[0][0] in "{["):
        kind = "YAML" if suffix in (".yaml", ".yml") else "JSON"
        return f"is {kind}, not a list of names. Write a text file with one name per line"
    for pattern, starts in ((_NUMBER_AND_MARK, (0, 1)), (_NUMBER_AND_SPACE, (0,))):
        found = [pattern.match(line) for line in lines]
        numbers = [int(match[1]) for match in found if match]
        is_counted = len(numbers) == len(lines) > 1 and numbers[0] in starts
        if is_counted and all(a < b for a, b in itertools.pairwise(numbers)):
            return (
                f"its lines are numbered, as {lines[0]!r}, and the numbers would be asked as "
                "parts of the names. Remove them"
            )
    return ""


def names_from_text(text: str) -> list[str]:
    """Return the names that a person typed. Empty ones are left out.

    Where there is more than one line, a line is a name. In a single line names are separated by
    commas; there a name that contains a comma stands between double quotes: '"bow, knot", hat'.
    """
    lines = _stripped(_LINE.split(text))
    if len(lines) != 1:
        return lines
    parts = re.findall(r'\s*("[^"]*,[^"]*"(?=\s*(?:,|$))|[^,]*)(?:,|$)', lines[0])
    return _stripped([part[1:-1] if _is_quoted(part) else part for part in map(str.strip, parts)])


def text_from_names(names: Sequence[str]) -> str:
    """Return a text of which `names_from_text` makes these names: one name per line."""
    if len(names) == 1 and "," in names[0]:
        return f'"{names[0]}"'
    return "\n".join(names)


def _is_quoted(part: str) -> bool:
    return len(part) > 1 and part[0] == part[-1] == '"' and "," in part


def check_names(names: Sequence[str]) -> None:
    """Check that there is at least one name, and that each is a text that is not empty.

    Raises:
      UserError: a name is not valid; the message gives its number.
    """
    if not len(names):
        raise UserError("no names were given. Give at least one name to look for.")
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise UserError(f"name {number} of {len(names)} is {name!r}, expected a string.")
        if not normalize(name):
            raise UserError(f"name {number} of {len(names)} is empty. Remove it or fill it in.")


def check_distinct(names: Sequence[str]) -> None:
    """Raise `UserError` if two names differ only in case and spacing."""
    first: dict[str, int] = {}
    for number, name in enumerate(names, start=1):
        if (other := first.setdefault(normalize(name), number)) != number:
            raise UserError(f"name {number}, {name!r}, is the same as name {other}. Remove one.")


def check_asked(encoded: "EncodedNames") -> None:
    """Raise `UserError` if the model reads two names as the same tokens."""
    for number, other in enumerate(encoded.same_as):
        if other != number:
            raise UserError(
                f"name {number + 1}, {encoded.names[number]!r}, is the same as name {other + 1} to "
                f"the model, which reads {CONTEXT} tokens with start and end: both are asked as "
                f"{encoded.prompts[number]!r}. Shorten them so that they differ, or remove one."
            )


def cut_off_text(encoded: "EncodedNames") -> str | None:
    """Return a sentence about the names that do not fit into the model's tokens; None: all fit."""
    cut = [n for n, is_cut in enumerate(encoded.is_cut) if is_cut]
    if not cut:
        return None
    some = [f"{encoded.names[n]!r} is asked as {encoded.prompts[n]!r}" for n in cut[:_LISTED]]
    more = f", and {len(cut) - _LISTED} more" if len(cut) > _LISTED else ""
    verb = "does" if len(cut) == 1 else "do"
    return (
        f"{len(cut)} of {len(encoded.names)} names {verb} not fit into the {CONTEXT} tokens, "
        f"start and end included, that the model reads: {'; '.join(some)}{more}. Shorten them."
    )


def _stripped(texts: Sequence[str]) -> list[str]:
    # A byte order mark may be left in text that was pasted or joined.
    stripped = [text.strip().strip("\ufeff").strip() for text in texts]
    return [text for text in stripped if text]
