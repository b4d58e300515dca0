"""LVIS standard AP and fixed AP from the same detections. NumPy only.

LVIS is federated: on an image, only the categories known to be present or absent there count. An
unmatched detection of a category that was not annotated exhaustively is neither right nor wrong.
*Standard* AP keeps the 300 best detections of each image, whatever their category. *Fixed* AP (Dave
et al., arXiv 2102.01066) has no limit per image but keeps the 10,000 best of each category over the
whole dataset. The two differ and must never share a column. Both equal lvis-api's LVISEval within
rounding (tests/evaluation/).
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import shorten
from detclipv2_jax.evaluation import coco, instances, matching

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent
# As in LVISEval, without its "@300", which does not apply to fixed AP.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    *("AR", "ARs", "ARm", "ARl"),
)
_BUFFER = 1 << 20  # detections that wait to be sorted by category; 48 bytes each
_CHUNK = 1 << 18  # about how many detections are matched together, in whole categories


@dataclasses.dataclass(frozen=True, eq=False)
class LvisGroundTruth(coco.GroundTruth):
    """An LVIS v1 dataset: adds which categories of an image are absent or partly annotated.

    Attributes:
      negatives: image id -> ids of the categories known to be absent.
      not_exhaustive: image id -> ids of the categories of which some objects may not be annotated.
      frequencies: category id -> "r", "c" or "f".
      groups: name -> category ids (base, novel, ...), from the field "group" of the categories.
    """

    negatives: Mapping[int, frozenset[int]]
    not_exhaustive: Mapping[int, frozenset[int]]
    frequencies: Mapping[int, str]
    groups: Mapping[str, frozenset[int]]

    def truth_rows(self) -> np.ndarray:
        """Return the boxes to match, without those of area 0, which LVISEval leaves out."""
        rows = super().truth_rows()
        return rows[rows["area"] > 0]

    @functools.cached_property
    def annotated_keys(self) -> Int[np.ndarray, " p"]:
        """Sorted `pair_keys` of the images and categories where detections count."""
        return np.union1d(self.pair_keys(self.truth_rows()), self._keys_of(self.negatives))

    @functools.cached_property
    def not_exhaustive_keys(self) -> Int[np.ndarray, " p"]:
        """Sorted `pair_keys` of the images and categories whose objects may lack boxes."""
        return np.unique(self._keys_of(self.not_exhaustive))

    def pair_keys(self, rows: np.ndarray) -> Int[np.ndarray, " n"]:
        """Return a number for the image and category of each row of boxes or detections."""
        return rows["category"] * np.int64(len(self.images)) + rows["image"]

    def _keys_of(self, sets: Mapping[int, Iterable[int]]) -> Int[np.ndarray, " p"]:
        pairs = [(image, category) for image, members in sets.items() for category in members]
        rows = np.empty(len(pairs), matching.DETECTION_DTYPE)
        columns = np.asarray(pairs, np.int64).reshape(-1, 2)
        rows["image"] = self.image_indices(columns[:, 0])
        rows["category"] = self.category_indices(columns[:, 1])
        return self.pair_keys(rows)


@dataclasses.dataclass(frozen=True)
class LvisScores:
    """The metrics of `LvisEvaluator` as fractions; None where there is no ground truth.

    Attributes:
      standard: standard AP and AR, by the names in `METRICS`.
      fixed: fixed AP and AR, likewise.
      groups: group of categories -> {"standard": metrics, "fixed": metrics}.
      categories: per category, a dict with id, name, frequency, groups, boxes (their number),
        standard_AP, fixed_AP and a few more metrics.
    """

    standard: dict[str, float | None]
    fixed: dict[str, float | None]
    groups: dict[str, dict[str, dict[str, float | None]]]
    categories: list[dict[str, Any]]


def is_lvis(content: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Return whether the content of an annotation file has the fields that only LVIS has."""
    image, category = content["images"][0], content["categories"][0]
    return "neg_category_ids" in image and "frequency" in category


def load_lvis(path: str | pathlib.Path) -> LvisGroundTruth:
    """Load an LVIS v1 JSON file.

    Raises:
      UserError: the file is missing or invalid; names the file and the field.
    """
    return from_content(path, coco.read_annotations(path))


def from_content(path: str | pathlib.Path, content: dict[str, Any]) -> LvisGroundTruth:
    """Return LVIS ground truth from what `coco.read_annotations` returned for `path`.

    Raises:
      UserError: an entry is invalid; names the file and the field.
    """
    fields = coco.parse_instances(path, content)
    if (fields["crowd"] != 0).any():
        row = int(np.flatnonzero(fields["crowd"])[0])
        raise UserError(
            f"{path}: annotations[{row}].iscrowd is set, but LVIS has no crowds. Evaluate the file "
            "in COCO's format (--format=coco)."
        )
    return LvisGroundTruth(
        **fields,
        negatives=_category_sets(path, content, fields, "neg_category_ids"),
        not_exhaustive=_category_sets(path, content, fields, "not_exhaustive_category_ids"),
        frequencies=_frequencies(path, content, fields),
        groups=_groups(path, content, fields),
    )


def _category_sets(
    path: str | pathlib.Path, content: dict[str, Any], fields: dict[str, Any], field: str
) -> dict[int, frozenset[int]]:
    known = {category.given_id: category.id for category in fields["categories"]}
    sets = {}
    for number, (row, image) in enumerate(zip(content["images"], fields["images"])):
        where = f"{path}: images[{number}]"
        members = instances.category_ids(where, row, field, known)
        if members is None:
            raise UserError(
                f"{where}.{field} is missing or not a list. LVIS files have it; evaluate other "
                "files in COCO's format (--format=coco)."
            )
        sets[image.id] = members
    return sets


def _frequencies(
    path: str | pathlib.Path, content: dict[str, Any], fields: dict[str, Any]
) -> dict[int, str]:
    for number, row in enumerate(content["categories"]):
        if row.get("frequency") not in FREQUENCIES:
            raise UserError(
                f"{path}: categories[{number}].frequency is {shorten(row.get('frequency'))}, "
                "expected 'r', 'c' or 'f' as in LVIS. Evaluate other files in COCO's format "
                "(--format=coco)."
            )
    rows = zip(fields["categories"], content["categories"])
    return {category.id: row["frequency"] for category, row in rows}


def _groups(
    path: str | pathlib.Path, content: dict[str, Any], fields: dict[str, Any]
) -> dict[str, frozenset[int]]:
    groups: dict[str, set[int]] = {}
    for number, row in enumerate(content["categories"]):
        if "group" in row:
            name = instances.text_field(f"{path}: categories[{number}]", row, "group")
            groups.setdefault(name, set()).add(fields["categories"][number].id)
    return {name: frozenset(groups[name]) for name in sorted(groups)}


class LvisEvaluator(coco.DetectionEvaluator):
    """Computes standard and fixed AP.

    Equal scores rank in the order given within an image, and by image id between images. The limit
    of fixed AP takes equal scores in the order in which they were added, as with a results file.

    Memory is bounded. Standard AP keeps detections that pass the federated filter. Fixed AP keeps
    the best detections of each category so far; what scores no higher than all of them is dropped.
    """

    _truth: LvisGroundTruth

    def __init__(
        self,
        ground_truth: LvisGroundTruth,
        *,
        max_per_image: int = 300,
        max_per_category: int = 10_000,
    ):
        """Create an evaluator without detections.

        Args:
          ground_truth: what detections are compared with.
          max_per_image: detections per image that standard AP keeps.
          max_per_category: detections per category that fixed AP keeps.
        """
        super().__init__(ground_truth)
        self._max_per_image = max_per_image
        self._standard = _BestOfCategories(len(ground_truth.categories), sys.maxsize)
        self._fixed = _BestOfCategories(len(ground_truth.categories), max_per_category)

    def _keep(self, rows: np.ndarray) -> None:
        self._fixed.add(rows)
        best = matching.top_k_per_group(rows["image"], rows["score"], self._max_per_image)
        self._standard.add(self._countable(rows[best]))

    def result(self) -> LvisScores:
        """Return all metrics. An image that was not added counts as one without detections."""
        curves = self.curves()
        standard, fixed = curves["standard"], curves["fixed"]
        ids = self._truth.sorted_category_ids
        groups = {}
        for name, members in self._truth.groups.items():
            mask = np.isin(ids, np.fromiter(members, np.int64))
            groups[name] = {
                "standard": matching.summarize(standard.select(mask)),
                "fixed": matching.summarize(fixed.select(mask)),
            }
        return LvisScores(
            standard=self._metrics(standard),
            fixed=self._metrics(fixed),
            groups=groups,
            categories=self._category_rows(standard, fixed),
        )

    def true_and_false(self) -> tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Return the scores of the detections of standard AP that count, and which are right."""
        every = [
            matching.true_and_false(truth, found, not_exhaustive)
            for _, truth, found, not_exhaustive in self._to_match(self._standard)
        ]
        scores, is_right = zip(*every)
        return np.concatenate(scores), np.concatenate(is_right)

    def curves(self) -> dict[str, matching.Curves]:
        """Return the curves behind "standard" and "fixed"; categories by ascending id."""
        return {
            "standard": self._curves(self._standard),
            "fixed": self._curves(self._fixed),
        }

    def _countable(self, rows: np.ndarray) -> np.ndarray:
        """Apply the federated filter; drop boxes without an area, as LVISEval does."""
        sized = rows["box"][:, 2] * rows["box"][:, 3] > 0
        return rows[sized & _is_among(self._truth.annotated_keys, self._truth.pair_keys(rows))]

    def _curves(self, best: "_BestOfCategories") -> matching.Curves:
        return matching.Curves.concatenate(
            [
                matching.precision_recall(truth, found, not_exhaustive, categories)
                for categories, truth, found, not_exhaustive in self._to_match(best)
            ]
        )

    def _to_match(
        self, best: "_BestOfCategories"
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, Bool[np.ndarray, " n"]]]:
        """Yield, for some categories at a time, their number, truth and countable detections.

        The last item says which detections are ignored if they match nothing. Categories are
        numbered from 0 in each part.
        """
        truth = self._truth.truth_rows()
        truth = truth[np.argsort(truth["category"], kind="stable")]
        for chunk in best.chunks(_CHUNK):
            found = self._countable(chunk.rows)
            keys = self._truth.pair_keys(found)
            not_exhaustive = _is_among(self._truth.not_exhaustive_keys, keys)
            rows = slice(*np.searchsorted(truth["category"], [chunk.first, chunk.end]))
            wanted = truth[rows].copy()
            wanted["category"] -= chunk.first
            found["category"] -= chunk.first
            yield chunk.end - chunk.first, wanted, found, not_exhaustive

    def _metrics(self, curves: matching.Curves) -> dict[str, float | None]:
        ids = self._truth.sorted_category_ids
        letters = np.asarray([self._truth.frequencies[int(key)] for key in ids])
        metrics = matching.summarize(curves)
        for letter in FREQUENCIES:
            precision = curves.select(letters == letter).precision[..., 0]
            metrics[f"AP{letter}"] = matching.mean_defined(precision)
        return {name: metrics[name] for name in METRICS}

    def _category_rows(
        self, standard: matching.Curves, fixed: matching.Curves
    ) -> list[dict[str, Any]]:
        keys, counts = np.unique(self._truth.category_ids, return_counts=True)
        boxes = dict(zip(keys.tolist(), counts.tolist()))
        groups = self._truth.groups
        rows = []
        for category in self._truth.categories:
            index = self._truth.category_indices([category.id])
            row = {
                "id": category.id,
                "name": category.name,
                "frequency": self._truth.frequencies[category.id],
                "groups": [name for name, ids in groups.items() if category.id in ids],
                "boxes": boxes.get(category.id, 0),
            }
            for protocol, curves in (("standard", standard), ("fixed", fixed)):
                metrics = matching.summarize(curves.select(index))
                row |= {f"{protocol}_{key}": metrics[key] for key in ("AP", "AP50", "AP75", "AR")}
            rows.append(row)
        return rows


def _is_among(known: Int[np.ndarray, " k"], keys: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Return whether each key is one of the sorted keys `known`."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


class _Chunk(NamedTuple):
    """Detections of the categories `first` to `end` - 1."""

    first: int
    end: int
    rows: np.ndarray


class _BestOfCategories:
    """The best detections of each category; of equal scores those that were added first.

    Sorting after every image is slow. So up to `_BUFFER` detections wait unsorted, and a category
    keeps up to 5/4 of its limit.
    """

    def __init__(self, categories: int, limit: int):
        self._limit = limit
        self._floor = np.full(categories, -np.inf)  # a detection must score more than this
        self._rows: list[list[np.ndarray]] = [[] for _ in range(categories)]
        self._counts = np.zeros(categories, np.int64)
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        """Return how many detections are kept."""
        return int(self._counts.sum()) + self._num_waiting

    def add(self, rows: np.ndarray) -> None:
        """Add detections of any categories."""
        rows = rows[rows["score"] > self._floor[rows["category"]]]
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting > _BUFFER:
            self._sort()

    def chunks(self, size: int) -> Iterator[_Chunk]:
        """Yield the best detections in whole categories, about `size` detections at a time."""
        self._sort()
        for category in np.flatnonzero(self._counts > self._limit).tolist():
            self._cut(category)
        first, total = 0, 0
        for category, count in enumerate(self._counts.tolist()):
            total += count
            if total >= size or category == len(self._counts) - 1:
                arrays = [array for rows in self._rows[first : category + 1] for array in rows]
                empty = np.zeros(0, matching.DETECTION_DTYPE)
                yield _Chunk(first, category + 1, np.concatenate([empty, *arrays]))
                first, total = category + 1, 0

    def _sort(self) -> None:
        """Move the waiting detections to their categories."""
        rows = np.concatenate([np.zeros(0, matching.DETECTION_DTYPE), *self._waiting])
        self._waiting, self._num_waiting = [], 0
        rows = rows[np.argsort(rows["category"], kind="stable")]
        edges = np.searchsorted(rows["category"], np.arange(len(self._counts) + 1))
        for category in np.flatnonzero(np.diff(edges)):
            # Copy: a view of a few rows would keep all of them in memory.
            self._rows[category].append(rows[edges[category] : edges[category + 1]].copy())
        self._counts += np.diff(edges)
        for category in np.flatnonzero(self._counts > self._limit + self._limit // 4).tolist():
            self._cut(category)

    def _cut(self, category: int) -> None:
        """Keep the best `limit` detections of a category."""
        rows = np.concatenate(self._rows[category])
        scores = rows["score"]
        floor = np.partition(scores, len(scores) - self._limit)[len(scores) - self._limit]
        better, equal = scores > floor, scores == floor
        equal &= np.cumsum(equal) <= self._limit - np.count_nonzero(better)
        self._rows[category] = [rows[better | equal]]
        self._counts[category], self._floor[category] = self._limit, floor
