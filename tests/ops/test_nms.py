"""Suppression compared with the textbook loop in float64; coordinates are multiples of 1/4."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.ops import nms as ops
from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.boxes import (
    AnchorConfig,
    anchor_grid,
    centerness_targets,
    level_sizes,
    pairwise_iou,
)

COUNT = 60


def iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def greedy(boxes, scores, mask, threshold, labels=None):
    """Return the indices of the kept boxes, best first."""
    boxes = np.asarray(boxes, np.float64)
    order = sorted(np.flatnonzero(mask), key=lambda i: (-scores[i], i))
    kept = []
    for i in order:
        rivals = [j for j in kept if labels is None or labels[i] == labels[j]]
        if all(iou(boxes[i], boxes[j]) <= threshold for j in rivals):
            kept.append(i)
    return kept


def clustered(seed, count=COUNT):
    """Return overlapping boxes with many tied scores; some are duplicates, some have no area."""
    rng = np.random.default_rng(seed)
    piles = rng.uniform(0, 100, (6, 2))
    centers = piles[rng.integers(0, 6, count)] + rng.normal(0, 4, (count, 2))
    half = rng.uniform(5, 15, (count, 2))
    boxes = np.round(np.concatenate([centers - half, centers + half], axis=1) * 4) / 4
    boxes[5:8] = boxes[0]
    boxes[10, 2:] = boxes[10, :2]
    boxes[11] = boxes[10]
    scores = np.round(rng.uniform(0, 1, count), 1)
    return boxes.astype(np.float32), scores.astype(np.float32), rng.random(count) < 0.9


run_nms = jax.jit(ops.nms)


def suppress(*arguments):
    return np.asarray(run_nms(*arguments))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_nms(seed, threshold):
    boxes, scores, mask = clustered(seed)
    kept = suppress(boxes, scores, mask, threshold)
    assert list(np.flatnonzero(kept)) == sorted(greedy(boxes, scores, mask, threshold))
    assert 0 < kept.sum() < mask.sum()


def test_nms_settles_a_long_chain():
    # Each box overlaps only its neighbors, so that every second one is kept, one after another.
    x = np.arange(COUNT, dtype=np.float32)
    boxes = np.stack([x, 0 * x, x + 1.9, 0 * x + 1], axis=1)
    kept = suppress(boxes, -x, np.ones(COUNT, bool), 0.3)
    np.testing.assert_array_equal(kept, np.arange(COUNT) % 2 == 0)


def test_nms_ties_go_to_the_lower_index():
    boxes = np.tile(np.float32([[0, 0, 8, 8]]), (COUNT, 1))
    kept = suppress(boxes, np.zeros(COUNT, np.float32), np.arange(COUNT) >= 3, 0.5)
    assert list(np.flatnonzero(kept)) == [3]


def test_nms_keeps_at_the_threshold_and_without_area():
    boxes = np.zeros((COUNT, 4), np.float32)
    boxes[0], boxes[1] = [0, 0, 8, 8], [0, 0, 8, 4]  # IoU 1/2 exactly
    scores = np.linspace(1, 0, COUNT, dtype=np.float32)
    everything = np.ones(COUNT, bool)
    assert suppress(boxes, scores, everything, 0.5).all()  # the other boxes are points
    assert not suppress(boxes, scores, everything, 0.499)[1]


def test_nms_of_nothing():
    boxes, scores, _ = clustered(0)
    assert not suppress(boxes, scores, np.zeros(COUNT, bool), 0.5).any()


def test_nms_under_vmap():
    cases = [clustered(seed) for seed in range(3)]
    boxes, scores, mask = (np.stack(x) for x in zip(*cases))
    mask[1] = False
    run = jax.jit(jax.vmap(ops.nms, in_axes=(0, 0, 0, None)))
    got = np.asarray(run(boxes, scores, mask, 0.4))
    for b in range(3):
        np.testing.assert_array_equal(got[b], suppress(boxes[b], scores[b], mask[b], 0.4))


# Classes -----------------------------------------------------------------------------------------


@pytest.fixture
def class_nms_steps(monkeypatch):
    """Return a function that sets how many anchors the first pass of `class_nms` sees."""

    def set_steps(first):
        monkeypatch.setattr(ops, "_FIRST_ANCHORS", first)
        monkeypatch.setattr(ops, "_PICKS", 3)  # the bar is raised many times
        run_class_nms.clear_cache()

    yield set_steps
    run_class_nms.clear_cache()


@functools.partial(jax.jit, static_argnames=("block", "pre_nms_top_k", "max_detections"))
def run_class_nms(boxes, scores, mask, block, **options):
    """Run `class_nms` on a table of scores (B, K, C), `block` classes at a time."""
    blocks = jnp.pad(jnp.arange(scores.shape[2]), (0, -scores.shape[2] % block), constant_values=-1)
    score = lambda scores, ids: jnp.where(ids[:, None] < 0, -1.0, scores[..., ids].mT)
    return ops.class_nms(boxes, mask, score, scores, blocks.reshape(-1, block), **options)


def class_nms(*arrays, block=256, **options):
    """Run `class_nms` on one image: boxes (K, 4), scores (K, C), mask (K,)."""
    found = run_class_nms(*(np.asarray(x)[None] for x in arrays), block=block, **options)
    return [x[0] for x in jax.device_get(found)[:4]]


def reference_class_nms(
    boxes, scores, mask, iou_threshold, score_threshold, pre_nms_top_k, max_detections
):
    """Return (anchor, class, score) of the detections, best first."""
    pairs = []
    for c in range(scores.shape[1]):
        anchors = sorted(np.flatnonzero(mask), key=lambda k: -scores[k, c])  # stable: index order
        anchors = anchors[: pre_nms_top_k or None]
        pairs += [(k, c) for k in anchors if scores[k, c] > score_threshold]
    pairs = sorted(pairs, key=lambda p: -scores[p])  # equal scores by class, then by anchor
    values = [scores[p] for p in pairs]
    kept = greedy(
        [boxes[k] for k, _ in pairs],
        values,
        np.ones(len(pairs), bool),
        iou_threshold,
        [c for _, c in pairs],
    )
    return [(*pairs[i], values[i]) for i in kept[:max_detections]]


@pytest.mark.parametrize(
    "case",
    [
        # classes, pre_nms_top_k, max_detections, score_threshold
        (5, 16, 30, 0.1),
        (5, 1000, 60, 0.0),  # more candidates than anchors
        (5, 0, 60, 0.0),  # all anchors
        (5, 0, 400, 0.0),  # and more detections than there are
        (40, 0, 500, 0.3),
        (90, 0, 25, 0.0),
        (5, 4, 50, 0.0),  # more detections than candidates
        (1, 40, 20, 0.3),
        (40, 1, 10, 0.5),
        (700, 3, 500, 0.5),  # several blocks, the last one not full
    ],
)
@pytest.mark.parametrize("block", [7, 256])
@pytest.mark.parametrize("first", [100, 4])  # anchors of the first pass; there are 60
def test_class_nms(case, block, first, class_nms_steps):
    class_nms_steps(first)
    classes, pre_nms_top_k, max_detections, score_threshold = case
    for seed in range(3):
        boxes, _, mask = clustered(seed)
        rng = np.random.default_rng(seed)
        scores = np.round(rng.uniform(0, 1, (COUNT, classes)), 2).astype(np.float32)
        expected = reference_class_nms(
            boxes, scores, mask, 0.5, np.float32(score_threshold), pre_nms_top_k, max_detections
        )
        got_boxes, got_scores, got_labels, got_mask = class_nms(
            boxes,
            scores,
            mask,
            block=block,
            iou_threshold=0.5,
            score_threshold=score_threshold,
            pre_nms_top_k=pre_nms_top_k,
            max_detections=max_detections,
        )
        assert got_boxes.shape == (max_detections, 4) and got_mask.sum() == len(expected) > 0
        for i, (anchor, label, score) in enumerate(expected):
            np.testing.assert_array_equal(got_boxes[i], boxes[anchor])
            assert got_labels[i] == label and got_scores[i] == score and got_mask[i]
        for padding in (got_boxes, got_scores, got_labels, got_mask):
            assert not padding[len(expected) :].any()


def test_class_nms_suppresses_within_a_class_only():
    boxes = np.tile(np.float32([[0, 0, 8, 8]]), (4, 1))
    scores = np.float32([[0.9, 0.8], [0.7, 0.6], [0.5, 0.4], [0.3, 0.2]])
    _, values, labels, mask = class_nms(
        boxes,
        scores,
        np.ones(4, bool),
        iou_threshold=0.5,
        score_threshold=0,
        pre_nms_top_k=8,
        max_detections=4,
    )
    np.testing.assert_array_equal(mask, [True, True, False, False])
    np.testing.assert_array_equal(labels[:2], [0, 1])
    np.testing.assert_allclose(values[:2], [0.9, 0.8])


def test_class_nms_gives_every_class_its_own_anchors():
    """A class with low scores keeps its anchors next to a class with high scores."""
    boxes = np.float32([[9 * i, 0, 9 * i + 8, 8] for i in range(6)])
    scores = np.stack([np.linspace(0.9, 0.8, 6), np.linspace(0.02, 0.01, 6)], 1).astype(np.float32)
    _, _, labels, mask = class_nms(
        boxes,
        scores,
        np.ones(6, bool),
        iou_threshold=0.5,
        score_threshold=0,
        pre_nms_top_k=3,
        max_detections=9,
    )
    np.testing.assert_array_equal(labels[mask], [0, 0, 0, 1, 1, 1])


def test_class_nms_needs_more_than_the_threshold():
    boxes = np.float32([[9 * i, 0, 9 * i + 8, 8] for i in range(4)])
    scores = np.float32([[0.75, 0.25], [0.5, 0.5], [0.25, 0.5], [0.125, 0.625]])
    everything = np.ones(4, bool)
    options = {"iou_threshold": 0.5, "pre_nms_top_k": 8, "max_detections": 4}
    _, values, _, mask = class_nms(boxes, scores, everything, score_threshold=0.5, **options)
    assert mask.sum() == 2 and list(values) == [0.75, 0.625, 0, 0]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("block", [3, 256])
def test_class_nms_reports_the_best_score_whatever_the_threshold(threshold, block):
    rng = np.random.default_rng(3)
    boxes, scores = np.zeros((3, 40, 4), np.float32), rng.uniform(0, 0.9, (3, 40, 7))
    scores, mask = scores.astype(np.float32), rng.random((3, 40)) < 0.7
    mask[2], scores[1, 5] = False, -1.0  # no anchor; scores that are not finite come as -1
    options = {"iou_threshold": 0.5, "pre_nms_top_k": 0, "max_detections": 4}
    found = run_class_nms(boxes, scores, mask, block, score_threshold=threshold, **options)
    for image in range(2):
        table = np.where(mask[image][:, None], scores[image], 0)
        anchor, label = np.unravel_index(np.argmax(table), table.shape)
        assert found.best_scores[image] == table[anchor, label]
        assert found.best_labels[image] == label
    assert found.best_scores[2] == found.best_labels[2] == 0


def test_class_nms_of_nothing():
    boxes, scores, _ = clustered(0)
    nothing = np.zeros(COUNT, bool)
    result = class_nms(
        boxes,
        scores[:, None],
        nothing,
        iou_threshold=0.5,
        score_threshold=0,
        pre_nms_top_k=8,
        max_detections=4,
    )
    assert not any(np.asarray(x).any() for x in result)


@pytest.mark.parametrize("pre_nms_top_k", [16, 0])
def test_class_nms_of_several_images_equals_that_of_each(pre_nms_top_k, class_nms_steps):
    class_nms_steps(5)
    cases = [clustered(seed) for seed in range(3)]
    boxes, _, mask = (np.stack(x) for x in zip(*cases))
    scores = np.random.default_rng(0).random((3, COUNT, 90)).astype(np.float32)
    scores[1] *= 0.2  # the bar of one image must not affect another
    options = {
        "iou_threshold": 0.5,
        "score_threshold": 0.1,
        "pre_nms_top_k": pre_nms_top_k,
        "max_detections": 30,
    }
    together = jax.device_get(run_class_nms(boxes, scores, mask, block=40, **options))
    for b in range(3):
        for got, expected in zip(together, class_nms(boxes[b], scores[b], mask[b], **options)):
            np.testing.assert_array_equal(got[b], expected)


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("pre_nms_top_k", [COUNT, 0])
def test_class_nms_breaks_ties_by_class_then_anchor(ascending, pre_nms_top_k, class_nms_steps):
    """Few distinct scores, so that many equal the bar; the first blocks have the worst or best."""
    boxes = np.float32([[9 * i, 0, 9 * i + 8, 8] for i in range(COUNT)])
    scores = np.random.default_rng(0).integers(1, 4, (COUNT, 100)).astype(np.float32)
    scores = np.sort(scores, axis=1) if ascending else -np.sort(-scores, axis=1)
    scores /= 4
    class_nms_steps(7)
    everything = np.ones(COUNT, bool)
    for max_detections in (5, 64, 1000):
        got = class_nms(
            boxes,
            scores,
            everything,
            block=10,
            iou_threshold=0.5,
            score_threshold=0.0,
            pre_nms_top_k=pre_nms_top_k,
            max_detections=max_detections,
        )
        order = np.lexsort([*np.indices(scores.T.shape).reshape(2, -1)[::-1], -scores.T.ravel()])
        labels, anchors = np.unravel_index(order[:max_detections], scores.T.shape)
        np.testing.assert_array_equal(got[2], labels)
        np.testing.assert_array_equal(got[0], boxes[anchors])


def test_class_nms_forgives_scores_that_are_rounded_otherwise_the_second_time(class_nms_steps):
    """Classes are scored twice, in other shapes; that loses no detection and repeats none."""
    class_nms_steps(4)
    boxes = np.float32([[0, 0, 8, 8]] * 3 + [[9 * i, 9, 9 * i + 8, 17] for i in range(7)])
    # The fourth anchor of every class is its second detection. At 10 detections the last one is of
    # a class that is scored again.
    scores = np.float32([0.9, 0.8, 0.7, *np.linspace(0.5, 0.1, 7)])
    scores = scores[:, None] * np.linspace(1, 0.99, 8, dtype=np.float32)
    blocks = jnp.arange(8)[None]

    def score(scores, ids):  # eight classes in the first pass, four in the second
        return (scores[..., ids] * (1 - 3e-7 * (len(ids) == 4))).mT

    for count in (10, 30, 70):
        expected = reference_class_nms(boxes, scores, np.ones(10, bool), 0.5, 0.0, 0, count)
        found = ops.class_nms(
            boxes[None],
            np.ones((1, 10), bool),
            score,
            jnp.asarray(scores)[None],
            blocks,
            iou_threshold=0.5,
            score_threshold=0.0,
            pre_nms_top_k=0,
            max_detections=count,
        )
        _, values, labels, exists = (np.asarray(x[0]) for x in found[:4])
        assert exists.sum() == len(expected) == min(count, 64)
        np.testing.assert_array_equal(labels[exists], [c for _, c, _ in expected])
        np.testing.assert_allclose(values[exists], [v for *_, v in expected], rtol=1e-6)


CROWDS = [(20, 90), (60, 80), (100, 70), (150, 60)]  # objects, side in pixels


def crowd(count, side, grid, height, width):
    """Return the boxes of `count` objects, and the boxes and scores of an ideal detector.

    The anchors that ATSS assigns to an object score by its ease and their centerness.
    """
    rng = np.random.default_rng(count)
    columns = int(np.ceil(np.sqrt(count * width / height)))
    rows = -(-count // columns)
    x, y = np.meshgrid(np.arange(columns), np.arange(rows))
    centers = np.stack([(x + 0.5) * width / columns, (y + 0.5) * height / rows], -1)
    centers = centers.reshape(-1, 2)[:count] + rng.uniform(-8, 8, (count, 2))
    sides = side * rng.uniform(0.8, 1.25, (count, 2))
    objects = np.concatenate([centers - sides / 2, centers + sides / 2], 1).astype(np.float32)
    anchors = anchor_grid(height, width, grid)
    inside = np.ones(len(anchors), bool)
    levels = level_sizes(height, width, grid)
    match = np.asarray(atss_assign(anchors, inside, levels, objects, np.ones(count, bool)))
    target = objects[np.maximum(match, 0)]
    quality = rng.uniform(0.3, 0.9, count)[match] * np.asarray(centerness_targets(anchors, target))
    scores = np.where(
        match >= 0,
        quality * rng.uniform(0.9, 1, len(anchors)),
        rng.uniform(0, 0.01, len(anchors)),
    )
    found = np.where(match[:, None] >= 0, target + rng.normal(0, 1.5, anchors.shape), anchors)
    return objects, found.astype(np.float32), scores.astype(np.float32)


@pytest.mark.parametrize(("count", "side"), CROWDS)
@pytest.mark.parametrize("names", [1, 80])
def test_class_nms_keeps_crowds(count, side, names):
    """At 800×1344 all objects of one name are found, also among names that score up to 0.15."""
    grid, height, width = AnchorConfig(), 800, 1344
    objects, boxes, scores = crowd(count, side, grid, height, width)
    others = np.random.default_rng(0).uniform(0, 0.15, (len(scores), names - 1)).astype(np.float32)
    scores = np.concatenate([others, scores[:, None]], axis=1)
    found, values, labels, mask = class_nms(
        boxes,
        scores,
        np.ones(len(boxes), bool),
        block=16,
        iou_threshold=0.6,
        score_threshold=0.0,
        pre_nms_top_k=0,
        max_detections=300,
    )
    ours = mask & (labels == names - 1) & (values > 0.02)
    best = np.asarray(pairwise_iou(objects, found[ours])).max(1)
    assert (best > 0.7).sum() == count
    cut = class_nms(
        boxes,
        scores,
        np.ones(len(boxes), bool),
        block=16,
        iou_threshold=0.6,
        score_threshold=0.0,
        pre_nms_top_k=100,
        max_detections=300,
    )
    cut_found = cut[0][cut[3] & (cut[2] == names - 1) & (cut[1] > 0.02)]
    fewer = (np.asarray(pairwise_iou(objects, cut_found)).max(1) > 0.7).sum()
    assert fewer < 0.8 * count  # what a limit of 100 anchors loses


def test_top_k_by_chunks_equals_top_k():
    rng = np.random.default_rng(0)
    for total, k in ((1000, 3), (999, 15), (4000, 60), (50, 20), (64, 1)):
        for values in (
            rng.random((2, 3, total)),
            rng.integers(0, 3, (2, 3, total)),  # ties within and between chunks
            np.sort(rng.random((2, 3, total))),
            np.full((2, 3, total), -np.inf),
        ):
            values = values.astype(np.float32)
            expected = jax.lax.top_k(values, k)
            for got, wanted in zip(jax.jit(ops._top_k, static_argnums=1)(values, k), expected):
                np.testing.assert_array_equal(got, wanted)


# Proposals ---------------------------------------------------------------------------------------

CFG = AnchorConfig()
ANCHORS = anchor_grid(64, 64, CFG)
LEVELS = level_sizes(64, 64, CFG)  # 64, 16, 4, 1, 1

run_select_proposals = jax.jit(
    lambda *x, **options: ops.select_proposals(*x, LEVELS, **options),
    static_argnames=("pre_nms_per_level", "k"),
)


def select_proposals(*arrays, **options):
    return jax.device_get(run_select_proposals(*arrays, **options))


def reference_proposals(boxes, objectness, mask, pre_nms_top_k, threshold, k):
    entrants, start = [], 0
    for size in LEVELS:
        level = [i for i in range(start, start + size) if mask[i]]
        entrants += sorted(level, key=lambda i: (-objectness[i], i))[:pre_nms_top_k]
        start += size
    entering = np.isin(np.arange(len(boxes)), entrants)
    return greedy(boxes, objectness, entering, threshold)[:k]


def proposal_case(seed):
    rng = np.random.default_rng(seed)
    boxes = np.round((ANCHORS / 4 + rng.normal(0, 6, ANCHORS.shape)) * 4) / 4
    boxes = np.concatenate([boxes[:, :2], np.maximum(boxes[:, 2:], boxes[:, :2])], axis=1)
    objectness = np.round(rng.normal(0, 1, len(boxes)), 1)
    return boxes.astype(np.float32), objectness.astype(np.float32), rng.random(len(boxes)) < 0.8


@pytest.mark.parametrize(
    ("pre_nms_top_k", "threshold", "k"),
    [(1000, 0.5, 20), (6, 0.5, 20), (1000, 0.1, 100), (3, 0.9, 4)],
)
def test_select_proposals(pre_nms_top_k, threshold, k):
    for seed in range(3):
        boxes, objectness, mask = proposal_case(seed)
        expected = reference_proposals(boxes, objectness, mask, pre_nms_top_k, threshold, k)
        indices, found = select_proposals(
            boxes, objectness, mask, pre_nms_per_level=pre_nms_top_k, iou_threshold=threshold, k=k
        )
        assert indices.shape == found.shape == (k,)
        assert list(indices[: len(expected)]) == expected
        np.testing.assert_array_equal(found, np.arange(k) < len(expected))
        assert not indices[len(expected) :].any()


def test_select_proposals_of_an_empty_image():
    boxes, objectness, _ = proposal_case(0)
    nothing = np.zeros(len(boxes), bool)
    _, found = select_proposals(
        boxes, objectness, nothing, pre_nms_per_level=10, iou_threshold=0.5, k=5
    )
    assert not found.any()


def test_selection_has_no_gradient():
    boxes, objectness, mask = proposal_case(1)

    def chosen_sum(boxes, objectness):
        indices, found = ops.select_proposals(
            boxes, objectness, mask, LEVELS, pre_nms_per_level=10, iou_threshold=0.5, k=7
        )
        return jnp.where(found, objectness[indices], 0.0).sum()

    run = jax.jit(jax.grad(chosen_sum, (0, 1)))
    of_boxes, of_objectness = jax.device_get(run(boxes, objectness))
    assert not of_boxes.any()
    assert sorted(np.unique(of_objectness)) == [0, 1] and of_objectness.sum() == 7
