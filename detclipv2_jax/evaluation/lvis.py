"""LVIS standard AP and fixed AP from one and the same set of detections. NumPy only.

LVIS is federated: on an image only the categories known to be present or absent there count, and an
unmatched detection of a category that was not annotated exhaustively is neither right nor wrong.
*Standard* AP keeps the 300 best detections of each image, whatever their category. *Fixed* AP (Dave
et al., arXiv 2102.01066) has no limit an image but keeps the 10,000 best of each category over the
whole split. The two differ and must never share a column. The matching is faster-coco-eval's (C++).
"""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from faster_coco_eval import COCOeval_faster
from jaxtyping import Float, Int

from detclipv2_jax.errors import UserError
from detclipv2_jax.evaluation import coco

FREQUENCIES = ("r", "c", "f")
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
# The library makes an entry of every (image, category) that it is handed. All in one piece, 3,000
# images of LVIS took 3.8 GB and 28 s; in small pieces, each with just the images that know its
# categories, 0.3 GB and 3.5 s.
_CATEGORIES_A_PIECE = 8
# Detections that wait for the cut at the best of each category; 24 bytes each.
_BUFFER = 4_000_000
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class LvisGroundTruth(coco.GroundTruth):
    """An LVIS v1 split: beside the boxes, what is known to be absent or only partly marked.

    `groups` names sets of category ids (base, novel, ...) from the categories' own field "group".
    """

    negatives: Mapping[int, frozenset[int]]  # image id -> ids of categories known to be absent
    not_exhaustive: Mapping[int, frozenset[int]]  # image id -> ids of which some may be unmarked
    frequencies: Mapping[int, str]  # category id -> r, c or f
    groups: Mapping[str, frozenset[int]]

    @functools.cached_property
    def countable(self) -> np.ndarray:
        """Sorted keys (`pair_keys`) of the pairs (image, category) on which a detection counts."""
        present = pair_keys(self.image_ids, self.category_ids)
        return np.union1d(present, _keys_of(self.negatives))

    @functools.cached_property
    def images_of(self) -> Mapping[int, np.ndarray]:
        """Category id -> sorted ids of the images on which it is known to be present or absent."""
        images, categories = np.divmod(self.countable, _STRIDE)
        rows = coco.group_rows(categories, [category.id for category in self.categories])
        return {category: images[where] for category, where in rows.items()}


@dataclasses.dataclass(frozen=True)
class LvisScores:
    """What the evaluator found, in fractions of one; None: no ground truth to average over."""

    standard: dict[str, float | None]
    fixed: dict[str, float | None]
    groups: dict[str, dict[str, dict[str, float | None]]]  # name -> {"standard": …, "fixed": …}
    categories: list[dict]  # a row each: id, name, frequency, boxes, standard AP, fixed AP


_STRIDE = 1 << 24  # categories' ids stay below it


def pair_keys(image_ids: Int[np.ndarray, " n"], category_ids: Int[np.ndarray, " n"]) -> np.ndarray:
    """One int64 for each pair of image and category; orders by image, then category."""
    return np.asarray(image_ids, np.int64) * _STRIDE + np.asarray(category_ids, np.int64)


def _keys_of(sets: Mapping[int, Iterable[int]]) -> np.ndarray:
    pairs = [(image, category) for image, members in sets.items() for category in members]
    columns = np.asarray(pairs, np.int64).reshape(-1, 2)
    return np.unique(pair_keys(columns[:, 0], columns[:, 1]))


def load_ground_truth(path: str | pathlib.Path) -> LvisGroundTruth:
    """Reads an LVIS v1 JSON (federated: neg_category_ids, not_exhaustive_category_ids, frequency).

    Raises:
      UserError: the file is missing, no JSON, or an entry is broken; names the file and the field.
    """
    return from_content(path, coco.read_annotations(path))


def from_content(path: str | pathlib.Path, content: dict) -> LvisGroundTruth:
    """As `load_ground_truth`, from a file that `coco.read_annotations` read."""
    fields = coco.parse_instances(path, content)
    if (fields["crowd"] != 0).any():
        row = int(np.flatnonzero(fields["crowd"])[0])
        raise UserError(
            f"{path}: annotations[{row}].iscrowd is set; LVIS has no crowds: use COCO's."
        )
    known = {category.id for category in fields["categories"]}
    for number, category in enumerate(fields["categories"]):
        if not 0 <= category.id < _STRIDE:
            raise UserError(
                f"{path}: categories[{number}].id is {category.id}, not from 0 to {_STRIDE - 1}."
            )
    return LvisGroundTruth(
        **fields,
        negatives=_category_sets(path, content, "neg_category_ids", known),
        not_exhaustive=_category_sets(path, content, "not_exhaustive_category_ids", known),
        frequencies=_frequencies(path, content),
        groups=_groups(path, content),
    )


def _category_sets(
    path: str | pathlib.Path, content: dict, field: str, known: set[int]
) -> dict[int, frozenset[int]]:
    sets = {}
    for number, row in enumerate(content["images"]):
        place = f"images[{number}].{field}"
        members = row.get(field)
        if not isinstance(members, list):
            raise UserError(
                f"{path}: {place} is missing or no list; an LVIS file has it (COCO: --format=coco)."
            )
        unknown = [member for member in members if member not in known]
        if unknown:
            raise UserError(
                f"{path}: {place} holds {unknown[0]!r}, which is not among 'categories'."
            )
        sets[int(row["id"])] = frozenset(members)
    return sets


def _frequencies(path: str | pathlib.Path, content: dict) -> dict[int, str]:
    for number, row in enumerate(content["categories"]):
        if row.get("frequency") not in FREQUENCIES:
            raise UserError(
                f"{path}: categories[{number}].frequency is {row.get('frequency')!r}, not r, c or "
                "f as LVIS has it (COCO: --format=coco)."
            )
    return {int(row["id"]): row["frequency"] for row in content["categories"]}


def _groups(path: str | pathlib.Path, content: dict) -> dict[str, frozenset[int]]:
    groups: dict[str, set[int]] = {}
    for number, row in enumerate(content["categories"]):
        if "group" in row:
            name = coco.text(path, f"categories[{number}]", row, "group")
            groups.setdefault(name, set()).add(int(row["id"]))
    return {name: frozenset(groups[name]) for name in sorted(groups)}


class LvisEvaluator:
    """Takes a detector's boxes image by image and gives standard and fixed AP.

    Equal scores rank in the order in which they were given: within an image as in its arrays,
    between images by image id (the cut of fixed AP: by the order of `add`).
    """

    def __init__(
        self,
        ground_truth: LvisGroundTruth,
        *,
        max_per_image: int = 300,
        max_per_category: int = 10_000,
        groups: Mapping[str, Iterable[int]] | None = None,
    ):
        """`groups` (name -> category ids) replaces the ground truth's own."""
        self._truth = ground_truth
        self._max_per_image = max_per_image
        self._max_per_category = max_per_category
        self._groups = {
            name: frozenset(ids)
            for name, ids in (ground_truth.groups if groups is None else groups).items()
        }
        self._categories = np.asarray([category.id for category in ground_truth.categories])
        self._waiting = {image.id for image in ground_truth.images}
        self._standard: list[coco.Table] = []
        self._fixed: list[coco.Table] = []
        self._buffered = 0

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
        if image_id not in self._waiting:
            raise ValueError(f"image {image_id} is not in the ground truth, or was already given")
        table = coco.check_detections(image_id, boxes, scores, category_ids, self._categories)
        self._waiting.remove(image_id)
        best = np.argsort(-table.scores, kind="stable")[: self._max_per_image]
        self._standard.append(self._countable(table.take(best)))
        self._fixed.append(table)
        self._buffered += len(table)
        if self._buffered > _BUFFER:
            self._cut()

    def result(self) -> LvisScores:
        """Both sets of figures. Images that were never given count as images without detections."""
        self._cut()
        standard = self._precision(coco.Table.concatenate(self._standard))
        fixed = self._precision(self._countable(coco.Table.concatenate(self._fixed)))
        groups = {
            name: {
                "standard": summarize(standard, self._members(ids)),
                "fixed": summarize(fixed, self._members(ids)),
            }
            for name, ids in self._groups.items()
        }
        return LvisScores(
            standard=self._figures(standard),
            fixed=self._figures(fixed),
            groups=groups,
            categories=self._category_rows(standard, fixed),
        )

    def _countable(self, table: coco.Table) -> coco.Table:
        """The federated filter: only pairs of image and category of which the truth is known."""
        keys, known = pair_keys(table.image_ids, table.category_ids), self._truth.countable
        if not len(known):
            return table.take(known)
        nearest = np.minimum(np.searchsorted(known, keys), len(known) - 1)  # sorted: not np.isin
        return table.take(np.flatnonzero(known[nearest] == keys))

    def _cut(self) -> None:
        """Keeps the best of each category, in the order given; the others could never come back."""
        table = coco.Table.concatenate(self._fixed)
        order = np.lexsort((-table.scores, table.category_ids))  # stable: ties keep their order
        categories = table.category_ids[order]
        rank = np.arange(len(order)) - np.searchsorted(categories, categories, side="left")
        kept = table.take(np.sort(order[rank < self._max_per_category]))
        self._fixed, self._buffered = [kept], 0

    def _precision(self, table: coco.Table) -> Float[np.ndarray, "T R K A"]:
        """Precision at (IoU threshold, recall, category, area); -1 without ground truth."""
        ids = np.sort(self._categories)
        by_category = coco.group_rows(table.category_ids, ids.tolist())
        truth_rows = coco.group_rows(self._truth.category_ids, ids.tolist())
        pieces = []
        for start in range(0, len(ids), _CATEGORIES_A_PIECE):
            piece = ids[start : start + _CATEGORIES_A_PIECE].tolist()
            rows = np.concatenate([truth_rows[key] for key in piece])
            answers = table.take(np.concatenate([by_category[key] for key in piece]))
            pieces.append(self._evaluate(piece, rows, answers))
        precision = np.concatenate(pieces, axis=2)
        return precision[:, :, np.searchsorted(ids, self._categories)]

    def _evaluate(self, piece: list[int], rows: np.ndarray, answers: coco.Table) -> np.ndarray:
        """The precision of a few categories, over just the images that know them."""
        truth = self._truth
        if not len(rows):  # nothing to find: no precision, whatever was detected
            return np.full((10, 101, len(piece), 4), -1.0)
        known = np.unique(np.concatenate([truth.images_of[key] for key in piece])).tolist()
        images = [
            {
                "id": image,
                "neg_category_ids": sorted(truth.negatives[image]),
                "not_exhaustive_category_ids": sorted(truth.not_exhaustive[image]),
            }
            for image in known
        ]
        categories = [{"id": key, "frequency": truth.frequencies[key]} for key in piece]
        evaluation = COCOeval_faster(
            *coco.as_library_sets(truth, rows, answers, images, categories),
            iouType="bbox",
            lvis_style=True,
            print_function=_log.debug,
        )
        # Its limit is one for each image *and category*; ours were applied before.
        evaluation.params.maxDets = [max(len(answers), 1)]
        evaluation.evaluate()
        evaluation.accumulate()
        return np.asarray(evaluation.eval["precision"])[..., 0]

    def _members(self, ids: Iterable[int]) -> np.ndarray:
        return np.isin(self._categories, np.fromiter(ids, np.int64))

    def _figures(self, precision: np.ndarray) -> dict[str, float | None]:
        figures = summarize(precision, np.ones(len(self._categories), bool))
        letters = np.asarray([self._truth.frequencies[int(key)] for key in self._categories])
        for letter in FREQUENCIES:
            figures[f"AP{letter}"] = mean_precision(precision[:, :, letters == letter, 0])
        return figures

    def _category_rows(self, standard: np.ndarray, fixed: np.ndarray) -> list[dict]:
        keys, counts = np.unique(self._truth.category_ids, return_counts=True)
        boxes = dict(zip(keys.tolist(), counts.tolist()))
        return [
            {
                "id": category.id,
                "name": category.name,
                "frequency": self._truth.frequencies[category.id],
                "groups": [name for name, ids in self._groups.items() if category.id in ids],
                "boxes": boxes.get(category.id, 0),
                "standard_AP": mean_precision(standard[:, :, number, 0]),
                "fixed_AP": mean_precision(fixed[:, :, number, 0]),
            }
            for number, category in enumerate(self._truth.categories)
        ]


def summarize(precision: Float[np.ndarray, "T R K A"], members: np.ndarray) -> dict:
    """AP, AP50, AP75 and AP by area over the categories of the mask `members`."""
    chosen = precision[:, :, members]
    return {
        "AP": mean_precision(chosen[..., 0]),
        "AP50": mean_precision(chosen[0, ..., 0]),
        "AP75": mean_precision(chosen[5, ..., 0]),
        "APs": mean_precision(chosen[..., 1]),
        "APm": mean_precision(chosen[..., 2]),
        "APl": mean_precision(chosen[..., 3]),
    }


def mean_precision(values: np.ndarray) -> float | None:
    """The mean of what is defined (not -1); None where nothing is."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None


def is_lvis(content: Mapping[str, Sequence[Mapping]]) -> bool:
    """Whether a parsed annotation file is LVIS's: federated, categories with a frequency."""
    image, category = content["images"][0], content["categories"][0]
    return "neg_category_ids" in image and "frequency" in category
