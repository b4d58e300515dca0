"""Choosing the sense of a noun that a photograph can show, from WordNet alone.

WordNet orders the senses of a word by their frequency in texts, where a kite is first a bad check
and a crane a writer. Here a sense counts by what it is (the lexicographer file) before how frequent
it is, and a word whose sense stays doubtful gets none: no definition is better than a wrong one.
The rule and its constants are ours.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from detclipv2_jax.text.wordnet import wordnet

# Fields of things. Senses of one class are alternatives of one kind: a chicken is a bird and meat.
_CLASSES = {
    "artifact": "artifact",
    "animal": "living",
    "food": "living",
    "plant": "living",
    "object": "object",
    "body": "body",
}
_THINGS = frozenset(_CLASSES.values())
# "animal" and the like are the roots of their fields, and WordNet keeps them apart.
_ROOTS = {
    "animal.n.01": "animal",
    "plant.n.02": "plant",
    "food.n.01": "food",
    "person.n.01": "person",
}
# A picture can show these too, but their words are more often used for something else.
_OTHERS = frozenset(
    ["person", "phenomenon", "substance", "location", "group", "shape", "communication"]
)
# Of these, fields whose sense is likelier than that of a thing if WordNet has it first ("poster").
_RIVALS = frozenset(["location", "group", "communication"])
# What the gloss of a rude sense says.
_RUDE = re.compile(
    r"\b(obscene|offensive|derogatory|disparaging|slang|slur|ethnic|vulgar|prostitute|penis|vulva|"
    r"copulation|sexual|homosexual|gametes|narcotic|heroin|cocaine|marijuana|trade name)\b"
)
# That of a sense of one trade or of former times: the word means it only if it means nothing else.
_SPECIAL = re.compile(
    r"\b(archaic|formerly|old-fashioned|obsolete|armor|centur(y|ies)|medieval|middle ages)\b"
    r"|^\([^)]*(baseball|football|golf|tennis|hockey|basketball|nautical|heraldry|astronomy|physics|"
    r"electronics|mathematics|chess|cricket|architecture|Judaism|Roman|Greek|Testament|Bible|"
    r"computer|geology|music|anatomy|law|sports|linguistics|geometry|slang|ethnic)"
)
_LEAST = 3  # tags that make a sense frequent: of WordNet's senses most have none
_FREQUENT = 20  # tags that make it so frequent that senses of another class hardly matter
_RATIO = 3  # a sense is clearly more frequent with so many times the tags of another
_STRICT = 8  # the same for the head noun of a phrase, which may mean something else


class _Sense(NamedTuple):
    synset: str
    place: int  # in WordNet's order
    class_: str  # one of `_THINGS`, a field of `_OTHERS`, or "abstract"
    field: str
    tags: int
    is_first_word: bool  # the word is the first of the synset's words
    hyponyms: int
    is_usual: bool


def visible_sense(lemma: str, *, strict: bool = False) -> str | None:
    """Return the synset of a lemma that a photograph is likely to show; None where in doubt.

    Args:
        lemma: of WordNet, such as "traffic_light".
        strict: only a sense that has no serious rival (for head nouns).
    """
    sense = _visible(lemma, strict)
    singular = wordnet().singular(lemma)
    if singular is None:
        return sense
    # "Woods" and "colors" are nouns of their own, but a phrase rather has the plural of the noun.
    other = _visible(singular, strict)
    if sense is None or other is None:
        is_usual = sense is not None and wordnet().count(lemma, sense) >= _FREQUENT
        return sense if is_usual else other
    return sense if sense == other else None


def _visible(lemma: str, strict: bool) -> str | None:
    senses, ratio = _senses(lemma), _STRICT if strict else _RATIO
    things = [sense for sense in senses if sense.class_ in _THINGS and sense.is_usual]
    best = _likeliest(things, ratio)
    if best is None or any(_beats(rival, best, ratio) for rival in senses):
        best = _dominant(senses, ratio)
    return best.synset if best else None


def plausible_senses(lemma: str) -> list[str]:
    """Return the synsets of a lemma that a photograph may show, things first, in WordNet's order.

    An embedding of texts may choose among them.
    """
    senses = [sense for sense in _senses(lemma) if sense.class_ != "abstract" and sense.is_usual]
    things = [sense.synset for sense in senses if sense.class_ in _THINGS]
    return things + [sense.synset for sense in senses if sense.class_ not in _THINGS]


def _senses(lemma: str) -> list[_Sense]:
    """Return the senses of a lemma; without names of persons, places, languages and the like."""
    nouns = wordnet()
    synsets, found = nouns.synsets(lemma), []
    for place, synset in enumerate(synsets):
        field, marks, hyponyms = nouns.about(synset)
        field = _ROOTS.get(synset, field)
        class_ = _CLASSES.get(field) or (field if field in _OTHERS else "abstract")
        if "i" in marks or ("p" in marks and class_ not in _THINGS):
            continue
        found.append(
            _Sense(
                synset=synset,
                place=place,
                class_=class_,
                field=field,
                tags=nouns.count(lemma, synset),
                is_first_word=nouns.lemmas(synset)[0] == lemma,
                hyponyms=hyponyms,
                is_usual="u" not in marks and _is_usual(nouns.definition(synset), len(synsets)),
            )
        )
    return found


def _is_usual(gloss: str, senses: int) -> bool:
    """Return whether somebody may mean this sense, of so many, who names what is in a photo."""
    return not _RUDE.search(gloss) and (senses == 1 or not _SPECIAL.search(gloss))


def _likeliest(things: Sequence[_Sense], ratio: int) -> _Sense | None:
    """Return the likeliest of some senses that are things; None if there is no clear one."""
    if len({sense.class_ for sense in things}) > 1:
        top = max(things, key=lambda sense: sense.tags)
        others = [sense for sense in things if sense.class_ != top.class_]
        is_either = {"living", "artifact"} <= {sense.class_ for sense in things}
        least, times = (_FREQUENT // 2, _STRICT) if is_either else (_LEAST, ratio)
        if top.tags < least or top.tags < times * max(sense.tags for sense in others):
            # A bat, a crane, a seal: animal or artifact? Unless one is an odd word for its thing.
            own = [sense for sense in things if sense.is_first_word]
            odd = [sense.tags for sense in things if not sense.is_first_word]
            if len({sense.class_ for sense in own}) != 1 or max(odd) >= _LEAST:
                return None
            top = own[0]
        things = [sense for sense in things if sense.class_ == top.class_]
    elif things and things[0].class_ == "living":
        things = _edible(things)
    return _likeliest_of_class(things, ratio)


def _likeliest_of_class(things: Sequence[_Sense], ratio: int) -> _Sense | None:
    if len(things) < 2:
        return things[0] if things else None
    first, second = sorted(things, key=lambda sense: -sense.tags)[:2]
    own = [sense for sense in things if sense.is_first_word]
    is_odd = not first.is_first_word and any(first.hyponyms <= o.hyponyms for o in own)
    least = _FREQUENT if is_odd else _LEAST
    if first.tags >= least and first.tags >= ratio * second.tags:
        return first
    if len(own) == 1 and (first.tags < least or ratio * own[0].tags >= first.tags):
        return own[0]
    among = own if len(own) > 1 else things
    widest, next_ = sorted(among, key=lambda sense: -sense.hyponyms)[:2]
    is_wide = widest.hyponyms >= max(_RATIO, _RATIO * next_.hyponyms)
    return widest if is_wide and ratio * widest.tags >= first.tags else None


def _edible(things: Sequence[_Sense]) -> Sequence[_Sense]:
    """Return the senses of one field of a word for an animal, a food and a plant.

    An animal is rather seen alive, a fruit off its plant, unless the tags say otherwise.
    """
    tags = {field: 0 for field in ("animal", "food", "plant")}
    for sense in things:
        tags[sense.field] += sense.tags
    for field in tags:
        present = [other for other in tags if other != field]
        chosen = [sense for sense in things if sense.field == field]
        times = _RATIO if field == "animal" else 1  # beef is seen on plates
        if chosen and all(times * tags[other] <= max(tags[field], times) + 1 for other in present):
            return chosen
    return things


def _beats(rival: _Sense, thing: _Sense, ratio: int) -> bool:
    """Return whether a word is so often used for `rival` that `thing` is in doubt."""
    if rival.class_ in _THINGS:
        return not rival.is_usual and rival.tags > thing.tags
    if rival.class_ == "abstract":
        is_odd = not thing.is_first_word and not thing.tags and rival.is_first_word
        return is_odd or (rival.tags >= _LEAST and rival.tags > _RATIO * thing.tags)
    if rival.class_ == "person":
        return rival.tags > thing.tags
    is_first = rival.class_ in _RIVALS and rival.place < thing.place
    return rival.tags > _RATIO * thing.tags or (is_first and not thing.tags)


def _dominant(senses: Sequence[_Sense], ratio: int) -> _Sense | None:
    """Return the sense of something else than a thing that a word nearly always has, or None."""
    if len(senses) == 1:
        return senses[0] if senses[0].class_ != "abstract" and senses[0].is_usual else None
    first, second = [*sorted(senses, key=lambda sense: -sense.tags)[:2], None, None][:2]
    if first is None or first.class_ not in _OTHERS or not first.is_usual:
        return None
    if any(sense.class_ in _THINGS for sense in senses):
        is_clear = first.tags >= _FREQUENT and first.class_ in ("person", "substance")
    else:
        is_clear = first.tags >= _LEAST and first.class_ in ("person", "substance", "group")
    return first if is_clear and first.tags >= ratio * second.tags else None
