"""LVIS v1: COCO's pictures with 1,203 categories, of which an image's annotators marked some.

For training, an `instances` file like COCO's. For evaluation, LVIS minival: the part of val whose
pictures are COCO's val2017, as MDETR and everybody after it measures zero-shot detection.
"""

import json
from pathlib import Path
from typing import Any

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_stream import read_json
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco
from detclipv2_jax.data.prepare.sources.entries import BROKEN, problem

TRAINING_FILE = "lvis_v1_train.json"
MINIVAL_FOLDER = "val2017"


def training_files(directory: Path) -> list[Path]:
    """`lvis_v1_train.json` in a folder or in its annotations/, if it is there."""
    places = (directory / TRAINING_FILE, directory / "annotations" / TRAINING_FILE)
    return [path for path in places if path.is_file()][:1]


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open `lvis_v1_train.json`: detection examples, names with spaces; see `coco.read`.

    LVIS is federated: on an image, only the categories that are marked or listed as absent are
    known. A run that trains on these boxes takes every other name for absent, which for LVIS is not
    always so.
    """
    return coco.read(path, images)


def write_minival(val: str | Path, to: str | Path) -> int:
    """Write LVIS minival, rebuilt from `lvis_v1_val.json`; returns its number of images.

    All else is as in val: the 1,203 categories, the images' own fields, the order, every annotation
    of the images that stay. The same val gives the same bytes, whole or not at all. `UserError`
    where val is no LVIS file or has no picture of val2017.
    """
    content = minival(val, read_json(Path(val)))
    with replacing(to) as temporary:
        temporary.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return len(content["images"])


def minival(val: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    """LVIS minival as `write_minival` writes it, of the content of `lvis_v1_val.json`."""
    try:
        images = [entry for entry in content["images"] if _is_minival(entry)]
        ids = {entry["id"] for entry in images}
        annotations = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        content = content | {"images": images, "annotations": annotations}
    except BROKEN as error:
        raise UserError(f"{val}: {problem(error)}; give lvis_v1_val.json") from error
    if not images:
        raise UserError(
            f'{val}: no image whose "coco_url" is in {MINIVAL_FOLDER}; give lvis_v1_val.json'
        )
    return content


def _is_minival(entry: dict[str, Any]) -> bool:
    address = entry.get("coco_url")
    return isinstance(address, str) and f"/{MINIVAL_FOLDER}/" in address
