"""The datasets that `evaluate` knows by name, and annotation files in COCO's or LVIS's format.

Datasets are looked for where docs/data.md unpacks the archives.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Iterator

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.find_file import ImageFolder
from detclipv2_jax.data.prepare.sources import lvis as lvis_source
from detclipv2_jax.data.prepare.sources import odinw
from detclipv2_jax.data.prepare.sources.formats import EVALUATION_WORDS, judge
from detclipv2_jax.evaluation import coco, lvis

#: The datasets known by name: name -> description.
NAMES = {
    "lvis_val": "LVIS v1 val, 19,809 images",
    "lvis_minival": "the 4,809 images of LVIS val in COCO's val2017, usual for zero-shot AP",
    "coco": "COCO val2017",
    "odinw13": "the 13 datasets of Object Detection in the Wild, and their average",
}
_GET_LVIS = (
    "Get lvis_v1_val.json from https://www.lvisdataset.org, and COCO's train2017 and val2017 "
    "images from https://cocodataset.org"
)
_GET_COCO = (
    "Get instances_val2017.json (2017 Train/Val annotations) and the val2017 images from "
    "https://cocodataset.org"
)
_GET_ODINW = (
    "Get the datasets of ODinW as GLIP publishes them, https://github.com/microsoft/GLIP (odinw_35)"
)
_SAMPLED = 100  # images that are looked for to guess their directory
_MINIVAL_FILES = ("lvis_v1_minival.json", "lvis_v1_minival_inserted_image_name.json")


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
    """A dataset to evaluate on.

    Attributes:
      name: empty unless it is one of several.
      truth: its ground truth.
      images: the directory of its images, which may not be there if nobody asked for it.
    """

    name: str
    truth: coco.GroundTruth
    images: pathlib.Path


def load_sets(
    dataset: str,
    data_dir: str | pathlib.Path = "data",
    images: str | pathlib.Path | None = None,
    layout: str = "auto",
    *,
    find_images: bool = True,
) -> list[EvaluationSet]:
    """Load the datasets that `dataset` stands for.

    Args:
      dataset: one of `NAMES`, an annotation file, or a folder with one.
      data_dir: where the datasets known by name are.
      images: the directory of the images; None looks near the annotations.
      layout: the format of an annotation file: "lvis", "coco", or "auto" for either.
      find_images: whether to look for the images; otherwise they need not exist.

    Raises:
      UserError: the dataset or its images are missing (says how to get them), or a file is
        invalid.
    """
    data_dir = pathlib.Path(data_dir)
    if dataset == "odinw13":
        if images is not None:
            raise UserError("odinw13 has its images next to the annotations. Leave --images out.")
        return list(_load_odinw(data_dir))
    if dataset == "coco":
        files = ("instances_val2017.json",)
        truth = load_ground_truth(_find(dataset, data_dir, ("coco",), files, _GET_COCO), "coco")
    elif dataset == "lvis_val":
        truth = load_ground_truth(_find_lvis(dataset, data_dir, ("lvis_v1_val.json",)), "lvis")
    elif dataset == "lvis_minival":
        files = (*_MINIVAL_FILES, "lvis_v1_val.json")
        truth = _load_minival(_find_lvis(dataset, data_dir, files))
    else:
        path = pathlib.Path(dataset)
        if not path.exists() and not path.name.endswith((".json", ".json.gz")):
            raise UserError(
                f"--dataset={dataset}: no such file or folder. The datasets known by name are "
                f"{', '.join(NAMES)}."
            )
        truth = load_ground_truth(find_annotations(path) if path.is_dir() else path, layout)
    if images is None:
        images = guess_image_dir(truth) if find_images else pathlib.Path(truth.path).parent
    return [EvaluationSet("", truth, pathlib.Path(images))]


def load_ground_truth(path: str | pathlib.Path, layout: str = "auto") -> coco.GroundTruth:
    """Load an annotation file as LVIS or COCO ground truth.

    Args:
      path: the file.
      layout: "lvis", "coco", or "auto": LVIS if the file has the fields that only LVIS has.

    Raises:
      UserError: the file is missing or invalid; names the file and the field.
    """
    content = coco.read_annotations(path)
    federated = lvis.is_lvis(content) if layout == "auto" else layout == "lvis"
    return (lvis if federated else coco).from_content(path, content)


def find_annotations(folder: pathlib.Path) -> pathlib.Path:
    """Return the annotation file to evaluate on in a folder, its annotations/ or a split's folder.

    It is the only file, or the only one whose path contains a word such as "val" or "test".

    Raises:
      UserError: there is no such file, or there are several; names them.
    """
    places = ("", "annotations/")
    patterns = [f"{place}*.json{end}" for place in places for end in ("", ".gz")]
    patterns.append("*/_annotations.coco.json")
    found = {path for pattern in patterns for path in folder.glob(pattern) if _has_boxes(path)}
    files = sorted(found)
    words = lambda path: set(re.split(r"[\W_\d]+", str(path.relative_to(folder)).lower()))
    chosen = [path for path in files if words(path) & EVALUATION_WORDS]
    for wanted in ("val", "valid", "validation"):  # before "test", which is often not public
        chosen = [path for path in chosen if wanted in words(path)] or chosen
    chosen = chosen or files
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise UserError(
            f"{folder}: no annotations in COCO's or LVIS's format, neither in the folder nor in "
            "annotations/. Give the file (--dataset=FILE.json)."
        )
    names = ", ".join(str(path.relative_to(folder)) for path in chosen)
    raise UserError(
        f"{folder}: several annotation files: {names}. Give the one to evaluate on "
        "(--dataset=FILE.json)."
    )


def _has_boxes(path: pathlib.Path) -> bool:
    try:
        judgment = judge(path)
    except UserError:  # a damaged or unreadable file is not the one to evaluate on
        return False
    return judgment.format == "COCO instances" or judgment.is_lvis


def find_image(image: coco.ImageInfo, folder: ImageFolder) -> pathlib.Path | None:
    """Return the file of an image, None if there is none that is certain.

    The name is the image's `file_name` or the end of its `coco_url` (LVIS has only that).
    """
    return folder.find(*_names(image)).path


def find_images(
    truth: coco.GroundTruth, image_dir: str | pathlib.Path
) -> list[pathlib.Path | None]:
    """Return the file of each image, None if there is none; say what is not as its name says.

    Raises:
      UserError: `image_dir` is not a directory.
    """
    folder, found = image_folder(truth, image_dir), []
    told: dict[str, list[str]] = {}
    for image in truth.images:
        one = folder.find(*_names(image))
        found.append(one.path)
        if one.spelled:
            told.setdefault("are named differently in their folder", []).append(one.spelled)
        elif one.path is None:
            told.setdefault("are not evaluated", []).append(one.why)
    for what, sentences in told.items():
        print(
            f"{truth.path}: {len(sentences):,} of {len(found):,} images {what}, for example "
            f"{sentences[0]}",
            file=sys.stderr,
        )
    return found


def image_folder(truth: coco.GroundTruth, image_dir: str | pathlib.Path) -> ImageFolder:
    """Return the search for the images of a dataset; `UserError` if there is no directory."""
    folder = ImageFolder(image_dir)
    folder.expect(lambda: map(_names, truth.images))
    return folder


def _names(image: coco.ImageInfo) -> tuple[str, ...]:
    names = [image.file_name] if image.file_name else []
    if image.coco_url:
        names.append("/".join(image.coco_url.split("/")[-2:]))
    return tuple(dict.fromkeys(names))


def guess_image_dir(ground_truth: coco.GroundTruth) -> pathlib.Path:
    """Return the directory of a dataset's images: of the usual places that with the most images.

    Raises:
      UserError: the images are in none of these places.
    """
    home = pathlib.Path(ground_truth.path).absolute().parent
    places = [home, home / "images", home.parent / "images", home.parent]
    folders = {place: image_folder(ground_truth, place) for place in places if place.is_dir()}
    images = ground_truth.images
    sample = images[:: max(1, len(images) // _SAMPLED)]
    for exactly in (True, False):  # a name with other folders is looked for last: it takes longest
        for some in (sample, images):
            counts = {
                place: sum(_is_there(image, folder, exactly) for image in some)
                for place, folder in folders.items()
            }
            best = max(counts, key=lambda place: counts[place])
            if counts[best]:
                return best
    raise UserError(
        f"{ground_truth.path}: its images are not in {', '.join(map(str, places))}. Give their "
        "directory with --images=DIR."
    )


def _is_there(image: coco.ImageInfo, folder: ImageFolder, exactly: bool) -> bool:
    return folder.find(*_names(image), exactly=exactly).path is not None


def _find_lvis(dataset: str, data_dir: pathlib.Path, files: tuple[str, ...]) -> pathlib.Path:
    return _find(dataset, data_dir, ("coco", "lvis"), files, _GET_LVIS)


def _find(
    dataset: str,
    data_dir: pathlib.Path,
    folders: tuple[str, ...],
    files: tuple[str, ...],
    how_to_get: str,
) -> pathlib.Path:
    """Return the first of the files in DATA/FOLDER/annotations, DATA/FOLDER or DATA itself."""
    homes = [data_dir / folder for folder in folders] + [data_dir]
    places = [home / inside for home in homes for inside in ("annotations", "")]
    for path in (place / file for file in files for place in places):
        if path.is_file():
            return path
    raise UserError(
        f"{dataset}: {places[0] / files[-1]} does not exist. {how_to_get}, or give another place "
        "with --data_dir=DIR, or with --dataset=FILE.json --images=DIR."
    )


def _load_minival(path: pathlib.Path) -> lvis.LvisGroundTruth:
    """Load LVIS minival from its own file or from LVIS val."""
    content = coco.read_annotations(path)
    if path.name in _MINIVAL_FILES:
        return lvis.from_content(path, content)
    return lvis.from_content(f"{path}, images of val2017", lvis_source.minival(path, content))


def _load_odinw(data_dir: pathlib.Path) -> Iterator[EvaluationSet]:
    """Load the datasets of ODinW with the benchmark's names, on the splits that GLIP measures."""
    roots = [data_dir / "odinw", data_dir / "odinw13", data_dir]
    root = next((r for r in roots if any((r / s.directory).is_dir() for s in odinw.SETS)), roots[0])
    missing = [s.name for s in odinw.SETS if not (root / s.directory / s.evaluation).is_file()]
    if missing:
        first = next(s for s in odinw.SETS if s.name == missing[0])
        raise UserError(
            f"odinw13: {', '.join(missing)} not found under {root} (for example "
            f"{root / first.directory / first.evaluation}). {_GET_ODINW}, or give another place "
            "with --data_dir=DIR."
        )
    for one in odinw.SETS:
        path = root / one.directory / one.evaluation
        content = coco.read_annotations(path)
        for category in content["categories"]:
            name = category.get("name")
            if isinstance(name, str):
                category["name"] = one.names.get(name.lower(), name)
        yield EvaluationSet(one.name, coco.from_content(path, content), path.parent)
