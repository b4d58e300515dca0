"""Negatives of a step with a prepared dictionary: nobody's, and nobody's synonyms."""

import dataclasses
import time

import numpy as np
import pytest
from concept_sources import source

from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text.wordnet import wordnet

FURNITURE = [
    "sofa",
    "couch",
    "sofas",
    "chair",
    "lamp",
    "rug",
    "hoverboard",
    "hoverboards",
    "t-shirt",
]
SPELT = {"sofa": {"sofa", "couch", "sofas"}, "hoverboard": {"hoverboard", "hoverboards"}}


def with_records(one, positives):
    """A source with records that own concepts, named by local ids."""
    offsets = np.cumsum([0] + [len(ids) for ids in positives])
    return dataclasses.replace(
        one,
        info={"records": len(positives), "shards": [len(positives)]},
        height=np.full(len(positives), 60, np.uint16),
        width=np.full(len(positives), 80, np.uint16),
        positives_offsets=offsets,
        positives=np.array([i for ids in positives for i in ids], np.int32),
    )


def planned(
    tmp_path, kind, names, positives, *, batch_size=1, seed=0, words=(), only_words=False, **fields
):
    """(plan, vocabulary): one source of a kind, and a dictionary of its names and `words`."""
    one = source(tmp_path / kind, kind, dict.fromkeys(names, 9))
    one = with_records(one, positives)
    known = [*(() if only_words else names), *words]
    opened = dictionary_writer.build(tmp_path / "to", list(dict.fromkeys(known)), {})
    vocabulary = Vocabulary({kind: one}, opened)
    fields = {"table_size": 64, "concepts_per_image": 64} | fields
    config = KindConfig(sources=(kind,), batch_size=batch_size, shapes=((8, 8),), **fields)
    return Plan({kind: one}, vocabulary, {kind: config}, seed), vocabulary


def names_of(vocabulary, step):
    """(positives, negatives) of a step by name."""
    used = vocabulary.names(step.concepts[step.concepts >= 0])
    return used[: step.positives], used[step.positives :]


@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_synonyms_of_a_positive_are_never_negatives(tmp_path, kind):
    plan, vocabulary = planned(tmp_path, kind, FURNITURE, [[0], [6], [3]])
    for number in range(3 * plan.steps_per_epoch):
        (own,), negatives = names_of(vocabulary, plan.plan(number))
        same = SPELT.get(own, {own})
        assert sorted(negatives) == sorted(set(FURNITURE) - same)


def test_of_any_image_of_the_batch(tmp_path):
    plan, vocabulary = planned(tmp_path, "detection", FURNITURE, [[0], [6]], batch_size=2)
    own, negatives = names_of(vocabulary, plan.plan(0))
    assert set(own) == {"sofa", "hoverboard"}
    assert set(negatives) == {"chair", "lamp", "rug", "t-shirt"}


def test_two_synonyms_may_both_be_positives(tmp_path):
    plan, vocabulary = planned(tmp_path, "detection", FURNITURE, [[0, 1]])
    own, negatives = names_of(vocabulary, plan.plan(0))
    assert set(own) == {"sofa", "couch"} and "sofas" not in negatives


def test_grounding_draws_from_the_dictionary(tmp_path):
    words = ["tree", "bus", "motorbus", "couches", "t shirt", "🙂"]
    plan, vocabulary = planned(tmp_path, "grounding", FURNITURE[:3], [[1]], words=words)
    _, negatives = names_of(vocabulary, plan.plan(0))
    assert set(negatives) == {"tree", "bus", "motorbus", "t shirt", "🙂"}


def test_names_that_the_dictionary_lacks_are_not_one_thing(tmp_path):
    options = dict(words=["tree", "couch"], only_words=True)
    plan, vocabulary = planned(tmp_path, "detection", FURNITURE, [[3], [0]], **options)
    for own, negatives in (names_of(vocabulary, plan.plan(number)) for number in range(2)):
        # "couch" is known, and so are "sofa" and "sofas" beside it.
        same = SPELT["sofa"] if own == ["sofa"] else {"chair"}
        assert set(negatives) == set(FURNITURE) - same


def test_a_pool_of_nothing_but_synonyms(tmp_path):
    plan, vocabulary = planned(tmp_path, "detection", ["sofa", "couch", "sofas"], [[0], [], [2]])
    found = [names_of(vocabulary, plan.plan(number)) for number in range(3)]
    for own, negatives in found:
        assert sorted(negatives) == ([] if own else ["couch", "sofa", "sofas"])
    assert sorted(own for own, _ in found) == [[], ["sofa"], ["sofas"]]


@pytest.mark.parametrize("asked", [1, 3, 5, 6, 64])
def test_an_image_sees_as_many_as_it_asks_for_if_there_are(tmp_path, asked):
    plan, _ = planned(tmp_path, "detection", FURNITURE, [[0]], concepts_per_image=asked)
    # Of nine names two are synonyms of the positive.
    assert (plan.plan(0).concepts >= 0).sum() == min(asked, 7)


def test_a_step_depends_on_seed_and_step_alone(tmp_path):
    words = [name.replace("_", " ") for name in list(wordnet()._senses)[:2000:2]]
    positives = [[i % 9] for i in range(40)]
    options = dict(batch_size=4, concepts_per_image=20, table_size=128, words=words)
    plan, _ = planned(tmp_path / "a", "grounding", FURNITURE, positives, **options)
    again, _ = planned(tmp_path / "b", "grounding", FURNITURE, positives, **options)
    other, _ = planned(tmp_path / "c", "grounding", FURNITURE, positives, seed=1, **options)
    steps = [3, 0, 17, 3]
    rows = [plan.plan(step).concepts for step in steps]
    for step, row in zip(reversed(steps), reversed(rows)):
        np.testing.assert_array_equal(again.plan(step).concepts, row)
    np.testing.assert_array_equal(rows[0], rows[3])
    assert not np.array_equal(rows[0], other.plan(3).concepts)
    assert not np.array_equal(rows[0], rows[1])


def test_what_may_be_drawn_is_drawn_equally_often(tmp_path):
    plan, vocabulary = planned(tmp_path, "detection", FURNITURE, [[0]] * 600, concepts_per_image=4)
    counts = dict.fromkeys(FURNITURE, 0)
    for number in range(600):
        for name in names_of(vocabulary, plan.plan(number))[1]:
            counts[name] += 1
    allowed = sorted(set(FURNITURE) - SPELT["sofa"])
    assert [counts[name] for name in sorted(SPELT["sofa"])] == [0, 0, 0]
    # 3 of 6 in each of 600: mean 300, deviation sqrt(600 / 4) = 12.
    assert all(abs(counts[name] - 300) < 5 * 12.3 for name in allowed)


def test_a_large_dictionary_is_drawn_from_in_milliseconds(tmp_path):
    words = [name.replace("_", " ") for name in list(wordnet()._senses)[:70_000:5]]
    positives = np.random.default_rng(0).integers(0, 9, (512, 2)).tolist()
    plan, _ = planned(
        tmp_path,
        "grounding",
        FURNITURE,
        [sorted(set(ids)) for ids in positives],
        batch_size=128,
        concepts_per_image=100,
        table_size=2048,
        words=words,
    )
    plan.plan(0)
    started = time.process_time()
    steps = [plan.plan(number) for number in range(20)]
    assert (time.process_time() - started) / 20 < 0.1  # 7 ms on an idle core
    assert all((step.concepts >= 0).all() for step in steps)
