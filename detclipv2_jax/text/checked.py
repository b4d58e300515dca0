"""Tables of names with a sense or definition that somebody chose by hand.

A table is UTF-8 text with tabs. Its first line is "name", "synset", "definition", then more columns
that are not read. A row has a synset of WordNet 3.0 ("hot_dog.n.02"), or a definition that replaces
its gloss, or neither: the bare name is better than any definition. assets/senses.tsv is the
package's own; assets/senses.md says how it was made.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.text_file import read_text
from detclipv2_jax.text.tokenizer import normalize
from detclipv2_jax.text.wordnet import wordnet

COLUMNS = ("name", "synset", "definition")
_ASSET = Path(__file__).parent / "assets" / "senses.tsv"


class Meaning(NamedTuple):
    """What a dataset, or somebody who checked it, says that a name means."""

    definition: str | None = None
    synset: str | None = None  # used where there is no definition

    @classmethod
    def of_category(cls, row: Mapping[str, Any]) -> "Meaning":
        """Return what a category's entry says: "def" (LVIS) or "definition" (V3Det), "synset"."""
        texts = [row.get(field) for field in ("def", "definition", "synset")]
        given = [text.strip() if isinstance(text, str) else "" for text in texts]
        return cls(given[0] or given[1] or None, given[2] or None)

    @property
    def gloss(self) -> str | None:
        """The definition, else the synset's gloss; None without either."""
        return self.definition or (wordnet().definition(self.synset) if self.synset else None)


@functools.cache
def checked_senses() -> Mapping[str, Meaning]:
    """Return the package's own table: names of Objects365, COCO and other datasets."""
    return read_table(_ASSET)


def read_table(path: str | Path) -> dict[str, Meaning]:
    """Return normalized name → meaning.

    Raises:
        UserError: the file cannot be read, or a line is not valid; names the line.
    """
    head, *lines = re.split(r"\r\n|\r|\n", read_text(path))
    if tuple(head.lower().split("\t")[:3]) != COLUMNS:
        raise UserError(
            f"{path}, line 1: expected the columns {', '.join(COLUMNS)}, separated by tabs. Add "
            "this line."
        )
    found: dict[str, Meaning] = {}
    for number, line in enumerate(lines, 2):
        if not line.strip() or line.startswith("#"):
            continue
        name, meaning = _row(f"{path}, line {number}", line)
        if name in found:
            raise UserError(f"{path}, line {number}: {name!r} is already defined. Keep one line.")
        found[name] = meaning
    return found


def _row(where: str, line: str) -> tuple[str, Meaning]:
    cells = [cell.strip() for cell in line.split("\t")]
    name, synset, definition = [*cells, "", ""][:3]
    name = normalize(name)
    if not name:
        raise UserError(f"{where}: has no name. Add one, or remove the line.")
    if synset and wordnet().canonical(synset) is None:
        raise UserError(
            f"{where}: {synset!r} is not a noun of WordNet 3.0. Write a synset such as "
            "hot_dog.n.02, or a definition in the third column."
        )
    return name, Meaning(definition or None, (wordnet().canonical(synset) if synset else None))
