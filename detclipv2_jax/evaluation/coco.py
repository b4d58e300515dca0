"""COCO-format ground truth, and COCO's twelve metrics of a detector's boxes. NumPy only.

The metrics equal those of pycocotools' COCOeval within rounding (tests/evaluation/).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from detclipv2_jax.common.json_fields import Identifier
from detclipv2_jax.evaluation import matching
from detclipv2_jax.evaluation.instances import (
    Category,
    ImageInfo,
    parse_instances,
    read_annotations,
)

# In the order of COCOeval.summarize.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_MAX_DETECTIONS = 100  # per image and category
_Ids = Int[np.ndarray, " n"] | Sequence[int] | int  # as in the annotation file


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
      notes: sentences on annotations that are probably not what somebody meant.
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
    notes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)

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

    @functools.cached_property
    def has_text_ids(self) -> bool:
        """Whether an id of the file is not an int64, so that its number here is one of ours."""
        return any(one.text_id is not None for one in (*self.images, *self.categories))

    @functools.cached_property
    def image_places(self) -> Mapping[Identifier, int]:
        """Image id as in the file -> its position in `sorted_image_ids`."""
        places = self.image_indices([image.id for image in self.images]).tolist()
        return {image.given_id: place for image, place in zip(self.images, places)}

    @functools.cached_property
    def category_places(self) -> Mapping[Identifier, int]:
        """Category id as in the file -> its position in `sorted_category_ids`."""
        places = self.category_indices([category.id for category in self.categories]).tolist()
        return {category.given_id: place for category, place in zip(self.categories, places)}

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


def from_content(path: str | pathlib.Path, content: dict[str, Any]) -> GroundTruth:
    """Return COCO ground truth from what `read_annotations` returned for `path`.

    Raises:
      UserError: an entry is invalid; names the file and the field.
    """
    return GroundTruth(**parse_instances(path, content))


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
