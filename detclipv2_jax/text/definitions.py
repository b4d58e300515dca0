"""What a name means: its own definition where one is known, else that of what is most like it.

The order: a synset given with the name (LVIS has them), the dictionary, WordNet's first sense of
the whole name; a plural has what its singular has. A name that none of these knows borrows the
definition of the dictionary concept whose text embedding is nearest (paper.md §1); without
embeddings that of its head noun.
"""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.text.tokenizer import normalize
from detclipv2_jax.text.wordnet import wordnet

#: Texts in, a vector each out, of any length: their directions are compared.
Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]

_VARIANTS = 16  # readings of one name: "a/b" repeated doubles them each time
_PIECE = 1024  # names that are compared with all concepts at once: bounds the memory


@dataclasses.dataclass(frozen=True)
class Definition:
    """What stands behind a name.

    origin: 'synset', 'dictionary' or 'wordnet' where the definition is its own; 'nearest' or 'head'
    where it is that of `like`; 'none'.
    """

    text: str | None
    origin: str
    synset: str | None = None  # its own, in WordNet's one spelling
    like: str | None = None


NONE = Definition(None, "none")


def define(
    names: Sequence[str],
    *,
    synsets: Mapping[str, str] | None = None,
    dictionary: Mapping[str, str] | None = None,
    embed: Embed | None = None,
) -> list[Definition]:
    """The definition of each name.

    Args:
        names: in any case and spacing.
        synsets: normalized name → synset, where one is known to be meant.
        dictionary: normalized name → definition. Names may borrow from it; where it is empty, from
            those of `names` that have a definition of their own.
        embed: for the nearest concept; without it names borrow from their head noun.
    """
    synsets, dictionary = synsets or {}, dictionary or {}
    names = [normalize(name) for name in names]
    found = [_own(name, synsets, dictionary) for name in names]
    missing = [i for i, definition in enumerate(found) if definition is None]
    lenders = dictionary or {n: d.text for n, d in zip(names, found) if d is not None}
    if embed is not None and lenders and missing:
        borrowed = _nearest([names[i] for i in missing], lenders, embed)
    else:
        borrowed = [_head(names[i], synsets, dictionary) for i in missing]
    for i, definition in zip(missing, borrowed):
        found[i] = definition
    return found


def origins(found: Sequence[Definition]) -> dict[str, int]:
    """How many names have their definition from where, in the order in which it is looked for."""
    counts = collections.Counter(definition.origin for definition in found)
    order = ("synset", "dictionary", "wordnet", "nearest", "head", "none")
    return {origin: counts[origin] for origin in order if counts[origin]}


def readings(name: str) -> list[str]:
    """The phrases under which a category's name may be looked up, the likeliest first.

    Brackets explain ("bow (weapon)") and slashes separate alternatives: of whole names
    ("washing machine/drying machine"), or of a word ("cutting/chopping board").
    """
    plain = re.sub(r"\([^)]*\)", " ", normalize(name).replace("_", " "))
    wholes = [" ".join(part.split()) for part in plain.split("/")]
    if len({len(whole.split()) for whole in wholes}) == 1:
        return list(dict.fromkeys(wholes))
    words = re.sub(r"\s*/\s*", "/", plain).split()
    variants = itertools.islice(itertools.product(*(w.split("/") for w in words)), _VARIANTS)
    return list(dict.fromkeys([*map(" ".join, variants), *wholes]))


def synsets_of(name: str, synsets: Mapping[str, str] | None = None) -> list[str]:
    """What a normalized name stands for, the likeliest first: of each reading a sense.

    That is the one which `synsets` (normalized name → synset) gives it or its singular, else
    WordNet's first. A given synset that has other words than this ("man" given as a person) comes
    last: the name is a synonym there, and has its own meaning.
    """
    nouns, synsets = wordnet(), synsets or {}
    given = nouns.canonical(synsets.get(name, ""))
    lemmas = _lemmas(name)
    if given and (not lemmas or set(lemmas) & set(nouns.lemmas(given))):
        return [given]
    own = [_sense(lemma, synsets) for lemma in lemmas]
    return list(dict.fromkeys([*own, given] if given else own))


def nearest(
    queries: Float[np.ndarray, "q d"], among: Float[np.ndarray, "n d"]
) -> Int[np.ndarray, " q"]:
    """Row of `among`, n ≥ 1, of the same direction as each query, as nearly as there is one."""
    queries, among = _unit(queries), _unit(among)
    pieces = range(0, len(queries), _PIECE)
    rows = [np.argmax(queries[start : start + _PIECE] @ among.T, axis=1) for start in pieces]
    return np.concatenate(rows or [np.zeros(0, np.int64)])


def _own(name: str, synsets: Mapping[str, str], dictionary: Mapping[str, str]) -> Definition | None:
    """The definition that is meant for this very name, or for its singular."""
    nouns = wordnet()
    spellings = dict.fromkeys([name, *map(_text, _lemmas(name))])
    given = {nouns.canonical(synsets[text]) for text in spellings if text in synsets}
    senses = synsets_of(name, synsets)
    if senses and senses[0] in given:
        return Definition(nouns.definition(senses[0]), "synset", senses[0])
    for text in spellings:
        if text in dictionary:
            return Definition(dictionary[text], "dictionary")
    for sense in senses[:1]:
        return Definition(nouns.definition(sense), "wordnet", sense)
    return None


def _head(name: str, synsets: Mapping[str, str], dictionary: Mapping[str, str]) -> Definition:
    """The definition of a name's head noun."""
    nouns = wordnet()
    for lemma in filter(None, map(nouns.head, readings(name))):
        text = dictionary.get(_text(lemma)) or nouns.definition(_sense(lemma, synsets))
        return Definition(text, "head", like=_text(lemma))
    return NONE


def _lemmas(name: str) -> list[str]:
    """The lemmas under which WordNet knows a name as a whole."""
    found = dict.fromkeys(map(wordnet().noun, readings(name)))
    return [lemma for lemma in found if lemma]


def _sense(lemma: str, synsets: Mapping[str, str]) -> str:
    """The synset that is given for a lemma, where it is a word for it; else its first."""
    nouns = wordnet()
    given = nouns.canonical(synsets.get(_text(lemma), ""))
    return given if given and lemma in nouns.lemmas(given) else nouns.synsets(lemma)[0]


def _text(lemma: str) -> str:
    return lemma.replace("_", " ")


def _nearest(names: list[str], lenders: Mapping[str, str], embed: Embed) -> list[Definition]:
    """The definition of the lender that is most like each name."""
    known = list(lenders)
    rows = nearest(embed(names), embed(known))
    return [Definition(lenders[known[row]], "nearest", like=known[row]) for row in rows]


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
