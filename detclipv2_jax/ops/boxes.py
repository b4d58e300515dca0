"""Boxes and anchors: areas, overlaps, the delta coder, the anchor grid.

Boxes are (x_min, y_min, x_max, y_max) in pixels of the canvas (the padded image), in continuous
coordinates: a box from 0 to 8 is 8 pixels wide, without `+1`. `*n` are any leading axes.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Limit of a side's growth in decoding, from the code of Faster R-CNN (1000 / 16). It keeps exp()
# finite while an untrained model predicts arbitrary values.
MAX_LOG_RATIO = math.log(1000 / 16)

# Divisors of the deltas (dx, dy, dw, dh): those of ATSS (Zhang et al. 2020), kept by DetCLIPv2.
DELTA_STDS = (0.1, 0.1, 0.2, 0.2)


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    """One square anchor per location (Zhang et al. 2020).

    strides: pixels from one location to the next, per level, fine to coarse.
    scale: side of an anchor, in strides.
    offset: distance of the first center from the canvas's corner, in strides.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    scale: float = 8.0
    offset: float = 0.5


def area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return the area of each box in square pixels; 0 where a side is negative."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def iou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return the IoU of corresponding boxes (shapes broadcast); 0 where both are empty."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def pairwise_iou(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Return the IoU of every box of `a` with every box of `b`; 0 where both are empty."""
    return iou(a[:, None], b[None])


def giou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return the generalized IoU of corresponding boxes, in (-1, 1].

    IoU - (hull - union) / hull, where the hull is the smallest box that encloses both
    (Rezatofighi et al., CVPR 2019, algorithm 1). Two empty boxes have IoU 0, and no penalty if
    their hull is empty too. Gradients are always finite.
    """
    intersection, union = _intersection_and_union(a, b)
    low = jnp.minimum(a[..., :2], b[..., :2])
    high = jnp.maximum(a[..., 2:], b[..., 2:])
    hull = area(jnp.concatenate([low, high], axis=-1))
    return _ratio(intersection, union) - _ratio(hull - union, hull)


def encode_deltas(
    anchors: Float[Array, "*n 4"],
    boxes: Float[Array, "*n 4"],
    stds: tuple[float, float, float, float] = DELTA_STDS,
) -> Float[Array, "*n 4"]:
    """Return the deltas that `decode_deltas` turns into `boxes`: (dx, dy, dw, dh) / stds.

    (dx, dy) is the shift of the center in anchor sides and (dw, dh) the log of the ratio of the
    sides (Ren et al., Faster R-CNN, eq. 2). Sides below a thousandth of the anchor's, such as
    those of padding, count as a thousandth.
    """
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    centers, sides = _centers_and_sides(boxes)
    shift = (centers - anchor_centers) / anchor_sides
    growth = jnp.log(jnp.maximum(sides / anchor_sides, 1e-3))
    return jnp.concatenate([shift, growth], axis=-1) / jnp.asarray(stds, jnp.float32)


def decode_deltas(
    anchors: Float[Array, "*n 4"],
    deltas: Float[Array, "*n 4"],
    stds: tuple[float, float, float, float] = DELTA_STDS,
) -> Float[Array, "*n 4"]:
    """Return the boxes in pixels, float32, that the head's deltas describe.

    The inverse of `encode_deltas` (Ren et al., Faster R-CNN, eq. 2). The log of a side's growth is
    clamped to ±MAX_LOG_RATIO. Boxes are not clipped to the image.
    """
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    deltas = deltas.astype(jnp.float32) * jnp.asarray(stds, jnp.float32)
    centers = anchor_centers + deltas[..., :2] * anchor_sides
    growth = jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)
    half = 0.5 * anchor_sides * jnp.exp(growth)
    return jnp.concatenate([centers - half, centers + half], axis=-1)


def clip(boxes: Float[Array, "B *n 4"], sizes: Int[Array, "B 2"]) -> Float[Array, "B *n 4"]:
    """Return the part of each box that is inside its image; `sizes`: its (height, width)."""
    limits = jnp.concatenate([sizes[:, ::-1]] * 2, axis=-1).astype(boxes.dtype)
    return jnp.clip(boxes, 0.0, limits.reshape(len(sizes), *[1] * (boxes.ndim - 2), 4))


def level_sizes(height: int, width: int, cfg: AnchorConfig) -> tuple[int, ...]:
    """Return the number of anchors per level, fine to coarse, of a height × width pixel canvas."""
    return tuple(math.ceil(height / s) * math.ceil(width / s) for s in cfg.strides)


def anchor_grid(height: int, width: int, cfg: AnchorConfig) -> np.ndarray:
    """Return all anchors of a height × width pixel canvas: (K, 4), float32, in pixels.

    Levels go from fine to coarse and rows from top to bottom; K = sum(level_sizes(...)). The
    result is a numpy array, so that it becomes a constant of the compiled program.
    """
    levels = []
    for stride in cfg.strides:
        x = (np.arange(math.ceil(width / stride)) + cfg.offset) * stride
        y = (np.arange(math.ceil(height / stride)) + cfg.offset) * stride
        centers = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
        half = 0.5 * cfg.scale * stride
        levels.append(np.concatenate([centers - half, centers + half], axis=-1))
    return np.concatenate(levels).astype(np.float32)


def anchors_inside(anchors: Float[Array, "K 4"], sizes: Int[Array, "B 2"]) -> Bool[Array, "B K"]:
    """Return which anchors have their center inside the image; `sizes`: its (height, width)."""
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    height, width = sizes[:, :1], sizes[:, 1:]
    return (x >= 0) & (y >= 0) & (x < width) & (y < height)


def centerness_targets(
    anchors: Float[Array, "*n 4"], boxes: Float[Array, "*n 4"]
) -> Float[Array, "*n"]:
    """Return how central an anchor's center is in its box: 1 at the center, 0 on or past an edge.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), where l, r, t and b are the distances to
    the edges (Tian et al., FCOS, ICCV 2019, eq. 3).
    """
    centers, _ = _centers_and_sides(anchors)
    before, after = centers - boxes[..., :2], boxes[..., 2:] - centers
    near, far = jnp.minimum(before, after), jnp.maximum(before, after)
    inside = jnp.all(near > 0, axis=-1)
    # Outside, the ratio would be negative or 0 / 0, and the root's gradient would be NaN even
    # where it is not used.
    ratio = jnp.where(inside[..., None], near, 1.0) / jnp.where(inside[..., None], far, 1.0)
    return jnp.where(inside, jnp.sqrt(ratio[..., 0] * ratio[..., 1]), 0.0)


def _centers_and_sides(
    boxes: Float[Array, "*n 4"],
) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    return (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]


def _intersection_and_union(
    a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    intersection = area(jnp.concatenate([low, high], axis=-1))
    return intersection, area(a) + area(b) - intersection


def _ratio(part: Float[Array, "*n"], whole: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Return part / whole; 0, with gradient 0, where the whole is not positive."""
    # The outer `where` sets the value, the inner one keeps 0 / 0 out of the gradient.
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1.0), 0.0)
