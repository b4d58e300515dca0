"""The score threshold of a checkpoint, fitted on a dataset: the one with the best F1.

F1 is 2 TP / (detections + ground-truth boxes), at an IoU of 0.5, over all categories together. A
detection is right or wrong as for AP50; what AP ignores (crowds, categories that LVIS did not
annotate in an image) does not count.
"""

import pathlib
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from detclipv2_jax.evaluation import coco

_IOU = 0.5
_MAX_DIGITS = 6  # of the threshold, if so many do not tell two scores apart, it is a score


def fitted(evaluator: coco.DetectionEvaluator, truth: coco.GroundTruth) -> dict[str, Any] | None:
    """Return the threshold of the best F1 as JSON stores it; None if no detection is right.

    Keys: "score_threshold", "f1", "precision", "recall", "iou", "dataset" (the file's name),
    "images" and "boxes" of the dataset.
    """
    boxes = int(np.count_nonzero(~truth.truth_rows()["crowd"]))
    best = best_threshold(*evaluator.true_and_false(), boxes)
    if best is None:
        return None
    return {
        **best,
        "iou": _IOU,
        "dataset": pathlib.Path(truth.path).name,
        "images": len(truth.images),
        "boxes": boxes,
    }


def best_threshold(
    scores: Float[np.ndarray, " n"], is_right: Bool[np.ndarray, " n"], boxes: int
) -> dict[str, float] | None:
    """Return the threshold with the best F1 of the detections that score above it.

    Of several with the same F1 it is the highest. Between two scores it has as few digits as tell
    them apart.

    Args:
      scores: of all detections.
      is_right: which of them are true positives.
      boxes: the number of ground-truth boxes.

    Returns:
      "score_threshold", "f1", "precision" and "recall"; None if no detection is right.
    """
    order = np.argsort(-scores, kind="stable")
    scores, right = scores[order], np.cumsum(is_right[order])
    if not len(right) or not right[-1]:
        return None
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of equal scores
    f1 = 2 * right[last] / (last + 1 + boxes)
    best = int(np.argmax(f1))
    kept = last[best] + 1
    below = scores[kept] if kept < len(scores) else 0.0
    return {
        "score_threshold": _between(float(below), float(scores[last[best]])),
        "f1": round(float(f1[best]), 4),
        "precision": round(float(right[last[best]] / kept), 4),
        "recall": round(float(right[last[best]] / boxes), 4),
    }


def _between(below: float, score: float) -> float:
    """Return a threshold that `score` is above, and `below` is not, also in float32."""
    for digits in range(1, _MAX_DIGITS + 1):
        value = round((below + score) / 2, digits)
        if below <= value and np.float32(value) < np.float32(score):
            return value
    return below
