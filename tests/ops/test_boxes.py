"""Box operations compared with plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.ops import boxes as ops

pairwise_iou = jax.jit(ops.pairwise_iou)
giou = jax.jit(ops.giou)
encode_deltas = jax.jit(ops.encode_deltas)
decode_deltas = jax.jit(ops.decode_deltas)
centerness_targets = jax.jit(ops.centerness_targets)


def slope(function):
    """Return the gradients of the sum of an elementwise function of two arrays."""
    return jax.jit(jax.grad(lambda a, b: function(a, b).sum(), (0, 1)))


# Ordinary, contained, touching, disjoint, identical, without area, with negative sides.
BOXES = np.array(
    [
        [0, 0, 10, 20],
        [2, 3, 8, 9],
        [10, 0, 15, 20],
        [100, 100, 140, 120],
        [0, 0, 10, 20],
        [5, 5, 5, 5],
        [5, 5, 5, 5],
        [4, 4, 9, 4],
        [8, 8, 2, 2],
        [-3.25, -7.5, 4.75, 1.125],
    ],
    np.float32,
)


def side(low, high):
    return max(float(high) - float(low), 0.0)


def reference_area(box):
    return side(box[0], box[2]) * side(box[1], box[3])


def reference_iou_giou(a, b):
    inter = side(max(a[0], b[0]), min(a[2], b[2])) * side(max(a[1], b[1]), min(a[3], b[3]))
    union = reference_area(a) + reference_area(b) - inter
    hull = side(min(a[0], b[0]), max(a[2], b[2])) * side(min(a[1], b[1]), max(a[3], b[3]))
    iou = inter / union if union > 0 else 0.0
    return iou, iou - ((hull - union) / hull if hull > 0 else 0.0)


def all_pairs(count):
    return [(i, j) for i in range(count) for j in range(count)]


def test_area():
    expected = [reference_area(b) for b in BOXES]
    np.testing.assert_allclose(ops.area(BOXES), expected, rtol=1e-6)
    assert expected[0] == 200 and expected[8] == 0


def test_pairwise_iou():
    got = np.asarray(pairwise_iou(BOXES, BOXES[:7]))
    assert got.shape == (10, 7)
    for i in range(10):
        for j in range(7):
            assert got[i, j] == pytest.approx(reference_iou_giou(BOXES[i], BOXES[j])[0], abs=1e-6)


def test_iou_of_no_boxes():
    assert pairwise_iou(BOXES[:0], BOXES).shape == (0, 10)


def test_giou():
    pairs = all_pairs(len(BOXES))
    a, b = (BOXES[list(i)] for i in zip(*pairs))
    expected = [reference_iou_giou(x, y)[1] for x, y in zip(a, b)]
    np.testing.assert_allclose(giou(a, b), expected, atol=1e-6)
    assert min(expected) < -0.9 and max(expected) == 1


def test_giou_gradient_equals_finite_differences():
    rng = np.random.default_rng(0)
    corner, sides = rng.uniform(0, 50, (2, 40, 2)), rng.uniform(3, 40, (2, 40, 2))
    a, b = np.concatenate([corner, corner + sides], axis=-1)
    got, _ = slope(ops.giou)(np.float32(a), np.float32(b))
    for i in range(40):
        for k in range(4):
            step = np.eye(4)[k] * 1e-5
            above, below = (reference_iou_giou(a[i] + d, b[i])[1] for d in (step, -step))
            assert got[i, k] == pytest.approx((above - below) / 2e-5, abs=1e-5)


def test_overlap_gradients_are_finite_for_degenerate_boxes():
    pairs = all_pairs(len(BOXES))
    a, b = (BOXES[list(i)] for i in zip(*pairs))
    for function in (ops.giou, ops.iou):
        for gradient in slope(function)(a, b):
            assert np.isfinite(gradient).all()


def test_decode_equals_plain_loops():
    rng = np.random.default_rng(1)
    anchors = ops.anchor_grid(64, 64, ops.AnchorConfig())
    deltas = rng.normal(0, 8, (len(anchors), 4)).astype(np.float32)
    deltas[0] = [0, 0, 1e4, -1e4]  # clamped to 1000 / 16 in both directions
    got = decode_deltas(anchors, deltas)
    limit = math.log(1000 / 16)
    for (x1, y1, x2, y2), (dx, dy, dw, dh), box in zip(anchors, deltas, np.asarray(got)):
        x, y = (x1 + x2) / 2 + 0.1 * dx * (x2 - x1), (y1 + y2) / 2 + 0.1 * dy * (y2 - y1)
        w = (x2 - x1) * math.exp(min(max(0.2 * dw, -limit), limit))
        h = (y2 - y1) * math.exp(min(max(0.2 * dh, -limit), limit))
        np.testing.assert_allclose(
            box, [x - w / 2, y - h / 2, x + w / 2, y + h / 2], rtol=1e-4, atol=1e-3
        )
    np.testing.assert_allclose(got[0, 2] - got[0, 0], 64 * 62.5, rtol=1e-4)
    np.testing.assert_allclose(got[0, 3] - got[0, 1], 64 / 62.5, rtol=1e-4)


def test_decode_of_bfloat16_deltas_is_float32():
    anchors = ops.anchor_grid(32, 32, ops.AnchorConfig())
    deltas = np.ones((len(anchors), 4), jnp.bfloat16)
    got = decode_deltas(anchors, deltas)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, decode_deltas(anchors, np.ones(deltas.shape, np.float32)))


def test_clip():
    boxes = np.float32([[[-5, 2, 30, 70], [50, 50, 90, 60]], [[1, 2, 3, 4], [-9, -9, -1, -1]]])
    got = ops.clip(jnp.asarray(boxes), jnp.asarray(np.int32([[40, 60], [10, 20]])))
    expected = [[[0, 2, 30, 40], [50, 40, 60, 40]], [[1, 2, 3, 4], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(got, expected)


def test_encode_is_the_inverse_of_decode():
    rng = np.random.default_rng(2)
    anchors = ops.anchor_grid(64, 96, ops.AnchorConfig())
    corner, sides = rng.uniform(0, 60, (len(anchors), 2)), rng.uniform(1, 60, (len(anchors), 2))
    boxes = np.concatenate([corner, corner + sides], axis=-1).astype(np.float32)
    boxes = boxes[np.lexsort((sides[:, 0],))]
    deltas = encode_deltas(anchors, boxes)
    reachable = (np.abs(np.asarray(deltas)[:, 2:]) * 0.2 < ops.MAX_LOG_RATIO).all(axis=1)
    assert reachable.mean() > 0.5
    back = decode_deltas(anchors, deltas)
    np.testing.assert_allclose(np.asarray(back)[reachable], boxes[reachable], atol=1e-2)


def test_encode_stays_finite_for_padding():
    anchors = ops.anchor_grid(32, 32, ops.AnchorConfig())
    zeros = np.zeros_like(anchors)
    assert np.isfinite(encode_deltas(anchors, zeros)).all()
    assert np.isfinite(slope(ops.encode_deltas)(anchors, zeros)[1]).all()


@pytest.mark.parametrize("size", [(96, 96), (100, 52), (5, 300), (800, 1344)])
def test_anchor_grid(size):
    height, width = size
    cfg = ops.AnchorConfig()
    grid = ops.anchor_grid(height, width, cfg)
    counts = ops.level_sizes(height, width, cfg)
    assert isinstance(grid, np.ndarray) and grid.dtype == np.float32
    expected = []
    for stride in (8, 16, 32, 64, 128):
        for row in range(-(-height // stride)):
            for column in range(-(-width // stride)):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                expected.append([x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride])
    np.testing.assert_array_equal(grid, np.array(expected, np.float32))
    assert sum(counts) == len(grid) and len(counts) == 5


def test_anchor_config_moves_and_scales():
    grid = ops.anchor_grid(32, 32, ops.AnchorConfig(strides=(16,), scale=2.0, offset=0.0))
    np.testing.assert_array_equal(grid[0], [-16, -16, 16, 16])
    np.testing.assert_array_equal(grid[1], [0, -16, 32, 16])


def test_level_sizes_match_a_pyramid_of_halvings():
    # P6 and P7 are P5 halved once and twice, rounded up; level_sizes must give the same sizes.
    cfg = ops.AnchorConfig()
    for height, width in [(800, 1333), (33, 65), (1, 1), (511, 513)]:
        h, w = -(-height // 8), -(-width // 8)
        for count in ops.level_sizes(height, width, cfg):
            assert count == h * w
            h, w = -(-h // 2), -(-w // 2)


def test_anchors_inside():
    anchors = ops.anchor_grid(96, 64, ops.AnchorConfig())
    sizes = np.array([[96, 64], [0, 0], [50, 20], [12, 64], [1, 1]])
    got = np.asarray(ops.anchors_inside(anchors, sizes))
    for b, (height, width) in enumerate(sizes):
        for k, (x1, y1, x2, y2) in enumerate(anchors):
            assert got[b, k] == ((x1 + x2) / 2 < width and (y1 + y2) / 2 < height)
    assert not got[1].any() and got[0].sum() > got[2].sum() > 0
    assert not got[4].any()  # an image too small to contain a center


def test_centerness_targets():
    box = np.array([10, 20, 50, 40], np.float32)
    centers = np.array([[30, 30], [11, 30], [49, 39], [10, 30], [9, 30], [30, 41], [50, 40]])
    anchors = np.concatenate([centers - 8, centers + 8], axis=-1).astype(np.float32)
    got = np.asarray(centerness_targets(anchors, np.broadcast_to(box, anchors.shape)))
    for (x, y), value in zip(centers, got):
        left, right, top, bottom = x - 10, 50 - x, y - 20, 40 - y
        expected = 0.0
        if min(left, right, top, bottom) > 0:
            expected = math.sqrt(
                min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
            )
        assert value == pytest.approx(expected, abs=1e-6)
    assert got[0] == 1 and 0 < got[2] < 0.1 and got[3] == got[4] == got[5] == got[6] == 0


def test_centerness_of_degenerate_boxes():
    anchors = ops.anchor_grid(16, 16, ops.AnchorConfig())
    gradients = slope(ops.centerness_targets)
    for box in ([4, 4, 4, 4], [0, 4, 16, 4], [12, 12, 4, 4], [0, 0, 0, 0]):
        boxes = np.broadcast_to(np.float32(box), anchors.shape)
        assert not centerness_targets(anchors, boxes).any()
        assert all(np.isfinite(g).all() for g in gradients(anchors, boxes))
