import collections
import dataclasses
import math
import pathlib

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import concept_table
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import Plan, StepPlan
from detclipv2_jax.data.vocabulary import Vocabulary


def source(name, kind, positives, concepts, sizes=None, captions=0, first_key=0):
    """A source in memory. Keys fall as local ids rise: global ids are not the local ones."""
    keys = first_key + np.arange(concepts, 0, -1).astype(np.uint64)
    vocabulary = np.arange(concepts) < concepts - captions
    sizes = np.array([(60, 80)] * len(positives) if sizes is None else sizes).reshape(-1, 2)
    return Source(
        directory=pathlib.Path("nowhere"),
        name=name,
        kind=kind,
        info={"records": len(positives), "shards": [len(positives)]},
        height=sizes[:, 0].astype(np.uint16),
        width=sizes[:, 1].astype(np.uint16),
        positives_offsets=np.cumsum([0] + [len(p) for p in positives]),
        positives=np.array([i for p in positives for i in p], np.int32),
        tokens=np.zeros((concepts, 16), np.uint16),
        keys=keys,
        vocabulary=vocabulary,
    )


def random_positives(records, concepts, most=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        sorted(rng.choice(concepts, rng.integers(0, most + 1), replace=False).tolist())
        for _ in range(records)
    ]


def three_kinds(seed=0, **changes):
    rng = np.random.default_rng(1)
    sizes = rng.integers(40, 90, (53, 2))
    captioned = [[60 + i, *p] for i, p in enumerate(random_positives(37, 60, seed=5))]
    sources = {
        "boxes": source("boxes", "detection", random_positives(53, 40), 40, sizes),
        "more": source("more", "detection", random_positives(20, 30, seed=3), 30, first_key=25),
        "phrases": source("phrases", "grounding", random_positives(29, 50, seed=4), 50),
        "pairs": source("pairs", "image_text", captioned, 97, captions=37),
    }
    kinds = {
        "detection": dict(
            sources=("boxes", "more"), batch_size=8, shapes=((48, 64), (64, 48)), table_size=45
        ),
        "grounding": dict(sources=("phrases",), batch_size=5, shapes=((48, 64),), table_size=50),
        "image_text": dict(sources=("pairs",), batch_size=6, shapes=((32, 32),), table_size=64),
    }
    kinds["detection"] |= dict(concepts_per_image=12, max_boxes=4)
    kinds["grounding"] |= dict(concepts_per_image=9, max_boxes=4)
    kinds["image_text"] |= dict(texts_per_image=4, concepts_per_image=0)
    for name, change in changes.items():
        kinds[name] |= change
    configs = {kind: KindConfig(**fields) for kind, fields in kinds.items()}
    return Plan(sources, Vocabulary(sources), configs, seed), sources


def one_kind(sources, kind="detection", seed=0, **fields):
    """The plan of sources that are all of one kind."""
    fields = dict(shapes=((8, 8),), concepts_per_image=0) | fields
    config = KindConfig(sources=tuple(sources), **fields)
    return Plan(sources, Vocabulary(sources), {kind: config}, seed)


def positives_of(plan, sources, step):
    """The global ids that each slot of a step owns, in order: by Python loops over the index."""
    kind = plan.kinds[step.kind]
    owned = []
    for index, record in zip(step.sources, step.records):
        if record < 0:
            owned.append([])
            continue
        name = kind.sources[index]
        local = sources[name].positives_of(record)
        ids = [int(plan.vocabulary.local_to_global[name][i]) for i in local]
        owned.append(ids[: kind.texts_per_image] if step.kind == "image_text" else ids)
    return owned


def steps_equal(a, b):
    fields = [field.name for field in dataclasses.fields(StepPlan)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_holds_each_record_exactly_once(epoch):
    plan, sources = three_kinds()
    seen = collections.Counter()
    first = epoch * plan.steps_per_epoch
    for step in range(first, first + plan.steps_per_epoch):
        planned = plan.plan(step)
        assert planned.epoch == epoch
        for index, record in zip(planned.sources, planned.records):
            if record >= 0:
                seen[plan.kinds[planned.kind].sources[index], int(record)] += 1
    everything = {(name, i) for name, s in sources.items() for i in range(len(s))}
    assert set(seen) == everything
    assert set(seen.values()) == {1}


def test_a_repeated_source_is_passed_several_times_an_epoch():
    sizes = [(60, 80)] * 13 + [(80, 60)] * 6
    sources = {"s": source("s", "classification", [[i % 7] for i in range(19)], 7, sizes)}
    fields = dict(shapes=((48, 64), (64, 48)), batch_size=4, texts_per_image=1, table_size=8)
    once = one_kind(sources, "classification", **fields)
    plan = one_kind(sources, "classification", repeat=3, **fields)
    assert once.steps_per_epoch == 4 + 2 and plan.steps_per_epoch == 3 * (4 + 2)
    assert plan.batches == {"classification": 18}
    orders = {}  # (epoch, repetition, canvas) → records in the order of their batches
    for step in map(plan.plan, range(2 * plan.steps_per_epoch)):
        filled = step.records[step.records >= 0].tolist()
        assert len(set(filled)) == len(filled)  # no batch holds a record twice
        assert step.epoch == step.step // 18
        orders.setdefault((step.epoch, step.repetition, step.shape), []).append(filled)
        # The class name is the only text of each image; every name has one row.
        assert step.texts.shape == (4, 1) and step.scored.shape == (4, 0)
        assert step.texts[: len(filled), 0].tolist() == [
            int(step.rows(plan.vocabulary.local_to_global["s"][record % 7 :][:1])[0])
            for record in filled
        ]
        assert (step.texts[len(filled) :] == -1).all()
        names = step.concepts[step.concepts >= 0]
        assert len(names) == len({record % 7 for record in filled}) == step.positives
    assert len(orders) == 2 * 3 * 2
    records = {(48, 64): set(range(13)), (64, 48): set(range(13, 19))}
    for (_, _, shape), batches in orders.items():
        assert sorted(sum(batches, [])) == sorted(records[shape])
    assert len({str(batches) for batches in orders.values()}) == len(orders)
    # The first pass has the same batches as without repetition, although in other steps.
    first = {str(s.records) for s in map(once.plan, range(6))}
    steps = map(plan.plan, range(18))
    assert {str(s.records) for s in steps if s.repetition == 0} == first


def test_rehearsed_records_are_not_repeated():
    rows = [[0], [1], [2]]
    sources = {name: source(name, "detection", rows, 3) for name in ("own", "old")}
    config = KindConfig(
        sources=("own",), rehearsal=("old",), rehearsal_share=1.0, repeat=2, batch_size=1,
        shapes=((8, 8),), concepts_per_image=0,
    )  # fmt: skip
    plan = Plan(sources, Vocabulary(sources), {"detection": config}, 0)
    assert plan.steps_per_epoch == 2 * 3 + 3 and plan.rehearsal_batches == 3
    seen = [(step.sources[0], step.records[0]) for step in map(plan.plan, range(9))]
    counts = collections.Counter((int(s), int(r)) for s, r in seen)
    assert counts == {(s, r): 2 - s for s in range(2) for r in range(3)}


def test_a_kind_is_drawn_in_proportion_to_its_batches():
    plan, _ = three_kinds()
    kinds = collections.Counter(plan.plan(s).kind for s in range(plan.steps_per_epoch))
    assert kinds == plan.batches
    assert plan.batches["grounding"] == math.ceil(29 / 5)
    assert plan.batches["image_text"] == math.ceil(37 / 6)
    assert sum(plan.batches.values()) == plan.steps_per_epoch
    # Shuffled through one another, and another way in the next epoch.
    sequence = [plan.plan(s).kind for s in range(2 * plan.steps_per_epoch)]
    changes = sum(a != b for a, b in zip(sequence, sequence[1:]))
    assert changes > 2 * len(kinds)
    assert sequence[: plan.steps_per_epoch] != sequence[plan.steps_per_epoch :]


def test_a_kind_may_join_late_in_the_first_epoch():
    plan, _ = three_kinds(
        detection=dict(batch_size=1), grounding=dict(batch_size=1), image_text=dict(begin=0.6)
    )
    others = plan.batches["detection"] + plan.batches["grounding"]
    sequence = [plan.plan(s).kind for s in range(2 * plan.steps_per_epoch)]
    first, second = sequence[: plan.steps_per_epoch], sequence[plan.steps_per_epoch :]
    assert collections.Counter(first) == collections.Counter(second) == plan.batches
    # 102 batches at independent moments: 0.6 of them before, with a deviation of 0.05.
    assert 0.45 < first.index("image_text") / others < 0.8
    assert second.index("image_text") / others < 0.45
    assert "detection" in first[first.index("image_text") :]


def test_empty_slots_are_only_the_tail_of_the_last_batch_of_a_bucket():
    plan, _ = three_kinds()
    steps = [plan.plan(s) for s in range(plan.steps_per_epoch)]
    for kind, shape in plan.programs:
        counts = [int((s.records >= 0).sum()) for s in steps if (s.kind, s.shape) == (kind, shape)]
        size = plan.kinds[kind].batch_size
        assert sum(count < size for count in counts) <= 1
        assert min(counts) > 0
    for step in steps:
        used = step.records >= 0
        assert not (np.diff(used.astype(int)) > 0).any()
        assert len(step.records) == plan.kinds[step.kind].batch_size


def test_every_epoch_has_its_own_order():
    plan, _ = three_kinds()
    orders = collections.defaultdict(list)
    for step in (plan.plan(s) for s in range(3 * plan.steps_per_epoch)):
        used = step.records >= 0
        pairs = zip(step.sources[used].tolist(), step.records[used].tolist())
        orders[step.kind, step.shape, step.epoch] += pairs
    for kind, shape in plan.programs:
        epochs = [orders[kind, shape, epoch] for epoch in range(3)]
        # Batches come shuffled, so it is batch-mates that tell: hardly a pair stays together.
        size = plan.kinds[kind].batch_size
        mates = [
            {
                frozenset(pair)
                for i in range(0, len(e), size)
                for pair in zip(e[i:], e[i + 1 : i + size])
            }
            for e in epochs
        ]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert len(mates[one] & mates[other]) < 0.5 * len(mates[one])
            assert epochs[one] != sorted(epochs[one])


def test_records_go_to_the_canvas_of_nearest_aspect():
    plan, sources = three_kinds()
    shapes = plan.kinds["detection"].shapes
    seen = set()
    for step in (plan.plan(s) for s in range(plan.steps_per_epoch)):
        if step.kind != "detection":
            continue
        for index, record in zip(step.sources, step.records):
            if record >= 0:
                where = sources[plan.kinds["detection"].sources[index]]
                aspect = math.log(int(where.height[record]) / int(where.width[record]))
                distance = {s: abs(aspect - math.log(s[0] / s[1])) for s in shapes}
                assert distance[step.shape] <= min(distance.values()) + 1e-6
                seen.add(step.shape)
    assert seen == set(shapes)


def test_the_program_of_a_step_is_known_without_its_plan():
    plan, _ = three_kinds()
    for step in range(2 * plan.steps_per_epoch):
        planned = plan.plan(step)
        assert plan.program(step) == (planned.kind, planned.shape)
        assert plan.program(step) in plan.programs
    with pytest.raises(ValueError, match="negative"):
        plan.program(-1)


def test_an_epoch_stays_whole_when_the_number_of_processes_changes_within_it():
    """Every process plans for itself, in an order of its own, and takes its slice of each step."""
    eights = {kind: dict(batch_size=8) for kind in ("detection", "grounding", "image_text")}
    stop = three_kinds(**eights)[0].steps_per_epoch
    seen = collections.Counter()
    rng = np.random.default_rng(0)
    for steps, count in ((range(stop // 2), 2), (range(stop // 2, stop), 4)):
        for index in range(count):
            plan, sources = three_kinds(**eights)
            for step in rng.permutation(steps).tolist():
                planned = plan.plan(step)
                mine = slice(index * 8 // count, (index + 1) * 8 // count)
                names = plan.kinds[planned.kind].sources
                for name, record in zip(planned.sources[mine], planned.records[mine].tolist()):
                    if record >= 0:
                        seen[names[name], record] += 1
    everything = {(name, i) for name, s in sources.items() for i in range(len(s))}
    assert set(seen) == everything and set(seen.values()) == {1}


def test_a_step_depends_on_seed_and_step_alone():
    one, _ = three_kinds()
    other, _ = three_kinds()
    steps = [0, 5, one.steps_per_epoch + 3, 4 * one.steps_per_epoch, 1]
    forward = {s: one.plan(s) for s in steps}
    backward = {s: other.plan(s) for s in reversed(steps)}
    assert all(steps_equal(forward[s], backward[s]) for s in steps)
    # Long after its epoch left the cache it is still the same.
    assert steps_equal(one.plan(5), forward[5])
    different, _ = three_kinds(seed=1)
    assert not all(steps_equal(different.plan(s), forward[s]) for s in steps)


def test_the_table_is_the_batch_s_positives_then_negatives_that_are_nobodys():
    plan, sources = three_kinds()
    seen_negatives = 0
    for step in (plan.plan(s) for s in range(2 * plan.steps_per_epoch)):
        owned = positives_of(plan, sources, step)
        wanted = set().union(*map(set, owned))
        used = step.concepts[step.concepts >= 0].tolist()
        positives, negatives = used[: step.positives], used[step.positives :]
        assert len(used) == len(set(used))
        assert (step.concepts[len(used) :] == -1).all()
        assert len(step.concepts) == plan.kinds[step.kind].table_size
        assert step.dropped == 0
        assert positives == sorted(wanted)
        assert not wanted & set(negatives)
        assert set(negatives) <= set(plan.vocabulary.pool(step.kind).tolist())
        seen_negatives += len(negatives)
        if step.kind == "image_text":
            assert not negatives
    assert seen_negatives


def test_one_image_sees_exactly_as_many_concepts_as_asked():
    plan, sources = three_kinds(detection=dict(batch_size=1), grounding=dict(batch_size=1))
    for step in (plan.plan(s) for s in range(plan.steps_per_epoch)):
        asked = plan.kinds[step.kind].concepts_per_image
        if asked:
            assert (step.concepts >= 0).sum() == asked


def test_every_negative_is_drawn_equally_often():
    sources = {"s": source("s", "detection", [[0]] * 400, 41)}
    plan = one_kind(sources, batch_size=1, table_size=64, concepts_per_image=11)
    count = np.zeros(41)
    for step in range(400):
        concepts = plan.plan(step).concepts
        count[concepts[1:11]] += 1
    assert count[plan.plan(0).concepts[0]] == 0
    others = np.delete(count, plan.plan(0).concepts[0])
    # 10 of 40 in each of 400 draws: mean 100, deviation sqrt(400 * 0.25 * 0.75) = 8.7.
    assert others.sum() == 4000
    assert abs(others - 100).max() < 5 * 8.7


def test_a_small_pool_gives_all_it_has():
    sources = {"s": source("s", "detection", [[0], [1]], 6, captions=2)}
    plan = one_kind(sources, batch_size=2, table_size=32, concepts_per_image=30)
    step = plan.plan(0)
    # Two positives, two more names; whole captions are never drawn.
    names = plan.vocabulary.local_to_global["s"][:4]
    assert set(step.concepts[:4].tolist()) == set(names.tolist())
    assert (step.concepts[4:] == -1).all()


def test_negatives_fill_the_table_and_no_more():
    plan, sources = three_kinds(detection=dict(table_size=30, concepts_per_image=29))
    for step in (plan.plan(s) for s in range(plan.steps_per_epoch)):
        if step.kind == "detection":
            wanted = set().union(*map(set, positives_of(plan, sources, step)))
            assert step.dropped == max(len(wanted) - 30, 0)
            if (step.records >= 0).sum() == 8:
                assert (step.concepts >= 0).all()


def test_too_many_positives_are_dropped_by_chance_and_counted():
    plan, sources = three_kinds(detection=dict(table_size=7))
    overflown, kept_lowest = 0, 0
    for step in (plan.plan(s) for s in range(4 * plan.steps_per_epoch)):
        if step.kind != "detection":
            continue
        wanted = sorted(set().union(*map(set, positives_of(plan, sources, step))))
        assert step.dropped == max(len(wanted) - 7, 0)
        assert set(step.concepts[step.concepts >= 0][: step.positives].tolist()) <= set(wanted)
        if step.dropped:
            assert step.positives == 7
            overflown += 1
            kept_lowest += step.concepts[:7].tolist() == wanted[:7]
            lost = [i for i in wanted if i not in step.concepts]
            assert (step.rows(np.array(lost)) == -1).all()
    assert overflown > 10
    assert kept_lowest < overflown / 2


def test_captions_outlive_phrases():
    plan, sources = three_kinds(image_text=dict(table_size=7))
    dropped = 0
    for step in (plan.plan(s) for s in range(plan.steps_per_epoch)):
        if step.kind == "image_text":
            owned = positives_of(plan, sources, step)
            captions = [ids[0] for ids in owned if ids]
            assert (step.rows(np.array(captions)) >= 0).all()
            assert (step.texts[: len(captions), 0] >= 0).all()
            dropped += step.dropped
    assert dropped


@pytest.mark.parametrize("limit", [1, 3, 20])
def test_texts_are_rows_of_the_table_caption_first(limit):
    change = dict(texts_per_image=limit, table_size=100)
    plan, sources = three_kinds(image_text=change)
    for step in (plan.plan(s) for s in range(plan.steps_per_epoch)):
        width = limit if step.kind == "image_text" else 0
        assert step.texts.shape == (len(step.records), width)
        if step.kind == "image_text":
            for ids, rows in zip(positives_of(plan, sources, step), step.texts):
                assert step.concepts[rows[: len(ids)]].tolist() == ids
                assert (rows[len(ids) :] == -1).all()


def test_rows_of_finds_what_is_there():
    concepts = np.array([4, 9, 30, 2, 7, -1, -1], np.int32)
    ids = np.array([2, 4, 5, 30, -1, 31, 7, 0])
    assert concept_table.rows_of(concepts, ids).tolist() == [3, 0, -1, 2, -1, -1, 4, -1]
    assert concept_table.rows_of(np.full(3, -1, np.int32), ids).tolist() == [-1] * 8
    assert concept_table.rows_of(concepts, ids[:0]).shape == (0,)


def test_a_source_without_a_single_concept():
    sources = {"s": source("s", "detection", [[], [], []], 0)}
    plan = one_kind(sources, batch_size=2, table_size=4, concepts_per_image=3)
    assert plan.steps_per_epoch == 2
    assert (plan.plan(0).concepts == -1).all()
    assert plan.plan(1).records.tolist()[1] == -1


def test_large_sources_are_planned_in_seconds():
    records = 2_000_000
    many = source("s", "image_text", [[0]], 1)
    rng = np.random.default_rng(0)
    fields = dict(
        height=rng.integers(200, 400, records).astype(np.uint16),
        width=rng.integers(200, 400, records).astype(np.uint16),
        positives_offsets=np.arange(records + 1),
        positives=np.zeros(records, np.int32),
    )
    many = Source(**{**many.__dict__, **fields, "info": {"records": records}})
    fields = dict(batch_size=6144, shapes=((320, 320),), table_size=64, texts_per_image=8)
    plan = one_kind({"s": many}, "image_text", **fields)
    first = plan.plan(3 * plan.steps_per_epoch)
    assert len(np.unique(first.records)) == 6144


def test_plans_that_their_sources_do_not_allow():
    sources = {
        "s": source("s", "detection", [[0]], 2),
        "t": source("t", "grounding", [[0]], 2),
        "none": source("none", "detection", [], 2),
    }
    vocabulary = Vocabulary(sources)
    config = lambda *names, **fields: KindConfig(sources=names, shapes=((8, 8),), **fields)
    with pytest.raises(UserError, match="no kind"):
        Plan(sources, vocabulary, {}, 0)
    for kind, wrong, message in (
        ("detection", config("s", "absent"), "detection.sources: source 'absent' is not open"),
        ("detection", config("t"), "detection.sources: source 't' was prepared as grounding"),
        ("detection", config("s", rehearsal=("t",)), "detection.rehearsal: source 't'"),
        ("boxes", config("s"), "prepared as detection"),
        ("detection", config("none"), "no records"),
        ("detection", config(), "no records"),
    ):
        with pytest.raises(UserError, match=message):
            Plan(sources, vocabulary, {kind: wrong}, 0)
    with pytest.raises(UserError, match="config.seed is -1"):
        Plan(sources, vocabulary, {"detection": config("s")}, -1)
    assert Plan(sources, vocabulary, {"detection": config("s", "none")}, 0).steps_per_epoch == 1


def rehearsing(records):
    """Two sources of 20 and 37 records; `records` of one and 7 of another are rehearsed."""
    return three_kinds(
        detection=dict(sources=("more",), rehearsal=("boxes",), rehearsal_share=records / 57),
        grounding=dict(sources=(), rehearsal=("phrases",), rehearsal_share=7 / 57),
    )


@pytest.mark.parametrize("records", [0, 10, 1000])
def test_an_epoch_holds_the_target_once_and_a_part_of_what_is_rehearsed(records):
    plan, _ = rehearsing(records)
    seen = [collections.Counter(), collections.Counter()]
    for step in range(2 * plan.steps_per_epoch):
        planned = plan.plan(step)
        names = plan.kinds[planned.kind].all_sources
        names = {names[i] for i in planned.sources[planned.records >= 0]}
        assert len(names) == 1, "no step holds both"
        for record in planned.records[planned.records >= 0]:
            seen[planned.epoch][names.copy().pop(), int(record)] += 1
    for epoch in seen:
        assert set(epoch.values()) == {1}
        counts = collections.Counter(name for name, _ in epoch)
        expected = {"more": 20, "pairs": 37, "boxes": min(records, 53), "phrases": 7}
        assert counts == {name: n for name, n in expected.items() if n}
    if records == 10:
        assert seen[0].keys() != seen[1].keys(), "others in the next epoch"
    assert sum(plan.batches.values()) == plan.steps_per_epoch
    assert len(set(plan.programs)) == len(plan.programs)


def test_what_is_rehearsed_takes_its_negatives_from_its_own_names():
    plan, _ = rehearsing(30)
    own = {
        "more": set(plan.vocabulary.local_to_global["more"].tolist()),
        "boxes": set(plan.vocabulary.local_to_global["boxes"].tolist()),
    }
    assert own["more"] - own["boxes"] and own["boxes"] - own["more"]
    kinds = collections.Counter()
    for step in range(plan.steps_per_epoch):
        planned = plan.plan(step)
        if planned.kind == "detection":
            name = plan.kinds["detection"].all_sources[planned.sources[0]]
            concepts = set(planned.concepts[planned.concepts >= 0].tolist())
            assert concepts <= own[name]
            kinds[name] += len(concepts) > planned.positives
    assert kinds["more"] and kinds["boxes"]


def test_a_plan_without_rehearsal_is_what_it_was_before_there_was_any():
    plan, _ = three_kinds()
    again, _ = three_kinds(detection=dict(rehearsal=(), rehearsal_share=5.0))
    assert plan.rehearsal_batches == again.rehearsal_batches == 0
    for step in range(plan.steps_per_epoch):
        assert steps_equal(plan.plan(step), again.plan(step))


def test_names_are_bare_as_often_as_asked_and_by_seed_and_step_alone():
    sources = {"a": source("a", "detection", random_positives(400, 50), 50)}
    plans = [one_kind(sources, seed=seed, definitions_drop=0.25) for seed in (0, 0, 1)]
    drawn = [np.stack([plan.plan(step).bare for step in range(60)]) for plan in plans]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any() and (drawn[0][0] != drawn[0][1]).any()
    n = drawn[0].size
    assert abs(drawn[0].mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / n)
    assert not one_kind(sources).plan(0).bare.any()
    assert one_kind(sources, definitions_drop=1.0).plan(0).bare.all()
