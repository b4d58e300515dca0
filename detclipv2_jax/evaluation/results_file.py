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
from typing import Any

import numpy as np

from detclipv2_jax.common import json_fields, json_file
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import Identifier
from detclipv2_jax.data.prepare.sources.entries import seem_corners, seem_relative
from detclipv2_jax.evaluation import coco, detected_set, matching

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

        def write(image_id: Identifier, boxes, scores, category_ids) -> None:
            nonlocal separator
            boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
            boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
            columns = (boxes, np.asarray(scores, np.float64), np.asarray(category_ids))
            for box, score, category in zip(*(column.tolist() for column in columns)):
                entry = {"image_id": image_id, "category_id": category}
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
        not in `rows`) and "negative_sizes"; "images_without_entries" of the dataset, or what
        `detected_set.Matching` counts.
      notes: sentences on how ids were matched, and on boxes that are probably in another format.
    """

    rows: np.ndarray
    counts: dict[str, int]
    notes: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """Return a sentence for each count that users should know about."""
        sentences = {
            "unknown_images": "have an image_id that is not in the dataset; they are left out.",
            "unknown_categories": "have a category_id that is not in the dataset; they are left "
            "out.",
            "negative_sizes": "have a box with a negative width or height; they match nothing.",
        }
        found = [
            f"{self.counts[key]} of {self.counts['entries']} entries {sentence}"
            for key, sentence in sentences.items()
            if self.counts[key]
        ]
        if count := self.counts.get("images_without_entries"):
            found.append(
                f"{count} images of the dataset have no entry: they count as images "
                "without detections."
            )
        return [f"{note}." for note in self.notes] + found

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
    """Read a results file, of this or of any other tool, or the `coco.json` of `detclip detect`.

    Entries of images or categories that are not in the ground truth are left out and counted, so a
    file of all of LVIS val can be measured on minival.

    Raises:
      UserError: the file is missing, is of another format or has an invalid entry; or no entry
        belongs to the ground truth. Names the file and the entry.
    """
    path, matching_ids = pathlib.Path(path), None
    if json_file.first_character(path) == "{":
        matching_ids = detected_set.match(path, truth)
        entries = (entry for _, _, entry in json_file.read_lists(path, ("annotations",)))
    else:
        entries = json_file.read_entries(path)
    columns = _ColumnReader(path, truth, matching_ids)
    chunks = [np.zeros(0, matching.DETECTION_DTYPE)]
    while some := list(itertools.islice(entries, _ENTRIES_PER_CHECK)):
        chunks.append(columns.known_rows(some))
    counts = columns.counts
    if counts["entries"] and not any(map(len, chunks)):
        raise UserError(
            f"{path}: none of the {counts['entries']} entries has an image and a category of "
            f"{truth.path}. Give a results file of that dataset."
        )
    if matching_ids is None:
        answered = len(np.unique(np.concatenate(chunks)["image"]))
        counts["images_without_entries"] = len(truth.images) - answered
    else:
        counts |= dict(matching_ids.counts)
    rows = np.concatenate(chunks)
    notes = matching_ids.notes if matching_ids else ()
    return ResultsFile(rows, counts, (*notes, *_other_formats(rows, truth)))


def _other_formats(rows: np.ndarray, truth: coco.GroundTruth) -> Iterator[str]:
    """Yield a sentence if boxes are probably not [x, y, width, height] in pixels."""
    if not len(rows):
        return
    sizes = np.zeros((len(truth.images), 2))  # in the order of the positions in `rows`
    places = truth.image_indices([image.id for image in truth.images])
    sizes[places] = [(image.height, image.width) for image in truth.images]
    parts = [rows[at : at + _ENTRIES_PER_CHECK] for at in range(0, len(rows), _ENTRIES_PER_CHECK)]
    if all(seem_relative(part["box"]) for part in parts):  # most files end at the first part
        yield (
            "all boxes have numbers from 0 to 1, as if in parts of their images; bbox is in pixels"
        )
    if all(seem_corners(part["box"], sizes[part["image"]]) for part in parts):
        yield (
            "most boxes leave their images, and all of them would fit as [x_min, y_min, x_max, "
            "y_max]; bbox is [x, y, width, height]"
        )


class _ColumnReader:
    """Turns entries into rows of detections, and counts the unusable ones.

    Attributes:
      counts: as in `ResultsFile`.
    """

    def __init__(
        self,
        path: pathlib.Path,
        truth: coco.GroundTruth,
        matching_ids: detected_set.Matching | None,
    ):
        self._path, self._truth = path, truth
        self._list = "" if matching_ids is None else "annotations"  # where the entries are
        self._images = matching_ids.images if matching_ids else truth.image_places
        self._categories = matching_ids.categories if matching_ids else truth.category_places
        self._has_own_ids = matching_ids is not None or truth.has_text_ids
        keys = ("entries", "unknown_images", "unknown_categories", "negative_sizes")
        self.counts: dict[str, int] = dict.fromkeys(keys, 0)

    def known_rows(self, entries: Sequence[Any]) -> np.ndarray:
        """Return the rows of the entries whose image and category are in the ground truth.

        Raises:
          UserError: an entry is invalid; names it.
        """
        rows = None if self._has_own_ids else _fast_rows(entries, self._truth)
        if rows is None:
            rows = np.empty(len(entries), matching.DETECTION_DTYPE)
            for number, entry in enumerate(entries):
                rows[number] = self._row(self.counts["entries"] + number, entry)
        image_known, category_known = rows["image"] >= 0, rows["category"] >= 0
        known = rows[image_known & category_known]
        self.counts["entries"] += len(entries)
        self.counts["unknown_images"] += int(np.count_nonzero(~image_known))
        self.counts["unknown_categories"] += int(np.count_nonzero(image_known & ~category_known))
        negative = (known["box"][:, 2:] < 0).any(axis=1)
        self.counts["negative_sizes"] += int(np.count_nonzero(negative))
        return known

    def _row(self, number: int, entry: Any) -> np.ndarray:
        """Return one entry as a row; the ids as positions, -1 if they are unknown."""
        row = np.zeros((), matching.DETECTION_DTYPE)
        try:
            entry = json_fields.entry_object(entry)
            image = json_fields.identifier(entry, "image_id")
            category = json_fields.identifier(entry, "category_id")
            row["box"] = json_fields.box(entry)
            row["score"] = json_fields.number(entry, "score")
        except ValueError as error:
            where = f"{self._path}: {self._list}[{number}]"
            raise UserError(f"{json_fields.locate(where, error)}. Fix the entry.") from error
        row["image"], row["category"] = (
            self._images.get(image, -1), self._categories.get(category, -1),
        )  # fmt: skip
        return row


def _fast_rows(entries: Sequence[Any], truth: coco.GroundTruth) -> np.ndarray | None:
    """Return the rows of entries whose fields are plain numbers, None if one is not.

    This is fast; `_ColumnReader` reads other entries one by one, and finds what is wrong.
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
    rows = np.empty(count, matching.DETECTION_DTYPE)
    rows["image"] = truth.image_indices(image_ids)
    rows["category"] = truth.category_indices(category_ids)
    rows["box"], rows["score"] = boxes, scores
    return rows
