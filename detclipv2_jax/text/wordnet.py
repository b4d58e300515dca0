"""The nouns of WordNet 3.0: meanings of words, synonyms, and singulars of plurals.

The data is in assets/wordnet/, with Princeton's license; scripts/vendor_wordnet.py made it. Reading
it takes about half a second, on first use.
"""

import functools
import gzip
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_ASSETS = Path(__file__).parent / "assets" / "wordnet"
#: Names of the lexicographer files with nouns (lexnames(5)), by number; 00 to 02 have none.
FIELDS = dict(
    enumerate(
        [
            "tops",
            "act",
            "animal",
            "artifact",
            "attribute",
            "body",
            "cognition",
            "communication",
            "event",
            "feeling",
            "food",
            "group",
            "location",
            "motive",
            "object",
            "person",
            "phenomenon",
            "plant",
            "possession",
            "process",
            "quantity",
            "relation",
            "shape",
            "state",
            "substance",
            "time",
        ],
        3,
    )
)
# Endings of plurals and those of their singulars (morphy(7)).
_ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
# Plurals that are also nouns, of a meaning that images seldom show ("men": a workforce).
_RATHER_PLURAL = frozenset({"men"})
# A word of fewer letters is an abbreviation: it is not looked up without its spaces and hyphens.
_LEAST_UNJOINED = 4
_SYNSET = re.compile(r"(.+)\.n\.(\d+)")


class About(NamedTuple):
    """What kind of thing a synset is."""

    field: str  # name of its lexicographer file, such as "artifact"
    # "i": an instance ("Stephen Crane"); "p": a proper noun ("Dalmatian"); "u": a usage that is
    # slang, offensive or archaic.
    marks: str
    hyponyms: int  # how many synsets are a kind of it


class WordNet:
    """The nouns of WordNet 3.0.

    A synset is a meaning, named like "traffic_light.n.01". A lemma is a word for it, with
    underscores for spaces.
    """

    def __init__(self):
        """Read the assets."""
        self._lines = _read("nouns.txt.gz")
        # Lemma → {number of the sense: row of `_lines`}; the file is ordered by synset.
        self._senses: dict[str, dict[int, int]] = {}
        for row, line in enumerate(self._lines):
            words = line[: line.index("\t")].split(" ")
            for lemma, sense in zip(words[::2], words[1::2]):
                self._senses.setdefault(lemma, {})[int(sense.partition(":")[0])] = row
        pairs = (line.split() for line in _read("exceptions.txt.gz"))
        self._exceptions = {plural: singulars for plural, *singulars in pairs}

    def __len__(self) -> int:
        return len(self._lines)

    def first_lemmas(self) -> Iterator[str]:
        """Yield the usual word of each synset, each word once."""
        yield from dict.fromkeys(line[: line.index(" ")] for line in self._lines)

    def synsets(self, lemma: str) -> list[str]:
        """Return the synsets of a lemma, the most frequent sense first."""
        senses = self._senses.get(lemma.lower().replace(" ", "_"), {})
        return [self._name(senses[sense]) for sense in sorted(senses)]

    def definition(self, synset: str) -> str | None:
        """Return the definition of a synset; None if WordNet has no such noun."""
        row = self._row(synset)
        return None if row is None else self._lines[row].split("\t")[2]

    def about(self, synset: str) -> About | None:
        """Return what kind of thing a synset is; None if WordNet has no such noun."""
        row = self._row(synset)
        if row is None:
            return None
        about, _, hyponyms = self._lines[row].split("\t")[1].partition(":")
        return About(FIELDS[int(about[:2])], about[2:], int(hyponyms or 0))

    def hypernyms(self, synset: str) -> list[str]:
        """Return what a synset is a kind of, directly or not: a dog is a canine, an animal, …"""
        row = self._row(synset)
        return [] if row is None else [self._name(one) for one in sorted(self._ancestors(row))]

    def related(self, synsets: Iterable[str]) -> set[str]:
        """Return some synsets with all of their hypernyms and hyponyms, direct or not."""
        rows = {row for row in map(self._row, synsets) if row is not None}
        above = set(rows).union(*(self._ancestors(row) for row in rows))
        below, waiting = set(rows), list(rows)
        while waiting:
            new = set(self._hyponyms.get(waiting.pop(), ())) - below
            below |= new
            waiting += new
        return {self._name(row) for row in above | below}

    def _ancestors(self, row: int) -> set[int]:
        found: set[int] = set()
        waiting = [row]
        while waiting:
            new = set(self._hypernyms[waiting.pop()]) - found
            found |= new
            waiting += new
        return found

    @functools.cached_property
    def _hypernyms(self) -> list[tuple[int, ...]]:
        """The rows of the direct hypernyms of each row."""
        return [tuple(map(int, line.split())) for line in _read("hypernyms.txt.gz")]

    @functools.cached_property
    def _hyponyms(self) -> dict[int, list[int]]:
        """The rows of the direct hyponyms of rows that have any."""
        found: dict[int, list[int]] = {}
        for row, above in enumerate(self._hypernyms):
            for one in above:
                found.setdefault(one, []).append(row)
        return found

    def count(self, lemma: str, synset: str) -> int:
        """Return how often a lemma has this sense in the texts that WordNet's authors tagged."""
        row = self._row(synset)
        words = [] if row is None else self._words(row)
        sense = dict(zip(words[::2], words[1::2])).get(lemma.lower().replace(" ", "_"), "")
        return int(sense.partition(":")[2] or 0)

    def lemmas(self, synset: str) -> list[str]:
        """Return the lemmas of a synset; none if WordNet has no such noun."""
        row = self._row(synset)
        return [] if row is None else self._words(row)[::2]

    def canonical(self, synset: str) -> str | None:
        """Return the standard name of a synset that is named by any of its lemmas, else None."""
        row = self._row(synset)
        return None if row is None else self._name(row)

    def noun(self, phrase: str) -> str | None:
        """Return the lemma for a phrase as a whole, or None.

        Case, spaces and hyphens do not matter ("T shirt" is "t-shirt"). A phrase that is not a
        lemma is tried as a plural. Numbers and single letters have no lemma.
        """
        joined = "_".join(re.findall(r"[^\s_]+", phrase.lower()))
        if sum(map(str.isalpha, joined)) < 2:
            return None
        forms = [joined, *self._singulars(joined)][joined in _RATHER_PLURAL :]
        for form in forms:
            if form in self._senses:
                return form
        for bare in map(_unjoined, forms):
            if len(bare) < _LEAST_UNJOINED:
                continue
            if bare in self._senses:
                return bare
            if bare in self._joined:
                return self._joined[bare]
        return None

    def singulars(self, phrase: str) -> list[str]:
        """Return what a phrase may be the plural of by its ending: no lemmas, rarely words."""
        return list(self._singulars(phrase))

    def singular(self, lemma: str) -> str | None:
        """Return another lemma that this one is the plural of ("colors"), or None."""
        return next((form for form in self._singulars(lemma) if form in self._senses), None)

    def head(self, phrase: str) -> str | None:
        """Return the head noun of a phrase: the longest ending that is a lemma, or None.

        "a wide traffic light" has "traffic_light".
        """
        words = re.findall(r"[^\s_]+", phrase)
        ends = (" ".join(words[first:]) for first in range(len(words)))
        return next((lemma for lemma in map(self.noun, ends) if lemma), None)

    @functools.cached_property
    def _joined(self) -> dict[str, str]:
        """Lemmas of several words, by the lemma without underscores and hyphens."""
        joined = (lemma for lemma in self._senses if "_" in lemma or "-" in lemma)
        return {_unjoined(lemma): lemma for lemma in joined}

    def _singulars(self, word: str) -> Iterator[str]:
        """Yield what a word may be the plural of: irregular singulars first, then by the endings.

        As in morphy, words in -ss and of two letters are not plurals; "boxesful" is of "boxful".
        """
        yield from self._exceptions.get(word, ())
        stem, full = (word[:-3], "ful") if word.endswith("ful") else (word, "")
        if stem.endswith("ss") or len(stem) <= 2:
            return
        for ending, singular in _ENDINGS:
            if stem.endswith(ending):
                yield stem[: -len(ending)] + singular + full

    def _words(self, row: int) -> list[str]:
        line = self._lines[row]
        return line[: line.index("\t")].split(" ")

    def _name(self, row: int) -> str:
        lemma, sense = self._words(row)[:2]
        return f"{lemma}.n.{int(sense.partition(':')[0]):02d}"

    def _row(self, synset: str) -> int | None:
        match = _SYNSET.fullmatch(synset.lower())
        return self._senses.get(match[1], {}).get(int(match[2])) if match else None


def _unjoined(lemma: str) -> str:
    return lemma.replace("_", "").replace("-", "")


@functools.cache
def wordnet() -> WordNet:
    """Return WordNet's nouns, read once per process."""
    return WordNet()


def _read(name: str) -> list[str]:
    return gzip.decompress((_ASSETS / name).read_bytes()).decode("utf-8").split("\n")
