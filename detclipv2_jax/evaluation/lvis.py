"""LVIS standard AP and fixed AP from one and the same set of detections. NumPy only.

LVIS is federated: on an image only the categories known to be present or absent there count, and an
unmatched detection of a category that was not annotated exhaustively is neither right nor wrong.
*Standard* AP keeps the 300 best detections of each image, whatever their category. *Fixed* AP (Dave
et al., arXiv 2102.01066) has no limit an image but keeps the 10,000 best of each category over the
whole split. The two differ and must never share a column. Equal to lvis-api's LVISEval to the last
digits.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, matching

FREQUENCIES = ("r", "c", "f")
# As LVISEval names them, but for its "@300", which fixed AP has not.
FIGURES = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"),
    *("AR", "ARs", "ARm", "ARl"),
)
_BUFFER = 1 << 20  # detections that wait until they are sorted by category; 48 bytes each
_PIECE = 1 << 18  # detections that are measured at once, but whole categories


@dataclasses.dataclass(frozen=True, eq=False)
class LvisGroundTruth(coco.GroundTruth):
    """An LVIS v1 split: beside the boxes, what is known to be absent or only partly marked.

    `groups` names sets of category ids (base, novel, ...) from the categories' own field "group".
    """

    negatives: Mapping[int, frozenset[int]]  # image id -> ids of categories known to be absent
    not_exhaustive: Mapping[int, frozenset[int]]  # image id -> ids of which some may be unmarked
    frequencies: Mapping[int, str]  # category id -> r, c or f
    groups: Mapping[str, frozenset[int]]

    def truth(self) -> np.ndarray:
        """As COCO's, without boxes that have no area: LVISEval leaves those out."""
        rows = super().truth()
        return rows[rows["area"] > 0]

    @functools.cached_property
    def countable(self) -> Int[np.ndarray, " p"]:
        """Sorted `pair_keys` of the pairs (image, category) on which a detection counts."""
        return np.union1d(self.pair_keys(self.truth()), self._keys_of(self.negatives))

    @functools.cached_property
    def unmarked(self) -> Int[np.ndarray, " p"]:
        """Sorted `pair_keys` of the pairs of which not every object is marked."""
        return np.unique(self._keys_of(self.not_exhaustive))

    def pair_keys(self, rows: np.ndarray) -> Int[np.ndarray, " n"]:
        """One number for each row's image and category."""
        return rows["category"] * np.int64(len(self.images)) + rows["image"]

    def _keys_of(self, sets: Mapping[int, Iterable[int]]) -> Int[np.ndarray, " p"]:
        pairs = [(image, category) for image, members in sets.items() for category in members]
        rows = np.empty(len(pairs), matching.DETECTION)
        columns = np.asarray(pairs, np.int64).reshape(-1, 2)
        rows["image"] = self.image_places(columns[:, 0])
        rows["category"] = self.category_places(columns[:, 1])
        return self.pair_keys(rows)


@dataclasses.dataclass(frozen=True)
class LvisScores:
    """What the evaluator found, in fractions of one; None: no ground truth to average over."""

    standard: dict[str, float | None]
    fixed: dict[str, float | None]
    groups: dict[str, dict[str, dict[str, float | None]]]  # name -> {"standard": …, "fixed": …}
    categories: list[dict]  # a row each: id, name, frequency, groups, boxes, standard_AP, fixed_AP…


def load_lvis(path: str | pathlib.Path) -> LvisGroundTruth:
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


class LvisEvaluator(coco.DetectionEvaluator):
    """Takes a detector's boxes and gives standard and fixed AP.

    Equal scores rank as given within an image, and by image id between images; the cut of fixed AP
    takes them as they come, which in a results file is its order.

    Of standard AP's detections those of the federated filter are kept, of fixed AP's the best of
    each category so far: what is no better than all of them is dropped when it comes.
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
        super().__init__(ground_truth)
        self._max_per_image = max_per_image
        self._groups = {
            name: frozenset(ids)
            for name, ids in (ground_truth.groups if groups is None else groups).items()
        }
        self._standard = _Best(len(ground_truth.categories), sys.maxsize)
        self._fixed = _Best(len(ground_truth.categories), max_per_category)

    def _keep(self, rows: np.ndarray) -> None:
        self._fixed.add(rows)
        best = matching.among_best(rows["image"], rows["score"], self._max_per_image)
        self._standard.add(self._countable(rows[best]))

    def result(self) -> LvisScores:
        """Both sets of figures. Images that were never given count as images without detections."""
        standard, fixed = self.curves().values()
        ids = self._truth.sorted_categories
        groups = {}
        for name, members in self._groups.items():
            mask = np.isin(ids, np.fromiter(members, np.int64))
            groups[name] = {
                "standard": matching.summarize(standard.of(mask)),
                "fixed": matching.summarize(fixed.of(mask)),
            }
        return LvisScores(
            standard=self._figures(standard),
            fixed=self._figures(fixed),
            groups=groups,
            categories=self._category_rows(standard, fixed),
        )

    def held(self) -> dict[str, int]:
        """How many detections are kept for "standard" and "fixed"; 48 bytes each."""
        return {"standard": len(self._standard), "fixed": len(self._fixed)}

    def curves(self) -> dict[str, matching.Curves]:
        """Precision and recall behind the figures of "standard" and "fixed"; categories by id."""
        return {
            "standard": self._measured(self._standard),
            "fixed": self._measured(self._fixed),
        }

    def _countable(self, rows: np.ndarray) -> np.ndarray:
        """The federated filter, and boxes that have an area: LVISEval leaves the others out."""
        sized = rows["box"][:, 2] * rows["box"][:, 3] > 0
        return rows[sized & _among(self._truth.countable, self._truth.pair_keys(rows))]

    def _measured(self, best: "_Best") -> matching.Curves:
        truth = self._truth.truth()
        truth = truth[np.argsort(truth["category"], kind="stable")]
        pieces = []
        for first, end, found in best.pieces(_PIECE):
            found = self._countable(found)
            unsure = _among(self._truth.unmarked, self._truth.pair_keys(found))
            rows = slice(*np.searchsorted(truth["category"], [first, end]))
            wanted = truth[rows].copy()
            wanted["category"] -= first
            found["category"] -= first
            pieces.append(matching.curves(wanted, found, unsure, end - first))
        return matching.Curves.concatenate(pieces)

    def _figures(self, found: matching.Curves) -> dict[str, float | None]:
        ids = self._truth.sorted_categories
        letters = np.asarray([self._truth.frequencies[int(key)] for key in ids])
        figures = matching.summarize(found)
        for letter in FREQUENCIES:
            figures[f"AP{letter}"] = matching.mean(found.of(letters == letter).precision[..., 0])
        return {name: figures[name] for name in FIGURES}

    def _category_rows(self, standard: matching.Curves, fixed: matching.Curves) -> list[dict]:
        keys, counts = np.unique(self._truth.category_ids, return_counts=True)
        boxes = dict(zip(keys.tolist(), counts.tolist()))
        rows = []
        for category in self._truth.categories:
            number = self._truth.category_places([category.id])
            row = {
                "id": category.id,
                "name": category.name,
                "frequency": self._truth.frequencies[category.id],
                "groups": [name for name, ids in self._groups.items() if category.id in ids],
                "boxes": boxes.get(category.id, 0),
            }
            for protocol, found in (("standard", standard), ("fixed", fixed)):
                figures = matching.summarize(found.of(number))
                row |= {f"{protocol}_{key}": figures[key] for key in ("AP", "AP50", "AP75", "AR")}
            rows.append(row)
        return rows


def _among(known: Int[np.ndarray, " k"], keys: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Whether each key is one of the sorted keys `known`."""
    if not len(known):
        return np.zeros(len(keys), bool)
    return known[np.minimum(np.searchsorted(known, keys), len(known) - 1)] == keys


class _Best:
    """The best detections of each category, of equal scores those that came first.

    Holds at most 5/4 of what it may, and `_BUFFER` that wait: sorting after every image takes long.
    """

    def __init__(self, categories: int, limit: int):
        self._limit = limit
        self._floor = np.full(categories, -np.inf)  # a score that has to be beaten
        self._rows: list[list[np.ndarray]] = [[] for _ in range(categories)]
        self._counts = np.zeros(categories, np.int64)
        self._waiting: list[np.ndarray] = []
        self._buffered = 0

    def __len__(self) -> int:
        """How many detections are held."""
        return int(self._counts.sum()) + self._buffered

    def add(self, rows: np.ndarray) -> None:
        """Detections of any categories."""
        rows = rows[rows["score"] > self._floor[rows["category"]]]
        self._waiting.append(rows)
        self._buffered += len(rows)
        if self._buffered > _BUFFER:
            self._sort()

    def pieces(self, size: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """All that are to stay: (first category, end, rows), some `size` rows at once."""
        self._sort()
        for category in np.flatnonzero(self._counts > self._limit):
            self._cut(category)
        first, total = 0, 0
        for category, count in enumerate(self._counts.tolist()):
            total += count
            if total >= size or category == len(self._counts) - 1:
                parts = [part for rows in self._rows[first : category + 1] for part in rows]
                empty = np.zeros(0, matching.DETECTION)
                yield first, category + 1, np.concatenate([empty, *parts])
                first, total = category + 1, 0

    def _sort(self) -> None:
        """Hands what waits to its categories."""
        rows = np.concatenate([np.zeros(0, matching.DETECTION), *self._waiting])
        self._waiting, self._buffered = [], 0
        rows = rows[np.argsort(rows["category"], kind="stable")]
        edges = np.searchsorted(rows["category"], np.arange(len(self._counts) + 1))
        for category in np.flatnonzero(np.diff(edges)):
            # A copy: a view of a few rows would keep all of them in memory.
            self._rows[category].append(rows[edges[category] : edges[category + 1]].copy())
        self._counts += np.diff(edges)
        for category in np.flatnonzero(self._counts > self._limit + self._limit // 4):
            self._cut(category)

    def _cut(self, category: int) -> None:
        rows = np.concatenate(self._rows[category])
        scores = rows["score"]
        floor = np.partition(scores, len(scores) - self._limit)[len(scores) - self._limit]
        better, equal = scores > floor, scores == floor
        equal &= np.cumsum(equal) <= self._limit - np.count_nonzero(better)
        self._rows[category] = [rows[better | equal]]
        self._counts[category], self._floor[category] = self._limit, floor


def is_lvis(content: Mapping[str, Sequence[Mapping]]) -> bool:
    """Whether a parsed annotation file is LVIS's: federated, categories with a frequency."""
    image, category = content["images"][0], content["categories"][0]
    return "neg_category_ids" in image and "frequency" in category
