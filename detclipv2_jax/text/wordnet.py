"""WordNet 3.0's nouns: what a word means, which words mean the same, the singular of a plural.

The data lies beside this file (assets/wordnet/, with Princeton's license; made by
scripts/vendor_wordnet.py). It is read when it is first asked for, in about half a second.
"""

import functools
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

_ASSETS = Path(__file__).parent / "assets" / "wordnet"
# How the singular is made of a plural (morphy(7)): an ending, and what takes its place.
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
# Plurals that are nouns themselves, of a meaning that pictures seldom show ("men": a workforce).
_RATHER_PLURAL = frozenset({"men"})
_UNJOINED = 4  # letters of a word that is looked up without its joints; fewer are abbreviations
_SYNSET = re.compile(r"(.+)\.n\.(\d+)")


class WordNet:
    """The nouns of WordNet 3.0. A synset, a meaning, is named "traffic_light.n.01"."""

    def __init__(self):
        """Read the assets."""
        self._lines = _read("nouns.txt.gz")
        # Lemma → rows of `_lines`, as {sense: row}: the file has meanings, not words, in order.
        self._senses: dict[str, dict[int, int]] = {}
        for row, line in enumerate(self._lines):
            words = line[: line.index("\t")].split(" ")
            for lemma, sense in zip(words[::2], words[1::2]):
                self._senses.setdefault(lemma, {})[int(sense)] = row
        pairs = (line.split() for line in _read("exceptions.txt.gz"))
        self._exceptions = {plural: singulars for plural, *singulars in pairs}

    def __len__(self) -> int:
        return len(self._lines)

    def synsets(self, lemma: str) -> list[str]:
        """The synsets of a noun as it stands in WordNet, the most frequent sense first."""
        senses = self._senses.get(lemma.lower().replace(" ", "_"), {})
        return [self._name(senses[sense]) for sense in sorted(senses)]

    def definition(self, synset: str) -> str | None:
        """What a synset means; None if WordNet has no such noun."""
        row = self._row(synset)
        return None if row is None else self._lines[row].partition("\t")[2]

    def lemmas(self, synset: str) -> list[str]:
        """The words for a synset, joined by underscores; none if WordNet has no such noun."""
        row = self._row(synset)
        return [] if row is None else self._words(row)[::2]

    def canonical(self, synset: str) -> str | None:
        """The one name of a synset, which any of its lemmas may be used to tell; else None."""
        row = self._row(synset)
        return None if row is None else self._name(row)

    def noun(self, phrase: str) -> str | None:
        """The lemma under which WordNet knows a phrase as a whole; None if it does not.

        Case, and how words are joined, do not matter ("T shirt" is "t-shirt"). A phrase that is no
        lemma itself is tried as a plural. Numbers and single letters are none.
        """
        joined = "_".join(re.findall(r"[^\s_]+", phrase.lower()))
        if sum(map(str.isalpha, joined)) < 2:
            return None
        forms = [joined, *self._singulars(joined)][joined in _RATHER_PLURAL :]
        for form in forms:
            if form in self._senses:
                return form
        for bare in map(_unjoined, forms):
            if len(bare) < _UNJOINED:
                continue
            if bare in self._senses:
                return bare
            if bare in self._joined:
                return self._joined[bare]
        return None

    def head(self, phrase: str) -> str | None:
        """The longest end of a phrase that WordNet knows, as a lemma: its head noun.

        "a tall traffic light pole" ends in "pole"; None where not even its last word is known.
        """
        words = re.findall(r"[^\s_]+", phrase)
        ends = (" ".join(words[first:]) for first in range(len(words)))
        return next((lemma for lemma in map(self.noun, ends) if lemma), None)

    @functools.cached_property
    def _joined(self) -> dict[str, str]:
        """The lemmas of several words, by their letters alone."""
        joined = (lemma for lemma in self._senses if "_" in lemma or "-" in lemma)
        return {_unjoined(lemma): lemma for lemma in joined}

    def _singulars(self, word: str) -> Iterator[str]:
        """What a word may be the plural of: the irregular singulars first, then by the endings.

        As in morphy: words in -ss and of two letters are no plurals; "boxesful" is of "boxful".
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
        return f"{lemma}.n.{int(sense):02d}"

    def _row(self, synset: str) -> int | None:
        match = _SYNSET.fullmatch(synset.lower())
        return self._senses.get(match[1], {}).get(int(match[2])) if match else None


def _unjoined(lemma: str) -> str:
    return lemma.replace("_", "").replace("-", "")


@functools.cache
def wordnet() -> WordNet:
    """The nouns, read once a process."""
    return WordNet()


def _read(name: str) -> list[str]:
    return gzip.decompress((_ASSETS / name).read_bytes()).decode("utf-8").split("\n")
