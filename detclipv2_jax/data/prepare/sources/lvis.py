"""Read LVIS v1: COCO's images with 1,203 categories, each image annotated for some of them.

For training, LVIS is an `instances` file like COCO's. For evaluation there is LVIS minival: the
part of val whose images are in COCO's val2017. MDETR introduced it to measure zero-shot detection,
and later papers use it too.
"""

import json
from pathlib import Path
from typing import Any

from detclipv2_jax.common.atomic import write_new_text
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import identifier
from detclipv2_jax.common.json_file import read_json
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.sources import coco
from detclipv2_jax.data.prepare.sources.entries import MALFORMED, describe

TRAINING_FILE = "lvis_v1_train.json"
MINIVAL_FOLDER = "val2017"


def training_files(directory: Path) -> list[Path]:
    """Return `lvis_v1_train.json` in a folder or its annotations/, if it exists."""
    places = (directory / TRAINING_FILE, directory / "annotations" / TRAINING_FILE)
    return [path for path in places if path.is_file()][:1]


def read(path: str | Path, images: ImageFolder) -> Archive:
    """Open `lvis_v1_train.json`: detection examples, names with spaces (see `coco.read`).

    LVIS is federated: for each image, only the categories that have a box or are listed as absent
    are known. Both lists of each image ("neg_category_ids", "not_exhaustive_category_ids") are
    kept, and `config.data.detection.federated` makes training heed them.
    """
    return coco.read(path, images)


def write_minival(val: str | Path, to: str | Path) -> int:
    """Write LVIS minival, extracted from `lvis_v1_val.json`.

    Everything else is as in val: the 1,203 categories, the fields and order of the images, every
    annotation of the images that are kept. The same val gives the same bytes.

    Returns:
        The number of images.

    Raises:
        UserError: val is not an LVIS file or has no image of val2017.
    """
    content = minival(val, read_json(Path(val)))
    write_new_text(to, json.dumps(content, separators=(",", ":")) + "\n", "--to")
    return len(content["images"])


def minival(val: str | Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return LVIS minival as `write_minival` writes it, given the content of `val`."""
    try:
        images = [entry for entry in content["images"] if _is_minival(entry)]
        ids = {identifier(entry, "id") for entry in images}
        annotations = [
            entry for entry in content["annotations"] if identifier(entry, "image_id") in ids
        ]
        content = content | {"images": images, "annotations": annotations}
    except MALFORMED as error:
        raise UserError(f"{val}: {describe(error)}. Give lvis_v1_val.json.") from error
    if not images:
        raise UserError(
            f'{val}: no image whose "coco_url" is in {MINIVAL_FOLDER}. Give lvis_v1_val.json.'
        )
    return content


def _is_minival(entry: dict[str, Any]) -> bool:
    url = entry.get("coco_url")
    return isinstance(url, str) and f"/{MINIVAL_FOLDER}/" in url
