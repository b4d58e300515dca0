"""Makes the package's copy of WordNet 3.0's nouns from the database files of a WordNet 3.0.

    python scripts/vendor_wordnet.py --from=/usr/share/wordnet

Debian's package `wordnet-base` has them. Written to detclipv2_jax/text/assets/wordnet/:

    nouns.txt.gz       a line a synset: "lemma sense lemma sense …", a tab, the definition
    exceptions.txt.gz  a line an irregular plural: the plural, then its singulars
    LICENSE            Princeton's, as it stands in the files

Lemmas are in lower case, words joined by underscores; `sense` is the number under which the lemma
has this synset, so the synset's usual name is its first lemma, ".n." and the sense in two digits.
What follows the definition (example sentences in quotes) is left out.
"""

import argparse
import gzip
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError

_TO = Path(__file__).resolve().parent.parent / "detclipv2_jax" / "text" / "assets" / "wordnet"


def read_lines(folder: Path, name: str) -> list[str]:
    """A database file's lines; Latin-1 holds whatever byte may stand in one."""
    try:
        return (folder / name).read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder / name}: cannot be read ({error.strerror}); name the folder of WordNet 3.0's "
            "database with --from=DIR"
        ) from None


def senses(index: Iterable[str]) -> dict[str, list[str]]:
    """Lemma → offsets of its synsets, most frequent sense first (wndb(5), index.pos)."""
    rows = (line.split() for line in index if not line.startswith("  "))
    return {row[0]: row[-int(row[2]) :] for row in rows}


def synset_line(line: str, numbers: dict[str, list[str]]) -> str:
    """One line of nouns.txt from one of data.noun (wndb(5), data.pos)."""
    head, _, gloss = line.partition(" | ")
    offset, _, _, count, *rest = head.split()
    words = dict.fromkeys(word.lower() for word in rest[: 2 * int(count, 16) : 2])
    pairs = " ".join(f"{word} {numbers[word].index(offset) + 1}" for word in words)
    return f"{pairs}\t{definition(gloss)}"


def definition(gloss: str) -> str:
    """A gloss without its examples, which are in quotes at its end (or in a bracket there)."""
    told = re.split(r'[;:,]?\s+"', f" {gloss.strip()}", maxsplit=1)[0].strip(' ;"')
    return re.sub(r" \([^)]*$", "", told)


def license(lines: Iterable[str]) -> str:
    """The numbered lines at the top of every database file."""
    numbered = (re.match(r"  +\d+ (.*)", line) for line in lines)
    return "\n".join(m.group(1).rstrip() for m in numbered if m).strip() + "\n"


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """Compressed text, the same bytes every time."""
    with replacing(path) as temporary:
        content = "\n".join(lines).encode("utf-8")
        temporary.write_bytes(gzip.compress(content, 9, mtime=0))


def main() -> None:
    """Reads the database files, writes the three assets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="origin", metavar="DIR", type=Path, required=True)
    origin = parser.parse_args().origin
    try:
        numbers = senses(read_lines(origin, "index.noun"))
        data = read_lines(origin, "data.noun")
        synsets = [synset_line(line, numbers) for line in data if not line.startswith("  ")]
        write_gzip(_TO / "nouns.txt.gz", synsets)
        write_gzip(_TO / "exceptions.txt.gz", read_lines(origin, "noun.exc"))
        with replacing(_TO / "LICENSE") as temporary:
            temporary.write_text(license(data), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{_TO}: {len(numbers):,} lemmas, {len(synsets):,} synsets")


if __name__ == "__main__":
    main()
