"""Detections as a results file: the JSON list that COCO's and LVIS's tools write and read.

    [{"image_id": 42, "category_id": 7, "bbox": [x, y, width, height], "score": 0.9}, ...]

Pixels of the image; other fields are passed over. Numbers are written so that they read back just
as they were: the figures of a file are those of the run that wrote it.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from detclipv2_jax.common import json_stream
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, lvis, matching

_BATCH = 1 << 16  # entries that are looked at together
_HANDED_ON = 1 << 20  # detections that the evaluator gets at once


@contextlib.contextmanager
def writing(path: str | pathlib.Path) -> Iterator[Callable[..., None]]:
    """Writes a results file image by image; it is there whole, once the block ended well, or not.

    Gives a function of an image id, xyxy boxes in pixels, scores and category ids (arrays).
    """
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        separator = "[\n"

        def write(image_id: int, boxes, scores, category_ids) -> None:
            nonlocal separator
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            columns = (boxes, np.asarray(scores, np.float64), np.asarray(category_ids))
            for box, score, category in zip(*(column.tolist() for column in columns)):
                entry = {"image_id": int(image_id), "category_id": category}
                entry |= {"bbox": box, "score": score}
                file.write(separator + json.dumps(entry, allow_nan=False))
                separator = ",\n"

        yield write
        file.write("[]\n" if separator == "[\n" else "\n]\n")


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """A results file: `matching.DETECTION` rows in its order, and what was odd about it."""

    rows: np.ndarray
    counts: dict[str, int]

    def oddities(self) -> list[str]:
        """A sentence for each count that people should know of."""
        told = {
            "unknown_images": "entries are of images that the set has not; they were left out",
            "unknown_categories": "entries have category ids that the set has not; left out",
            "negative_sizes": "boxes have a negative width or height; they match nothing",
        }
        entries = self.counts["entries"]
        return [
            f"{self.counts[k]} of {entries} {text}" for k, text in told.items() if self.counts[k]
        ]


def read(path: str | pathlib.Path, truth: coco.GroundTruth) -> Results:
    """Reads a results file of any tool.

    Entries of images or categories that the ground truth has not are left out and counted: a file
    of all of val serves for minival. So are boxes of negative size counted, which match nothing.

    Raises:
      UserError: no such file, no JSON list, or an entry is broken; names the file and the entry.
        Or not one entry is of the ground truth.
    """
    pieces = [np.zeros(0, matching.DETECTION)]
    counts = dict.fromkeys(("entries", "unknown_images", "unknown_categories", "negative_sizes"), 0)
    entries = json_stream.read_entries(pathlib.Path(path))
    while batch := list(itertools.islice(entries, _BATCH)):
        columns = _columns(batch)
        if columns is None:
            raise _explained(path, counts["entries"], batch)
        images, categories, boxes, scores = columns
        rows = np.empty(len(batch), matching.DETECTION)
        rows["image"] = truth.image_places(images)
        rows["category"] = truth.category_places(categories)
        rows["box"], rows["score"] = boxes, scores
        image, category = rows["image"] >= 0, rows["category"] >= 0
        known = rows[image & category]
        negative = (known["box"][:, 2:] < 0).any(axis=1)
        counts["entries"] += len(batch)
        counts["unknown_images"] += int(np.count_nonzero(~image))
        counts["unknown_categories"] += int(np.count_nonzero(image & ~category))
        counts["negative_sizes"] += int(np.count_nonzero(negative))
        pieces.append(known)
    if counts["entries"] and not any(map(len, pieces)):
        raise UserError(
            f"{path}: none of its {counts['entries']} entries has an image and a category of "
            f"{truth.path}; give the results of that set."
        )
    return Results(np.concatenate(pieces), counts)


def measure_file(results: Results, truth: coco.GroundTruth) -> dict[str, Any]:
    """The figures of a results file: {"standard", "fixed", "groups", "categories"} or {"coco"}."""
    federated = isinstance(truth, lvis.LvisGroundTruth)
    evaluator = (lvis.LvisEvaluator if federated else coco.CocoEvaluator)(truth)
    for rows in _handfuls(results.rows):
        evaluator.add_rows(rows)
    found = evaluator.result()
    return dataclasses.asdict(found) if federated else {"coco": found}


def _handfuls(rows: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in their order, some at once; all at once where an image's do not stand together."""
    starts = np.flatnonzero(np.diff(rows["image"], prepend=-1))
    together = len(np.unique(rows["image"][starts])) == len(starts)
    at = 0
    while at < len(rows):
        later = starts[np.searchsorted(starts, at + _HANDED_ON) :]
        end = int(later[0]) if together and len(later) else len(rows)
        yield rows[at:end]
        at = end


def _columns(batch: Sequence[Any]) -> tuple[np.ndarray, ...] | None:
    """Image ids, category ids, boxes and scores as arrays; None where an entry is broken."""
    try:
        lists = [[entry[key] for entry in batch] for key in ("image_id", "category_id", "score")]
        *ids, scores = map(np.asarray, lists)
        boxes = np.asarray([entry["bbox"] for entry in batch])
    except (TypeError, KeyError, ValueError):
        return None
    if any(bool in set(map(type, values)) for values in lists):  # NumPy takes true for 1
        return None
    count = len(batch)
    if boxes.shape != (count, 4) or any(c.shape != (count,) for c in (*ids, scores)):
        return None
    if any(column.dtype.kind != "i" for column in ids):
        return None
    if any(c.dtype.kind not in "if" or not np.isfinite(c).all() for c in (boxes, scores)):
        return None
    return (*ids, boxes, scores)


def _explained(path: str | pathlib.Path, start: int, batch: Sequence[Any]) -> UserError:
    """What is wrong with the first broken entry; `start` is the number of the batch's first."""
    for number, entry in enumerate(batch, start):
        if not isinstance(entry, dict):
            return UserError(
                f"{path}: entry [{number}] is {_short(entry)}, not an object with 'image_id', "
                "'category_id', 'bbox' and 'score'."
            )
        for field in ("image_id", "category_id"):
            value = entry.get(field)
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
                return _broken(path, number, field, value, "a whole number")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            return _broken(path, number, "bbox", box, "four finite numbers [x, y, width, height]")
        if not _finite(entry.get("score")):
            return _broken(path, number, "score", entry.get("score"), "a finite number")
    return UserError(f"{path}: entries [{start}] to [{start + len(batch) - 1}] are no detections.")


def _broken(path, number: int, field: str, value: Any, wanted: str) -> UserError:
    told = f"is {_short(value)}" if value is not None else "is missing"
    return UserError(f"{path}: entry [{number}]: '{field}' {told}, not {wanted}; mend that entry.")


def _finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300 and math.isfinite(value)  # an int may have any length


def _short(value: Any) -> str:
    told = json.dumps(value)
    return told if len(told) <= 80 else told[:77] + "..."
