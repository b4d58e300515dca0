"""COCO-format ground truth, and the twelve figures of COCO from a detector's boxes. NumPy only.

The matching itself is faster-coco-eval's (C++), which gives pycocotools' figures.
"""

import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from jaxtyping import Float, Int

from detclipv2_jax.errors import UserError

# In the order in which COCOeval.summarize lists them.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """One image of a split, as its JSON describes it; height and width in pixels."""

    id: int
    height: int
    width: int
    file_name: str | None
    coco_url: str | None


@dataclasses.dataclass(frozen=True)
class Category:
    """One category: its id in the file, its name as the file spells it, and what it means.

    LVIS has a definition and a WordNet synset for each category, COCO has not.
    """

    id: int
    name: str
    definition: str | None = None
    synset: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """The boxes of a split, a row each: what a detector is measured against.

    `boxes` are xyxy in pixels; `areas` are the file's (an instance's mask, where there is one),
    which is what small, medium and large refer to; `crowd` marks regions in which nothing counts as
    wrong.
    """

    path: str
    images: tuple[ImageInfo, ...]
    categories: tuple[Category, ...]
    image_ids: Int[np.ndarray, " n"]
    category_ids: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, " n"]
    crowd: Int[np.ndarray, " n"]

    @functools.cached_property
    def rows(self) -> Mapping[int, np.ndarray]:
        """Image id -> the rows of its boxes, in the order of the file."""
        return group_rows(self.image_ids, [image.id for image in self.images])


def group_rows(keys: Int[np.ndarray, " n"], groups: Sequence[int]) -> dict[int, np.ndarray]:
    """For each of `groups`, the positions at which it occurs in `keys`, ascending."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.searchsorted(ordered, groups, side="left")
    ends = np.searchsorted(ordered, groups, side="right")
    return {group: order[a:b] for group, a, b in zip(groups, starts, ends)}


def read_annotations(path: str | pathlib.Path) -> dict:
    """Reads an annotation JSON that has the lists `images`, `annotations` and `categories`.

    Raises:
      UserError: no such file, no JSON, or a list is missing; names the file and the field.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file; give the annotation JSON of the set.") from None
    except (ValueError, RecursionError) as error:  # not JSON, not text, nested too deep
        raise UserError(
            f"{path}: not a JSON file ({error}); give the set's annotation JSON."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a JSON {type(content).__name__}, not an object with 'images'."
        )
    for field in ("images", "annotations", "categories"):
        rows = content.get(field)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(
                f"{path}: '{field}' is missing or no list of objects; COCO and LVIS files have it."
            )
    for field in ("images", "categories"):
        if not content[field]:
            raise UserError(f"{path}: '{field}' is empty, so there is nothing to evaluate.")
    return content


def load_ground_truth(path: str | pathlib.Path) -> GroundTruth:
    """Reads a COCO `instances` JSON.

    Raises:
      UserError: the file is missing, is no JSON, or an entry is broken; names the file and field.
    """
    return from_content(path, read_annotations(path))


def from_content(path: str | pathlib.Path, content: dict) -> GroundTruth:
    """As `load_ground_truth`, from a file that `read_annotations` read."""
    return GroundTruth(**parse_instances(path, content))


def parse_instances(path: str | pathlib.Path, content: dict) -> dict:
    """The fields of `GroundTruth` from a parsed file; `area` falls back to the box's own.

    Raises:
      UserError: an entry lacks a field or refers to an image or category that does not exist.
    """
    images = tuple(_image(path, number, row) for number, row in enumerate(content["images"]))
    categories = tuple(
        Category(
            id=integer(path, f"categories[{number}]", row, "id"),
            name=text(path, f"categories[{number}]", row, "name"),
            definition=_text_if_any(row, "def"),
            synset=_text_if_any(row, "synset"),
        )
        for number, row in enumerate(content["categories"])
    )
    image_ids = unique_ids(path, "images", [image.id for image in images])
    category_ids = unique_ids(path, "categories", [category.id for category in categories])
    rows = [
        _annotation(path, number, row, image_ids, category_ids)
        for number, row in enumerate(content["annotations"])
    ]
    columns = list(zip(*rows)) if rows else [()] * 5
    return {
        "path": str(path),
        "images": images,
        "categories": categories,
        "image_ids": np.asarray(columns[0], np.int64),
        "category_ids": np.asarray(columns[1], np.int64),
        "boxes": np.asarray(columns[2], np.float64).reshape(-1, 4),
        "areas": np.asarray(columns[3], np.float64),
        "crowd": np.asarray(columns[4], np.int64),
    }


def integer(path: str | pathlib.Path, place: str, row: dict, field: str) -> int:
    """`row[field]` as a whole number; else a UserError names the file, `place` and the field."""
    value = row.get(field)
    if isinstance(value, str) and value.strip().isdigit():  # published files hold such heights
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UserError(
            f"{path}: {place}.{field} is {value!r}, not a whole number; mend that entry."
        )
    return int(value)


def text(path: str | pathlib.Path, place: str, row: dict, field: str) -> str:
    """`row[field]` as text that is not empty; a UserError names the place otherwise."""
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{path}: {place}.{field} is {value!r}, not a text; mend that entry.")
    return value


def _text_if_any(row: dict, field: str) -> str | None:
    value = row.get(field)
    return value if isinstance(value, str) and value.strip() else None


def unique_ids(path: str | pathlib.Path, field: str, ids: Sequence[int]) -> set[int]:
    """The ids as a set; a UserError names the first that occurs twice."""
    known: set[int] = set()
    for number, value in enumerate(ids):
        if value in known:
            raise UserError(
                f"{path}: {field}[{number}].id {value} occurs twice; ids must be unique."
            )
        known.add(value)
    return known


def _image(path: str | pathlib.Path, number: int, row: dict) -> ImageInfo:
    place = f"images[{number}]"
    url, name = row.get("coco_url"), row.get("file_name")
    if not (isinstance(name, str) and name) and not (isinstance(url, str) and url):
        raise UserError(f"{path}: {place} has neither 'file_name' nor 'coco_url'; mend that entry.")
    return ImageInfo(
        id=integer(path, place, row, "id"),
        height=integer(path, place, row, "height"),
        width=integer(path, place, row, "width"),
        file_name=name if isinstance(name, str) and name else None,
        coco_url=url if isinstance(url, str) and url else None,
    )


def _annotation(
    path: str | pathlib.Path, number: int, row: dict, image_ids: set[int], category_ids: set[int]
) -> tuple[int, int, tuple[float, ...], float, int]:
    place = f"annotations[{number}]"
    image = integer(path, place, row, "image_id")
    category = integer(path, place, row, "category_id")
    if image not in image_ids:
        raise UserError(f"{path}: {place}.image_id {image} is not among 'images'; mend that entry.")
    if category not in category_ids:
        raise UserError(
            f"{path}: {place}.category_id {category} is not among 'categories'; mend that entry."
        )
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(v) for v in box):
        raise UserError(
            f"{path}: {place}.bbox is {box!r}, not four numbers [x, y, width, height]; "
            "mend that entry."
        )
    x, y, width, height = map(float, box)
    area = row.get("area", width * height)
    if not _finite(area):
        raise UserError(f"{path}: {place}.area is {area!r}, not a number; mend that entry.")
    crowd = int(bool(row.get("iscrowd", 0)))
    return image, category, (x, y, x + width, y + height), float(area), crowd


def _finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


@dataclasses.dataclass(frozen=True)
class Table:
    """Detections, a row each: image id, category id, xyxy box in pixels, score."""

    image_ids: Int[np.ndarray, " n"]
    category_ids: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: np.ndarray) -> "Table":
        """Those rows, in that order."""
        return Table(
            self.image_ids[rows], self.category_ids[rows], self.boxes[rows], self.scores[rows]
        )

    @staticmethod
    def concatenate(tables: Sequence["Table"]) -> "Table":
        """All rows of all tables, in their order."""
        return Table(
            np.concatenate([np.zeros(0, np.int64), *(t.image_ids for t in tables)]),
            np.concatenate([np.zeros(0, np.int64), *(t.category_ids for t in tables)]),
            np.concatenate([np.zeros((0, 4), np.float32), *(t.boxes for t in tables)]),
            np.concatenate([np.zeros(0, np.float32), *(t.scores for t in tables)]),
        )


def check_detections(
    image_id: int,
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    category_ids: Int[np.ndarray, " n"],
    known_categories: np.ndarray,
) -> Table:
    """One image's detections as a `Table`.

    Raises:
      ValueError: shapes that do not match, a score or box that is not finite, an unknown category.
    """
    boxes, scores = np.asarray(boxes), np.asarray(scores)
    category_ids = np.asarray(category_ids, np.int64)
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or category_ids.shape != scores.shape:
        raise ValueError(
            f"image {image_id}: boxes {boxes.shape}, scores {scores.shape} and category ids "
            f"{category_ids.shape} must be (n, 4), (n,) and (n,)"
        )
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ValueError(f"image {image_id}: a detection's score or box is not finite")
    if not np.isin(category_ids, known_categories).all():
        raise ValueError(f"image {image_id}: a detection's category is not in the ground truth")
    return Table(np.full(len(scores), image_id, np.int64), category_ids, boxes, scores)


class CocoEvaluator:
    """Takes a detector's boxes image by image and gives COCO's twelve figures."""

    def __init__(self, ground_truth: GroundTruth):
        self._truth = ground_truth
        self._categories = np.asarray([category.id for category in ground_truth.categories])
        self._images = {image.id for image in ground_truth.images}
        self._tables: dict[int, Table] = {}

    def add(
        self,
        image_id: int,
        boxes: Float[np.ndarray, "n 4"],
        scores: Float[np.ndarray, " n"],
        category_ids: Int[np.ndarray, " n"],
    ) -> None:
        """One image's detections: xyxy boxes in pixels of the image, scores, category ids.

        Raises:
          ValueError: an unknown image, or one that was already given; broken arrays.
        """
        if image_id not in self._images or image_id in self._tables:
            raise ValueError(f"image {image_id} is not in the ground truth, or was already given")
        self._tables[image_id] = check_detections(
            image_id, boxes, scores, category_ids, self._categories
        )

    def result(self) -> dict[str, float | None]:
        """The twelve figures, fractions of one; None where no ground truth could be averaged."""
        table = Table.concatenate([self._tables[key] for key in sorted(self._tables)])
        truth = self._truth
        evaluation = COCOeval_faster(
            *as_library_sets(
                truth,
                np.arange(len(truth.areas)),
                table,
                [{"id": image.id} for image in truth.images],
                [{"id": int(key)} for key in self._categories],
            ),
            iouType="bbox",
            print_function=_log.debug,
        )
        evaluation.run()
        values = [float(value) for value in evaluation.stats]
        return {name: None if value < 0 else value for name, value in zip(FIGURES, values)}


def as_library_sets(
    truth: GroundTruth, rows: np.ndarray, detections: Table, images: list[dict], cats: list[dict]
) -> tuple[COCO, COCO]:
    """The rows of the ground truth and the detections as faster-coco-eval's two data sets."""
    # Its matching knows annotations by id and takes 0 for "unmatched": ours count from 1.
    annotations = [
        {
            "id": number,
            "image_id": int(truth.image_ids[row]),
            "category_id": int(truth.category_ids[row]),
            "bbox": _xywh(truth.boxes[row]),
            "area": float(truth.areas[row]),
            "iscrowd": int(truth.crowd[row]),
        }
        for number, row in enumerate(rows, start=1)
    ]
    answers = []
    columns = zip(
        detections.image_ids.tolist(),
        detections.category_ids.tolist(),
        detections.boxes.astype(np.float64),
        detections.scores.tolist(),
    )
    for number, (image, category, box, score) in enumerate(columns, start=1):
        box = _xywh(box)
        answers.append(
            {
                "id": number,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "area": box[2] * box[3],
                "score": score,
                "iscrowd": 0,
            }
        )
    sets = []
    for entries in (annotations, answers):
        sets.append(COCO({"images": images, "annotations": entries, "categories": cats}))
    return sets[0], sets[1]


def _xywh(box: Float[np.ndarray, " 4"]) -> list[float]:
    x_min, y_min, x_max, y_max = box.tolist()
    return [x_min, y_min, x_max - x_min, y_max - y_min]
