"""Definitions of names: a name's own definition, or that of the most similar concept.

The first of these that has a definition is used: a synset given with the name (LVIS has them), the
dictionary, WordNet's first sense of the whole name. A plural has the definition of its singular. A
name without any gets the definition of the dictionary concept whose text embedding is nearest (Yao
et al. 2022, DetCLIP), or without embeddings that of its head noun.

Here a dictionary is a mapping of normalized names to definitions; `data/dictionary.py` reads it
from a file.
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

#: Texts in, one vector per text out; vectors are compared by direction.
Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]

_MAX_READINGS = 16  # of one name: each "a/b" in it doubles them
_CHUNK = 1024  # names compared with all concepts at once: bounds the memory


@dataclasses.dataclass(frozen=True)
class Definition:
    """The definition of a name, and where it is from."""

    text: str | None
    # 'synset', 'dictionary' or 'wordnet': the name's own definition; 'nearest' or 'head': that of
    # `like`; 'none': there is no definition.
    origin: str
    synset: str | None = None  # of the name itself, in WordNet's spelling
    like: str | None = None  # the concept whose definition is used


NONE = Definition(None, "none")


def define(
    names: Sequence[str],
    *,
    synsets: Mapping[str, str] | None = None,
    dictionary: Mapping[str, str] | None = None,
    embed: Embed | None = None,
) -> list[Definition]:
    """Return the definition of each name.

    Args:
        names: in any case and spacing.
        synsets: normalized name → synset, for names whose meaning is known.
        dictionary: normalized name → definition. A name without a definition gets that of the
            nearest name in it; if it is empty, of the nearest of `names` that has one.
        embed: embeds texts to find the nearest name. Without it, a name without a definition gets
            that of its head noun.
    """
    synsets, dictionary = synsets or {}, dictionary or {}
    names = [normalize(name) for name in names]
    found = [_own(name, synsets, dictionary) for name in names]
    missing = [i for i, definition in enumerate(found) if definition is None]
    known = dictionary or {n: d.text for n, d in zip(names, found) if d is not None}
    if embed is not None and known and missing:
        others = _of_nearest([names[i] for i in missing], known, embed)
    else:
        others = [_of_head_noun(names[i], synsets, dictionary) for i in missing]
    for i, definition in zip(missing, others):
        found[i] = definition
    return found


def origins(found: Sequence[Definition]) -> dict[str, int]:
    """Return how many definitions have each origin, in the order in which origins are tried."""
    counts = collections.Counter(definition.origin for definition in found)
    order = ("synset", "dictionary", "wordnet", "nearest", "head", "none")
    return {origin: counts[origin] for origin in order if counts[origin]}


def readings(name: str) -> list[str]:
    """Return the phrases that a category's name may mean, the likeliest first.

    Brackets explain ("bow (weapon)"). Slashes separate alternatives: of whole names
    ("washing machine/drying machine"), or of a word ("cutting/chopping board").
    """
    plain = re.sub(r"\([^)]*\)", " ", normalize(name).replace("_", " "))
    wholes = [" ".join(part.split()) for part in plain.split("/")]
    if len({len(whole.split()) for whole in wholes}) == 1:
        return list(dict.fromkeys(wholes))
    words = re.sub(r"\s*/\s*", "/", plain).split()
    variants = itertools.islice(itertools.product(*(w.split("/") for w in words)), _MAX_READINGS)
    return list(dict.fromkeys([*map(" ".join, variants), *wholes]))


def synsets_of(name: str, synsets: Mapping[str, str] | None = None) -> list[str]:
    """Return the synsets that a normalized name may mean, the likeliest first: one per reading.

    That is the synset that `synsets` (normalized name → synset) gives for the name or its singular,
    otherwise WordNet's first sense. A given synset that does not have the name among its words
    ("man" given as person.n.01) comes last: the name has a meaning of its own.
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
    """Return the row of `among` with the highest cosine similarity to each query; n >= 1."""
    queries, among = _unit(queries), _unit(among)
    starts = range(0, len(queries), _CHUNK)
    rows = [np.argmax(queries[start : start + _CHUNK] @ among.T, axis=1) for start in starts]
    return np.concatenate(rows or [np.zeros(0, np.int64)])


def _own(name: str, synsets: Mapping[str, str], dictionary: Mapping[str, str]) -> Definition | None:
    """Return the definition of the name itself, or of its singular."""
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


def _of_head_noun(
    name: str, synsets: Mapping[str, str], dictionary: Mapping[str, str]
) -> Definition:
    """Return the definition of a name's head noun."""
    nouns = wordnet()
    for lemma in filter(None, map(nouns.head, readings(name))):
        text = dictionary.get(_text(lemma)) or nouns.definition(_sense(lemma, synsets))
        return Definition(text, "head", like=_text(lemma))
    return NONE


def _lemmas(name: str) -> list[str]:
    """Return WordNet's lemmas for a name as a whole."""
    found = dict.fromkeys(map(wordnet().noun, readings(name)))
    return [lemma for lemma in found if lemma]


def _sense(lemma: str, synsets: Mapping[str, str]) -> str:
    """Return the synset given for a lemma if the lemma is one of its words, else its first."""
    nouns = wordnet()
    given = nouns.canonical(synsets.get(_text(lemma), ""))
    return given if given and lemma in nouns.lemmas(given) else nouns.synsets(lemma)[0]


def _text(lemma: str) -> str:
    return lemma.replace("_", " ")


def _of_nearest(names: list[str], known: Mapping[str, str], embed: Embed) -> list[Definition]:
    """Return for each name the definition of the nearest name in `known` (name → definition)."""
    others = list(known)
    rows = nearest(embed(names), embed(others))
    return [Definition(known[others[row]], "nearest", like=others[row]) for row in rows]


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
