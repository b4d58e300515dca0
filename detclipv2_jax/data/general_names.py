"""Names of things from WordNet, as negatives for data that has few names of its own [ours].

A detector that is trained on one name never has to read it: every picture has the name, and any
other name would get the same boxes. Names that nobody annotated are negatives only if they cannot
be in the picture by the names that it has. So synonyms, hypernyms ("animal" of "raccoon") and
hyponyms of every name of the data are left out, and of people and of what is in most pictures
("sky", "hand") there is none. Other things of a picture may still be drawn: of some 15,000 names
each occurs too rarely to teach much.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt16, UInt64

from detclipv2_jax.data.dictionary import letters
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.senses import visible_sense
from detclipv2_jax.text.wordnet import wordnet

_FIELDS = {"animal", "artifact", "food", "plant"}
_USUAL = re.compile(r"[a-z]{3,}(_[a-z]{3,})?")  # one or two words, without digits and dots


class GeneralNames:
    """General names that are related to none of the data's names; a table of concepts."""

    def __init__(self, names: Iterable[str]):
        """Choose the names.

        Args:
            names: of the boxes of all sources.
        """
        known = list(names)
        related, same = _related(known), {letters(name) for name in known}
        self.names: list[str] = [
            name
            for name, synsets in _things().items()
            if not related & synsets and letters(name) not in same
        ]

    @property
    def concepts(self) -> Sequence[Mapping[str, str]]:
        """The names as rows, as `Source` has them."""
        return [{"name": name} for name in self.names]

    @functools.cached_property
    def keys(self) -> UInt64[np.ndarray, " n"]:
        """`tokenizer.key` of each name."""
        return tokenizer_lib.keys(self.names)

    @functools.cached_property
    def tokens(self) -> UInt16[np.ndarray, "n 16"]:
        """Token ids of the names."""
        return tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(self.names))


def _related(names: Iterable[str]) -> frozenset[str]:
    """Return the synsets that names may mean, with their hypernyms and hyponyms.

    Of a phrase ("red car") it is the head noun that counts. A name may have any of its senses.
    """
    nouns = wordnet()
    lemmas = {lemma for name in names for lemma in (nouns.noun(name), nouns.head(name)) if lemma}
    return frozenset(nouns.related(synset for lemma in lemmas for synset in nouns.synsets(lemma)))


@functools.cache
def _things() -> dict[str, frozenset[str]]:
    """Return names of things that a photo can show, with all synsets that each may mean."""
    nouns = wordnet()
    found = {}
    for lemma in nouns.first_lemmas():
        sense = visible_sense(lemma) if _USUAL.fullmatch(lemma) else None
        about = nouns.about(sense) if sense else None
        if about is not None and about.field in _FIELDS and not about.marks:
            found[lemma.replace("_", " ")] = frozenset(nouns.synsets(lemma))
    return found
