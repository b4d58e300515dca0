"""COCO-format ground truth, and COCO's twelve metrics of a detector's boxes. NumPy only.

The metrics equal those of pycocotools' COCOeval within rounding (tests/evaluation/).
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Bool, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import categories as categories_lib
from detclipv2_jax.evaluation import matching
from detclipv2_jax.text.checked import Meaning

# In the order of COCOeval.summarize.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_MAX_DETECTIONS = 100  # per image and category
_Ids = Int[np.ndarray, " n"] | Sequence[int] | int  # as in the annotation file


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """An image of a dataset as its annotation file describes it; height and width in pixels."""

    id: int
    height: int
    width: int
    file_name: str | None
    coco_url: str | None


@dataclasses.dataclass(frozen=True)
class Category:
    """A category of a dataset; the name is spelled as in the file.

    LVIS has a definition and a WordNet synset for each category ("def", "synset"), V3Det a
    "definition". COCO has none.
    """

    id: int
    name: str
    definition: str | None = None
    synset: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GroundTruth:
    """The images, categories and annotated boxes of a dataset. The arrays have one row per box.

    Attributes:
      path: the annotation file, for messages and results.
      images: in the order of the file.
      categories: in the order of the file.
      image_ids: the image of each box.
      category_ids: the category of each box.
      xywh: [x, y, width, height] in pixels, as in the file.
      areas: in square pixels, as in the file: usually the area of the instance's mask. Small,
        medium and large refer to it.
      crowd: not 0 for a region in which no detection counts as wrong.
      left_out: why categories of the file are not in `categories`, in words: the root that Roboflow
        adds, and placeholders. They have no boxes, so AP is the same with them.
    """

    path: str
    images: tuple[ImageInfo, ...]
    categories: tuple[Category, ...]
    image_ids: Int[np.ndarray, " n"]
    category_ids: Int[np.ndarray, " n"]
    xywh: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, " n"]
    crowd: Int[np.ndarray, " n"]
    left_out: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

    @functools.cached_property
    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """The boxes as (x_min, y_min, x_max, y_max) in pixels."""
        return np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1)

    @functools.cached_property
    def sorted_image_ids(self) -> Int[np.ndarray, " i"]:
        """The ids of all images, ascending."""
        return np.sort(np.asarray([image.id for image in self.images], np.int64))

    @functools.cached_property
    def sorted_category_ids(self) -> Int[np.ndarray, " k"]:
        """The ids of all categories, ascending."""
        return np.sort(np.asarray([category.id for category in self.categories], np.int64))

    @functools.cached_property
    def boxes_of_image(self) -> Mapping[int, Int[np.ndarray, " b"]]:
        """Image id -> the indices of its boxes, ascending."""
        ids = [image.id for image in self.images]
        order = np.argsort(self.image_ids, kind="stable")
        ordered = self.image_ids[order]
        starts = np.searchsorted(ordered, ids, side="left")
        ends = np.searchsorted(ordered, ids, side="right")
        return {image: order[start:end] for image, start, end in zip(ids, starts, ends)}

    def image_indices(self, ids: _Ids) -> Int[np.ndarray, " n"]:
        """Return the positions of image ids in `sorted_image_ids`; -1 for unknown ids."""
        return _indices(self.sorted_image_ids, ids)

    def category_indices(self, ids: _Ids) -> Int[np.ndarray, " n"]:
        """Return the positions of category ids in `sorted_category_ids`; -1 for unknown ids."""
        return _indices(self.sorted_category_ids, ids)

    def truth_rows(self) -> np.ndarray:
        """Return the boxes to match as `matching.TRUTH_DTYPE`, in the order of the file."""
        rows = np.empty(len(self.areas), matching.TRUTH_DTYPE)
        rows["image"] = self.image_indices(self.image_ids)
        rows["category"] = self.category_indices(self.category_ids)
        rows["box"], rows["area"], rows["crowd"] = self.xywh, self.areas, self.crowd != 0
        return rows


def _indices(known: Int[np.ndarray, " k"], ids: _Ids) -> np.ndarray:
    found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[found] == ids, found, -1)


def load_coco(path: str | pathlib.Path) -> GroundTruth:
    """Load a COCO `instances` JSON file.

    Raises:
      UserError: the file is missing or invalid; names the file and the field.
    """
    return from_content(path, read_annotations(path))


def read_annotations(path: str | pathlib.Path) -> dict[str, Any]:
    """Return the content of an annotation file: `images`, `annotations`, `categories` and the rest.

    Raises:
      UserError: the file is missing, is not JSON or lacks one of the three lists.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file. Give the annotation JSON of the dataset.") from None
    except (ValueError, RecursionError) as error:  # not JSON, not text, nested too deeply
        raise UserError(
            f"{path}: not valid JSON ({error}). Give the annotation JSON of the dataset."
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: contains a JSON {type(content).__name__}, expected an object with 'images', "
            "'annotations' and 'categories'. Give a file in COCO's or LVIS's format."
        )
    for field in ("images", "annotations", "categories"):
        rows = content.get(field)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(
                f"{path}: '{field}' is missing or not a list of objects. Give a file in COCO's or "
                "LVIS's format."
            )
    for field in ("images", "categories"):
        if not content[field]:
            raise UserError(f"{path}: '{field}' is empty, so there is nothing to evaluate.")
    return content


def from_content(path: str | pathlib.Path, content: dict[str, Any]) -> GroundTruth:
    """Return COCO ground truth from what `read_annotations` returned for `path`.

    Raises:
      UserError: an entry is invalid; names the file and the field.
    """
    return GroundTruth(**parse_instances(path, content))


def parse_instances(path: str | pathlib.Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `GroundTruth` by name, checked. A missing `area` is that of the box.

    Raises:
      UserError: an entry lacks a field or refers to an image or category that does not exist.
    """
    images = tuple(_image(path, number, row) for number, row in enumerate(content["images"]))
    categories = tuple(
        Category(
            id=integer_field(path, f"categories[{number}]", row, "id"),
            name=text_field(path, f"categories[{number}]", row, "name"),
            **Meaning.of_category(row)._asdict(),
        )
        for number, row in enumerate(content["categories"])
    )
    image_ids = _unique_ids(path, "images", [image.id for image in images])
    category_ids = _unique_ids(path, "categories", [category.id for category in categories])
    boxes = [
        _annotated_box(path, number, row, image_ids, category_ids)
        for number, row in enumerate(content["annotations"])
    ]
    left_out = _left_out(content, categories, {box.category_id for box in boxes})
    return {
        "path": str(path),
        "images": images,
        "categories": tuple(one for one in categories if one.id not in left_out),
        "left_out": tuple(left_out.values()),
        "image_ids": np.asarray([box.image_id for box in boxes], np.int64),
        "category_ids": np.asarray([box.category_id for box in boxes], np.int64),
        "xywh": np.asarray([box.xywh for box in boxes], np.float64).reshape(-1, 4),
        "areas": np.asarray([box.area for box in boxes], np.float64),
        "crowd": np.asarray([box.crowd for box in boxes], np.int64),
    }


def _left_out(
    content: dict[str, Any], categories: Sequence[Category], boxed: set[int]
) -> dict[int, str]:
    """Return the categories that preparation leaves out too: id -> why, in words."""
    if "neg_category_ids" in content["images"][0]:
        return {}  # the lists of a federated file may refer to any category
    parents = [row.get("supercategory") for row in content["categories"]]
    rows = [
        categories_lib.Category(one.id, one.name.replace("_", " "), parent)
        for one, parent in zip(categories, parents)
    ]
    return {key: why for key, (_, why) in categories_lib.left_out(rows, boxed).items()}


def integer_field(path: str | pathlib.Path, place: str, row: dict[str, Any], field: str) -> int:
    """Return `row[field]` as an int; `place` locates the row in error messages.

    Raises:
      UserError: the field is missing or not a whole number.
    """
    value = row.get(field)
    if isinstance(value, str) and value.strip().isdigit():  # some published files have such heights
        return int(value)
    if not is_finite_number(value) or value != int(value) or abs(value) >= 1 << 63:
        raise UserError(
            f"{path}: {place}.{field} is {value!r}, expected a whole number. Fix the entry."
        )
    return int(value)


def text_field(path: str | pathlib.Path, place: str, row: dict[str, Any], field: str) -> str:
    """Return `row[field]` as a text that is not blank; `place` locates the row in error messages.

    Raises:
      UserError: the field is missing, blank or not a text.
    """
    value = row.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{path}: {place}.{field} is {value!r}, expected a non-empty text. Fix the entry."
        )
    return value


def is_finite_number(value: object) -> TypeGuard[float]:
    """Return whether a value of a JSON file is a finite number; JSON's integers have any size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)


def _unique_ids(path: str | pathlib.Path, field: str, ids: Sequence[int]) -> set[int]:
    """Return the ids as a set; `UserError` names the first id that occurs twice."""
    known: set[int] = set()
    for number, value in enumerate(ids):
        if value in known:
            raise UserError(
                f"{path}: {field}[{number}].id {value} occurs twice. Ids must be unique."
            )
        known.add(value)
    return known


def _image(path: str | pathlib.Path, number: int, row: dict[str, Any]) -> ImageInfo:
    place = f"images[{number}]"
    file_name, coco_url = _file_text(row, "file_name"), _file_text(row, "coco_url")
    if file_name is None and coco_url is None:
        raise UserError(f"{path}: {place} has no 'file_name' and no 'coco_url'. Fix the entry.")
    return ImageInfo(
        id=integer_field(path, place, row, "id"),
        height=integer_field(path, place, row, "height"),
        width=integer_field(path, place, row, "width"),
        file_name=file_name,
        coco_url=coco_url,
    )


def _file_text(row: dict[str, Any], field: str) -> str | None:
    value = row.get(field)
    return value if isinstance(value, str) and value else None


class _AnnotatedBox(NamedTuple):
    image_id: int
    category_id: int
    xywh: tuple[float, ...]
    area: float
    crowd: int


def _annotated_box(
    path: str | pathlib.Path,
    number: int,
    row: dict[str, Any],
    image_ids: set[int],
    category_ids: set[int],
) -> _AnnotatedBox:
    place = f"annotations[{number}]"
    image = integer_field(path, place, row, "image_id")
    category = integer_field(path, place, row, "category_id")
    if image not in image_ids:
        raise UserError(f"{path}: {place}.image_id {image} is not in 'images'. Fix the entry.")
    if category not in category_ids:
        raise UserError(
            f"{path}: {place}.category_id {category} is not in 'categories'. Fix the entry."
        )
    box = row.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite_number, box)):
        raise UserError(
            f"{path}: {place}.bbox is {box!r}, expected four finite numbers [x, y, width, height]. "
            "Fix the entry."
        )
    xywh = tuple(map(float, box))
    area = row.get("area", xywh[2] * xywh[3])
    if not is_finite_number(area):
        raise UserError(f"{path}: {place}.area is {area!r}, expected a number. Fix the entry.")
    return _AnnotatedBox(image, category, xywh, float(area), int(bool(row.get("iscrowd", 0))))


class DetectionEvaluator:
    """Collects detections, image by image or all rows of a results file, and computes metrics.

    Which detections it keeps and which metrics it computes depends on the subclass: `CocoEvaluator`
    or `LvisEvaluator`.
    """

    def __init__(self, ground_truth: GroundTruth):
        self._truth = ground_truth
        self._added = np.zeros(len(ground_truth.images), bool)

    def add(
        self,
        image_id: int,
        boxes: Float[np.ndarray, "n 4"],
        scores: Float[np.ndarray, " n"],
        category_ids: Int[np.ndarray, " n"],
    ) -> None:
        """Add the detections of one image.

        Args:
          image_id: as in the annotation file.
          boxes: (x_min, y_min, x_max, y_max) in pixels of the image.
          scores: the higher, the better.
          category_ids: as in the annotation file.

        Raises:
          ValueError: the image or a category is unknown, the image was added before, shapes do not
            match, or a score or box is not finite.
        """
        rows = _detection_rows(self._truth, image_id, boxes, scores, category_ids)
        self._mark(self._truth.image_indices([image_id]))
        self._keep(rows)

    def add_rows(self, rows: np.ndarray) -> None:
        """Add all detections of some images, as `matching.DETECTION_DTYPE`, in any order.

        Raises:
          ValueError: one of the images was added before.
        """
        self._mark(np.unique(rows["image"]))
        self._keep(rows)

    def _mark(self, images: Int[np.ndarray, " n"]) -> None:
        """Note that the images were added, so that no detection counts twice."""
        again = images[self._added[images]]
        if len(again):
            image_id = self._truth.sorted_image_ids[again[0]]
            raise ValueError(f"the detections of image {image_id} were added before")
        self._added[images] = True

    def _keep(self, rows: np.ndarray) -> None:
        raise NotImplementedError

    def true_and_false(self) -> tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Return what `matching.true_and_false` returns for the best detections of each image."""
        raise NotImplementedError


def _detection_rows(
    truth: GroundTruth,
    image_id: int,
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    category_ids: Int[np.ndarray, " n"],
) -> np.ndarray:
    """Return one image's detections as `matching.DETECTION_DTYPE`; see `DetectionEvaluator.add`."""
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    category_ids = np.asarray(category_ids, np.int64)
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or category_ids.shape != scores.shape:
        raise ValueError(
            f"image {image_id}: boxes {boxes.shape}, scores {scores.shape} and category ids "
            f"{category_ids.shape} must be (n, 4), (n,) and (n,)"
        )
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ValueError(f"image {image_id}: a detection's score or box is not finite")
    image, categories = truth.image_indices(image_id), truth.category_indices(category_ids)
    if image < 0:
        raise ValueError(f"image {image_id} is not in the ground truth")
    if (categories < 0).any():
        raise ValueError(f"image {image_id}: a detection's category is not in the ground truth")
    rows = np.empty(len(scores), matching.DETECTION_DTYPE)
    rows["image"], rows["category"], rows["score"] = image, categories, scores
    rows["box"][:, :2] = boxes[:, :2]
    rows["box"][:, 2:] = boxes[:, 2:] - boxes[:, :2]
    return rows


class CocoEvaluator(DetectionEvaluator):
    """Computes COCO's twelve metrics.

    Equal scores rank in the order given within an image, and by image id between images.
    """

    def __init__(self, ground_truth: GroundTruth):
        super().__init__(ground_truth)
        self._kept: list[np.ndarray] = []

    def _keep(self, rows: np.ndarray) -> None:
        self._kept.append(rows[self._is_among_best(rows, _MAX_DETECTIONS)])

    def _is_among_best(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """Return a mask of the `limit` best detections of each image and category."""
        pairs = rows["image"] * np.int64(len(self._truth.categories)) + rows["category"]
        return matching.top_k_per_group(pairs, rows["score"], limit)

    def true_and_false(self) -> tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Return the scores of the best 300 detections of each image, and which are right."""
        rows = np.concatenate([np.zeros(0, matching.DETECTION_DTYPE), *self._kept])
        rows = rows[matching.top_k_per_group(rows["image"], rows["score"], 300)]
        return matching.true_and_false(self._truth.truth_rows(), rows, np.zeros(len(rows), bool))

    def result(self) -> dict[str, float | None]:
        """Return the twelve metrics as fractions, None where there is no ground truth.

        An image that was not added counts as one without detections.
        """
        rows = np.concatenate([np.zeros(0, matching.DETECTION_DTYPE), *self._kept])
        truth, num_categories = self._truth.truth_rows(), len(self._truth.categories)
        recalls = {}
        for limit in (1, 10, _MAX_DETECTIONS):
            best = rows[self._is_among_best(rows, limit)]
            curves = matching.precision_recall(
                truth, best, np.zeros(len(best), bool), num_categories
            )
            recalls[f"AR{limit}"] = matching.mean_defined(curves.recall[..., 0])
        metrics = matching.summarize(curves) | recalls  # the curves of the last, largest limit
        return {name: metrics[name] for name in METRICS}
