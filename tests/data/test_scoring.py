"""Which concepts each image is scored on: its label space, its lists, and nothing like its own."""

import dataclasses

import numpy as np
import pytest
from test_negatives import FURNITURE, planned
from test_plan import one_kind, positives_of, random_positives, rehearsing, source, three_kinds

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import DataConfig, KindConfig
from detclipv2_jax.data.index import IdLists
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes


def two_sources(seed=0, **fields):
    """40 and 30 names, 15 of them in common."""
    sources = {
        "boxes": source("boxes", "detection", random_positives(53, 40), 40),
        "more": source("more", "detection", random_positives(40, 30, seed=3), 30, first_key=25),
    }
    fields = dict(batch_size=8, table_size=80, concepts_per_image=12, scored_on="source") | fields
    return one_kind(sources, seed=seed, **fields), sources


def label_space(plan, name):
    return set(plan.vocabulary.local_to_global[name].tolist())


def scored_ids(step, slot):
    return set(step.concepts[step.scored[slot]].tolist())


def every_step(plan):
    return map(plan.plan, range(plan.steps_per_epoch))


def images_of(plan, sources, step, slot):
    """(source, the ids that it owns) of every image of a slot, by Python loops."""
    names, result = plan.kinds[step.kind].all_sources, []
    indices = [step.sources[slot], *step.extra_sources[slot]]
    for index, record in zip(indices, [step.records[slot], *step.extra_records[slot]]):
        if record >= 0:
            name = names[index]
            local = sources[name].positives_of(record)
            result.append((name, {int(plan.vocabulary.local_to_global[name][i]) for i in local}))
    return result


def test_two_sources_with_different_names_never_meet():
    names = {"a": ["car", "dog", "chair"], "b": ["spatula", "gasmask", "person"]}
    sources = {
        name: source(name, "detection", [[i % 3] for i in range(8)], 3, first_key=3 * number)
        for number, name in enumerate(names)
    }
    plan = one_kind(sources, batch_size=8, table_size=16, concepts_per_image=4, scored_on="source")
    mixed = 0
    for step in every_step(plan):
        mixed += len(set(step.sources.tolist())) == 2
        for slot, index in enumerate(step.sources):
            assert scored_ids(step, slot) == label_space(plan, "ab"[index])
    assert mixed


@pytest.mark.parametrize("mosaic", [0.0, 0.7])
def test_an_image_is_scored_on_the_names_of_its_source(mosaic):
    plan, sources = two_sources(mosaic=mosaic)
    for step in every_step(plan):
        used = set(step.concepts[step.concepts >= 0].tolist())
        for slot in range(len(step.records)):
            images = images_of(plan, sources, step, slot)
            spaces = [label_space(plan, name) for name, _ in images]
            expected = used.intersection(*spaces) if images else set()
            assert scored_ids(step, slot) == expected


def test_each_image_has_its_concepts_from_its_own_source():
    plan, sources = two_sources()
    both = 0
    for step in every_step(plan):
        assert step.dropped == 0 and step.negatives == step.wanted_negatives
        positives = set(step.concepts[: step.positives].tolist())
        negatives = set(step.concepts[step.positives :].tolist()) - {-1}
        assert step.negatives == len(negatives) and not positives & negatives
        for slot in np.flatnonzero(step.records >= 0):
            assert len(scored_ids(step, slot)) >= 12
        both += len(set(step.sources[step.records >= 0].tolist())) == 2
    assert both


def test_a_name_that_only_one_source_knows_is_drawn_for_it_alone():
    """A name of both sources that an image of either has is nobody's negative draw."""
    plan, _ = two_sources(concepts_per_image=3, batch_size=2)
    spaces = [label_space(plan, name) for name in ("boxes", "more")]
    for step in every_step(plan):
        present = [spaces[i] for i in set(step.sources[step.records >= 0].tolist())]
        negatives = step.concepts[step.positives :][: step.negatives].tolist()
        assert set(negatives) <= set().union(*present)


@pytest.mark.parametrize("table_size", [80, 20])
def test_its_own_concepts_and_the_negatives_drawn_for_it(table_size):
    plan, sources = two_sources(scored_on="own", table_size=table_size)
    shared = 0
    for step in every_step(plan):
        owned = [set(ids) for ids in positives_of(plan, sources, step)]
        for slot in np.flatnonzero(step.records >= 0):
            name = plan.kinds["detection"].sources[step.sources[slot]]
            found = scored_ids(step, slot)
            others = set().union(*(ids for i, ids in enumerate(owned) if i != slot)) - owned[slot]
            assert not found & others and found <= label_space(plan, name)
            if table_size == 80:
                assert owned[slot] <= found and len(found) == 12
            shared += len(found) < 12
        assert step.wanted_negatives >= step.negatives
        if step.wanted_negatives > step.negatives:
            assert step.positives + step.negatives == table_size
    assert (shared > 0) == (table_size == 20)


def test_phrases_may_be_scored_on_what_is_their_own():
    plan, sources = three_kinds(grounding=dict(scored_on="own", table_size=60))
    for step in every_step(plan):
        if step.kind == "grounding":
            for slot, ids in enumerate(positives_of(plan, sources, step)):
                if step.records[slot] >= 0:
                    assert set(ids) <= scored_ids(step, slot)
                    assert step.scored[slot].sum() == 9


def test_the_paper_scores_every_image_on_the_whole_table():
    plan, _ = three_kinds()
    for step in every_step(plan):
        if step.kind == "image_text":
            assert step.scored.shape == (6, 0)
        else:
            filled = step.records >= 0
            assert (step.scored[filled] == (step.concepts >= 0)).all()
            assert not step.scored[~filled].any()


def test_what_is_rehearsed_is_scored_on_its_own_names():
    plan, _ = rehearsing(30)
    detection = dataclasses.replace(plan.kinds["detection"], scored_on="source")
    again = type(plan)(
        plan.vocabulary.sources, plan.vocabulary, plan.kinds | {"detection": detection}, plan.seed
    )
    for one, other in zip(every_step(plan), every_step(again)):
        np.testing.assert_array_equal(one.concepts, other.concepts)
        np.testing.assert_array_equal(one.scored, other.scored)


def test_wanted_and_drawn_negatives_are_counted():
    """Grounding's pooling at the paper's size, as review of the recipe found it."""
    rng = np.random.default_rng(1)
    owned = [sorted(rng.choice(14_000, 6, replace=False).tolist()) for _ in range(128)]
    sources = {"s": source("s", "grounding", owned, 14_000)}
    fields = dict(batch_size=128, concepts_per_image=100)
    small = one_kind(sources, "grounding", table_size=2048, **fields).plan(0)
    large = one_kind(sources, "grounding", table_size=10_000, **fields).plan(0)
    assert small.wanted_negatives == large.wanted_negatives == large.negatives
    assert small.negatives == 2048 - small.positives < 0.2 * small.wanted_negatives
    # 128 x 94 draws of 13,260: 1 - (1 - 94 / 13,260)^128 of them, 7,900.
    assert abs(large.wanted_negatives - 13_260 * (1 - (1 - 94 / 13_260) ** 128)) < 200


@pytest.mark.parametrize("size", ["swin_t", "swin_l"])
@pytest.mark.parametrize("recipe", ["pretrain", "finetune_lvis", "finetune_coco_format"])
def test_the_tables_of_the_recipes_hold_all_negatives_that_their_images_want(recipe, size):
    """Images of six phrases each, of a dictionary of the paper's size."""
    config = config_lib.parse(recipes.load(recipe).get_config(size).to_dict()).data.grounding
    rng = np.random.default_rng(0)
    count = 3 * config.batch_size
    owned = [sorted(rng.choice(14_000, 6, replace=False).tolist()) for _ in range(count)]
    sources = {"s": source("s", "grounding", owned, 14_000)}
    names = ("batch_size", "table_size", "concepts_per_image")
    plan = one_kind(sources, "grounding", **{name: getattr(config, name) for name in names})
    for step in every_step(plan):
        assert step.dropped == 0 and step.negatives == step.wanted_negatives > 0


# ---- Federated sources


def federated(names, positives, absent, partial, **fields):
    lists = [IdLists(np.cumsum([0] + [len(i) for i in ids]), np.int32(sum(ids, []))) for ids in
             (absent, partial)]  # fmt: skip
    one = source("s", "detection", positives, names)
    sources = {"s": dataclasses.replace(one, absent=lists[0], partial=lists[1])}
    fields = dict(scored_on="source", federated=True, concepts_per_image=5, table_size=32) | fields
    return one_kind(sources, **fields), sources


def test_a_federated_image_is_scored_on_what_its_lists_say():
    positives = [[0, 1], [2], [], [3]]
    absent, partial = [[4, 5], [1, 6, 7, 8, 9, 10], [11], []], [[1], [], [0], [3]]
    plan, sources = federated(16, positives, absent, partial, batch_size=4)
    step = plan.plan(0)
    to_global = plan.vocabulary.local_to_global["s"]
    of = lambda ids: set(to_global[np.array(ids, int)].tolist())
    own, lists = [of(ids) for ids in positives], [of(ids) for ids in absent]
    in_table = set(step.concepts.tolist()) - {-1}
    assert in_table <= set().union(*own, *lists), "nothing that nobody is known to lack"
    for slot, record in enumerate(step.records):
        expected = (own[record] | lists[record]) - of(partial[record])
        assert scored_ids(step, slot) == expected & in_table
    # The second image lists six names, one of them another image's positive, and has room for four.
    assert len(in_table & of([6, 7, 8, 9, 10])) == 4
    assert of([4, 5, 11]) <= in_table


def test_lists_are_only_heeded_where_the_config_says_so():
    plan, sources = federated(6, [[0], [1]], [[2], [3]], [[0], []], batch_size=2, federated=False)
    step = plan.plan(0)
    assert (step.scored == (step.concepts >= 0)).all()


def test_a_source_without_lists_is_not_federated():
    with pytest.raises(UserError, match="detection.federated is True, but s: no lists"):
        one_kind({"s": source("s", "detection", [[0]], 2)}, scored_on="source", federated=True)


def test_a_mosaic_of_federated_images_is_scored_on_what_all_of_them_lack():
    positives, rng = [[i % 4] for i in range(9)], np.random.default_rng(0)
    absent = [rng.choice(np.arange(4, 12), 6, replace=False).tolist() for _ in range(9)]
    plan, sources = federated(12, positives, absent, [[]] * 9, batch_size=3, mosaic=1.0)
    to_global = plan.vocabulary.local_to_global["s"]
    for step in every_step(plan):
        used = set(step.concepts.tolist())
        for slot in range(3):
            expected = set(used)
            for record in (step.records[slot], *step.extra_records[slot]):
                expected &= set(to_global[positives[record] + absent[record]].tolist())
            assert scored_ids(step, slot) == expected


# ---- Concepts that are like an image's own


def alike(tmp_path, likeness, kind="detection", names=FURNITURE, positives=((0,), (1,), (3,))):
    plan, vocabulary = planned(
        tmp_path, kind, names, [list(ids) for ids in positives], batch_size=len(positives),
        ignore_alike=likeness,
    )  # fmt: skip
    step = plan.plan(0)
    used = step.concepts >= 0
    names = np.array(vocabulary.names(step.concepts))
    return {
        int(record): set(names[used & ~step.scored[slot]].tolist())
        for slot, record in enumerate(step.records)
    }


@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_a_synonym_of_its_own_concept_is_not_scored(tmp_path, kind):
    assert alike(tmp_path / "a", (), kind) == {0: set(), 1: set(), 2: set()}
    found = alike(tmp_path / "b", ("synonyms",), kind)
    assert found == {0: {"couch"}, 1: {"sofa"}, 2: set()}


def test_a_phrase_of_the_same_head_noun_is_not_scored(tmp_path):
    names = ["car", "a red car", "sofa", "old leather couch", "the red", "traffic light"]
    positives = [[0], [1, 2], [3], [4], [5], []]
    found = alike(tmp_path / "a", ("heads",), "grounding", names, positives)
    assert found == {0: {"a red car"}, 1: {"car"}, 2: set(), 3: set(), 4: set(), 5: set()}
    # Its own concepts stay, also where they are alike.
    assert alike(tmp_path / "b", ("heads",), "grounding", names, [[0, 1], [2]]) == {
        0: set(),
        1: set(),
    }


def test_synonyms_need_a_dictionary():
    with pytest.raises(UserError, match="ignore_alike names synonyms.*config.data.dictionary"):
        DataConfig(detection=KindConfig(sources=("s",), ignore_alike=("synonyms",)))
