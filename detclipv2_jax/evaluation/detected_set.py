"""Predictions in the form of a dataset: `coco.json` of `detclip detect`, with a score for each box.

Such a file has its own image and category ids. So its images are matched with those of a dataset by
file name, and its categories by name.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detclipv2_jax.common import json_fields
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import Identifier, locate, shorten
from detclipv2_jax.common.json_file import read_lists
from detclipv2_jax.evaluation import coco
from detclipv2_jax.text.tokenizer import normalize

_SHOWN = 3  # names in a sentence
_FIX = "Give a results file (a JSON list), or the coco.json of `detclip detect`."


@dataclasses.dataclass(frozen=True)
class Matching:
    """How the ids of a file of predictions belong to a dataset.

    Attributes:
      images: id in the file -> position in the dataset's `sorted_image_ids`, -1 if it has no such
        image.
      categories: likewise.
      notes: sentences on what was matched, and what of the dataset is not in the file.
      counts: "images_not_answered", "categories_not_asked".
    """

    images: Mapping[Identifier, int]
    categories: Mapping[Identifier, int]
    notes: tuple[str, ...]
    counts: Mapping[str, int]


def match(path: pathlib.Path, truth: coco.GroundTruth) -> Matching:
    """Match the images and categories of a file with those of a dataset.

    Raises:
      UserError: the file lacks a list, an entry is invalid, or a name fits several images.
    """
    rows: dict[str, list[dict[str, Any]]] = {"images": [], "categories": []}
    fields = ("images", "categories", "annotations")
    for field, number, entry in read_lists(path, fields, fix=_FIX):
        if field in rows:
            rows[field].append(_named(f"{path}: {field}[{number}]", field, entry))
    files = _Files(truth)
    names = {c.name: place for c, place in zip(truth.categories, truth.category_places.values())}
    alike: dict[str, list[int]] = {}
    for name, place in names.items():
        alike.setdefault(_plain(name), []).append(place)
    images = {row["id"]: files.find(path, row["name"]) for row in rows["images"]}
    categories = {
        row["id"]: names[row["name"]] if row["name"] in names else _only(path, row["name"], alike)
        for row in rows["categories"]
    }
    _refuse_twice(path, truth, images, rows["images"])
    return _described(truth, images, categories)


def _named(where: str, field: str, entry: Any) -> dict[str, Any]:
    """Return the id and the name, or file name, of an entry."""
    try:
        row = json_fields.entry_object(entry)
        name = json_fields.text(row, "file_name" if field == "images" else "name")
        # The frames of a video have its name; none of them is an image of a dataset.
        is_frame = field == "images" and row.get("frame") is not None
        return {"id": json_fields.identifier(row, "id"), "name": "" if is_frame else name}
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. {_FIX}") from error


def _plain(name: str) -> str:
    return normalize(name.replace("_", " "))


def _only(path: pathlib.Path, name: str, alike: Mapping[str, Sequence[int]]) -> int:
    found = alike.get(_plain(name), ())
    if len(found) > 1:
        raise UserError(
            f"{path}: category {shorten(name)} fits {len(found)} categories of the dataset. Give a "
            "results file with the dataset's ids."
        )
    return found[0] if found else -1


class _Files:
    """The file names of a dataset by their parts: `find` compares paths from the end."""

    def __init__(self, truth: coco.GroundTruth):
        self._by_base: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for image, place in zip(truth.images, truth.image_places.values()):
            for name in filter(None, {image.file_name, image.coco_url}):
                parts = _parts(name)
                self._by_base.setdefault(parts[-1], []).append((parts, place))

    def find(self, path: pathlib.Path, name: str) -> int:
        """Return the place of the image whose name shares most parts with `name`, or -1."""
        parts = _parts(name)
        shared = [(_shared(parts, other), at) for other, at in self._by_base.get(parts[-1], ())]
        best = max((count for count, _ in shared), default=0)
        places = {place for count, place in shared if count == best}
        if len(places) > 1:
            raise UserError(
                f"{path}: file name {shorten(name)} fits {len(places)} images of the dataset. Give "
                "a results file with the dataset's ids."
            )
        return places.pop() if places else -1


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", ".")) or (
        "",
    )


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many parts of two paths agree, from the end."""
    pairs = enumerate(zip(reversed(one), reversed(other)))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def _refuse_twice(
    path: pathlib.Path,
    truth: coco.GroundTruth,
    images: Mapping[Identifier, int],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Raise if two entries of the file are one image of the dataset."""
    first: dict[int, str] = {}
    for row in rows:
        place = images[row["id"]]
        if place >= 0 and first.setdefault(place, row["name"]) is not row["name"]:
            raise UserError(
                f"{path}: {shorten(first[place])} and {shorten(row['name'])} fit the same image of "
                f"{truth.path}. Detect each picture once."
            )


def _described(
    truth: coco.GroundTruth,
    images: Mapping[Identifier, int],
    categories: Mapping[Identifier, int],
) -> Matching:
    answered, asked = set(images.values()) - {-1}, set(categories.values()) - {-1}
    places = truth.image_places, truth.category_places
    lost = [image for image in truth.images if places[0][image.given_id] not in answered]
    unasked = [one for one in truth.categories if places[1][one.given_id] not in asked]
    notes = [
        f"images are matched by file name, categories by name: {len(answered)} of the "
        f"{len(images)} images of the file are images of the dataset"
    ]
    if lost:
        shown = _shown(lost, lambda image: str(image.file_name or image.given_id))
        notes.append(
            f"{len(lost)} of {len(truth.images)} images of the dataset were not answered "
            f"({shown}); they count as images without detections"
        )
    if unasked:
        shown = _shown(unasked, lambda category: category.name)
        notes.append(
            f"{len(unasked)} of {len(truth.categories)} categories of the dataset were not asked "
            f"for ({shown}); none of their objects counts as found"
        )
    counts = {"images_not_answered": len(lost), "categories_not_asked": len(unasked)}
    return Matching(images, categories, tuple(notes), counts)


def _shown(entries: Sequence[Any], name: Callable[[Any], str]) -> str:
    text = ", ".join(name(entry) for entry in entries[:_SHOWN])
    return text if len(entries) <= _SHOWN else f"{text}, ..."
