"""The names that a user asks for: reading them from a command line, and checking them."""

import pathlib
from collections.abc import Sequence

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text.tokenizer import normalize


def names_from_flags(names: str | None, names_file: str | None) -> list[str]:
    """Return the names given with `--names` or `--names_file`.

    Args:
      names: names separated by commas; not used if `names_file` is given.
      names_file: path of a UTF-8 text file with one name per line.

    Raises:
      UserError: there is no name, or the file cannot be read.
    """
    if names_file is None:
        found = _stripped((names or "").split(","))
        if not found:
            raise UserError(
                f"--names={names!r} contains no name. Give for example 'cat, traffic light'."
            )
        return found
    try:
        lines = pathlib.Path(names_file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{names_file}: not valid UTF-8 (byte {error.start}). Save the file as UTF-8."
        ) from None
    except OSError as error:
        raise UserError(
            f"{names_file}: cannot be read ({error.strerror}). Check the path of --names_file."
        ) from None
    found = _stripped(lines)
    if not found:
        raise UserError(f"{names_file}: contains no name. Write one name per line.")
    return found


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


def _stripped(texts: Sequence[str]) -> list[str]:
    return [text.strip() for text in texts if text.strip()]
