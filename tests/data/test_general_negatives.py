"""Negatives from a general list of names, for data that has few names of its own."""

import dataclasses

import numpy as np
import pytest
from concept_sources import source
from test_negatives import with_records

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import KindConfig, check_kind
from detclipv2_jax.data.general_names import GeneralNames
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text.wordnet import wordnet


@pytest.mark.parametrize(
    ("names", "related", "others"),
    [
        (
            ["raccoon"],
            ["raccoon", "common raccoon", "mammal", "animal", "vertebrate"],
            ["cat", "wolf", "teapot", "pineapple"],
        ),
        (["couch", "t-shirt"], ["sofa", "lounge", "furniture", "shirt"], ["hammock", "raccoon"]),
        # Of a phrase its head noun, plurals, other spellings, several senses.
        (["red cars"], ["car", "limousine", "vehicle", "motorcar"], ["apple", "horse"]),
        (["crane"], ["crane", "bird", "animal"], ["machine", "apple"]),
        (["Teapots"], ["teapot", "pot"], ["samovar", "apple"]),
        (["widget_a", "defect 17"], [], ["apple", "raccoon"]),
    ],
)
def test_no_name_that_could_be_in_the_picture_by_the_names_of_the_data(names, related, others):
    known = set(GeneralNames(names).names)
    assert not known & set(related) and set(others) <= known
    assert len(known) > 8000


def test_people_and_what_most_pictures_show_are_not_in_the_list():
    known = set(GeneralNames([]).names)
    assert not known & {"person", "woman", "sky", "hand", "face", "ground", "water", "entity"}
    assert len(known) == len(GeneralNames([]).names)


def test_hypernyms_and_hyponyms_are_those_of_wordnet():
    nouns = wordnet()
    assert nouns.hypernyms("cat.n.01")[-1] == "feline.n.01"
    assert {"carnivore.n.01", "animal.n.01", "entity.n.01"} <= set(nouns.hypernyms("cat.n.01"))
    assert nouns.hypernyms("entity.n.01") == [] and nouns.hypernyms("nonsuch word.n.01") == []
    related = nouns.related(["cat.n.01"])
    assert {"cat.n.01", "siamese_cat.n.01", "wildcat.n.03", "animal.n.01"} <= related
    assert "dog.n.01" not in related and nouns.related(["nonsuch.n.99"]) == set()


def planned(tmp_path, sizes, **fields):
    """(plan, vocabulary): detection sources with so many names; each record has the first name."""
    fields = dict(batch_size=4, table_size=64, concepts_per_image=16, scored_on="source") | fields
    sources = {}
    for number, size in enumerate(sizes):
        names = {f"thing {number} {i}": 9 for i in range(size)}
        one = source(tmp_path / str(number), "detection", names)
        sources[str(number)] = with_records(one, [[0]] * 8)
    config = KindConfig(sources=tuple(sources), shapes=((8, 8),), **fields)
    general = GeneralNames(["raccoon"]) if config.general_negatives else None
    vocabulary = Vocabulary(sources, general=general)
    return Plan(sources, vocabulary, {"detection": config}, seed=0), vocabulary


def test_images_of_one_name_are_scored_on_general_names(tmp_path):
    plan, vocabulary = planned(tmp_path, [1], general_negatives=10)
    seen = set()
    for number in range(plan.steps_per_epoch):
        step = plan.plan(number)
        rows = step.concepts >= 0
        is_general = np.isin(step.concepts, vocabulary.general)
        assert 10 <= is_general.sum() <= 40 and rows.sum() == is_general.sum() + 1
        assert (step.scored == rows).all()  # the images' own name, and every general one
        names = vocabulary.names(step.concepts[rows])
        assert names[0] == "thing 0 0" and "raccoon" not in names
        assert vocabulary.tokens(step.concepts)[rows].any(axis=1).all()
        seen |= set(names)
    assert len(seen) > 40


def test_only_what_a_source_lacks_is_drawn(tmp_path):
    # The first source offers 7 negatives, the second 30, of which an image draws 15.
    plan, vocabulary = planned(tmp_path, [8, 31], general_negatives=10, batch_size=1)
    for number in range(plan.steps_per_epoch):
        step = plan.plan(number)
        is_general = np.isin(step.concepts, vocabulary.general)
        assert is_general.sum() == (3 if step.sources[0] == 0 else 0)


def test_without_the_field_the_batches_are_those_of_before(tmp_path):
    """The vocabulary has no general names then, and the generator is not touched."""
    plan, vocabulary = planned(tmp_path, [1, 8])
    assert not len(vocabulary.general) and len(vocabulary) == 9
    again, _ = planned(tmp_path / "again", [1, 8], general_negatives=0)
    for number in range(plan.steps_per_epoch):
        one, other = plan.plan(number), again.plan(number)
        assert (one.concepts == other.concepts).all() and (one.scored == other.scored).all()
    assert dataclasses.asdict(KindConfig())["general_negatives"] == 0


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("grounding", {"general_negatives": 1}, "general_negatives is 1. It must be 0"),
        ("detection", {"general_negatives": -1}, "must be at least 0"),
        ("detection", {"general_negatives": 1}, 'above 0 with scored_on "source" or "own" only'),
        (
            "detection",
            {"general_negatives": 1, "scored_on": "source", "concepts_per_image": 0},
            "above 0 to draw negatives",
        ),
    ],
)
def test_where_it_cannot_work_it_is_refused(kind, fields, message):
    with pytest.raises(UserError, match=message):
        check_kind(kind, KindConfig(**fields))
