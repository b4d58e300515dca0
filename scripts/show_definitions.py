"""Show what names mean to the model: sense, definition, and where the definition is from.

    python scripts/show_definitions.py "hot dog" kite "potted plant"
    python scripts/show_definitions.py --data=data/objects365 --dictionary=data/concepts
    python scripts/show_definitions.py --names_file=names.txt --definitions_file=FILE --to=table.tsv

Read the list before a long training. To correct it, write a table of your own, a text file with
tabs whose first line is name, synset, definition:

    name	synset	definition
    kite	kite.n.03
    egg tart		a small pastry with a sweet yellow custard filling
    thing

A row has a synset of WordNet 3.0 or a definition; a row with neither gives the name no definition.
`detclip prepare concepts --definitions_file=FILE` writes it into a dictionary, and
`--config.data.definitions_file=FILE` uses it in a run.

`source` is one of: own (the dataset says so), corrected (your table), dictionary, checked (by hand,
text/assets/senses.tsv), synset (LVIS's list), wordnet, nearest or head (borrowed), none.
"""

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path

from detclipv2_jax.common.atomic import write_text
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.data.prepare.concepts import find_sources
from detclipv2_jax.text.checked import read_table
from detclipv2_jax.text.definitions import Definition, Knowledge, define, origins
from detclipv2_jax.text.tokenizer import normalize

_COLUMNS = ("name", "synset", "definition", "source")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 after an error that the user can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--names_file", metavar="FILE", type=Path, help="names, one per line")
    parser.add_argument(
        "--data", metavar="DIR", type=Path, help="prepared sources: the names of their boxes"
    )
    parser.add_argument(
        "--dictionary", metavar="DIR", type=Path, help="folder of a prepared dictionary"
    )
    parser.add_argument(
        "--definitions_file", metavar="FILE", type=Path, help="table of your own definitions"
    )
    parser.add_argument(
        "--to", metavar="FILE", type=Path, help="write a table with tabs instead of printing it"
    )
    return exit_status(show, parser.parse_args(argv))


def show(args: argparse.Namespace) -> None:
    """Print or write the table of the names that the arguments give."""
    if args.to:
        OutputFolder(args.to.parent, "--to").check([args.to.name])
    names = [normalize(name) for name in args.names]
    if args.names_file:
        names += _lines(args.names_file)
    own = {}
    if args.data:
        counted = dictionary_writer.count(find_sources(args.data))
        names += sorted(counted.categories, key=lambda name: -counted.counts[name])
        own = dict(counted.own)
    names = list(dict.fromkeys(filter(None, names)))
    if not names:
        raise UserError("no names are given. Give NAME, --names_file or --data.")
    known = Knowledge(
        own=own,
        corrections=read_table(args.definitions_file) if args.definitions_file else {},
        dictionary=Dictionary.open(args.dictionary).definitions if args.dictionary else {},
    )
    found = define(names, known)
    rows = [_row(name, definition) for name, definition in zip(names, found)]
    if args.to:
        with guarded(OutputFolder(args.to.parent, "--to")):
            write_text(args.to, "\n".join("\t".join(row) for row in (_COLUMNS, *rows)) + "\n")
    else:
        print(as_text(rows))
    print(_summary(found))


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return a table for people."""
    widths = [
        max(map(len, column)) for column in zip(_COLUMNS, *((r[0], r[1], "", r[3]) for r in rows))
    ]
    lines = []
    for name, synset, definition, source in (_COLUMNS, *rows):
        line = f"{name:<{widths[0]}}  {source:<{widths[3]}}  {synset:<{widths[1]}}  {definition}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _row(name: str, found: Definition) -> tuple[str, ...]:
    source = f"{found.origin} ({found.like})" if found.like else found.origin
    return name, found.synset or "", found.text or "", source


def _lines(path: Path) -> list[str]:
    try:
        return [normalize(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give a text file.") from None


def _summary(found: Sequence[Definition]) -> str:
    counts = collections.Counter(origins(found))
    defined = len(found) - counts["none"]
    parts = ", ".join(f"{origin} {count:,}" for origin, count in counts.items())
    return f"{defined:,} of {len(found):,} names have a definition ({parts})"


if __name__ == "__main__":
    sys.exit(main())
