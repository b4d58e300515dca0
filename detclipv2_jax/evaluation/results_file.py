"""Results files: detections as the JSON list that COCO's and LVIS's tools write and read.

    [{"image_id": 42, "category_id": 7, "bbox": [x, y, width, height], "score": 0.9}, ...]

Boxes are in pixels of the image. Other fields are ignored. Numbers are written with all digits, so
the metrics of a written file equal those of the run that wrote it.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from detclipv2_jax.common import json_file
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, matching

_ENTRIES_PER_CHECK = 1 << 16  # entries that are checked together
_ROWS_PER_CHUNK = 1 << 20  # detections that an evaluator gets at a time


@contextlib.contextmanager
def results_writer(path: str | pathlib.Path) -> Iterator[Callable[..., None]]:
    """Write a results file image by image; the file appears when the block ends without an error.

    Yields:
      A function of an image id, xyxy boxes in pixels, scores and category ids (arrays).

    Raises:
      UserError: the file cannot be written.
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
class ResultsFile:
    """The detections of a results file.

    Attributes:
      rows: an array of `matching.DETECTION_DTYPE`, in the order of the file.
      counts: "entries" of the file, and of these "unknown_images", "unknown_categories" (both are
        not in `rows`) and "negative_sizes".
    """

    rows: np.ndarray
    counts: dict[str, int]

    def warnings(self) -> list[str]:
        """Return a sentence for each count that users should know about."""
        sentences = {
            "unknown_images": "have an image_id that is not in the dataset; they are left out.",
            "unknown_categories": "have a category_id that is not in the dataset; they are left "
            "out.",
            "negative_sizes": "have a box with a negative width or height; they match nothing.",
        }
        return [
            f"{self.counts[key]} of {self.counts['entries']} entries {sentence}"
            for key, sentence in sentences.items()
            if self.counts[key]
        ]

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the rows in their order, in chunks that do not split an image.

        If the rows of an image are not consecutive, all rows are one chunk.
        """
        starts = np.flatnonzero(np.diff(self.rows["image"], prepend=-1))
        is_grouped = len(np.unique(self.rows["image"][starts])) == len(starts)
        at = 0
        while at < len(self.rows):
            later = starts[np.searchsorted(starts, at + _ROWS_PER_CHUNK) :]
            end = int(later[0]) if is_grouped and len(later) else len(self.rows)
            yield self.rows[at:end]
            at = end


def read_results(path: str | pathlib.Path, truth: coco.GroundTruth) -> ResultsFile:
    """Read a results file, of this or of any other tool.

    Entries of images or categories that are not in the ground truth are left out and counted, so a
    file of all of LVIS val can be measured on minival.

    Raises:
      UserError: the file is missing, is not a JSON list or has an invalid entry; or no entry
        belongs to the ground truth. Names the file and the entry.
    """
    chunks = [np.zeros(0, matching.DETECTION_DTYPE)]
    counts: dict[str, int] = dict.fromkeys(
        ("entries", "unknown_images", "unknown_categories", "negative_sizes"), 0
    )
    entries = json_file.read_entries(pathlib.Path(path))
    while some := list(itertools.islice(entries, _ENTRIES_PER_CHECK)):
        columns = _columns(some)
        if columns is None:
            raise _first_problem(path, counts["entries"], some)
        rows = np.empty(len(some), matching.DETECTION_DTYPE)
        rows["image"] = truth.image_indices(columns.image_ids)
        rows["category"] = truth.category_indices(columns.category_ids)
        rows["box"], rows["score"] = columns.boxes, columns.scores
        image_known, category_known = rows["image"] >= 0, rows["category"] >= 0
        known = rows[image_known & category_known]
        negative = (known["box"][:, 2:] < 0).any(axis=1)
        counts["entries"] += len(some)
        counts["unknown_images"] += int(np.count_nonzero(~image_known))
        counts["unknown_categories"] += int(np.count_nonzero(image_known & ~category_known))
        counts["negative_sizes"] += int(np.count_nonzero(negative))
        chunks.append(known)
    if counts["entries"] and not any(map(len, chunks)):
        raise UserError(
            f"{path}: none of the {counts['entries']} entries has an image and a category of "
            f"{truth.path}. Give a results file of that dataset."
        )
    return ResultsFile(np.concatenate(chunks), counts)


class _Columns(NamedTuple):
    image_ids: np.ndarray
    category_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray


def _columns(entries: Sequence[Any]) -> _Columns | None:
    """Return the fields of the entries as arrays, None if an entry is invalid.

    This is fast for valid entries; `_first_problem` then finds what is wrong.
    """
    try:
        lists = [[entry[key] for entry in entries] for key in ("image_id", "category_id", "score")]
        image_ids, category_ids, scores = map(np.asarray, lists)
        boxes = np.asarray([entry["bbox"] for entry in entries])
    except (TypeError, KeyError, ValueError):
        return None
    if any(bool in set(map(type, values)) for values in lists):  # NumPy takes true for 1
        return None
    count = len(entries)
    if boxes.shape != (count, 4) or any(
        column.shape != (count,) for column in (image_ids, category_ids, scores)
    ):
        return None
    if image_ids.dtype.kind != "i" or category_ids.dtype.kind != "i":
        return None
    if any(c.dtype.kind not in "if" or not np.isfinite(c).all() for c in (boxes, scores)):
        return None
    return _Columns(image_ids, category_ids, boxes, scores)


def _first_problem(path: str | pathlib.Path, start: int, entries: Sequence[Any]) -> UserError:
    """Return the error of the first invalid entry; `start` is the number of the first entry."""
    for number, entry in enumerate(entries, start):
        if not isinstance(entry, dict):
            return UserError(
                f"{path}: entry [{number}] is {_shortened(entry)}, expected an object with "
                "'image_id', 'category_id', 'bbox' and 'score'. Fix the entry."
            )
        for field in ("image_id", "category_id"):
            value = entry.get(field)
            if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 1 << 63:
                return _invalid(path, number, field, value, "a whole number")
        box = entry.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(map(coco.is_finite_number, box)):
            return _invalid(path, number, "bbox", box, "four finite numbers [x, y, width, height]")
        if not coco.is_finite_number(entry.get("score")):
            return _invalid(path, number, "score", entry.get("score"), "a finite number")
    last = start + len(entries) - 1
    return UserError(f"{path}: one of the entries [{start}] to [{last}] is not a detection.")


def _invalid(
    path: str | pathlib.Path, number: int, field: str, value: Any, expected: str
) -> UserError:
    problem = f"is {_shortened(value)}" if value is not None else "is missing"
    return UserError(
        f"{path}: entry [{number}]: '{field}' {problem}, expected {expected}. Fix the entry."
    )


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
