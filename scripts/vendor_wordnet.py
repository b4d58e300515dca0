"""Make the package's copy of the nouns of WordNet 3.0 from WordNet's database files.

    python scripts/vendor_wordnet.py --from=/usr/share/wordnet

Debian's package `wordnet-base` has them. Written to detclipv2_jax/text/assets/wordnet/:

    nouns.txt.gz       one line per synset: "lemma sense lemma sense …", a tab, its field, marks and
                       number of hyponyms, a tab, the definition
    hypernyms.txt.gz   one line per synset, in the order of nouns.txt: the rows, from 0, of the
                       synsets that it is a kind or an instance of
    exceptions.txt.gz  one line per irregular plural: the plural, then its singulars
    LICENSE            Princeton's license, copied from the files

Lemmas are in lower case, with words joined by underscores. `sense` is the number of this synset
among the senses of the lemma, so the usual name of a synset is its first lemma, ".n." and the sense
in two digits. ":N" after it: in the texts that WordNet's authors tagged, the lemma has this sense N
times. The field is the number of the lexicographer file (lexnames(5): 06 is artifacts). The marks:
"i" an instance (a person, place or work by name), "p" a proper noun (its first word begins with a
capital), "u" a usage that is slang, offensive or archaic. ":N" after them: N synsets are a kind of
this one. Example sentences are left out.
"""

import argparse
import gzip
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from detclipv2_jax.common.atomic import replacing, write_text
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError

# Offsets of the usages in data.noun that are marked.
_USAGES = {
    "07157273": "slang",
    "06717170": "disparagement",
    "07073447": "archaism",
    "06718862": "ethnic slur",
    "07124340": "obscenity",
}
_TO = Path(__file__).resolve().parent.parent / "detclipv2_jax" / "text" / "assets" / "wordnet"


def read_lines(folder: Path, name: str) -> list[str]:
    """Return the lines of a database file; Latin-1 decodes every byte."""
    try:
        return (folder / name).read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise UserError(
            f"{folder / name}: cannot be read ({error.strerror}). Give the folder of WordNet 3.0's "
            "database with --from=DIR."
        ) from None


def senses(index: Iterable[str]) -> dict[str, list[str]]:
    """Return lemma → offsets of its synsets, most frequent sense first (wndb(5), index.pos)."""
    rows = (line.split() for line in index if not line.startswith("  "))
    return {row[0]: row[-int(row[2]) :] for row in rows}


def tag_counts(lines: Iterable[str]) -> dict[tuple[str, int], int]:
    """Return (lemma, sense) → how often the tagged texts have it (cntlist(5), cntlist.rev)."""
    rows = (line.split() for line in lines)
    return {
        (key.partition("%")[0], int(sense)): int(count)
        for key, sense, count in rows
        if key.partition("%")[2].startswith("1:")  # a noun
    }


def synset_line(
    line: str, numbers: dict[str, list[str]], counts: dict[tuple[str, int], int]
) -> str:
    """Return the line of nouns.txt for a line of data.noun (wndb(5), data.pos)."""
    head, _, gloss = line.partition(" | ")
    offset, field, _, count, *rest = head.split()
    spellings = rest[: 2 * int(count, 16) : 2]
    pairs = []
    for word in dict.fromkeys(word.lower() for word in spellings):
        sense = numbers[word].index(offset) + 1
        tagged = counts.get((word, sense), 0)
        pairs.append(f"{word} {sense}" + f":{tagged}" * bool(tagged))
    hyponyms = rest.count("~")
    about = f"{field}{marks(spellings[0], rest)}" + f":{hyponyms}" * bool(hyponyms)
    return f"{' '.join(pairs)}\t{about}\t{definition(gloss)}"


def hypernym_lines(data: Sequence[str]) -> list[str]:
    """Return the lines of hypernyms.txt for the lines of data.noun."""
    rows = {line.split()[0]: row for row, line in enumerate(data)}
    found = []
    for line in data:
        fields = line.partition(" | ")[0].split()
        pairs = zip(fields, fields[1:])
        found.append(" ".join(str(rows[to]) for symbol, to in pairs if symbol in ("@", "@i")))
    return found


def marks(word: str, rest: Sequence[str]) -> str:
    """Return the marks of a synset, given its first word and the rest of its line."""
    pointers = set(zip(rest, rest[1:]))
    found = {
        "i": any(symbol == "@i" for symbol, _ in pointers),
        "p": re.match(r"[A-Z][a-z]", word) is not None,
        "u": any((";u", offset) in pointers for offset in _USAGES),
    }
    return "".join(mark for mark, holds in found.items() if holds)


def definition(gloss: str) -> str:
    """Return a gloss without the examples at its end, which are in quotes or brackets."""
    text = re.split(r'[;:,]?\s+"', f" {gloss.strip()}", maxsplit=1)[0].strip(' ;"')
    return re.sub(r" \([^)]*$", "", text)


def license(lines: Iterable[str]) -> str:
    """Return the license: the numbered lines at the top of every database file."""
    numbered = (re.match(r"  +\d+ (.*)", line) for line in lines)
    return "\n".join(m.group(1).rstrip() for m in numbered if m).strip() + "\n"


def write_gzip(path: Path, lines: Iterable[str]) -> None:
    """Write compressed lines; the same lines give the same bytes."""
    with replacing(path) as temporary:
        content = "\n".join(lines).encode("utf-8")
        temporary.write_bytes(gzip.compress(content, 9, mtime=0))


def main() -> int:
    """Run the command and return its exit status; 2 after an error that the user can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="origin",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder with data.noun, index.noun, cntlist.rev and noun.exc",
    )
    return exit_status(write_assets, parser.parse_args().origin)


def write_assets(origin: Path) -> None:
    """Read the database files in `origin` and write the assets."""
    numbers = senses(read_lines(origin, "index.noun"))
    data = read_lines(origin, "data.noun")
    counts = tag_counts(read_lines(origin, "cntlist.rev"))
    nouns = [line for line in data if not line.startswith("  ")]
    synsets = [synset_line(line, numbers, counts) for line in nouns]
    write_gzip(_TO / "nouns.txt.gz", synsets)
    write_gzip(_TO / "hypernyms.txt.gz", hypernym_lines(nouns))
    write_gzip(_TO / "exceptions.txt.gz", read_lines(origin, "noun.exc"))
    write_text(_TO / "LICENSE", license(data))
    print(f"{_TO}: {len(numbers):,} lemmas, {len(synsets):,} synsets")


if __name__ == "__main__":
    sys.exit(main())
