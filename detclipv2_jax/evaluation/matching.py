"""Match detections to ground truth; compute precision and recall. NumPy only, no loop over boxes.

The rules are those of COCO (pycocotools' COCOeval), which LVIS shares. They apply to each image,
category, IoU threshold and area range separately: detections choose in the order of their scores,
and each takes the ground-truth box with the highest IoU among those that are still free. A box that
is ignored (a crowd, or a box whose area is outside the range) is taken only if no other box is
left; the detection is then ignored, too.

Packages that do the same in C++ take one Python dictionary per box. At the size of LVIS, making the
dictionaries costs more than everything that is computed here (docs/performance_evaluation.md).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# All, small, medium and large boxes: [lowest, highest] area in square pixels, both included.
AREAS = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])
# Image and category are positions in the sorted ids of the ground truth. A box is [x, y, width,
# height] in pixels.
DETECTION_DTYPE = np.dtype(
    [("image", np.int32), ("category", np.int32), ("score", np.float64), ("box", np.float64, 4)]
)
TRUTH_DTYPE = np.dtype(
    [
        ("image", np.int32),
        ("category", np.int32),
        ("box", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
    ]
)
_PAIRS_PER_IOU = 1 << 19  # pairs of boxes whose IoU is computed together: about 100 MB
_PAIRS_PER_ROUND = 1 << 12  # pairs that are matched together: what fits a processor's cache
_UNMATCHED, _TRUE_POSITIVE, _IGNORED = 0, 1, 2  # outcomes of a detection


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """Precision and recall of each category; -1 where an area range has no ground truth.

    Shapes: T IoU thresholds, R recalls, K categories, A area ranges.
    """

    precision: Float[np.ndarray, "T R K A"]
    recall: Float[np.ndarray, "T K A"]

    @staticmethod
    def concatenate(curves: "Sequence[Curves]") -> "Curves":
        """Return the curves of all categories, in the order given."""
        return Curves(
            np.concatenate([one.precision for one in curves], axis=2),
            np.concatenate([one.recall for one in curves], axis=1),
        )

    def select(self, categories: np.ndarray) -> "Curves":
        """Return the curves of some categories, given as indices or as a mask."""
        return Curves(self.precision[:, :, categories], self.recall[:, categories])


class _Pairs(NamedTuple):
    """Pairs of a detection and a ground-truth box of the same image and category that overlap."""

    detection: Int[np.ndarray, " p"]  # index of the detection
    truth: Int[np.ndarray, " p"]  # row of the ground truth
    iou: Float[np.ndarray, " p"]

    def select(self, rows: slice | np.ndarray) -> "_Pairs":
        """Return some of the pairs."""
        return _Pairs(self.detection[rows], self.truth[rows], self.iou[rows])


class _Choices(NamedTuple):
    """Which detection takes which ground-truth box, at which IoU threshold, in which area range."""

    detection: Int[np.ndarray, " m"]  # as in the pairs
    truth: Int[np.ndarray, " m"]  # row of the ground truth
    threshold: Int[np.ndarray, " m"]
    area: Int[np.ndarray, " m"]


class _Matches(NamedTuple):
    """Detections that overlap some ground truth, in ranking order. All others match nothing."""

    detection: Int[np.ndarray, " c"]  # row of the detections, ascending
    outcome: Int[np.ndarray, "c T A"]  # _UNMATCHED, _TRUE_POSITIVE or _IGNORED


class _CategoryCurves(NamedTuple):
    """Precision and recall of one category."""

    precision: Float[np.ndarray, "T R A"]
    recall: Float[np.ndarray, "T A"]


def summarize(curves: Curves) -> dict[str, float | None]:
    """Return AP, AP50, AP75, AP by area, AR and AR by area.

    Each is a mean over the thresholds, recalls and categories that have ground truth.
    """
    precision, recall = curves.precision, curves.recall
    return {
        "AP": mean_defined(precision[..., 0]),
        "AP50": mean_defined(precision[0, ..., 0]),
        "AP75": mean_defined(precision[5, ..., 0]),
        **{f"AP{letter}": mean_defined(precision[..., a]) for a, letter in enumerate("sml", 1)},
        "AR": mean_defined(recall[..., 0]),
        **{f"AR{letter}": mean_defined(recall[..., a]) for a, letter in enumerate("sml", 1)},
    }


def mean_defined(values: np.ndarray) -> float | None:
    """Return the mean of the values that are defined (not -1), None if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def top_k_per_group(
    group: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], k: int
) -> Bool[np.ndarray, " n"]:
    """Return a mask of the `k` highest scores of each group. Equal scores: the first ones win."""
    if len(group) <= k:
        return np.ones(len(group), bool)
    order = np.lexsort((-scores, group))
    ordered = group[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    mask = np.empty(len(order), bool)
    mask[order] = rank < k
    return mask


def precision_recall(
    truth: np.ndarray,
    detections: np.ndarray,
    ignore_unmatched: Bool[np.ndarray, " n"],
    num_categories: int,
) -> Curves:
    """Return the precision and recall of detections.

    Equal scores are ranked by image, then in the order given. Of equal IoUs the last is taken.

    Args:
      truth: ground-truth boxes, an array of `TRUTH_DTYPE`. Categories are 0 to num_categories - 1.
      detections: an array of `DETECTION_DTYPE`.
      ignore_unmatched: per detection, whether it is ignored instead of a false positive if it
        matches nothing.
      num_categories: K of the result.
    """
    truth, detections, ignore_unmatched = _in_order(truth, detections, ignore_unmatched)
    ignored = ~_in_area_ranges(truth["area"]) | truth["crowd"][:, None]
    positives = np.stack(
        [
            np.bincount(truth["category"][~ignored[:, a]], minlength=num_categories)
            for a in range(len(AREAS))
        ],
        axis=1,
    )
    matches = _match(detections, truth, ignored, THRESHOLDS)
    area = detections["box"][:, 2] * detections["box"][:, 3]
    false_if_unmatched = _in_area_ranges(area) & ~ignore_unmatched[:, None]
    return _curves(detections["category"], false_if_unmatched, matches, positives)


def _in_area_ranges(areas: Float[np.ndarray, " n"]) -> Bool[np.ndarray, "n A"]:
    """Return, per area and range, whether the range contains the area."""
    return (areas[:, None] >= AREAS[:, 0]) & (areas[:, None] <= AREAS[:, 1])


def _in_order(
    truth: np.ndarray, detections: np.ndarray, ignore_unmatched: Bool[np.ndarray, " n"]
) -> tuple[np.ndarray, np.ndarray, Bool[np.ndarray, " n"]]:
    """Return the arrays with detections in ranking order, and truth by category, then image."""
    order = np.lexsort((detections["image"], -detections["score"], detections["category"]))
    detections, ignore_unmatched = detections[order], ignore_unmatched[order]
    truth = truth[np.lexsort((truth["image"], truth["category"]))]
    return truth, detections, ignore_unmatched


def true_and_false(
    truth: np.ndarray, detections: np.ndarray, ignore_unmatched: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
    """Return the score of every detection that counts, and whether it is a true positive.

    They are those of AP50 over boxes of all sizes, all categories together, in no order.

    Args:
      truth: ground-truth boxes, an array of `TRUTH_DTYPE`.
      detections: an array of `DETECTION_DTYPE`.
      ignore_unmatched: per detection, whether it is ignored instead of a false positive if it
        matches nothing.
    """
    truth, detections, ignore_unmatched = _in_order(truth, detections, ignore_unmatched)
    matches = _match(detections, truth, truth["crowd"][:, None], THRESHOLDS[:1])
    outcome = np.where(ignore_unmatched, _IGNORED, _UNMATCHED)
    outcome[matches.detection] = np.where(
        matches.outcome[:, 0, 0] == _UNMATCHED,
        outcome[matches.detection],
        matches.outcome[:, 0, 0],
    )
    counts = outcome != _IGNORED
    return detections["score"][counts], outcome[counts] == _TRUE_POSITIVE


def _match(
    detections: np.ndarray,
    truth: np.ndarray,
    ignored: Bool[np.ndarray, "g A"],
    thresholds: Float[np.ndarray, " T"],
) -> _Matches:
    """Match detections to ground truth.

    The detections of one image and category compete, so they choose one after another: the first of
    every image and category in round 0, the second in round 1, and so on. Within a round all choose
    at once.

    Args:
      detections: in ranking order.
      truth: sorted by category, then image.
      ignored: per ground-truth box and area range, whether it is ignored.
      thresholds: of the IoU, 0.5 or more.
    """
    pairs = _overlapping_pairs(detections, truth)
    matched, matchable = np.unique(pairs.detection, return_inverse=True)
    rounds = _rounds(detections[matched])
    # By round, then by detection, then by IoU. Equal IoUs keep the order of the ground truth.
    order = np.lexsort((pairs.iou, matchable, rounds[matchable]))
    pairs = _Pairs(matchable, pairs.truth, pairs.iou).select(order)
    shape = (len(thresholds), ignored.shape[1])
    outcome = np.full((len(matched), *shape), _UNMATCHED, np.int8)
    free = np.ones((len(truth), *shape), bool)
    for rows in _slices_within_rounds(pairs.detection, rounds[pairs.detection]):
        some = pairs.select(rows)
        chosen = _choose(some, free[some.truth], ignored[some.truth], thresholds)
        outcome[chosen.detection, chosen.threshold, chosen.area] = np.where(
            ignored[chosen.truth, chosen.area], _IGNORED, _TRUE_POSITIVE
        )
        used_up = ~truth["crowd"][chosen.truth]  # a crowd stays free for other detections
        free[chosen.truth[used_up], chosen.threshold[used_up], chosen.area[used_up]] = False
    return _Matches(matched, outcome)


def _overlapping_pairs(detections: np.ndarray, truth: np.ndarray) -> _Pairs:
    """Return the pairs of the same image and category with an IoU of at least 0.5.

    They are sorted by row of the detections, then by row of the ground truth.
    """
    images = 1 + max(np.max(rows["image"], initial=0) for rows in (detections, truth))
    wanted, known = (
        rows["category"] * np.int64(images) + rows["image"] for rows in (detections, truth)
    )
    first = np.searchsorted(known, wanted, side="left")
    count = np.searchsorted(known, wanted, side="right") - first
    total = np.cumsum(count)
    chunks = [_Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for start in range(0, int(total[-1]) if len(total) else 0, _PAIRS_PER_IOU):
        numbers = np.arange(start, min(start + _PAIRS_PER_IOU, total[-1]))
        detection = np.searchsorted(total, numbers, side="right")
        row = first[detection] + numbers - (total - count)[detection]
        iou = _iou(detections["box"][detection], truth["box"][row], truth["crowd"][row])
        chunks.append(_Pairs(detection, row, iou).select(iou >= THRESHOLDS[0]))
    return _Pairs(*map(np.concatenate, zip(*chunks)))


def _iou(
    found: Float[np.ndarray, "p 4"], truth: Float[np.ndarray, "p 4"], crowd: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """Return the IoU of each pair of boxes [x, y, width, height].

    For a crowd, return the share of the detection's area inside the crowd instead. The rounding is
    that of pycocotools, so that the same IoUs tie.
    """
    x, y, width, height = found.T
    u, v, across, down = truth.T
    shared_x = np.minimum(width + x, across + u) - np.maximum(x, u)
    shared_y = np.minimum(height + y, down + v) - np.maximum(y, v)
    shared = shared_x * shared_y
    area = width * height
    union = np.where(crowd, area, area + across * down - shared)
    touching = (shared_x > 0) & (shared_y > 0)
    return np.divide(shared, union, out=np.zeros(len(shared)), where=touching)


def _rounds(detections: np.ndarray) -> Int[np.ndarray, " n"]:
    """Return, per detection in ranking order, how many of its image and category rank above it."""
    order = np.lexsort((detections["image"], detections["category"]))
    image, category = detections["image"][order], detections["category"][order]
    new = np.diff(image, prepend=-1) != 0
    new |= np.diff(category, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(new, np.arange(len(detections)), 0))
    rounds = np.empty(len(detections), np.int64)
    rounds[order] = np.arange(len(detections)) - starts
    return rounds


def _slices_within_rounds(
    detection: Int[np.ndarray, " p"], rounds: Int[np.ndarray, " p"]
) -> Iterator[slice]:
    """Yield slices of pairs to match together: whole detections of one round, not too many."""
    starts = np.flatnonzero(np.diff(detection, prepend=-1))
    ends = np.append(np.flatnonzero(np.diff(rounds[starts], prepend=-1)), len(starts))
    starts = np.append(starts, len(detection))
    for at, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        while at < end:
            fits = int(np.searchsorted(starts, starts[at] + _PAIRS_PER_ROUND, side="right")) - 1
            stop = min(max(fits, at + 1), end)
            yield slice(int(starts[at]), int(starts[stop]))
            at = stop


def _choose(
    pairs: _Pairs,
    free: Bool[np.ndarray, "p T A"],
    ignored: Bool[np.ndarray, "p A"],
    thresholds: Float[np.ndarray, " T"],
) -> _Choices:
    """Return the ground-truth box that each detection takes, per IoU threshold and area range.

    Args:
      pairs: all pairs of some detections that do not compete, by detection, then ascending IoU.
      free: per pair, whether the ground-truth box is free.
      ignored: per pair, whether the ground-truth box is ignored.
      thresholds: of the IoU.
    """
    starts = np.flatnonzero(np.diff(pairs.detection, prepend=-1))
    count = len(pairs.truth)
    place = 1 + np.arange(count, dtype=np.int32)
    # The largest preference wins. Every box that counts is preferred to every one that is ignored.
    preference = place[:, None] + np.where(ignored, 0, count).astype(np.int32)
    allowed = free & (pairs.iou[:, None] >= thresholds)[:, :, None]
    best = np.maximum.reduceat(np.where(allowed, preference[:, None, :], 0), starts, axis=0)
    number, threshold, area = np.nonzero(best)
    pair = (best[number, threshold, area] - 1) % count
    return _Choices(pairs.detection[pair], pairs.truth[pair], threshold, area)


def _curves(
    category: Int[np.ndarray, " n"],
    false_if_unmatched: Bool[np.ndarray, "n A"],
    matches: _Matches,
    positives: Int[np.ndarray, "K A"],
) -> Curves:
    """Return the precision and recall of ranked detections.

    Args:
      category: per detection, ascending.
      false_if_unmatched: per detection, whether it is a false positive if it matches nothing.
      matches: the detections that may match something.
      positives: how many ground-truth boxes count.
    """
    categories = len(positives)
    shape = (len(THRESHOLDS), len(RECALLS), categories, len(AREAS))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    padded = np.pad(false_if_unmatched, ((1, 0), (0, 0)))
    false_above = np.cumsum(padded, axis=0, dtype=np.int64)
    first = np.searchsorted(category, np.arange(categories))
    edges = np.searchsorted(category[matches.detection], np.arange(categories + 1))
    for number in np.flatnonzero(positives.any(axis=1)):
        rows = slice(edges[number], edges[number + 1])
        ranked = matches.detection[rows]
        curves = _category_curves(
            outcome=matches.outcome[rows],
            false_if_unmatched=false_if_unmatched[ranked],
            false_above=false_above[ranked] - false_above[first[number]],
            positives=positives[number],
        )
        precision[:, :, number], recall[:, number] = curves
    return Curves(precision, recall)


def _category_curves(
    outcome: Int[np.ndarray, "c T A"],
    false_if_unmatched: Bool[np.ndarray, "c A"],
    false_above: Int[np.ndarray, "c A"],
    positives: Int[np.ndarray, " A"],
) -> _CategoryCurves:
    """Return the precision at 101 recalls and the recall of one category.

    Precision peaks at true positives, so it is computed there alone: the h-th true positive has
    precision h / (true and false positives down to it). That sum starts from the false positives if
    nothing matched and is corrected by what the detections above did match.

    Args:
      outcome: of the n detections that overlap some ground truth, in ranking order.
      false_if_unmatched: per such detection, whether it is a false positive if it matches nothing.
      false_above: per such detection, how many detections above it would be false positives if
        nothing matched.
      positives: how many ground-truth boxes count.
    """
    true_positive = outcome == _TRUE_POSITIVE
    counts = np.where(outcome == _UNMATCHED, false_if_unmatched[:, None, :], true_positive)
    correction = np.cumsum(counts.astype(np.int64) - false_if_unmatched[:, None, :], axis=0)
    hits = np.cumsum(true_positive, axis=0)
    peaks = np.zeros((len(outcome) + 1, *outcome.shape[1:]))  # [h - 1]: at the h-th true positive
    at = np.nonzero(true_positive)
    detection, threshold, area = at
    counted = (false_above + false_if_unmatched)[detection, area] + correction[at]
    peaks[hits[at] - 1, threshold, area] = hits[at] / counted
    # Interpolated: the highest precision at this recall or any higher one.
    peaks = np.maximum.accumulate(peaks[::-1], axis=0)[::-1]
    recall = true_positive.sum(axis=0) / np.maximum(positives, 1)
    precision = np.empty((len(THRESHOLDS), len(RECALLS), len(AREAS)))
    for a, count in enumerate(positives.tolist()):
        needed = np.searchsorted(np.arange(1, count + 1) / max(count, 1), RECALLS)
        precision[..., a] = peaks[np.minimum(needed, len(outcome)), :, a].T
    return _CategoryCurves(
        np.where(positives > 0, precision, -1), np.where(positives > 0, recall, -1)
    )
