"""COCO-format ground truth, and the twelve figures of COCO from a detector's boxes. NumPy only.

Equal to pycocotools' COCOeval to the last digits.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import matching

# In the order in which COCOeval.summarize lists them.
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_MAX_DETECTIONS = 100  # of an image and category that are measured


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

    `xywh` are the file's own [x, y, width, height] in pixels; `areas` are the file's (an instance's
    mask, where there is one), which is what small, medium and large refer to; `crowd` marks regions
    in which nothing counts as wrong.
    """

    path: str
    images: tuple[ImageInfo, ...]
    categories: tuple[Category, ...]
    image_ids: Int[np.ndarray, " n"]
    category_ids: Int[np.ndarray, " n"]
    xywh: Float[np.ndarray, "n 4"]
    areas: Float[np.ndarray, " n"]
    crowd: Int[np.ndarray, " n"]

    @functools.cached_property
    def boxes(self) -> Float[np.ndarray, "n 4"]:
        """(x_min, y_min, x_max, y_max) in pixels."""
        return np.concatenate([self.xywh[:, :2], self.xywh[:, :2] + self.xywh[:, 2:]], axis=1)

    @functools.cached_property
    def sorted_images(self) -> Int[np.ndarray, " i"]:
        """The ids of the images, ascending."""
        return np.sort(np.asarray([image.id for image in self.images], np.int64))

    @functools.cached_property
    def sorted_categories(self) -> Int[np.ndarray, " k"]:
        """The ids of the categories, ascending."""
        return np.sort(np.asarray([category.id for category in self.categories], np.int64))

    def image_places(self, ids: Int[np.ndarray, " n"] | int) -> Int[np.ndarray, " n"]:
        """Where image ids stand in `sorted_images`; -1 for unknown ones."""
        return _places(self.sorted_images, ids)

    def category_places(self, ids: Int[np.ndarray, " n"] | int) -> Int[np.ndarray, " n"]:
        """Where category ids stand in `sorted_categories`; -1 for unknown ones."""
        return _places(self.sorted_categories, ids)

    def truth(self) -> np.ndarray:
        """The boxes as `matching.TRUTH`, in the order of the file."""
        rows = np.empty(len(self.areas), matching.TRUTH)
        rows["image"] = self.image_places(self.image_ids)
        rows["category"] = self.category_places(self.category_ids)
        rows["box"], rows["area"], rows["crowd"] = self.xywh, self.areas, self.crowd != 0
        return rows

    @functools.cached_property
    def rows(self) -> Mapping[int, np.ndarray]:
        """Image id -> the rows of its boxes, in the order of the file."""
        return group_rows(self.image_ids, [image.id for image in self.images])


def _places(known: Int[np.ndarray, " k"], ids: Int[np.ndarray, " n"] | int) -> np.ndarray:
    found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.where(known[found] == ids, found, -1)


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


def load_coco(path: str | pathlib.Path) -> GroundTruth:
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
        "xywh": np.asarray(columns[2], np.float64).reshape(-1, 4),
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
    return image, category, (x, y, width, height), float(area), crowd


def _finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def detections(
    truth: GroundTruth,
    image_id: int,
    boxes: Float[np.ndarray, "n 4"],
    scores: Float[np.ndarray, " n"],
    category_ids: Int[np.ndarray, " n"],
) -> np.ndarray:
    """One image's xyxy boxes in pixels, scores and category ids as `matching.DETECTION`.

    Raises:
      ValueError: an unknown image or category, shapes that do not match, a score or box that is not
        finite.
    """
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    category_ids = np.asarray(category_ids, np.int64)
    if boxes.shape != (len(scores), 4) or scores.ndim != 1 or category_ids.shape != scores.shape:
        raise ValueError(
            f"image {image_id}: boxes {boxes.shape}, scores {scores.shape} and category ids "
            f"{category_ids.shape} must be (n, 4), (n,) and (n,)"
        )
    if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
        raise ValueError(f"image {image_id}: a detection's score or box is not finite")
    image, categories = truth.image_places(image_id), truth.category_places(category_ids)
    if image < 0:
        raise ValueError(f"image {image_id} is not in the ground truth")
    if (categories < 0).any():
        raise ValueError(f"image {image_id}: a detection's category is not in the ground truth")
    rows = np.empty(len(scores), matching.DETECTION)
    rows["image"], rows["category"], rows["score"] = image, categories, scores
    rows["box"][:, :2] = boxes[:, :2]
    rows["box"][:, 2:] = boxes[:, 2:] - boxes[:, :2]
    return rows


class DetectionEvaluator:
    """Takes a detector's boxes, image by image or all rows of a results file at once.

    What is kept of them and what comes out is the sets': see `CocoEvaluator`, `LvisEvaluator`.
    """

    def __init__(self, ground_truth: GroundTruth):
        self._truth = ground_truth
        self._given = np.zeros(len(ground_truth.images), bool)

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
        rows = detections(self._truth, image_id, boxes, scores, category_ids)
        self._note(self._truth.image_places([image_id]))
        self._keep(rows)

    def add_rows(self, rows: np.ndarray) -> None:
        """All detections of some images, as `matching.DETECTION`, in any order.

        Raises:
          ValueError: one of these images was already given.
        """
        self._note(np.unique(rows["image"]))
        self._keep(rows)

    def _note(self, images: Int[np.ndarray, " n"]) -> None:
        """So that nothing is counted twice."""
        again = images[self._given[images]]
        if len(again):
            raise ValueError(f"image {self._truth.sorted_images[again[0]]} was already given")
        self._given[images] = True

    def _keep(self, rows: np.ndarray) -> None:
        raise NotImplementedError


class CocoEvaluator(DetectionEvaluator):
    """Takes a detector's boxes and gives COCO's twelve figures.

    Equal scores rank as given within an image, and by image id between images.
    """

    def __init__(self, ground_truth: GroundTruth):
        super().__init__(ground_truth)
        self._kept: list[np.ndarray] = []

    def _keep(self, rows: np.ndarray) -> None:
        self._kept.append(rows[self._best(rows, _MAX_DETECTIONS)])

    def _best(self, rows: np.ndarray, limit: int) -> np.ndarray:
        """Whether each row is among the `limit` best of its image and category."""
        pairs = rows["image"] * np.int64(len(self._truth.categories)) + rows["category"]
        return matching.among_best(pairs, rows["score"], limit)

    def result(self) -> dict[str, float | None]:
        """The twelve figures, fractions of one; None where no ground truth could be averaged."""
        rows = np.concatenate([np.zeros(0, matching.DETECTION), *self._kept])
        truth, categories = self._truth.truth(), len(self._truth.categories)
        recalls = {}
        for limit in (1, 10, _MAX_DETECTIONS):
            rated = rows[self._best(rows, limit)]
            found = matching.curves(truth, rated, np.zeros(len(rated), bool), categories)
            recalls[f"AR{limit}"] = matching.mean(found.recall[..., 0])
        figures = matching.summarize(found) | recalls  # of the largest limit
        return {name: figures[name] for name in FIGURES}
