"""Boxes and anchors: areas, overlaps, the delta coder, the anchor grid.

Boxes are (x_min, y_min, x_max, y_max) in pixels of the canvas, continuous coordinates, no `+1`.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The largest growth of a side that decoding allows (the R-CNN family's 16 / 1000 rule): it keeps
# exp() finite while a young model predicts nonsense.
MAX_LOG_RATIO = math.log(1000 / 16)

DELTA_STDS = (0.1, 0.1, 0.2, 0.2)  # ATSS's coder, DetCLIPv2 keeps it


@dataclasses.dataclass(frozen=True)
class AnchorConfig:
    """One square anchor a location (ATSS).

    Its side is `scale` strides; the first center lies `offset` strides from the canvas's corner.
    """

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    scale: float = 8.0
    offset: float = 0.5


def area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Areas in square pixels; 0 where a side is negative."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def iou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Intersection over union of boxes pair by pair (shapes broadcast); 0 where both are empty."""
    intersection, union = _intersection_and_union(a, b)
    return _ratio(intersection, union)


def pairwise_iou(a: Float[Array, "N 4"], b: Float[Array, "M 4"]) -> Float[Array, "N M"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both are empty."""
    return iou(a[:, None], b[None])


def giou(a: Float[Array, "*n 4"], b: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Generalised IoU pair by pair, in (-1, 1] (Rezatofighi et al., CVPR 2019, eq. 3).

    Two empty boxes have IoU 0, and no penalty if their hull is empty too; gradients stay finite.
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
    """What the head has to predict so that `decode_deltas` gives `boxes`: (dx, dy, dw, dh) / stds.

    Sides under a thousandth of the anchor's (padding boxes have none) are taken as that.
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
    """Boxes in pixels from the head's deltas (Faster R-CNN's parametrisation), float32.

    The log of a side's growth is clamped to +-MAX_LOG_RATIO; boxes are not clipped to the picture.
    """
    anchor_centers, anchor_sides = _centers_and_sides(anchors)
    deltas = deltas.astype(jnp.float32) * jnp.asarray(stds, jnp.float32)
    centers = anchor_centers + deltas[..., :2] * anchor_sides
    growth = jnp.clip(deltas[..., 2:], -MAX_LOG_RATIO, MAX_LOG_RATIO)
    half = 0.5 * anchor_sides * jnp.exp(growth)
    return jnp.concatenate([centers - half, centers + half], axis=-1)


def level_sizes(height: int, width: int, cfg: AnchorConfig) -> tuple[int, ...]:
    """Number of anchors on each level, fine to coarse, for a canvas of height x width pixels."""
    return tuple(math.ceil(height / s) * math.ceil(width / s) for s in cfg.strides)


def anchor_grid(height: int, width: int, cfg: AnchorConfig) -> np.ndarray:
    """All anchors (K, 4) of a canvas, float32: levels fine to coarse, rows top to bottom in each.

    A numpy array, so that it is a constant of the compiled program. K = sum(level_sizes(...)).
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
    """Which anchors have their center on the picture, whose (height, width) are `sizes`."""
    x, y = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    height, width = sizes[:, :1], sizes[:, 1:]
    return (x >= 0) & (y >= 0) & (x < width) & (y < height)


def centerness_targets(
    anchors: Float[Array, "*n 4"], boxes: Float[Array, "*n 4"]
) -> Float[Array, "*n"]:
    """How central an anchor's center lies in its box, 1 at the center, 0 on or past an edge.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of the distances to the edges (FCOS eq. 3).
    """
    centers, _ = _centers_and_sides(anchors)
    before, after = centers - boxes[..., :2], boxes[..., 2:] - centers
    near, far = jnp.minimum(before, after), jnp.maximum(before, after)
    inside = jnp.all(near > 0, axis=-1)
    # Outside, the ratio would be negative or 0 / 0, and the root's gradient NaN even when unused.
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
    # Two wheres: the outer one sets the value, the inner one keeps 0 / 0 out of the gradient.
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1.0), 0.0)
