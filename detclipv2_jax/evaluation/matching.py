"""Detections against ground truth: matches, precision, recall. NumPy only, no loop over boxes.

The rules are COCO's (pycocotools' COCOeval), which LVIS shares. In the order of their scores, the
detections of an image and category each take the ground truth that they overlap most of those still
free, for each IoU threshold and area range anew. A box that is to be ignored (a crowd, or one of
another size) is taken only where none that counts is left, and the detection is then ignored too.

Packages that do the same in C++ take a Python dictionary a box: at the size of LVIS those cost more
than all that is computed here. docs/performance_evaluation.md has the figures.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# All, small, medium and large, in square pixels; both ends belong to a range.
AREAS = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])
# A detection: the places of its image and category in the sorted ids; box [x, y, width, height].
DETECTION = np.dtype(
    [("image", np.int32), ("category", np.int32), ("score", np.float64), ("box", np.float64, 4)]
)
TRUTH = np.dtype(
    [
        ("image", np.int32),
        ("category", np.int32),
        ("box", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
    ]
)
_COMPARED = 1 << 19  # pairs of boxes that are compared at once: some 100 MB
_MATCHED = 1 << 12  # pairs that are matched at once: what fits a processor's cache
_FREE, _RIGHT, _IGNORED = 0, 1, 2  # what a detection may be


@dataclasses.dataclass(frozen=True, eq=False)
class Curves:
    """What was found of each category; -1 where a range has nothing to find.

    T IoU thresholds, R recalls, K categories, A area ranges.
    """

    precision: Float[np.ndarray, "T R K A"]
    recall: Float[np.ndarray, "T K A"]

    @staticmethod
    def concatenate(pieces: "Sequence[Curves]") -> "Curves":
        """The curves of all pieces' categories, one piece after another."""
        return Curves(
            np.concatenate([piece.precision for piece in pieces], axis=2),
            np.concatenate([piece.recall for piece in pieces], axis=1),
        )

    def of(self, categories: np.ndarray) -> "Curves":
        """Those of some categories: their numbers, or a mask."""
        return Curves(self.precision[:, :, categories], self.recall[:, categories])


def among_best(
    group: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], limit: int
) -> Bool[np.ndarray, " n"]:
    """Whether each score is among the `limit` best of its group; of equal ones the first are."""
    if len(group) <= limit:
        return np.ones(len(group), bool)
    order = np.lexsort((-scores, group))
    ordered = group[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered, side="left")
    best = np.empty(len(order), bool)
    best[order] = rank < limit
    return best


def summarize(found: Curves) -> dict[str, float | None]:
    """AP, AP50, AP75, AP by area, AR, AR by area: means over thresholds, recalls and categories."""
    precision, recall = found.precision, found.recall
    return {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
        **{f"AP{letter}": mean(precision[..., a]) for a, letter in enumerate("sml", start=1)},
        "AR": mean(recall[..., 0]),
        **{f"AR{letter}": mean(recall[..., a]) for a, letter in enumerate("sml", start=1)},
    }


def mean(values: np.ndarray) -> float | None:
    """The mean of what is defined (not -1); None where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def curves(
    truth: np.ndarray, found: np.ndarray, unsure: Bool[np.ndarray, " n"], categories: int
) -> Curves:
    """Precision and recall of the detections `found` (`DETECTION`) given `truth` (`TRUTH`).

    Equal scores rank by image, then in the order given; of equal overlaps the last is taken.

    Args:
      unsure: for each detection, whether it is ignored, not wrong, if it matches nothing.
      categories: how many there are; the rows' categories count from 0.
    """
    order = np.lexsort((found["image"], -found["score"], found["category"]))
    found, unsure = found[order], unsure[order]
    truth = truth[np.lexsort((truth["image"], truth["category"]))]
    ignored = ~_within(truth["area"]) | truth["crowd"][:, None]
    counted = np.stack(
        [
            np.bincount(truth["category"][~ignored[:, a]], minlength=categories)
            for a in range(len(AREAS))
        ],
        axis=1,
    )
    candidates, states = _match(found, truth, ignored)
    wrong = _within(found["box"][:, 2] * found["box"][:, 3]) & ~unsure[:, None]
    return _accumulate(found["category"], wrong, candidates, states, counted)


def _within(areas: Float[np.ndarray, " n"]) -> Bool[np.ndarray, "n A"]:
    """Whether areas lie in each of the ranges."""
    return (areas[:, None] >= AREAS[:, 0]) & (areas[:, None] <= AREAS[:, 1])


def _match(
    found: np.ndarray, truth: np.ndarray, ignored: Bool[np.ndarray, "g A"]
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, "c T A"]]:
    """The rows of `found` that overlap anything by half, and what they are; the rest are free.

    `found` is in the order of ranks, `truth` sorted by category, then image.
    """
    detection, row, overlap = _overlapping(found, truth)
    candidates, number = np.unique(detection, return_inverse=True)
    turns = _turns(found[candidates])
    # Of a detection's pairs the best come last; `row` ascends already.
    order = np.lexsort((overlap, number, turns[number]))
    number, row, overlap = number[order], row[order], overlap[order]
    states = np.full((len(candidates), len(THRESHOLDS), len(AREAS)), _FREE, np.int8)
    free = np.ones((len(truth), len(THRESHOLDS), len(AREAS)), bool)
    for step in _steps(number, turns[number]):
        starts = np.flatnonzero(np.diff(number[step], prepend=-1))
        winners, *where = _best(
            row[step], overlap[step], starts, free[row[step]], ignored[row[step]]
        )
        states[number[step][starts[where[0]]], where[1], where[2]] = np.where(
            ignored[winners, where[2]], _IGNORED, _RIGHT
        )
        taken = ~truth["crowd"][winners]  # a crowd stays free for the next
        free[winners[taken], where[1][taken], where[2][taken]] = False
    return candidates, states


def _overlapping(found: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, ...]:
    """Pairs of the same image and category that overlap by half: rows of both, the IoU."""
    images = 1 + max(np.max(rows["image"], initial=0) for rows in (found, truth))
    keys = [rows["category"] * np.int64(images) + rows["image"] for rows in (found, truth)]
    first = np.searchsorted(keys[1], keys[0], side="left")
    count = np.searchsorted(keys[1], keys[0], side="right") - first
    total = np.cumsum(count)
    pieces = []
    for start in range(0, int(total[-1]) if len(total) else 0, _COMPARED):
        pairs = np.arange(start, min(start + _COMPARED, total[-1]))
        detection = np.searchsorted(total, pairs, side="right")
        row = first[detection] + pairs - (total - count)[detection]
        overlap = _iou(found["box"][detection], truth["box"][row], truth["crowd"][row])
        kept = overlap >= THRESHOLDS[0]
        pieces.append((detection[kept], row[kept], overlap[kept]))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))
    return tuple(np.concatenate(column) for column in zip(empty, *pieces))


def _iou(
    found: Float[np.ndarray, "p 4"], truth: Float[np.ndarray, "p 4"], crowd: Bool[np.ndarray, " p"]
) -> Float[np.ndarray, " p"]:
    """Of each pair of boxes [x, y, width, height]; of a crowd, the part of `found` that lies in it.

    Rounds as pycocotools does, so that a tie here is a tie there.
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


def _turns(found: np.ndarray) -> Int[np.ndarray, " n"]:
    """For detections in the order of ranks, how many of the same image and category are before."""
    order = np.lexsort((found["image"], found["category"]))
    image, category = found["image"][order], found["category"][order]
    new = np.diff(image, prepend=-1) != 0
    new |= np.diff(category, prepend=-1) != 0
    starts = np.maximum.accumulate(np.where(new, np.arange(len(found)), 0))
    turns = np.empty(len(found), np.int64)
    turns[order] = np.arange(len(found)) - starts
    return turns


def _steps(number: Int[np.ndarray, " p"], turn: Int[np.ndarray, " p"]) -> Iterator[slice]:
    """Slices of pairs that can be matched at once: whole detections, of one turn, not too many."""
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    ends = np.append(np.flatnonzero(np.diff(turn[starts], prepend=-1)), len(starts))
    starts = np.append(starts, len(number))
    for at, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
        while at < end:
            fits = int(np.searchsorted(starts, starts[at] + _MATCHED, side="right")) - 1
            stop = min(max(fits, at + 1), end)
            yield slice(int(starts[at]), int(starts[stop]))
            at = stop


def _best(
    row: Int[np.ndarray, " p"],
    overlap: Float[np.ndarray, " p"],
    starts: Int[np.ndarray, " d"],
    free: Bool[np.ndarray, "p T A"],
    ignored: Bool[np.ndarray, "p A"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What each detection takes: rows of the truth; the detection, threshold and range of each.

    The pairs of detection d begin at starts[d], the best last; what counts goes before what is
    ignored.
    """
    pairs = len(row)
    place = 1 + np.arange(pairs, dtype=np.int32)
    value = place[:, None] + np.where(ignored, 0, pairs).astype(np.int32)
    can = free & (overlap[:, None] >= THRESHOLDS)[:, :, None]
    best = np.maximum.reduceat(np.where(can, value[:, None, :], 0), starts, axis=0)
    detection, threshold, area = np.nonzero(best)
    chosen = (best[detection, threshold, area] - 1) % pairs
    return row[chosen], detection, threshold, area


def _accumulate(
    category: Int[np.ndarray, " n"],
    wrong: Bool[np.ndarray, "n A"],
    candidates: Int[np.ndarray, " c"],
    states: Int[np.ndarray, "c T A"],
    counted: Int[np.ndarray, "K A"],
) -> Curves:
    """The curves of ranked detections: `wrong` tells which are if they are free."""
    categories = len(counted)
    shape = (len(THRESHOLDS), len(RECALLS), categories, len(AREAS))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    before = np.cumsum(np.pad(wrong, ((1, 0), (0, 0))), axis=0, dtype=np.int64)
    first = np.searchsorted(category, np.arange(categories))
    edges = np.searchsorted(category[candidates], np.arange(categories + 1))
    for number in np.flatnonzero(counted.any(axis=1)):
        rows = slice(edges[number], edges[number + 1])
        ranked = candidates[rows]
        precision[:, :, number], recall[:, number] = _curve(
            states[rows],
            wrong[ranked],
            before[ranked] - before[first[number]],
            counted[number],
        )
    return Curves(precision, recall)


def _curve(
    states: Int[np.ndarray, "c T A"],
    wrong: Bool[np.ndarray, "c A"],
    before: Int[np.ndarray, "c A"],
    counted: Int[np.ndarray, " A"],
) -> tuple[Float[np.ndarray, "T R A"], Float[np.ndarray, "T A"]]:
    """One category's precision and recall.

    `before` is how many detections above each would be wrong if all were free: only the candidates
    differ from that, and precision has its peaks where one of them is right.
    """
    right = states == _RIGHT
    counts = np.where(states == _FREE, wrong[:, None, :], right)
    change = np.cumsum(counts.astype(np.int64) - wrong[:, None, :], axis=0)
    hits = np.cumsum(right, axis=0)
    peaks = np.zeros((len(states) + 1, *states.shape[1:]))  # [h - 1]: at the h-th hit
    where = np.nonzero(right)
    seen = (before + wrong)[where[0], where[2]] + change[where]
    peaks[hits[where] - 1, where[1], where[2]] = hits[where] / seen
    peaks = np.maximum.accumulate(peaks[::-1], axis=0)[::-1]
    recall = right.sum(axis=0) / np.maximum(counted, 1)
    precision = np.empty((len(THRESHOLDS), len(RECALLS), len(AREAS)))
    for area, count in enumerate(counted.tolist()):
        needed = np.searchsorted(np.arange(1, count + 1) / max(count, 1), RECALLS)
        precision[..., area] = peaks[np.minimum(needed, len(states)), :, area].T
    return np.where(counted > 0, precision, -1), np.where(counted > 0, recall, -1)
