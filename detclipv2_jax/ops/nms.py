"""Non-maximum suppression with static shapes: exact, greedy, and made for vmap.

A box is dropped where its IoU with a kept box of a higher score is *above* the threshold. Equal
scores rank by index. A box without area overlaps nothing.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from detclipv2_jax.ops.boxes import area

_CLASSES_AT_ONCE = 32  # classes suppressed side by side
_CHUNK = 32  # values of which the largest is looked at first


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
    boxes: Float[Array, "B K 4"],
    mask: Bool[Array, "B K"],
    score: Callable[[PyTree], Float[Array, "B C K"]],
    blocks: PyTree,
    *,
    iou_threshold: float,
    score_threshold: float,
    pre_nms_top_k: int,
    max_detections: int,
) -> tuple[Float[Array, "B T 4"], Float[Array, "B T"], Int[Array, "B T"], Bool[Array, "B T"]]:
    """Return the best `max_detections` of each image; a box suppresses only boxes of its own class.

    Of each class the best `pre_nms_top_k` anchors enter, if they score above `score_threshold`: no
    class loses its place to another one's scores, which fixed AP, a measure a class, must not see.
    Returns boxes, scores, labels and a mask, best first, padded with zeros to T = max_detections.
    Equal scores rank by class, then by anchor.

    The classes come in blocks: arrays with one entry a block on their first axis, of which `score`
    makes the scores of the C classes of one block. So the memory is that of one block, however many
    there are. The score of the last detection kept so far is a bar for all that follow: what does
    not pass it can neither be kept nor, ranking lower, suppress what is.
    """
    found = (
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
    (_, (values, anchors, labels)), _ = jax.lax.scan(add_block, (start, found), blocks)
    there = values > -jnp.inf
    return (
        jnp.where(there[..., None], _rows(boxes, anchors), 0.0),
        jnp.where(there, values, 0.0),
        jnp.where(there, labels, 0),
        there,
    )


def _add_classes(
    found: tuple[Float[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]],
    boxes: Float[Array, "B K 4"],
    scores: Float[Array, "B C K"],
    first: Int[Array, ""],
    *,
    iou_threshold: float,
    pre_nms_top_k: int,
) -> tuple[Float[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"]]:
    """The best scores, anchors and labels so far, and those of C classes from `first` on.

    Only classes with a score above the bar are looked at, a few at a time, in their order: that is
    what keeps equal scores in the order of their classes.
    """
    max_detections, classes = found[0].shape[1], scores.shape[1]
    few = min(classes, _CLASSES_AT_ONCE)
    passes = jnp.max(scores, axis=-1) > found[0][:, -1:]
    order = jnp.argsort(~passes, axis=-1, stable=True).astype(jnp.int32)
    order = jnp.pad(order, ((0, 0), (0, -classes % few)), mode="edge")
    rounds = -(-jnp.max(jnp.sum(passes, axis=-1)) // few)

    def add_few(number, found):
        picks = jax.lax.dynamic_slice_in_dim(order, number * few, few, axis=1)
        # The last round may have more places than classes are left.
        fresh = number * few + jnp.arange(few) < classes
        values, anchors = _top_k(_rows(scores, picks), pre_nms_top_k)
        alive = fresh[:, None] & (values > found[0][:, -1:, None])
        corners = _rows(boxes, anchors.reshape(boxes.shape[0], -1)).reshape(*anchors.shape, 4)
        kept = _suppress_rows(_columns(corners), alive, iou_threshold)
        labels = jnp.broadcast_to((first + picks)[..., None], kept.shape)
        new = (jnp.where(kept, values, -jnp.inf), anchors, labels)
        pool = [
            jnp.concatenate([old, x.reshape(old.shape[0], -1)], axis=1)
            for old, x in zip(found, new)
        ]
        best, places = jax.lax.top_k(pool[0], max_detections)
        return best, *(jnp.take_along_axis(x, places, axis=1) for x in pool[1:])

    return jax.lax.fori_loop(0, rounds, add_few, found)


def _rows(table: Float[Array, "B N D"], picks: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Rows of each image's table."""
    return jnp.take_along_axis(table, picks[..., None], axis=1)


def _top_k(
    values: Float[Array, "B R N"], k: int
) -> tuple[Float[Array, "B R k"], Int[Array, "B R k"]]:
    """`jax.lax.top_k`, sooner where N is many times k: only the k best chunks are searched.

    Each chunk before that of a value, by the largest in it and then by place, holds a value that
    ranks before it: the k best values cannot lie but in the k best chunks.
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
    """What greedy suppression keeps of each row of boxes sorted best first, rows side by side.

    `alive` boxes are the first of their row.
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


def _columns(boxes: Float[Array, "*n 4"]) -> Float[Array, "5 *n"]:
    """The four coordinates and the area, each contiguous."""
    return jnp.stack([*jnp.moveaxis(jnp.asarray(boxes), -1, 0), area(boxes)])


def _overlap_more(
    a: Float[Array, "5 *n"], b: Float[Array, "5 *n"], threshold: float
) -> Bool[Array, "*n"]:
    """Whether the IoU exceeds the threshold, without a division; never for a box without area."""
    width = jnp.maximum(jnp.minimum(a[2], b[2]) - jnp.maximum(a[0], b[0]), 0.0)
    height = jnp.maximum(jnp.minimum(a[3], b[3]) - jnp.maximum(a[1], b[1]), 0.0)
    intersection = width * height
    return intersection > threshold * (a[4] + b[4] - intersection)
