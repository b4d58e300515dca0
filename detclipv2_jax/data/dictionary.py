"""Reading the concept dictionary: names and frequent phrases, with definitions and synonyms.

`detclip prepare concepts` (data/prepare/dictionary_writer.py) writes it once for all prepared
sources, to DIR/dictionary.jsonl. The first line says what it was made from. Each other line is a
concept, the most frequent first (the first line has a digest of these):

    {"name", "count", "definition", "origin", "like", "synsets", "group"}

`origin` and `like` are those of `definitions.Definition`; concepts of one `group` are synonyms.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt16, UInt64

from detclipv2_jax.common import digests
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.definitions import synsets_of

FILE = "dictionary.jsonl"
FORMAT = 2  # 1: WordNet's first senses


@dataclasses.dataclass(frozen=True, eq=False)
class Dictionary:
    """An open dictionary of n concepts, in the order of its file."""

    directory: Path
    info: Mapping[str, Any]  # the first line
    rows: Sequence[Mapping[str, Any]]  # the other lines

    @classmethod
    def open(cls, directory: str | Path) -> "Dictionary":
        """Read a prepared dictionary.

        Raises:
            UserError: it is missing, damaged or of another format.
        """
        directory = Path(directory)
        path = directory / FILE
        try:
            content = path.read_bytes()
            lines = content.decode().removesuffix("\n").split("\n")
        except FileNotFoundError:
            raise UserError(f"{path}: no such file. {_remedy(directory)}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read ({error}). {_remedy(directory)}") from None
        info = _parse(path, 1, lines[0], {"format": int, "concepts": int})
        if info["format"] != FORMAT:
            raise UserError(
                f"{path}: has format {info['format']}, but this version reads {FORMAT}. "
                f"{_remedy(directory)}"
            )
        rows = [_row(path, number, line) for number, line in enumerate(lines[1:], 2)]
        if len(rows) != info["concepts"]:
            raise UserError(
                f"{path}: has {len(rows)} concepts, but its first line says {info['concepts']}. "
                f"{_remedy(directory)}"
            )
        _verify(path, info, content)
        return cls(directory, info, rows)

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def names(self) -> list[str]:
        """The concepts' texts, normalized."""
        return [row["name"] for row in self.rows]

    @functools.cached_property
    def definitions(self) -> dict[str, str]:
        """Name → definition; "" for concepts that have none."""
        return {row["name"]: row["definition"] or "" for row in self.rows}

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, " n"]:
        """`tokenizer.key` of each name."""
        return tokenizer_lib.keys(self.names)

    @functools.cached_property
    def tokens(self) -> UInt16[np.ndarray, "n 16"]:
        """Token ids of the names without definitions."""
        return tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(self.names))

    @functools.cached_property
    def groups(self) -> Int32[np.ndarray, " n"]:
        """The group of each concept; synonyms have the same group."""
        return np.array([row["group"] for row in self.rows], np.int32)

    def groups_of(self, names: Iterable[str]) -> Int32[np.ndarray, " m"]:
        """Return the group that each name belongs to; -1 for a synonym of no concept."""
        return np.array([self._group_of(name) for name in names], np.int32)

    @property
    def concepts(self) -> Sequence[Mapping[str, Any]]:
        """The rows, by the name that `Source` uses for them."""
        return self.rows

    @functools.cached_property
    def _by_mark(self) -> dict[str, int]:
        """Mark → group. The marks of a concept are its synsets and its letters."""
        return {
            mark: row["group"]
            for row in self.rows
            for mark in (*row["synsets"], letters(row["name"]))
        }

    def _group_of(self, name: str) -> int:
        marks = (letters(name), *synsets_of(name))
        return next((self._by_mark[mark] for mark in marks if mark in self._by_mark), -1)


def _verify(path: Path, info: Mapping[str, Any], content: bytes) -> None:
    """Raise `UserError` unless the lines after the first have the digest that it says."""
    rest = content[content.find(b"\n") + 1 :]
    # Dictionaries of older versions have no digest.
    if "digest" in info and info["digest"] != digests.of_bytes(rest):
        raise UserError(
            f"{path}: damaged or edited: its content does not have the digest in its first line. "
            f'{_remedy(path.parent)} To keep your edits, remove "digest" from the first line.'
        )


_FIELDS = {
    "name": str,
    "count": int,
    "definition": str | None,
    "origin": str,
    "like": str | None,
    "synsets": list,
    "group": int,
}


def letters(name: str) -> str:
    """Return a name's letters and digits without a plural s; the name itself if it has none."""
    letters = re.sub(r"[\W_]+", "", name)
    return letters[:-1] if letters.endswith("s") and not letters.endswith("ss") else letters or name


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return a concept's line, checked, because users may edit the file."""
    row = _parse(path, number, line, _FIELDS)
    row["name"] = tokenizer_lib.normalize(row["name"])
    for field, holds in (
        ("name", row["name"]),
        ("synsets", all(isinstance(synset, str) for synset in row["synsets"])),
        ("group", 0 <= row["group"] < 2**31),
    ):
        if not holds:
            raise UserError(
                f"{path}, line {number}: {field!r} is not valid. {_remedy(path.parent)}"
            )
    return row


def _parse(path: Path, number: int, line: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of the file as an object; `fields`: its required fields and their types."""
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    is_object = isinstance(row, dict)
    wrong = [
        field
        for field, kind in fields.items()
        if not is_object or field not in row or not isinstance(row[field], kind)
    ]
    if wrong:
        raise UserError(
            f"{path}, line {number}: "
            f"{f'{wrong[0]!r} is missing or not valid' if is_object else 'not a JSON object'}. "
            f"{_remedy(path.parent)}"
        )
    return row


def _remedy(directory: Path) -> str:
    return f"Make it with `detclip prepare concepts --from=DATA --to={directory}`."
