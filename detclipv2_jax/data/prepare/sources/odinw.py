"""Read the 13 sets of Object Detection in the Wild: COCO format, in the layout that GLIP publishes.

The files are ROOT/DIRECTORY/{train,valid,test}/annotations_without_background.json, with the images
next to them: Roboflow exports without the empty category 0. Paths, names and prompts are those of
GLIP's configs/odinw_35.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from detclipv2_jax.common.atomic import write_text
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_json
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco
from detclipv2_jax.data.prepare.sources.entries import MALFORMED, describe

SPLITS = ("train", "valid", "test")
_FILE = "annotations_without_background.json"


@dataclasses.dataclass(frozen=True)
class OdinwSet:
    """One of the 13 sets."""

    name: str
    directory: str  # relative to the root
    evaluation: str = "valid/" + _FILE  # on which GLIP measures zero-shot detection
    # Split -> its file, where that is not SPLIT/_FILE.
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Name in the file, in lower case -> the benchmark's name.
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Name -> GLIP's prompt, where that is not the name.
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def annotation_file(self, split: str) -> str:
        """Return the file of a split (one of SPLITS), relative to the set's directory."""
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
    # It has no test split; GLIP uses valid for both.
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
    """Return the set of a name (case is ignored); `UserError` if there is none."""
    for one in SETS:
        if one.name.lower() == name.lower():
            return one
    raise UserError(f"{name}: not a set of ODinW. Use one of {', '.join(s.name for s in SETS)}.")


def set_of(path: str | Path) -> OdinwSet | None:
    """Return the set whose directory a file is in, or None."""
    place = Path(path).absolute().as_posix()
    return next((one for one in SETS if f"/{one.directory}/" in place), None)


def training_files(root: Path) -> list[Path]:
    """Return the training annotations of the sets that exist under `root`."""
    files = [root / one.directory / one.annotation_file("train") for one in SETS]
    return [path for path in files if path.is_file()]


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open a file of a set: detection examples with the benchmark's names (see `coco.read`)."""
    one, folder = set_of(path), images.before(Path(path).parent)
    return coco.read(path, folder, names=one.names if one else None)


def write_evaluation(root: str | Path, to: str | Path) -> dict[str, Path]:
    """Write the evaluation file of each set, as TO/NAME.json, and return their paths by set name.

    The files have the benchmark's names and the absolute paths of the images.

    Raises:
        UserError: a set is missing or damaged.
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
        except MALFORMED as error:
            raise UserError(f"{path}: {describe(error)}. Unpack ODinW again.") from error
        files[one.name] = Path(to) / f"{one.name}.json"
        write_text(files[one.name], json.dumps(content))
    return files
