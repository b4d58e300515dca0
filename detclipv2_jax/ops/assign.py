"""Assignment of ground-truth boxes to anchors: adaptive training sample selection (ATSS)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.ops.boxes import iou

# An anchor's center must be inside its box by more than this many pixels (ATSS's reference code).
MIN_INSIDE = 0.01


def atss_assign(
    anchors: Float[Array, "K 4"],
    anchor_mask: Bool[Array, " K"],
    level_sizes: Sequence[int],
    boxes: Float[Array, "N 4"],
    box_mask: Bool[Array, " N"],
    topk: int = 9,
) -> Int[Array, " K"]:
    """Return the index of the box that each anchor of one image is assigned, -1 for background.

    Zhang et al., CVPR 2020, algorithm 1:

    1. The candidates of a box are, on each level, the `topk` anchors (or all, where the level has
       fewer) whose centers are nearest to the center of the box.
    2. The box claims the candidates whose IoU with it is at least the mean plus the unbiased
       standard deviation of all its candidates' IoUs, and whose center is inside it by more than
       0.01 pixel. The standard deviation of a single candidate counts as 0.
    3. An anchor that several boxes claim is assigned the one with the largest IoU.

    Ties go to the lower index, of anchors and of boxes.

    Args:
      anchors: (x_min, y_min, x_max, y_max) in pixels, level by level.
      anchor_mask: False for anchors that do not take part, such as those outside the image.
      level_sizes: anchors per level, fine to coarse; they sum to K.
      boxes: ground truth in pixels, padded to N.
      box_mask: False for padding, whose contents do not matter.
      topk: candidates per level.
    """
    # Anchors may be numpy constants, which cannot be indexed by traced arrays.
    anchors, anchor_mask, boxes = map(jnp.asarray, (anchors, anchor_mask, boxes))
    candidates = _nearest_anchors(anchors, anchor_mask, level_sizes, boxes, topk)
    exists = anchor_mask[candidates]
    near = anchors[candidates]
    overlaps = iou(near, boxes[:, None])

    claims = (
        exists
        & box_mask[:, None]
        & (overlaps >= _thresholds(overlaps, exists)[:, None])
        & (_depth_inside(near, boxes[:, None]) > MIN_INSIDE)
    )
    return _largest_overlap_wins(candidates, overlaps, claims, len(anchors))


def _nearest_anchors(
    anchors: Float[Array, "K 4"],
    anchor_mask: Bool[Array, " K"],
    level_sizes: Sequence[int],
    boxes: Float[Array, "N 4"],
    topk: int,
) -> Int[Array, "N T"]:
    """Return the candidates of each box: indices of anchors, level by level."""
    anchor_centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    box_centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    candidates, start = [], 0
    for size in level_sizes:
        level = slice(start, start + size)
        offsets = box_centers[:, None] - anchor_centers[None, level]
        distances = jnp.sum(offsets**2, axis=-1)
        distances = jnp.where(anchor_mask[level], distances, jnp.inf)
        candidates.append(start + jax.lax.top_k(-distances, min(topk, size))[1])
        start += size
    return jnp.concatenate(candidates, axis=-1)


def _thresholds(overlaps: Float[Array, "N T"], exists: Bool[Array, "N T"]) -> Float[Array, " N"]:
    """Return the mean plus the standard deviation of each box's candidates' IoUs."""
    count = exists.sum(axis=-1)
    # Measure from the smallest overlap, so that the mean of equal overlaps is exactly that overlap.
    # A mean that is rounded up would exclude them all.
    low = jnp.min(jnp.where(exists, overlaps, jnp.inf), axis=-1, keepdims=True)
    above = jnp.where(exists, overlaps - low, 0.0)
    mean = above.sum(axis=-1) / jnp.maximum(count, 1)
    spread = jnp.where(exists, above - mean[:, None], 0.0)
    deviation = jnp.sqrt((spread**2).sum(axis=-1) / jnp.maximum(count - 1, 1))
    return low[:, 0] + mean + deviation


def _depth_inside(anchors: Float[Array, "*n 4"], boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Return how far inside its box an anchor's center is, in pixels; negative outside."""
    centers = (anchors[..., :2] + anchors[..., 2:]) / 2
    return jnp.minimum(centers - boxes[..., :2], boxes[..., 2:] - centers).min(axis=-1)


def _largest_overlap_wins(
    candidates: Int[Array, "N T"],
    overlaps: Float[Array, "N T"],
    claims: Bool[Array, "N T"],
    anchor_count: int,
) -> Int[Array, " K"]:
    """Return, for each anchor, the claiming box with the largest IoU, -1 without a claim."""
    # A scatter of the N * T claims costs far less than a (K, N) table of overlaps. The barrier
    # keeps the compiler from computing an overlap twice with different rounding, since overlaps
    # are compared for equality.
    overlaps = jax.lax.optimization_barrier(jnp.where(claims, overlaps, -1.0))
    best = jnp.full(anchor_count, -1.0).at[candidates].max(overlaps)
    wins = claims & (overlaps == best[candidates])
    count = len(candidates)
    box_index = jnp.where(wins, jnp.arange(count, dtype=jnp.int32)[:, None], count)
    winner = jnp.full(anchor_count, count, jnp.int32).at[candidates].min(box_index)
    return jnp.where(winner < count, winner, -1)
