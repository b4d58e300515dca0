"""Tell the format of an annotation file by its field names, or why it is not one for training.

The text is searched for the names without parsing it or reading it into memory: the file of
Objects365 has several gigabytes.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from detclipv2_jax.common.json_file import first_character
from detclipv2_jax.common.text_file import TextDecoder, open_bytes
from detclipv2_jax.data.prepare.sources import img2dataset

SUFFIXES = (".json", ".jsonl", ".tsv")
#: Words in the name of a file that is not for training.
EVALUATION_WORDS = {"val", "valid", "validation", "test", "dev", "minival", "eval"}
_COPY_WORDS = {"old", "copy", "bak", "backup", "orig", "original", "previous", "prev", "tmp"}
_COPY_ENDINGS = ("~", ".bak", ".old", ".orig", ".backup", ".tmp", ".swp", ".save")
_CHUNK = 1 << 22  # bytes
# LVIS is federated: a category without a box may still be in the image.
_FORMATS = {
    "neg_category_ids": "LVIS",
    "tokens_positive": "MDETR",
    "segments_info": "panoptic segmentation",
    "bbox": "COCO instances",
    "caption": "COCO captions",
}
_OTHER = {
    "LVIS": "it is LVIS; prepare it with `detclip prepare lvis --annotations=FILE`",
    "panoptic segmentation": "it is panoptic segmentation, which is not read; use instances",
}


class Judgment(NamedTuple):
    """What a file is, by its field names."""

    format: str | None  # a key of `registry.FORMATS`; None: none of them
    why: str = ""  # why it is none
    is_other: bool = False  # it is a known format that cannot be read, not a damaged file
    is_lvis: bool = False


def format_of(path: Path) -> str | None:
    """Return the format of a file: a key of `registry.FORMATS`, or None (see `judge`)."""
    return judge(path).format


def judge(path: Path) -> Judgment:
    """Return the format of a file, or why it has none that is read.

    A folder with shards is the output of img2dataset.

    Raises:
      UserError: the file cannot be read.
    """
    if path.is_dir():
        found = "img2dataset's shards" if img2dataset.shards(path) else None
        return Judgment(found, "it has no shards of img2dataset")
    suffix = suffix_of(path)
    if suffix in (".tsv", ".jsonl"):
        return Judgment({".tsv": "TSV", ".jsonl": "JSON lines"}[suffix])
    if suffix != ".json":
        return Judgment(None, f"its name does not end in {' or '.join(SUFFIXES)}")
    if not path.stat().st_size:
        return Judgment(None, "it is empty")
    if (first := first_character(path)) != "{":
        return _judge_list(path) if first == "[" else Judgment(None, "it is not JSON")
    found = next((_FORMATS[name] for name in _search(path, _FORMATS)), None)
    if found in _OTHER:
        is_lvis = found == "LVIS"
        return Judgment(None, _OTHER[found], is_other=not is_lvis, is_lvis=is_lvis)
    return Judgment(found) if found else _judge_without_boxes(path)


def _judge_without_boxes(path: Path) -> Judgment:
    """Judge a JSON object that has neither boxes nor captions."""
    lists = ("images", "annotations", "categories")
    found = set(_search(path, (*lists, "segmentation", "keypoints")))
    if found == set(lists):
        return Judgment("COCO instances")  # images of the background
    if what := found.intersection(("segmentation", "keypoints")):
        why = f'its annotations have "{min(what)}" and no "bbox", and boxes are needed'
        return Judgment(None, why, is_other=True)
    if "images" in found and "annotations" not in found:
        return Judgment(None, 'it lists images and has no "annotations"')
    missing = " and ".join(f'"{name}"' for name in lists if name not in found)
    return Judgment(None, f"it has no {missing}, and is of no other format that is read")


def _judge_list(path: Path) -> Judgment:
    if set(_search(path, ("score", "bbox"))) == {"score", "bbox"}:
        why = "it is a list of boxes with scores: the results of a detector, not annotations"
        return Judgment(None, why, is_other=True)
    why = 'it is a JSON list, and annotations are an object with "images" and "annotations"'
    return Judgment(None, why, is_other=True)


def suffix_of(path: Path) -> str:
    """Return the suffix of a file's name in lower case, without that of gzip."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def evaluation_word(name: str) -> str | None:
    """Return the word of a file's or folder's name that says that it is for evaluation, or None."""
    words = re.split(r"[\W_\d]+", name.lower())  # "val2017" too
    return next((word for word in words if word in EVALUATION_WORDS), None)


def is_candidate(path: Path) -> bool:
    """Return whether a name is that of an annotation file, or of a backup of one."""
    name = path.name.lower()
    for ending in _COPY_ENDINGS:
        name = name.removesuffix(ending)
    return suffix_of(Path(name)) in SUFFIXES


def why_ignored(path: Path) -> str | None:
    """Return why a candidate is left out by its name, or None."""
    if path.name.startswith("."):
        return "it is hidden"
    if path.name.lower().endswith(_COPY_ENDINGS):
        return "its name is that of a backup"
    return None


def is_copy(path: Path) -> bool:
    """Return whether a file's name says that it is a copy or an older version of another one."""
    words = re.split(r"[\W_\d]+", path.stem.lower())
    return bool(_COPY_WORDS.intersection(words)) or bool(re.search(r"\(\d+\)$", path.stem))


def _search(path: Path, names: Collection[str]) -> Iterator[str]:
    """Yield those of some field names that occur in a JSON file, in the order of `names`.

    A name is searched for when it is asked for: the caller stops at the first that it wants.
    """
    with open_bytes(path) as file:
        encoding = TextDecoder(path, file.read(4)).encoding
    wide = [f"utf-{bits}-{order}" for bits in (16, 32) for order in ("le", "be")]
    encodings = ["utf-8"] if encoding.startswith("utf-8") else wide
    for name in names:
        if any(_occurs(path, f'"{name}"'.encode(encoding)) for encoding in encodings):
            yield name


def _occurs(path: Path, wanted: bytes) -> bool:
    with open_bytes(path) as file:
        end = b""
        while data := file.read(_CHUNK):
            if wanted in end + data:
                return True
            end = data[-len(wanted) :]
    return False
