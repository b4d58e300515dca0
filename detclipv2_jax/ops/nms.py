"""Non-maximum suppression with static shapes: exact, greedy, and made for vmap.

A box is dropped where its IoU with a kept box of a higher score is *above* the threshold. Equal
scores rank by index. A box without area overlaps nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.ops.boxes import area

_CLASS_BLOCK = 512  # classes suppressed at a time, so that a huge vocabulary costs no more memory


def nms(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    mask: Bool[Array, " N"],
    iou_threshold: float,
) -> Bool[Array, " N"]:
    """Which of the boxes in `mask` greedy suppression keeps, whatever their classes. One image.

    Memory: N^2 bytes.
    """
    boxes, mask = jnp.asarray(boxes), jnp.asarray(mask)
    order = jnp.argsort(jnp.where(mask, -scores, jnp.inf), stable=True)
    columns, alive = _columns(boxes[order]), mask[order]
    ranks = jnp.arange(len(boxes))
    overlaps = _overlap_more(columns[:, :, None], columns[:, None], iou_threshold)
    suppresses = overlaps & (ranks[:, None] < ranks)

    # A box stays unless a box that stays suppresses it. Applied again and again, the rule settles
    # the ranks from the best down: after n rounds at least the n best are right for good, so the
    # point where nothing changes is the greedy answer. Real images need about ten rounds.
    def settle(state):
        kept, _ = state
        new = alive & ~jnp.any(suppresses & kept[:, None], axis=0)
        return new, jnp.any(new != kept)

    kept, _ = jax.lax.while_loop(lambda state: state[1], settle, (alive, jnp.any(alive)))
    return jnp.zeros_like(mask).at[order].set(kept)


def class_nms(
    boxes: Float[Array, "K 4"],
    scores: Float[Array, "K C"],
    mask: Bool[Array, " K"],
    *,
    iou_threshold: float,
    score_threshold: float,
    candidates: int,
    keep: int,
) -> tuple[Float[Array, "T 4"], Float[Array, " T"], Int[Array, " T"], Bool[Array, " T"]]:
    """The best `keep` detections of one image, where a box suppresses only boxes of its own class.

    Of each class the best `candidates` anchors enter, if they score above `score_threshold`: no
    class loses its place to another one's scores, which fixed AP, a measure a class, must not see.
    Returns boxes, scores, labels (columns of `scores`) and a mask, best first, padded with zeros to
    T = keep. Equal scores rank by class, then by anchor. Beside `scores` it holds `_CLASS_BLOCK`
    columns of it, and six numbers for each of the C * candidates that enter.
    """
    boxes, scores, mask = jnp.asarray(boxes), jnp.asarray(scores), jnp.asarray(mask)
    classes, size = scores.shape[-1], min(scores.shape[-1], _CLASS_BLOCK)
    count = min(candidates, len(boxes))

    def suppress_block(first):
        """Scores, anchors and classes of `size` columns: those from `first` on, if still new."""
        start = jnp.minimum(first, classes - size)  # the last block begins in the one before it
        table = jax.lax.dynamic_slice_in_dim(scores, start, size, axis=1).T
        values, anchors = jax.lax.top_k(jnp.where(mask, table, -jnp.inf), count)
        labels = start + jnp.arange(size)[:, None]
        alive = (values > score_threshold) & (labels >= first)
        kept = _suppress_rows(_columns(boxes)[:, anchors], alive, iou_threshold)
        return jnp.where(kept, values, -jnp.inf), anchors, jnp.broadcast_to(labels, kept.shape)

    found = jax.lax.map(suppress_block, jnp.arange(0, classes, size))
    values, anchors, labels = (x.reshape(-1) for x in found)
    values = jnp.pad(values, (0, max(0, keep - len(values))), constant_values=-jnp.inf)
    values, picks = jax.lax.top_k(values, keep)
    there = values > -jnp.inf
    picks = jnp.where(there, picks, 0)
    return (
        jnp.where(there[:, None], boxes[anchors[picks]], 0.0),
        jnp.where(there, values, 0.0),
        jnp.where(there, labels[picks].astype(jnp.int32), 0),
        there,
    )


def _suppress_rows(
    columns: Float[Array, "5 C N"], alive: Bool[Array, "C N"], iou_threshold: float
) -> Bool[Array, "C N"]:
    """What greedy suppression keeps of each row of boxes sorted best first, rows side by side."""
    ranks = jnp.arange(alive.shape[1])

    def step(kept, rank):
        box = jax.lax.dynamic_slice_in_dim(columns, rank, 1, axis=2)
        acts = jax.lax.dynamic_slice_in_dim(kept, rank, 1, axis=1)
        overlaps = _overlap_more(box, columns, iou_threshold)
        return kept & ~(acts & overlaps & (ranks > rank)), None

    return jax.lax.scan(step, alive, ranks)[0]


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
    """The `k` regions of one image that take part in the contrastive loss (DetCLIPv2, section 3.3).

    The best `pre_nms_per_level` of each level (`level_sizes`, fine to coarse, sum to K) enter one
    class-agnostic suppression; the `k` best that it keeps are returned, best first, as indices into
    the K anchors and a mask (False, with index 0, where fewer are left). No gradient passes.
    """
    boxes, objectness = jax.lax.stop_gradient((boxes, objectness))
    costs = jnp.where(mask, -objectness, jnp.inf)
    indices = jnp.arange(len(costs), dtype=jnp.int32)
    # The boxes travel with the sort: a TPU sorts six arrays sooner than it gathers from one.
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
    """Positions of the first `count` boxes that suppression keeps of boxes sorted best first.

    One pick at a time: count * N overlaps and N booleans, where a matrix would be N^2 of both. On a
    CPU that is five to fifty times faster for the sizes of a detector, and on a TPU all of it stays
    in fast memory. The picked box is read by a masked sum: a gather would have its own layout, and
    a TPU would copy all boxes between the two at each pick.
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


def _columns(boxes: Float[Array, "N 4"]) -> Float[Array, "5 N"]:
    """The four coordinates and the area, each contiguous."""
    return jnp.stack([*jnp.asarray(boxes).T, area(boxes)])


def _overlap_more(
    a: Float[Array, "5 *n"], b: Float[Array, "5 *n"], threshold: float
) -> Bool[Array, "*n"]:
    """Whether the IoU exceeds the threshold, without a division; never for a box without area."""
    width = jnp.maximum(jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0]), 0.0)
    height = jnp.maximum(jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    return intersection > threshold * (a[4] + b[4] - intersection)
