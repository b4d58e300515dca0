"""Read Objects365 v2 and v1: COCO's format, with misspelled names and an optional subset.

v2 is `zhiyuan_objv2_train.json` with images in 51 patches. v1 (2019) is `objects365_train.json`
with images in one folder. Their categories differ in ids, in spelling and partly in meaning, so
spelling is corrected by name, never by id.
"""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco

TRAINING_FILES = (
    "zhiyuan_objv2_train.json",
    "objects365_train.json",
    "objects365_train_20190423.json",
)
# "images/v1/patch8/objects365_v1_00420917.jpg" is in train/patch8/ if each split is unpacked alone.
IMAGE_FOLDERS = ("train", "images/train", "train/images")

#: Published name, in lower case -> corrected name: those of Detic's Objects365_names_fix.csv
#: (Apache-2.0) for v2, then three of ours. Only the spelling is corrected, not the meaning.
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
    """Return the training annotations in a folder, its annotations/ or train/: v2's, else v1's.

    The two releases share images, so they are never mixed. Val is never used.
    """
    folders = (directory, directory / "annotations", directory / "train")
    places = (folder / name for name in TRAINING_FILES for folder in folders)
    return [path for path in places if path.is_file()][:1]


def read(
    path: str | Path, images: ImageFolder, *, subset: int | None = None, seed: int = 0
) -> Archive:
    """Open the annotations of one release: detection examples (see `coco.read`).

    Args:
        path: the annotations.
        images: where the images are.
        subset: keep this many images (DetCLIPv2 samples 0.66 million for pre-training: Yao et al.
            2023, §4). The choice depends on the image ids and `seed` only, not on their order or on
            which images are on disk. A smaller subset is part of a larger one of the same seed.
        seed: of the subset.
    """
    choose = None if subset is None else functools.partial(choose_ids, count=subset, seed=seed)
    return coco.read(path, images.inside(*IMAGE_FOLDERS), names=NAMES, choose=choose)


def choose_ids(ids: Iterable[Any], *, count: int, seed: int) -> set:
    """Return the `count` ids with the smallest hashes of (seed, id), or all if there are fewer."""
    ids = list(ids)
    hashes = np.array([_hash(image_id, seed) for image_id in ids], np.uint64)
    return {ids[i] for i in np.argsort(hashes, kind="stable")[:count].tolist()}


def _hash(image_id: Any, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
