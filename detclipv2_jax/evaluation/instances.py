"""Read the entries of a COCO or LVIS annotation file for evaluation, checked one by one.

Evaluation refuses a file with an invalid entry, because every entry changes the metrics. What is
valid but cannot be what somebody meant is described in `notes`.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from detclipv2_jax.common import json_fields
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import Identifier, locate, shorten
from detclipv2_jax.common.json_file import json_type, read_json
from detclipv2_jax.data.prepare.sources import categories as categories_lib
from detclipv2_jax.data.prepare.sources.entries import seem_corners, seem_relative
from detclipv2_jax.text.checked import Meaning


@dataclasses.dataclass(frozen=True)
class ImageInfo:
    """An image of a dataset as its annotation file describes it.

    Height and width are in pixels, 0 if the file does not have them. Arrays need whole numbers:
    where the file's id is a text or above 2**63, `id` is a number of ours and `text_id` the file's.
    """

    id: int
    height: int
    width: int
    file_name: str | None
    coco_url: str | None
    text_id: Identifier | None = None

    @property
    def given_id(self) -> Identifier:
        """The id as in the annotation file."""
        return self.id if self.text_id is None else self.text_id


@dataclasses.dataclass(frozen=True)
class Category:
    """A category of a dataset; the name is spelled as in the file.

    LVIS has a definition and a WordNet synset for each category ("def", "synset"), V3Det a
    "definition". COCO has none. See `ImageInfo` for `text_id`.
    """

    id: int
    name: str
    definition: str | None = None
    synset: str | None = None
    text_id: Identifier | None = None

    @property
    def given_id(self) -> Identifier:
        """The id as in the annotation file."""
        return self.id if self.text_id is None else self.text_id


def read_annotations(path: str | pathlib.Path) -> dict[str, Any]:
    """Return the content of an annotation file: `images`, `annotations`, `categories` and the rest.

    Raises:
      UserError: the file is missing, is not JSON or lacks one of the three lists.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the annotation JSON of the dataset.")
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: contains a JSON {json_type(content)}, expected an object with 'images', "
            "'annotations' and 'categories'. Give a file in COCO's or LVIS's format."
        )
    for field in ("images", "annotations", "categories"):
        rows = content.get(field)
        if not isinstance(rows, list):
            raise UserError(
                f"{path}: '{field}' is missing or not a list of objects. Give a file in COCO's or "
                "LVIS's format."
            )
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: {field}[{number}] is {shorten(row)}, not an object. Fix the entry."
                )
    for field in ("images", "categories"):
        if not content[field]:
            raise UserError(f"{path}: '{field}' is empty, so there is nothing to evaluate.")
    return content


def parse_instances(path: str | pathlib.Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of `GroundTruth` by name, checked. A missing `area` is that of the box.

    Raises:
      UserError: an entry lacks a field or refers to an image or category that does not exist.
    """
    image_ids = _numbered(path, "images", content["images"])
    category_ids = _numbered(path, "categories", content["categories"])
    images = tuple(
        _image(f"{path}: images[{number}]", row, given, image_ids[given])
        for number, (given, row) in enumerate(zip(image_ids, content["images"]))
    )
    categories = tuple(
        Category(
            id=category_ids[given],
            name=_name(f"{path}: categories[{number}]", row),
            text_id=None if category_ids[given] == given else given,
            **Meaning.of_category(row)._asdict(),
        )
        for number, (given, row) in enumerate(zip(category_ids, content["categories"]))
    )
    boxes = [
        _annotated_box(f"{path}: annotations[{number}]", row, image_ids, category_ids)
        for number, row in enumerate(content["annotations"])
    ]
    left_out = _left_out(content, categories, {box.category_id for box in boxes})
    fields = {
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
    rows = content["annotations"]
    no_area = sum(row.get("area") is None for row in rows)
    turned = sum(bool(json_fields.rotation(row)) for row in rows)
    return fields | {"notes": tuple(_notes(fields, no_area, turned))}


def _left_out(
    content: dict[str, Any], categories: Sequence[Category], boxed: set[int]
) -> dict[int, str]:
    """Return the categories that preparation leaves out too: number -> why, in words."""
    if "neg_category_ids" in content["images"][0]:
        return {}  # the lists of a federated file may refer to any category
    parents = [row.get("supercategory") for row in content["categories"]]
    rows = [
        categories_lib.Category(
            one.given_id,
            one.name.replace("_", " "),
            parent if isinstance(parent, str) else None,
        )
        for one, parent in zip(categories, parents)
    ]
    found = categories_lib.left_out(rows, {one.given_id for one in categories if one.id in boxed})
    return {one.id: found[one.given_id][1] for one in categories if one.given_id in found}


def category_ids(
    where: str, row: Mapping[str, Any], field: str, known: Mapping[Identifier, int]
) -> frozenset[int] | None:
    """Return the numbers of the categories that a list of ids names; None if there is no list.

    Raises:
      UserError: the field is not a list of ids, or one of them is not in `known`.
    """
    try:
        given = json_fields.identifiers(row, field)
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. Fix the entry.") from error
    if given is None:
        return None
    for one in given:
        if one not in known:
            raise UserError(
                f"{where}.{field} contains {shorten(one)}, which is not in 'categories'. Fix the "
                "entry."
            )
    return frozenset(known[one] for one in given)


def text_field(where: str, row: Mapping[str, Any], field: str) -> str:
    """Return `row[field]` as a text that is not blank; `UserError` if it is not one."""
    try:
        return json_fields.text(row, field)
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. Fix the entry.") from error


def _numbered(
    path: str | pathlib.Path, field: str, rows: Sequence[Mapping[str, Any]]
) -> dict[Identifier, int]:
    """Return id -> number, in the order of the rows; ids that are not int64 get free numbers.

    Texts are numbered in their order, by which equal scores rank, as pycocotools ranks them.

    Raises:
      UserError: an id is missing, invalid or occurs twice; names the entry.
    """
    found: dict[Identifier, int] = {}
    others: list[Identifier] = []
    for number, row in enumerate(rows):
        try:
            given = json_fields.identifier(row, "id")
        except ValueError as error:
            raise UserError(
                f"{locate(f'{path}: {field}[{number}]', error)}. Fix the entry."
            ) from error
        if given in found:
            raise UserError(
                f"{path}: {field}[{number}].id {shorten(row['id'])} occurs twice. Ids must be "
                'unique (1, 1.0 and "1" are the same id).'
            )
        if isinstance(given, int) and abs(given) < 1 << 62:
            found[given] = given
        else:
            found[given] = 0  # until all numbers that the file has are known
            others.append(given)
    first = max((number for number in found.values()), default=0) + 1
    order = sorted(others, key=lambda one: (isinstance(one, str), one))
    return found | {given: number for number, given in enumerate(order, first)}


def _image(where: str, row: dict[str, Any], given: Identifier, number: int) -> ImageInfo:
    try:
        file_name = json_fields.optional_text(row, "file_name")
        coco_url = json_fields.optional_text(row, "coco_url")
        height, width = json_fields.size(row) or (0, 0)
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. Fix the entry.") from error
    if file_name is None and coco_url is None:
        raise UserError(f"{where} has no 'file_name' and no 'coco_url'. Fix the entry.")
    text_id = None if number == given else given
    return ImageInfo(number, height, width, file_name, coco_url, text_id)


def _name(where: str, row: dict[str, Any]) -> str:
    name = text_field(where, row, "name")
    if not name.replace("_", " ").strip():
        raise UserError(f"{where}.name is {shorten(name)}, which has no word. Fix the entry.")
    return name


class _AnnotatedBox(NamedTuple):
    image_id: int
    category_id: int
    xywh: tuple[float, float, float, float]
    area: float
    crowd: int


def _annotated_box(
    where: str,
    row: dict[str, Any],
    image_ids: Mapping[Identifier, int],
    category_ids: Mapping[Identifier, int],
) -> _AnnotatedBox:
    try:
        image = json_fields.identifier(row, "image_id")
        category = json_fields.identifier(row, "category_id")
        xywh, crowd = json_fields.box(row), json_fields.flag(row, "iscrowd")
        has_area = row.get("area") is not None
        area = json_fields.number(row, "area") if has_area else xywh[2] * xywh[3]
        if has_area and area < 0:
            raise json_fields.FieldError("area", f"is {shorten(row['area'])}, which is negative")
    except ValueError as error:
        raise UserError(f"{locate(where, error)}. Fix the entry.") from error
    if image not in image_ids:
        hint = json_fields.similar_identifier(image, image_ids)
        raise UserError(
            f"{where}.image_id {shorten(row['image_id'])} is not in 'images'{hint}. Fix the entry."
        )
    if category not in category_ids:
        raise UserError(
            f"{where}.category_id {shorten(row['category_id'])} is not in 'categories'. Fix the "
            "entry."
        )
    return _AnnotatedBox(image_ids[image], category_ids[category], xywh, area, int(crowd))


def _notes(fields: dict[str, Any], no_area: int, turned: int) -> list[str]:
    """Return a sentence for each kind of annotation that lowers the metrics of any detector."""
    xywh = fields["xywh"]
    negative = (xywh[:, 2:] < 0).any(axis=1)
    flat = (xywh[:, 2:] == 0).any(axis=1) & ~negative
    found = [
        _note(negative, "have a box with a negative width or height; no detection can match them"),
        _note(flat, "have a box of width or height 0; no detection can match them"),
    ]
    sizes = {image.id: (image.height, image.width) for image in fields["images"]}
    of_boxes = np.asarray([sizes[image] for image in fields["image_ids"].tolist()], np.float64)
    if seem_corners(xywh, of_boxes.reshape(-1, 2)):
        found.append(
            "most boxes leave their images, and all of them would fit as [x_min, y_min, x_max, "
            "y_max]. COCO's bbox is [x, y, width, height]: check what wrote the file"
        )
    if seem_relative(xywh):
        found.append(
            "all boxes have numbers from 0 to 1, as if in parts of their images. COCO's bbox is in "
            "pixels: check what wrote the file"
        )
    if turned:
        found.append(
            f"{turned} of {len(xywh)} annotations are turned boxes (attributes.rotation); each "
            "counts as the upright box around it"
        )
    if no_area:
        found.append(
            f"{no_area} of {len(xywh)} annotations have no area; small, medium and large go by "
            "the area of their boxes"
        )
    return [sentence for sentence in found if sentence]


def _note(mask: Bool[np.ndarray, " n"], what: str) -> str:
    if not mask.any():
        return ""
    example = f"annotations[{int(np.argmax(mask))}]"
    return f"{int(mask.sum())} of {len(mask)} annotations {what}, for example {example}"
