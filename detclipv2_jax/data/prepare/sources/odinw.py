"""The 13 sets of Object Detection in the Wild, COCO format in the layout that GLIP publishes.

ROOT/DIRECTORY/{train,valid,test}/annotations_without_background.json with the pictures beside it:
Roboflow exports from which the empty category 0 was taken away. Paths, names and prompts are those
of GLIP's configs/odinw_35.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_stream import read_json
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco
from detclipv2_jax.data.prepare.sources.entries import BROKEN, problem

SPLITS = ("train", "valid", "test")
_FILE = "annotations_without_background.json"


def _none() -> Mapping[str, str]:
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OdinwSet:
    """One of the sets; `directory` is its place under the root."""

    name: str
    directory: str
    evaluation: str = "valid/" + _FILE  # what GLIP measures zero-shot detection on
    files: Mapping[str, str] = _none()  # splits that lie elsewhere than SPLIT/_FILE
    names: Mapping[str, str] = _none()  # the benchmark's names, by the file's in lower case
    prompts: Mapping[str, str] = _none()  # GLIP's prompt for a name, where it is not the name

    def annotation_file(self, split: str) -> str:
        """The file of "train", "valid" or "test", relative to the set's directory."""
        return self.files.get(split, f"{split}/{_FILE}")


SETS = (
    OdinwSet("AerialMaritimeDrone", "AerialMaritimeDrone/large"),
    OdinwSet(
        "Aquarium",
        "Aquarium/Aquarium Combined.v2-raw-1024.coco",
        prompts={
            "penguin": "penguin, which is black and white",
            "puffin": "puffin with orange beaks",
            "stingray": "stingray which is flat and round",
        },
    ),
    OdinwSet("CottontailRabbits", "CottontailRabbits", names={"cottontail-rabbit": "rabbit"}),
    OdinwSet(
        "EgoHands",
        "EgoHands/generic",
        evaluation="mini_val/" + _FILE,
        prompts={"hand": "hand of a person"},
    ),
    OdinwSet(
        "NorthAmericaMushrooms",
        "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco",
        names={"cow": "flat mushroom", "chanterelle": "yellow mushroom"},
    ),
    OdinwSet("Packages", "Packages/Raw", prompts={"package": "there is a package on the porch"}),
    # It has no test split: GLIP names valid for both.
    OdinwSet("PascalVOC", "PascalVOC", files={"test": "valid/" + _FILE}),
    OdinwSet(
        "pistols",
        "pistols/export",
        evaluation="val_" + _FILE,
        files={
            "train": "train_" + _FILE,
            "valid": "val_" + _FILE,
            "test": "test_" + _FILE,
        },
    ),
    OdinwSet("pothole", "pothole", prompts={"pothole": "there are some holes on the road"}),
    OdinwSet("Raccoon", "Raccoon/Raccoon.v2-raw.coco"),
    OdinwSet("ShellfishOpenImages", "ShellfishOpenImages/raw"),
    OdinwSet("thermalDogsAndPeople", "thermalDogsAndPeople"),
    OdinwSet("VehiclesOpenImages", "VehiclesOpenImages/416x416", evaluation="mini_val/" + _FILE),
)


def find(name: str) -> OdinwSet:
    """The set of a name; `UserError` where there is none."""
    for one in SETS:
        if one.name.lower() == name.lower():
            return one
    raise UserError(f"{name}: no such set; ODinW's are {', '.join(one.name for one in SETS)}")


def set_of(path: str | Path) -> OdinwSet | None:
    """The set that a file belongs to by the folders it is in; None if to none."""
    place = Path(path).absolute().as_posix()
    return next((one for one in SETS if f"/{one.directory}/" in place), None)


def training_files(root: Path) -> list[Path]:
    """The training annotations of those sets that are there."""
    files = [root / one.directory / one.annotation_file("train") for one in SETS]
    return [path for path in files if path.is_file()]


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of a set: detection examples with the benchmark's names; see `coco.read`."""
    one, beside = set_of(path), ImageFolder(Path(path).parent, *images.roots)
    return coco.read(path, beside, names=one.names if one else None)


def write_evaluation(root: str | Path, to: str | Path) -> dict[str, Path]:
    """Write the file to evaluate each set on, as TO/NAME.json; returns them by the sets' names.

    They have the benchmark's names, and where each picture is on this machine. `UserError` where a
    set is missing or broken.
    """
    files = {}
    for one in SETS:
        path = Path(root) / one.directory / one.evaluation
        content = read_json(path)
        try:
            for entry in content["images"]:
                entry["file_name"] = str(path.parent.absolute() / entry["file_name"])
            for category in content["categories"]:
                category["name"] = one.names.get(category["name"].lower(), category["name"])
        except BROKEN as error:
            raise UserError(f"{path}: {problem(error)}; unpack ODinW's sets anew") from error
        files[one.name] = Path(to) / f"{one.name}.json"
        with replacing(files[one.name]) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
    return files
