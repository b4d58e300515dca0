"""The sense of a noun that a photograph is likely to show, against LVIS's annotators' choice."""

import collections

import pytest
from shared_data import lvis_categories

from detclipv2_jax.text.definitions import readings
from detclipv2_jax.text.senses import plausible_senses, visible_sense
from detclipv2_jax.text.wordnet import wordnet


@pytest.mark.parametrize(
    ("lemma", "synset"),
    [
        ("hot_dog", None),  # a stuntman, an exclamation, a sausage
        ("hotdog", "hotdog.n.02"),
        ("bat", None),
        ("ram", None),
        ("kite", None),
        ("plant", None),
        ("french", None),
        ("tart", "tart.n.02"),  # not the prostitute
        ("toaster", "toaster.n.02"),  # before the person who proposes a toast
        ("turkey", "turkey.n.01"),  # neither the country nor a failure
        ("banana", "banana.n.02"),  # the fruit before the herb
        ("beef", None),
        ("woman", "woman.n.01"),
        ("dog", "dog.n.01"),
        ("time", None),
        ("view", None),
        ("game", None),
        ("london", None),
        ("hands", "hand.n.01"),  # not the guardianship
        ("windows", "window.n.01"),  # not the operating system
        ("colors", None),  # not the flag
        ("poster", None),  # not a horse
        ("dalmatian", "dalmatian.n.02"),  # not a person of Dalmatia
    ],
)
def test_nouns(lemma, synset):
    assert visible_sense(lemma) == synset


def test_head_nouns_need_more():
    assert visible_sense("turkey", strict=True) in ("turkey.n.01", None)
    loose = {lemma for lemma in ("pool", "jacket", "board", "chair") if visible_sense(lemma)}
    strict = {lemma for lemma in loose if visible_sense(lemma, strict=True)}
    assert strict < loose and "chair" in strict


def test_plausible_senses_are_things_first():
    assert plausible_senses("crane") == ["crane.n.04", "crane.n.05"]
    assert plausible_senses("pitcher")[0] == "pitcher.n.02"  # the vessel, not the ballplayer
    assert "french.n.01" not in plausible_senses("french")  # a language


def test_the_senses_that_lvis_chose():
    """Of names that are words of WordNet and have LVIS's sense there."""
    nouns, counts = wordnet(), collections.Counter()
    for category in lvis_categories():
        lemma = nouns.noun(readings(category["name"].replace("_", " "))[0])
        true = nouns.canonical(category["synset"])
        if lemma and true in nouns.synsets(lemma):
            found = visible_sense(lemma)
            counts["right" if found == true else "other" if found else "none"] += 1
            counts["first"] += nouns.synsets(lemma)[0] == true
            counts["plausible"] += true in plausible_senses(lemma)
    # Of the others most are as right: "fish" is the animal, here it is the food.
    assert counts["right"] + counts["none"] + counts["other"] == 1183
    assert counts["right"] >= 950 and counts["other"] <= 40 and counts["plausible"] >= 1165
    assert counts["first"] == 934  # with WordNet's first sense 249 are wrong
