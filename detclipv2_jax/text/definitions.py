"""Definitions of names: a name's own definition, or that of the most similar concept.

The first of these that knows the name decides, also if it says that the name has no definition:

1. the dataset that the name is from, if it has definitions or synsets (LVIS, V3Det);
2. a user's table of corrections (`checked.read_table`);
3. a dictionary: the prepared one, or that of the run that trained the model;
4. the hand-checked senses of well-known datasets (assets/senses.tsv);
5. the synset that LVIS gives the name, if a list is given;
6. WordNet, if it is clear which sense of the whole name a photograph shows (`senses.py`).

A plural has the definition of its singular. A name that none of these knows gets the definition of
the dictionary concept whose text embedding is nearest (Yao et al. 2022, DetCLIP), or without
embeddings that of its head noun; but only if that is very likely right. No definition is better
than a doubtful one [ours].

Here a dictionary is a mapping of normalized names to definitions, "" for names that have none;
`data/dictionary.py` reads it from a file.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.text.checked import Meaning, checked_senses
from detclipv2_jax.text.senses import plausible_senses, visible_sense
from detclipv2_jax.text.tokenizer import normalize
from detclipv2_jax.text.wordnet import wordnet

#: Texts in, one vector per text out; vectors are compared by direction.
Embed = Callable[[Sequence[str]], Float[np.ndarray, "n d"]]

#: Where a definition is from, in the order in which it is looked for.
ORIGINS = (
    "own", "corrected", "dictionary", "checked", "synset", "wordnet", "nearest", "head", "none"
)  # fmt: skip
_MAX_READINGS = 16  # of one name: each "a/b" in it doubles them
# How near the nearest concept must be to lend its definition: nearer than the nearest neighbors of
# this share of the concepts themselves. With CLIP's ViT-B/32 and LVIS's names 0.89 and 0.93.
_NEAR_SAME_END = 0.5  # if both names end in the same word: "wild bird", "bird"
_NEAR = 0.9
_CHUNK = 1024  # names compared with all concepts at once: bounds the memory
# Leads in cosine similarity by which an embedding decides between senses.
_DECIDES = 0.02  # where WordNet leaves it in doubt
_OVERRULES = 0.05  # against the sense that WordNet's order and fields suggest
# Words after which a phrase only describes its noun further: "bowl of fruit", "man in a shirt".
_AFTER_HEAD = re.compile(
    r"\s(of|in|on|with|at|from|for|by|near|under|over|behind|beside|inside|next|to|that|who|which|"
    r"wearing|holding|riding|standing|sitting)\s.*"
)
_SEVERAL = re.compile(r"\s(and|or|&)\s|,")


@dataclasses.dataclass(frozen=True)
class Definition:
    """The definition of a name, and where it is from."""

    text: str | None
    origin: str  # one of ORIGINS; 'nearest' and 'head': it is that of `like`
    synset: str | None = None  # of the name itself, in WordNet's spelling
    like: str | None = None  # the concept whose definition is used


NONE = Definition(None, "none")


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """What is known of names before WordNet is asked; all by normalized name."""

    own: Mapping[str, Meaning] = dataclasses.field(default_factory=dict)  # said by the dataset
    corrections: Mapping[str, Meaning] = dataclasses.field(default_factory=dict)  # by the user
    dictionary: Mapping[str, str] = dataclasses.field(default_factory=dict)  # "": no definition
    synsets: Mapping[str, str] = dataclasses.field(default_factory=dict)  # LVIS's, with synonyms


def define(
    names: Sequence[str],
    known: Knowledge = Knowledge(),  # noqa: B008 - frozen
    *,
    embed: Embed | None = None,
    choose: Embed | None = None,
) -> list[Definition]:
    """Return the definition of each name.

    Args:
        names: in any case and spacing.
        known: what is known of names. A name without a definition gets that of the nearest name in
            its dictionary; if that is empty, of the nearest of `names` that has one.
        embed: embeds texts to find the nearest name. Without it, a name without a definition gets
            that of its head noun.
        choose: embeds texts to choose among the senses of a word that WordNet leaves in doubt.
    """
    names = [normalize(name) for name in names]
    found = [_stated_of(name, known) for name in names]
    unsaid = [i for i, definition in enumerate(found) if definition is None]
    for i, definition in zip(unsaid, _of_wordnet([names[i] for i in unsaid], known, choose)):
        found[i] = definition
    missing = [i for i, definition in enumerate(found) if definition is None]
    others = known.dictionary or {n: d.text for n, d in zip(names, found) if d is not None}
    others = {name: text for name, text in others.items() if text}
    if embed is not None and others and missing:
        borrowed = _of_nearest([names[i] for i in missing], others, embed)
    else:
        borrowed = [_of_head_noun(names[i], known) for i in missing]
    for i, definition in zip(missing, borrowed):
        found[i] = definition
    return found


def origins(found: Sequence[Definition]) -> dict[str, int]:
    """Return how many definitions have each origin, in the order in which origins are tried."""
    counts = collections.Counter(definition.origin for definition in found)
    return {origin: counts[origin] for origin in ORIGINS if counts[origin]}


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


def synsets_of(name: str, known: Knowledge = Knowledge()) -> list[str]:  # noqa: B008 - frozen
    """Return the synsets that a normalized name may mean, the likeliest first: one per reading.

    These are the senses that `define` uses; where it is in doubt, WordNet's first, because what may
    be a synonym must not be a negative. A synset of LVIS's list that does not have the name among
    its words ("man" given as person.n.01) comes last: the name has a meaning of its own.
    """
    nouns = wordnet()
    given = nouns.canonical(known.synsets.get(name, ""))
    for table in (known.own, known.corrections, checked_senses()):
        if name in table:
            stated = [nouns.canonical(table[name].synset or ""), given]
            return list(dict.fromkeys(filter(None, stated)))
    lemmas = _lemmas(name)
    if given and (not lemmas or set(lemmas) & set(nouns.lemmas(given))):
        return [given]
    own = [_sense(lemma, known) or nouns.synsets(lemma)[0] for lemma in lemmas]
    return list(dict.fromkeys([*own, given] if given else own))


def nearest(
    queries: Float[np.ndarray, "q d"], among: Float[np.ndarray, "n d"]
) -> tuple[Int[np.ndarray, " q"], Float[np.ndarray, " q"]]:
    """Return the row of `among` with the highest cosine similarity to each query, and that
    similarity; n >= 1."""
    queries, among = _unit(queries), _unit(among)
    rows, values = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    for start in range(0, len(queries), _CHUNK):
        similarity = queries[start : start + _CHUNK] @ among.T
        rows.append(np.argmax(similarity, axis=1))
        values.append(similarity.max(axis=1))
    return np.concatenate(rows), np.concatenate(values)


def _stated_of(name: str, known: Knowledge) -> Definition | None:
    """Return what is stated of the name itself or its singular; None if nothing is."""
    if (meaning := known.own.get(name)) and meaning.gloss:
        return Definition(meaning.gloss, "own", meaning.synset)
    is_listed = name in known.dictionary and not known.corrections  # saves time for thousands
    singulars = [] if is_listed else [*map(_text, _lemmas(name)), *wordnet().singulars(name)]
    spellings = dict.fromkeys([name, *singulars])
    for text in spellings:
        if text in known.corrections:
            return _stated(known.corrections[text], "corrected")
        if text in known.dictionary:
            return _stated(Meaning(known.dictionary[text]), "dictionary")
        if text in checked_senses():
            return _stated(checked_senses()[text], "checked")
    given = {wordnet().canonical(known.synsets[t]) for t in spellings if t in known.synsets}
    senses = synsets_of(name, known) if given else []
    if senses and senses[0] in given:
        return Definition(wordnet().definition(senses[0]), "synset", senses[0])
    return None


def _stated(meaning: Meaning, origin: str) -> Definition:
    """Return a definition that somebody decided on; none if they decided that there is none."""
    return Definition(meaning.gloss, origin, meaning.synset) if meaning.gloss else NONE


def _of_wordnet(
    names: Sequence[str], known: Knowledge, choose: Embed | None
) -> list[Definition | None]:
    """Return the definitions of names that WordNet has: `NONE` where the sense is in doubt. Of
    names that it has not, return None."""
    lemmas = [next(iter(_lemmas(name)), None) for name in names]
    senses = [_sense(lemma, known) if lemma else None for lemma in lemmas]
    if choose is not None:
        senses = _by_embedding(names, lemmas, senses, choose)
    found = []
    for lemma, sense in zip(lemmas, senses):
        text = wordnet().definition(sense) if sense else None
        found.append(Definition(text, "wordnet", sense) if text else NONE if lemma else None)
    return found


def _by_embedding(
    names: Sequence[str],
    lemmas: Sequence[str | None],
    senses: Sequence[str | None],
    choose: Embed,
) -> list[str | None]:
    """Return the sense of each name whose gloss is nearest to the name, among the plausible ones.

    The sense found without embeddings stays unless another one is nearer by far. Where there is
    none, one must be nearer than all others.
    """
    plausible = [plausible_senses(lemma) if lemma else [] for lemma in lemmas]
    asked = [i for i, some in enumerate(plausible) if len(some) > 1]
    glosses = list(dict.fromkeys(sense for i in asked for sense in plausible[i]))
    if not asked:
        return list(senses)
    queries = _unit(choose([names[i] for i in asked]))
    vectors = _unit(choose([wordnet().definition(sense) for sense in glosses]))
    rows, found = {sense: row for row, sense in enumerate(glosses)}, list(senses)
    for query, i in zip(queries, asked):
        similarity = vectors[[rows[sense] for sense in plausible[i]]] @ query
        first, second = np.argsort(-similarity, kind="stable")[:2]
        best, margin = plausible[i][first], similarity[first] - similarity[second]
        if senses[i] in plausible[i]:
            lead = similarity[first] - similarity[plausible[i].index(senses[i])]
            found[i] = best if lead >= _OVERRULES else senses[i]
        elif senses[i] is None and margin >= _DECIDES:
            found[i] = best
    return found


def _of_head_noun(name: str, known: Knowledge) -> Definition:
    """Return the definition of a name's head noun, if it is clear and surely meant."""
    nouns = wordnet()
    for reading in readings(name):
        if _SEVERAL.search(reading):
            continue
        head = nouns.head(_AFTER_HEAD.sub("", reading))
        if head is None:
            continue
        text = _text(head)
        if text in known.dictionary:
            gloss = known.dictionary[text]
        else:
            sense = _sense(head, known, strict=True)
            gloss = nouns.definition(sense) if sense else None
        return Definition(gloss, "head", like=text) if gloss else NONE
    return NONE


def _lemmas(name: str) -> list[str]:
    """Return WordNet's lemmas for a name as a whole."""
    found = dict.fromkeys(map(wordnet().noun, readings(name)))
    return [lemma for lemma in found if lemma]


def _sense(lemma: str, known: Knowledge, *, strict: bool = False) -> str | None:
    """Return the synset that a lemma is known to have if the lemma is one of its words; else the
    one that a photograph is likely to show; None where in doubt."""
    nouns, text = wordnet(), _text(lemma)
    for synset in (known.corrections.get(text, Meaning()).synset, _checked_lemmas().get(lemma)):
        if synset and lemma in nouns.lemmas(synset):
            return nouns.canonical(synset)
    given = nouns.canonical(known.synsets.get(text, ""))
    if given and lemma in nouns.lemmas(given):
        return given
    return visible_sense(lemma, strict=strict)


@functools.cache
def _checked_lemmas() -> Mapping[str, str]:
    """Return lemma → synset for the hand-checked names, singular or plural, that WordNet has."""
    found = {}
    for name, meaning in checked_senses().items():
        lemma = wordnet().noun(name)
        if lemma and meaning.synset and lemma in wordnet().lemmas(meaning.synset):
            found.setdefault(lemma, meaning.synset)
    return found


def _text(lemma: str) -> str:
    return lemma.replace("_", " ")


def _of_nearest(names: list[str], others: Mapping[str, str], embed: Embed) -> list[Definition]:
    """Return for each name the definition of the nearest of `others` (name → definition).

    It must be nearer than what is usual among `others`: how near, depends on the text tower.
    """
    concepts = list(others)
    among = embed(concepts)
    rows, similarity = nearest(embed(names), among)
    same_end, other_end = np.quantile(_neighbors(among), (_NEAR_SAME_END, _NEAR))
    found = []
    for name, row, value in zip(names, rows, similarity):
        like = concepts[row]
        is_near = value >= (same_end if _end(name) == _end(like) else other_end)
        found.append(Definition(others[like], "nearest", like=like) if is_near else NONE)
    return found


def _neighbors(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " m"]:
    """Return the similarity of some vectors to the nearest of the others; 1 if there is only one.

    These are evenly chosen among them: m <= n.
    """
    vectors = _unit(vectors)
    if len(vectors) < 2:
        return np.ones(1, np.float32)
    chosen = np.unique(np.linspace(0, len(vectors) - 1, _CHUNK).astype(int))
    similarity = vectors[chosen] @ vectors.T
    similarity[np.arange(len(chosen)), chosen] = -1
    return similarity.max(axis=1)


def _end(name: str) -> str:
    """Return the last word of a name, as a singular."""
    last = readings(name)[0].split()[-1:] or [""]
    return wordnet().noun(last[0]) or last[0].removesuffix("s")


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
