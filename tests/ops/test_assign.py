"""ATSS compared with plain loops in float64.

Coordinates are multiples of 1/4 on a canvas of at most 256 pixels. Distances are then exact in
float32 too, so that both sides see the same ties. The loops reject cases where two overlaps are so
close that rounding decides.
"""

import jax
import numpy as np
import pytest

from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.boxes import AnchorConfig, anchor_grid, anchors_inside, level_sizes

HEIGHT, WIDTH, BOXES = 96, 128, 16
CFG = AnchorConfig()
ANCHORS = anchor_grid(HEIGHT, WIDTH, CFG)
LEVELS = level_sizes(HEIGHT, WIDTH, CFG)
EVERYWHERE = np.ones(len(ANCHORS), bool)

jitted = jax.jit(lambda mask, boxes, box_mask: atss_assign(ANCHORS, mask, LEVELS, boxes, box_mask))


def assign(boxes, mask=EVERYWHERE):
    """Call the jitted function on boxes padded to BOXES; the padding holds arbitrary values."""
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    padded = np.full((BOXES, 4), np.nan, np.float32)
    padded[len(boxes) :: 2] = [0, 0, 96, 96]
    padded[: len(boxes)] = boxes
    return np.asarray(jitted(mask, padded, np.arange(BOXES) < len(boxes)))


def iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def reference(boxes, mask=EVERYWHERE, anchors=ANCHORS, levels=LEVELS, topk=9):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    anchors = anchors.astype(np.float64)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    result, best = np.full(len(anchors), -1), np.zeros(len(anchors))
    for n, box in enumerate(boxes):
        candidates, start = [], 0
        for size in levels:
            level = [k for k in range(start, start + size) if mask[k]]
            distance = {k: ((centers[k] - (box[:2] + box[2:]) / 2) ** 2).sum() for k in level}
            candidates += sorted(level, key=lambda k: (distance[k], k))[:topk]  # noqa: B023
            start += size
        overlaps = np.array([iou(anchors[k], box) for k in candidates])
        if not len(overlaps):
            continue
        threshold = overlaps.mean() + (overlaps.std(ddof=1) if len(overlaps) > 1 else 0.0)
        for k, overlap in zip(candidates, overlaps):
            (x, y), (x1, y1, x2, y2) = centers[k], box
            if min(x - x1, y - y1, x2 - x, y2 - y) <= 0.01:
                continue
            assert len(overlaps) == 1 or abs(overlap - threshold) > 1e-6, "too close to call"
            if overlap < threshold:
                continue
            if result[k] < 0 or overlap > best[k] + 1e-12:
                assert result[k] < 0 or overlap > best[k] + 1e-6, "too close to call"
                result[k], best[k] = n, overlap
    return result


def random_boxes(seed, count, low, high, height=HEIGHT, width=WIDTH):
    rng = np.random.default_rng(seed)
    centers = rng.uniform(0, 1, (count, 2)) * [width, height]
    half = rng.uniform(low, high, (count, 2)) / 2
    return np.round(np.concatenate([centers - half, centers + half], axis=1) * 4) / 4


def check(boxes, mask=EVERYWHERE):
    got, expected = assign(boxes, mask), reference(boxes, mask)
    np.testing.assert_array_equal(got, expected)
    return got


@pytest.mark.parametrize("seed", range(6))
def test_random_boxes(seed):
    got = check(random_boxes(seed, BOXES, 4, 80))
    assert len(set(got)) > BOXES / 2


@pytest.mark.parametrize("seed", range(4))
def test_crowd(seed):
    rng = np.random.default_rng(seed)
    boxes = np.round((np.array([40, 30, 80, 70]) + rng.normal(0, 4, (BOXES, 4))) * 4) / 4
    got = check(boxes)
    # They compete for a few anchors, so that some boxes get none.
    assert 1 < len(set(got) - {-1}) < BOXES


def test_tiny_boxes():
    boxes = random_boxes(0, BOXES, 0.5, 3)
    got = check(boxes)
    boxes[:4] = [[44, 44, 45, 45], [43.75, 43.75, 44.25, 44.25], [48, 48, 48.5, 48.5], [0, 0, 1, 1]]
    got = check(boxes)
    # 44 is the center of an anchor of 64 pixels; a box of half a pixel around it gets that anchor.
    assert 1 in got and 2 not in got and 3 not in got


def test_huge_boxes():
    boxes = [[0, 0, WIDTH, HEIGHT], [-300, -200, 500, 400], [0, 0, WIDTH, 20], [60, -900, 70, 900]]
    got = check(boxes)
    assert {0, 1} <= set(got)


def test_of_duplicate_boxes_the_first_gets_the_anchors():
    boxes = np.repeat(random_boxes(3, 4, 20, 60), 3, axis=0)
    got = check(boxes)
    assert set(got) <= {-1, 0, 3, 6, 9}


def test_boxes_on_the_edges():
    boxes = [[0, 0, 30, 40], [90, 0, WIDTH, 33], [0, 50, 21, HEIGHT], [99, 60, WIDTH, HEIGHT]]
    got = check(boxes)
    assert set(got) == {-1, 0, 1, 2, 3}


def test_no_boxes():
    assert (assign([]) == -1).all()
    got = jax.jit(lambda b, m: atss_assign(ANCHORS, EVERYWHERE, LEVELS, b, m))(
        np.zeros((0, 4), np.float32), np.zeros(0, bool)
    )
    assert got.shape == EVERYWHERE.shape and (np.asarray(got) == -1).all()


def test_boxes_without_area_get_no_anchor():
    assert (assign([[44, 44, 44, 44], [20, 30, 60, 30], [0, 0, 0, 0]]) == -1).all()


@pytest.mark.parametrize("size", [(96, 60), (40, 128), (64, 52), (70, 70)])
def test_only_anchors_inside_the_image_take_part(size):
    mask = np.asarray(anchors_inside(ANCHORS, np.array([size])))[0]
    boxes = random_boxes(5, BOXES, 4, min(size), *size)
    got = check(boxes, mask)
    assert (got[~mask] == -1).all() and (got >= 0).any()
    # The mask matters: without it, other anchors are assigned.
    assert (got != assign(boxes)).any()


@pytest.mark.parametrize("seed", range(3))
def test_few_scattered_anchors(seed):
    # Most levels have fewer than nine anchors left, so that masked ones fill up the candidates.
    mask = np.random.default_rng(seed).random(len(ANCHORS)) < 0.03
    boxes = random_boxes(seed, BOXES, 20, 100)
    got = check(boxes, mask)
    assert (got >= 0).any() and (got[~mask] == -1).all()


def test_a_single_anchor_gets_its_box():
    mask = np.zeros_like(EVERYWHERE)
    mask[np.flatnonzero((ANCHORS == [12, 12, 76, 76]).all(axis=1))] = True
    assert mask.sum() == 1
    got = check([[30, 30, 60, 60]], mask)
    assert (got >= 0).sum() == 1


def test_no_anchors():
    assert (assign(random_boxes(0, 4, 10, 50), np.zeros_like(EVERYWHERE)) == -1).all()


def test_equal_overlaps_pass_their_own_mean():
    # Seven anchors of one level, all inside a huge box: mean + 0 must not exceed their overlap.
    x = 10 * np.arange(7, dtype=np.float32)
    anchors = np.stack([x, 0 * x, x + 7, 0 * x + 7], axis=1)
    run = jax.jit(lambda box: atss_assign(anchors, np.ones(7, bool), (7,), box, np.ones(1, bool)))
    for side in range(70, 570, 7):
        got = run(np.array([[-5, -5, side, 3 * side]], np.float32))
        assert (np.asarray(got) == 0).all()


def test_a_center_must_be_more_than_a_hundredth_of_a_pixel_inside():
    anchors = np.array([[0, 0, 8, 8]], np.float32)  # its center is (4, 4)
    run = jax.jit(lambda box: atss_assign(anchors, np.ones(1, bool), (1,), box, np.ones(1, bool)))
    for edge, expected in [(4.0, -1), (4.009, -1), (4.02, 0), (3.0, -1)]:
        assert run(np.array([[0, 0, edge, 8]], np.float32))[0] == expected


def test_fewer_candidates():
    boxes = random_boxes(1, BOXES, 10, 70)
    got = jax.jit(
        lambda boxes: atss_assign(ANCHORS, EVERYWHERE, LEVELS, boxes, np.ones(BOXES, bool), topk=4)
    )(boxes.astype(np.float32))
    np.testing.assert_array_equal(got, reference(boxes, topk=4))
    assert (np.asarray(got) != assign(boxes)).any()


def test_vmap_agrees_with_single_images():
    boxes = np.stack([random_boxes(s, BOXES, 4, 80) for s in range(3)]).astype(np.float32)
    box_mask = np.arange(BOXES) < np.array([[BOXES], [0], [5]])
    sizes = np.array([[96, 128], [96, 128], [50, 60]])
    masks = anchors_inside(ANCHORS, sizes)
    got = jax.jit(jax.vmap(lambda mask, b, m: atss_assign(ANCHORS, mask, LEVELS, b, m)))(
        masks, boxes, box_mask
    )
    for b in range(3):
        np.testing.assert_array_equal(got[b], jitted(masks[b], boxes[b], box_mask[b]))
    assert (np.asarray(got[1]) == -1).all()


def test_a_large_canvas():
    height, width = 256, 256
    anchors, levels = anchor_grid(height, width, CFG), level_sizes(height, width, CFG)
    boxes = random_boxes(11, 40, 8, 200, height, width)
    everywhere = np.ones(len(anchors), bool)
    got = jax.jit(lambda b: atss_assign(anchors, everywhere, levels, b, np.ones(40, bool)))(
        boxes.astype(np.float32)
    )
    np.testing.assert_array_equal(got, reference(boxes, everywhere, anchors, levels))
