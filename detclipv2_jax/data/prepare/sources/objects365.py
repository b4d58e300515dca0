"""Objects365, both releases: COCO's format, names to correct, and the paper's 0.66 M pictures.

v2 is `zhiyuan_objv2_train.json` with pictures in 51 patches, v1 (2019) `objects365_train.json` with
pictures in one folder. Their categories differ in ids, spelling and partly in kind, so names are
corrected by name and never by id.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco
from detclipv2_jax.data.prepare.sources.entries import widened

SUBSET = 660_000  # pictures that DetCLIPv2 samples for pre-training (paper.md §4)
TRAINING_FILES = (
    "zhiyuan_objv2_train.json",
    "objects365_train.json",
    "objects365_train_20190423.json",
)
# "images/v1/patch8/objects365_v1_00420917.jpg" lies in train/patch8/ where people unpack a split.
IMAGE_FOLDERS = ("train", "images/train", "train/images")

#: Published name, in lower case -> its correction. Those that Detic's Objects365_names_fix.csv
#: (Apache-2.0) corrects in v2, then three of ours. What a name means stays as it is published.
NAMES = {
    "moniter/tv": "Monitor/TV",
    "bakset": "Basket",
    "dinning table": "Dining Table",
    "tea pot": "Teapot",
    "extention cord": "Extension Cord",
    "hotair ballon": "Hot air balloon",
    "hamimelon": "Hami melon",
    "mushroon": "Mushroom",
    "tape measur/ ruler": "Tape Measure/ Ruler",
    "campel": "Camel",
    "meat ball": "Meatball",
    "buttefly": "Butterfly",
    "table teniis paddle": "Table Tennis paddle",
    "ballon": "Balloon",
    "billards": "Billiards",
    "noddles": "Noodles",
}


def training_files(directory: Path) -> list[Path]:
    """The training annotations in a folder, its annotations/ or train/: v2's, else v1's.

    Val's are never taken; the two releases share pictures, so they are not mixed either.
    """
    folders = (directory, directory / "annotations", directory / "train")
    places = (folder / name for name in TRAINING_FILES for folder in folders)
    return [path for path in places if path.is_file()][:1]


def read(
    path: str | Path, images: ImageFolder, *, subset: int | None = None, seed: int = 0
) -> Archive:
    """Open a release's annotations: detection examples; see `coco.read` for what is dropped.

    `subset` keeps so many pictures, the same ones whatever their order in the file and whichever of
    them are on disk; a smaller subset of a seed is part of a larger one.
    """
    choose = None if subset is None else functools.partial(choose_ids, count=subset, seed=seed)
    return coco.read(path, widened(images, *IMAGE_FOLDERS), names=NAMES, choose=choose)


def choose_ids(ids: Iterable[Any], *, count: int, seed: int) -> set:
    """The `count` ids whose hashes with the seed are the smallest; all, if there are fewer."""
    ids = list(ids)
    keys = np.array([_key(image_id, seed) for image_id in ids], np.uint64)
    return {ids[i] for i in np.argsort(keys, kind="stable")[:count].tolist()}


def _key(image_id: Any, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
