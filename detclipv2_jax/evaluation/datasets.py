"""The sets that `evaluate` knows by name, and any other file or folder in COCO's or LVIS's format.

Where docs/data.md unpacks the archives, there they are found.
"""

import dataclasses
import mmap
import pathlib
import re
from collections.abc import Iterator

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.registry import EVALUATION_WORDS, format_of
from detclipv2_jax.data.prepare.sources import lvis as lvis_source
from detclipv2_jax.data.prepare.sources import odinw
from detclipv2_jax.evaluation import coco, lvis

#: The sets known by name, and what each is.
NAMES = {
    "lvis_val": "LVIS v1 val, 19,809 images",
    "lvis_minival": "its 4,809 images of COCO's val2017, on which zero-shot figures are told",
    "coco": "COCO val2017",
    "odinw13": "13 sets of Object Detection in the Wild, and their average",
}
_LVIS = (
    "get lvis_v1_val.json from https://www.lvisdataset.org, and COCO's train2017 and val2017 "
    "images from https://cocodataset.org"
)
_COCO = (
    "get instances_val2017.json (2017 Train/Val annotations) and the val2017 images from "
    "https://cocodataset.org"
)
_ODINW = "get ODinW's sets as GLIP publishes them, https://github.com/microsoft/GLIP (odinw_35)"
_MINIVAL_FILES = ("lvis_v1_minival.json", "lvis_v1_minival_inserted_image_name.json")


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
    """Ground truth and the directory of its images; `name` where it is one of several."""

    name: str
    truth: coco.GroundTruth
    images: pathlib.Path


def load(
    dataset: str,
    data_dir: str | pathlib.Path = "data",
    images: str | pathlib.Path | None = None,
    layout: str = "auto",
) -> list[EvaluationSet]:
    """The sets that `dataset` stands for: a name, an annotation file, or a folder with one.

    `images`: where the images lie, if not near the annotations. `layout`: 'auto', 'lvis', 'coco'.

    Raises:
      UserError: the set or its images are not there, says how to get them; or a file is broken.
    """
    data_dir = pathlib.Path(data_dir)
    if dataset == "odinw13":
        if images is not None:
            raise UserError("odinw13 has its images beside the annotations; leave --images out.")
        return list(_odinw(data_dir))
    if dataset == "coco":
        truth = load_ground_truth(
            _find(dataset, data_dir, ("coco",), ("instances_val2017.json",), _COCO), "coco"
        )
    elif dataset == "lvis_val":
        truth = load_ground_truth(_lvis(dataset, data_dir, ("lvis_v1_val.json",)), "lvis")
    elif dataset == "lvis_minival":
        truth = _minival(_lvis(dataset, data_dir, (*_MINIVAL_FILES, "lvis_v1_val.json")))
    else:
        path = pathlib.Path(dataset)
        if not path.exists() and path.suffix != ".json":
            raise UserError(
                f"--dataset={dataset}: no such file or folder, and the sets known by name are "
                f"{', '.join(NAMES)}."
            )
        truth = load_ground_truth(in_folder(path) if path.is_dir() else path, layout)
    return [EvaluationSet("", truth, pathlib.Path(images or guess_image_dir(truth)))]


def load_ground_truth(path: str | pathlib.Path, layout: str = "auto") -> coco.GroundTruth:
    """An annotation file as LVIS or COCO ground truth; `layout` is 'auto', 'lvis' or 'coco'.

    Raises:
      UserError: the file is missing or broken; names the file and the field.
    """
    content = coco.read_annotations(path)
    federated = lvis.is_lvis(content) if layout == "auto" else layout == "lvis"
    return (lvis if federated else coco).from_content(path, content)


def in_folder(folder: pathlib.Path) -> pathlib.Path:
    """The annotation file to evaluate on in a folder, its annotations/ or its folder of a split.

    By its name it is for evaluation ("val", "valid", "test", …), or it is the only one.

    Raises:
      UserError: there is none, or several; names them.
    """
    places = ("*.json", "annotations/*.json", "*/_annotations.coco.json")
    files = sorted({path for place in places for path in folder.glob(place) if _has_boxes(path)})
    words = lambda path: set(re.split(r"[\W_\d]+", str(path.relative_to(folder)).lower()))
    chosen = [path for path in files if words(path) & EVALUATION_WORDS]
    for wanted in ("val", "valid", "validation"):  # before test, of which often none is public
        chosen = [path for path in chosen if wanted in words(path)] or chosen
    chosen = chosen or files
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise UserError(
            f"{folder}: holds no annotations in COCO's or LVIS's format, neither itself nor in "
            "annotations/; name the file (--dataset=FILE.json)."
        )
    told = ", ".join(str(path.relative_to(folder)) for path in chosen)
    raise UserError(f"{folder}: holds {told}; name the one to evaluate on (--dataset=FILE.json).")


def _has_boxes(path: pathlib.Path) -> bool:
    if not path.stat().st_size:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        federated = content.find(b'"neg_category_ids"') >= 0
    return federated or format_of(path) == "COCO instances"


def find_image(image: coco.ImageInfo, image_dir: str | pathlib.Path) -> pathlib.Path | None:
    """The file of an image: by its `file_name`, or by the end of its `coco_url` as in LVIS."""
    names = [image.file_name] if image.file_name else []
    if image.coco_url:
        names.append("/".join(image.coco_url.split("/")[-2:]))
    names += [pathlib.PurePosixPath(name).name for name in names]
    for name in names:
        path = pathlib.Path(image_dir) / name
        if path.is_file():
            return path
    return None


def guess_image_dir(ground_truth: coco.GroundTruth) -> pathlib.Path:
    """Where the images of an annotation file lie, by the habits of COCO-format sets.

    Raises:
      UserError: in none of the usual places.
    """
    home = pathlib.Path(ground_truth.path).absolute().parent
    places = [home, home / "images", home.parent / "images", home.parent]
    for place in places:
        if any(find_image(image, place) for image in ground_truth.images[:20]):
            return place
    looked = ", ".join(map(str, places))
    raise UserError(f"the images of {ground_truth.path} are not in {looked}; give --images=DIR.")


def _lvis(dataset: str, data_dir: pathlib.Path, files: tuple[str, ...]) -> pathlib.Path:
    return _find(dataset, data_dir, ("coco", "lvis"), files, _LVIS)


def _find(
    dataset: str,
    data_dir: pathlib.Path,
    folders: tuple[str, ...],
    files: tuple[str, ...],
    get: str,
) -> pathlib.Path:
    """The first of the files in DATA/FOLDER/annotations, DATA/FOLDER or DATA itself."""
    homes = [data_dir / folder for folder in folders] + [data_dir]
    places = [home / inside for home in homes for inside in ("annotations", "")]
    for path in (place / file for file in files for place in places):
        if path.is_file():
            return path
    raise UserError(
        f"{dataset}: {places[0] / files[-1]} is not there; {get}, or say where they are with "
        "--data_dir=DIR or --dataset=FILE.json --images=DIR."
    )


def _minival(path: pathlib.Path) -> lvis.LvisGroundTruth:
    """LVIS minival, taken from val where only that is there."""
    content = coco.read_annotations(path)
    if path.name in _MINIVAL_FILES:
        return lvis.from_content(path, content)
    return lvis.from_content(f"{path}, images of val2017", lvis_source.minival(path, content))


def _odinw(data_dir: pathlib.Path) -> Iterator[EvaluationSet]:
    """Its sets with the benchmark's names, on the splits that GLIP measures."""
    roots = [data_dir / "odinw", data_dir / "odinw13", data_dir]
    root = next((r for r in roots if any((r / s.directory).is_dir() for s in odinw.SETS)), roots[0])
    gone = [one.name for one in odinw.SETS if not (root / one.directory / one.evaluation).is_file()]
    if gone:
        raise UserError(
            f"odinw13: {', '.join(gone)} not under {root} (as {odinw.SETS[0].directory}/"
            f"{odinw.SETS[0].evaluation}); {_ODINW}, or say where with --data_dir=DIR."
        )
    for one in odinw.SETS:
        path = root / one.directory / one.evaluation
        content = coco.read_annotations(path)
        for category in content["categories"]:
            name = category.get("name")
            if isinstance(name, str):
                category["name"] = one.names.get(name.lower(), name)
        yield EvaluationSet(one.name, coco.from_content(path, content), path.parent)
