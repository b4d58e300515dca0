"""Greedy non-maximum suppression (NMS) with static shapes: exact, and usable under `vmap`.

A box is dropped if its IoU with a kept box of a higher score is *above* the threshold. Equal
scores rank by index. A box without area overlaps nothing. Boxes are (x_min, y_min, x_max, y_max) in
pixels.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from detclipv2_jax.ops.boxes import area

_CLASSES_AT_ONCE = 32  # classes whose boxes are suppressed in parallel
_CHUNK = 32  # values per chunk of `_top_k`


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    mask: Bool[Array, " N"],
    iou_threshold: float,
) -> Bool[Array, " N"]:
    """Return which boxes of one image greedy suppression keeps, whatever their classes.

    Needs N² bytes of memory.

    Args:
      boxes: in pixels.
      scores: in any order.
      mask: boxes that take part.
      iou_threshold: a box overlapping a kept box by more is dropped.
    """
    boxes, mask = jnp.asarray(boxes), jnp.asarray(mask)
    order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), stable=True)
    columns, alive = _columns(boxes[order]), mask[order]
    ranks = jnp.arange(len(boxes))
    overlaps = _overlap_more(columns[:, :, None], columns[:, None], iou_threshold)
    suppresses = overlaps & (ranks[:, None] < ranks)

    # A box is kept unless a kept box suppresses it. Applied repeatedly, this rule settles the boxes
    # from the best down: after n rounds at least the n best are final, so the state that no longer
    # changes is the greedy result. Real images need about ten rounds.
    def settle(state):
        kept, _ = state
        new = alive & ~jnp.any(suppresses & kept[:, None], axis=0)
        return new, jnp.any(new != kept)

    kept, _ = jax.lax.while_loop(lambda state: state[1], settle, (alive, jnp.any(alive)))
    return jnp.zeros_like(mask).at[order].set(kept)


def class_nms(
    boxes: Float[Array, "B K 4"],
    mask: Bool[Array, "B K"],
    score: Callable[[PyTree], Float[Array, "B C K"]],
    blocks: PyTree,
    *,
    iou_threshold: float,
    score_threshold: Float[Array, ""] | float,
    pre_nms_top_k: int,
    max_detections: int,
) -> tuple[Float[Array, "B T 4"], Float[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Return the best `max_detections` of each image; a box suppresses only boxes of its own class.

    Of each class the `pre_nms_top_k` best anchors take part, if they score above
    `score_threshold`. The number is per class, so that no class loses anchors to the scores of
    another: fixed AP (Dave et al. 2021) measures each class by itself. Equal scores rank by class,
    then by anchor.

    Classes are processed in blocks, so that the memory is that of one block, however many there
    are. The score of the last detection found so far is a bar for all that follow: an anchor
    below it can neither be kept nor, since it ranks lower, suppress one that is.

    Args:
      boxes: of the K anchors of each image, in pixels.
      mask: anchors that take part.
      score: receives one block and returns the scores of its C classes.
      blocks: arrays whose first axis is the block.
      iou_threshold: a box overlapping a better one of its class by more is dropped.
      score_threshold: anchors that take part score above it.
      pre_nms_top_k: anchors that take part per class.
      max_detections: T, detections per image.

    Returns:
      Boxes, scores, labels (numbers of classes over all blocks) and a mask, best first, padded
      with zeros.
    """
    found = _Found(
        jnp.full((boxes.shape[0], max_detections), -jnp.inf),
        jnp.zeros((boxes.shape[0], max_detections), jnp.int32),
        jnp.zeros((boxes.shape[0], max_detections), jnp.int32),
    )
    options = {"iou_threshold": iou_threshold, "pre_nms_top_k": min(pre_nms_top_k, boxes.shape[1])}

    def add_block(state, block):
        first, found = state
        scores = jnp.where(mask[:, None], score(block), -jnp.inf)
        scores = jnp.where(scores > score_threshold, scores, -jnp.inf)
        found = _add_classes(found, boxes, scores, first, **options)
        return (first + scores.shape[1], found), None

    start = jnp.zeros((), jnp.int32)
    (_, found), _ = jax.lax.scan(add_block, (start, found), blocks)
    exists = found.scores > -jnp.inf
    return (
        jnp.where(exists[..., None], _rows(boxes, found.anchors), 0.0),
        jnp.where(exists, found.scores, 0.0),
        jnp.where(exists, found.labels, 0),
        exists,
    )


class _Found(NamedTuple):
    """The best detections so far, best first; the score of a missing one is minus infinity."""

    scores: Float[Array, "B T"]
    anchors: Int[Array, "B T"]
    labels: Int[Array, "B T"]


def _add_classes(
    found: _Found,
    boxes: Float[Array, "B K 4"],
    scores: Float[Array, "B C K"],
    first: Int[Array, ""],
    *,
    iou_threshold: float,
    pre_nms_top_k: int,
) -> _Found:
    """Return the best detections among those found so far and those of C more classes.

    Only classes with a score above the bar are processed, a few at a time. They are taken in order,
    so that equal scores stay in the order of their classes.

    Args:
      found: the best detections so far.
      boxes: of all anchors, in pixels.
      scores: of the C classes; minus infinity: takes no part.
      first: number of the first of the C classes.
      iou_threshold, pre_nms_top_k: as in `class_nms`.
    """
    max_detections, classes = found.scores.shape[1], scores.shape[1]
    few = min(classes, _CLASSES_AT_ONCE)
    passes = jnp.max(scores, axis=-1) > found.scores[:, -1:]
    order = jnp.argsort(~passes, axis=-1, stable=True).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, -classes % few)), mode="edge")
    rounds = -(-jnp.max(jnp.sum(passes, axis=-1)) // few)

    def add_few(number, found):
        picks = jax.lax.dynamic_slice_in_dim(order, number * few, few, axis=1)
        # The last round may have more places than there are classes left.
        fresh = number * few + jnp.arange(few) < classes
        values, anchors = _top_k(_rows(scores, picks), pre_nms_top_k)
        alive = fresh[:, None] & (values > found.scores[:, -1:, None])
        corners = _rows(boxes, anchors.reshape(boxes.shape[0], -1)).reshape(*anchors.shape, 4)
        kept = _suppress_rows(_columns(corners), alive, iou_threshold)
        labels = jnp.broadcast_to((first + picks)[..., None], kept.shape)
        new = (jnp.where(kept, values, -jnp.inf), anchors, labels)
        pool = [
            jnp.concatenate([old, x.reshape(old.shape[0], -1)], axis=1)
            for old, x in zip(found, new)
        ]
        best, places = jax.lax.top_k(pool[0], max_detections)
        return _Found(best, *(jnp.take_along_axis(x, places, axis=1) for x in pool[1:]))

    return jax.lax.fori_loop(0, rounds, add_few, found)


def _rows(table: Float[Array, "B N D"], picks: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Return the picked rows of each image's table."""
    return jnp.take_along_axis(table, picks[..., None], axis=1)


def _top_k(
    values: Float[Array, "B R N"], k: int
) -> tuple[Float[Array, "B R k"], Int[Array, "B R k"]]:
    """Return `jax.lax.top_k`, faster where N is many times k: only the k best chunks are searched.

    Chunks are ranked by their largest value, equal ones by place. Every chunk that ranks before a
    value's own chunk holds a value that ranks before it. So the k best values are in the k best
    chunks.
    """
    batch, rows, total = values.shape
    chunks = -(-total // _CHUNK)
    if chunks <= 2 * k:
        values, places = jax.lax.top_k(values, k)
        return values, places.astype(jnp.int32)
    padding = ((0, 0), (0, 0), (0, chunks * _CHUNK - total))
    table = jnp.pad(values, padding, constant_values=-jnp.inf)
    table = table.reshape(batch, rows, chunks, _CHUNK)
    _, best = jax.lax.top_k(jnp.max(table, axis=-1), k)
    best = jnp.sort(best, axis=-1).astype(jnp.int32)  # equal values rank by place
    table = jnp.take_along_axis(table, best[..., None], axis=2).reshape(batch, rows, k * _CHUNK)
    values, places = jax.lax.top_k(table, k)
    chunk = jnp.take_along_axis(best, places // _CHUNK, axis=2)
    return values, chunk * _CHUNK + places.astype(jnp.int32) % _CHUNK


def _suppress_rows(
    columns: Float[Array, "5 *rows N"], alive: Bool[Array, "*rows N"], iou_threshold: float
) -> Bool[Array, "*rows N"]:
    """Return which boxes greedy suppression keeps in each row of boxes sorted best first.

    Args:
      columns: see `_columns`.
      alive: boxes that take part; they come first in their row.
      iou_threshold: a box overlapping a better one of its row by more is dropped.
    """
    ranks = jnp.arange(alive.shape[-1])

    def step(rank, kept):
        box = jax.lax.dynamic_slice_in_dim(columns, rank, 1, axis=-1)
        acts = jax.lax.dynamic_slice_in_dim(kept, rank, 1, axis=-1)
        overlaps = _overlap_more(box, columns, iou_threshold)
        return kept & ~(acts & overlaps & (ranks > rank))

    return jax.lax.fori_loop(0, jnp.max(jnp.sum(alive, axis=-1)), step, alive)


def select_proposals(
    boxes: Float[Array, "K 4"],
    objectness: Float[Array, " K"],
    mask: Bool[Array, " K"],
    level_sizes: Sequence[int],
    *,
    pre_nms_per_level: int,
    iou_threshold: float,
    k: int,
) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
    """Select the `k` regions of one image for the contrastive loss (Yao et al. 2023, §3.3).

    The `pre_nms_per_level` best anchors of each level go through one class-agnostic suppression.
    The selection has no gradient.

    Args:
      boxes: of the K anchors, in pixels.
      objectness: ranks the anchors (`contrastive.proposal_scores`).
      mask: anchors that take part.
      level_sizes: anchors per level, fine to coarse; they sum to K.
      pre_nms_per_level: anchors that take part per level.
      iou_threshold: a box overlapping a better one by more is dropped.
      k: regions to select.

    Returns:
      Indices of the selected anchors, best first, and a mask: False, with index 0, where fewer
      than k are left.
    """
    boxes, objectness = jax.lax.stop_gradient((boxes, objectness))
    costs = jnp.where(mask, -objectness, jnp.inf)
    indices = jnp.arange(len(costs), dtype=jnp.int32)
    # Sort the boxes along: a TPU sorts six arrays faster than it gathers from one.
    costs, indices, *columns = jax.lax.sort(
        (costs, indices, *_columns(boxes)), num_keys=2, is_stable=False
    )

    enters, start = costs < jnp.inf, 0
    for size in level_sizes:
        if size > pre_nms_per_level:
            here = (indices >= start) & (indices < start + size)
            enters &= ~here | (jnp.cumsum(here) <= pre_nms_per_level)
        start += size
    picks, found = _pick_greedily(jnp.stack(columns), enters, iou_threshold, k)
    return jnp.where(found, indices[picks], 0), found


def _pick_greedily(
    columns: Float[Array, "5 N"],
    alive: Bool[Array, " N"],
    iou_threshold: float,
    count: int,
) -> tuple[Int[Array, " count"], Bool[Array, " count"]]:
    """Return the positions of the first `count` boxes that suppression keeps, and which exist.

    The boxes are sorted best first. They are picked one at a time, which takes count · N overlaps
    and N booleans instead of N² of both. For the sizes of a detector that is five to fifty times
    faster on a CPU, and on a TPU everything stays in VMEM. The picked box is read by a masked sum:
    a gather would want another memory layout, and a TPU would copy all boxes at every pick.
    """
    total = columns.shape[1]
    positions = jnp.arange(total, dtype=jnp.int32)

    def pick(alive, _):
        first = jnp.min(jnp.where(alive, positions, total))
        here = positions == first
        box = jnp.sum(jnp.where(here, columns, 0.0), axis=-1, keepdims=True)
        suppressed = _overlap_more(box, columns, iou_threshold)
        return alive & ~suppressed & ~here, first

    _, picks = jax.lax.scan(pick, alive, length=count)
    found = picks < total
    return jnp.where(found, picks, 0), found


def _columns(boxes: Float[Array, "*n 4"]) -> Float[Array, "5 *n"]:
    """Return the four coordinates and the area of the boxes, each contiguous."""
    return jnp.stack([*jnp.moveaxis(jnp.asarray(boxes), -1, 0), area(boxes)])


def _overlap_more(
    a: Float[Array, "5 *n"], b: Float[Array, "5 *n"], threshold: float
) -> Bool[Array, "*n"]:
    """Return whether the IoU exceeds the threshold, computed without a division.

    Never true for a box without area. `a` and `b` are `_columns`.
    """
    width = jnp.maximum(jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0]), 0.0)
    height = jnp.maximum(jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    return intersection > threshold * (a[4] + b[4] - intersection)
