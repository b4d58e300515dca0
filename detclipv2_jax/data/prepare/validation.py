"""The validation set of own photos: a file that the folder has, or pictures that are held out.

Both are written to TO/validation, where training finds them: `images/`, and `annotations.json` in
COCO's format. The pictures pass through the same code as records, so validation sees what training
would see, and the folder can be moved with the prepared data. Crowd regions are left out, and areas
are those of the boxes.

Pictures are held out by a hash of their content, not by their place in a list. So the same picture
never is in both sets, whatever its name and in however many files it is, and a picture stays in its
set when others are added.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detclipv2_jax.common.atomic import replace_directory, write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import counted
from detclipv2_jax.data.prepare import inputs, own_folders
from detclipv2_jax.data.prepare.examples import (
    HELD_OUT,
    Archive,
    Drops,
    Example,
    ImageFile,
    ImageFolder,
)
from detclipv2_jax.data.prepare.moved import same_inputs
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.repeats import Distinct
from detclipv2_jax.data.prepare.shards import make_records
from detclipv2_jax.data.prepare.sources import formats
from detclipv2_jax.text.tokenizer import normalize

FOLDER = "validation"  # in the directory of the prepared data
ANNOTATIONS, IMAGES = "annotations.json", "images"  # in that folder
_INFO = "made_from.json"
# Words that name a file or folder for validation. "test" is not one: who chooses a checkpoint by
# the test set has none left.
_WORDS = {"val", "valid", "validation", "minival", "dev"}
_HEAD = 1 << 16  # bytes of a picture that identify it, with its size
# Roboflow adds ".rf.HASH" to the name of each augmented copy of a picture.
_ROBOFLOW_COPY = re.compile(r"(.+)\.rf\.[0-9a-zA-Z]{8,}$")


@dataclasses.dataclass(frozen=True)
class Split:
    """Which pictures are held out: those whose hash lies below a share."""

    share: float
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(
                f"--val_share={self.share:g}: must be above 0 and below 1, such as 0.1."
            )

    def held_out(self, pictures: Iterable[ImageFile]) -> frozenset[str]:
        """Return the keys of the pictures to hold out, at least one.

        Raises:
            UserError: no picture would be left for training.
        """
        places = {key: self._place(key) for key in map(picture_key, pictures)}
        chosen = frozenset(key for key, place in places.items() if place < self.share)
        chosen = chosen or frozenset(sorted(places, key=lambda key: places[key])[:1])
        if len(chosen) == len(places):
            raise UserError(
                f"--val_share={self.share:g} leaves none of {counted(len(places), 'picture')} to "
                "train on. Give a smaller share, or a file of other pictures with "
                "--validation=FILE."
            )
        return chosen

    def _place(self, key: str) -> float:
        """Return a number from 0 to 1 that depends on the seed and the picture alone."""
        digest = hashlib.blake2b(f"{self.seed}\0{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64


def picture_key(picture: ImageFile) -> str:
    """Return what identifies a picture, wherever it lies: its size and first bytes.

    Copies that Roboflow augmented have the key of the picture they were made from.
    """
    if copy := _ROBOFLOW_COPY.match(picture.path.stem):
        return f"roboflow {copy[1]}".encode(errors="replace").decode()
    try:
        size = picture.path.stat().st_size if picture.size is None else picture.size
        head = dataclasses.replace(picture, size=min(size, _HEAD)).read()
    except OSError:  # reported when the picture is read as a whole
        return f"unreadable {ascii(str(picture))}"
    return f"{size} {hashlib.blake2b(head, digest_size=16).hexdigest()}"


def without(archive: Archive, held_out: frozenset[str]) -> Archive:
    """Return an archive without the pictures that are held out; they are counted."""

    def kept() -> Iterator[Example]:
        for example in archive.examples:
            if picture_key(example.image) in held_out:
                archive.drops.drop(HELD_OUT, f"{example.image}: in {FOLDER}/")
            else:
                yield example

    return dataclasses.replace(archive, examples=kept())


def find(directory: Path) -> Path | None:
    """Return the annotation file for validation in a folder: COCO boxes, by its name or folder.

    `val.json`, `annotations/instances_val2017.json`, `valid/_annotations.coco.json` and the like.

    Raises:
        UserError: there are several; names them.
    """
    places = ("*.json", "annotations/*.json", "*/*.json")
    found = {path for place in places for path in directory.glob(place) if path.is_file()}
    chosen = []
    for path in sorted(found):
        name = path.stem
        if path.parent.name != "annotations" and path.parent != directory:
            name = path.parent.name
        if _words(name) & _WORDS and formats.format_of(path) == "COCO instances":
            chosen.append(path)
    chosen = [path for path in chosen if "instances" in _words(path.stem)] or chosen
    if len(chosen) > 1:
        raise UserError(
            f"{directory}: several annotation files for validation: "
            f"{', '.join(str(path.relative_to(directory)) for path in chosen)}. Name one with "
            "--validation=FILE, or --validation=none."
        )
    return chosen[0] if chosen else None


def image_folder(path: Path, origin: Path) -> ImageFolder:
    """Return where the pictures of a validation file may be: COCO has val2017/, others valid/."""
    roots = [origin / "images" / "detection", origin / "images", origin]
    folders = [one for root in roots[1:] if root.is_dir() for one in sorted(root.iterdir())]
    named = [one for one in folders if one.is_dir() and _words(one.name) & _WORDS]
    return ImageFolder(*roots, first=[path.parent / "images", path.parent, *named])


def _words(name: str) -> set[str]:
    return set(re.split(r"[\W_\d]+", name.lower()))


def write(
    to: Path,
    archives: Sequence[Archive],
    created_from: Mapping[str, Any],
    origin: Path,
    *,
    held_out: frozenset[str] | None = None,
    overwrite: bool = False,
) -> str:
    """Write a validation set, unless it exists, and return a report for people.

    Args:
        to: its directory; it appears when it is complete.
        archives: of boxes.
        created_from: what identifies its origin.
        origin: folder of the files.
        held_out: keys of the pictures to take; None takes all.
        overwrite: replace a set of another origin.

    Raises:
        UserError: `to` has another set, pictures appeared or changed since it was made, or the
            archives have no usable box.
    """
    created_from = json.loads(json.dumps(created_from))
    found = _read_info(to)
    if found is not None and not overwrite and same_inputs(found["created_from"], created_from):
        inputs.refuse_changes(to, origin)
        return f"{to}: already prepared, {counted(found['images'], 'image')} for validation"
    if found is None and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(
            f"{to}: is in the way, and is not a validation set that was prepared here. Move it "
            "away, or choose another directory with --to."
        )
    if found is not None and not overwrite:
        raise UserError(
            f"{to}: holds a validation set made from other files or options. Add --overwrite to "
            "replace it, or choose another directory with --to."
        )
    partial = own_folders.empty_partial(to, {"inputs": created_from})
    new = partial / "merged"
    (new / IMAGES).mkdir(parents=True)
    drops, pictures = Drops(), []
    content = _content(archives, held_out, new / IMAGES, drops, pictures)
    for archive in archives:
        drops.add(archive.drops)
    if not content["annotations"]:
        shutil.rmtree(partial)
        example = f", for example {drops.first()}" if drops.first() else ""
        raise UserError(
            f"{', '.join(str(archive.path) for archive in archives)}: no usable box for validation"
            f"{example}. Fix the file, name another with --validation=FILE, or go without with "
            "--validation=none."
        )
    write_json(new / ANNOTATIONS, content)
    counts = {"images": len(content["images"]), "boxes": len(content["annotations"])}
    write_json(new / _INFO, counts | {"created_from": created_from} | drops.to_json())
    missing = itertools.chain.from_iterable(archive.drops.missing for archive in archives)
    inputs.write(new, origin, pictures, missing)
    replace_directory(new, to)
    shutil.rmtree(partial)
    return _report(to, content, drops)


def _content(
    archives: Sequence[Archive],
    held_out: frozenset[str] | None,
    images: Path,
    drops: Drops,
    pictures: list[inputs.Picture],
) -> dict[str, Any]:
    """Write the pictures and return the annotations in COCO's format; append to `pictures`."""
    ids: dict[str, int] = {}
    distinct = Distinct(archives)
    examples = (
        example
        for example in distinct
        if held_out is None or picture_key(example.image) in held_out
    )
    result: dict[str, Any] = {"images": [], "annotations": []}
    opened: list[inputs.Recorded] = []  # that are not read yet
    records = make_records(_recorded(examples, opened), "detection", PrepareOptions(), drops)
    for _, record in tqdm(records, desc=FOLDER, unit=" images", disable=None):
        if picture := opened.pop(0).picture(record is not None):
            pictures.append(picture)
        if record is None:
            continue
        number = len(result["images"]) + 1
        file_name = f"{number:06d}.jpg"
        (images / file_name).write_bytes(record.image)
        result["images"].append(
            {
                "id": number,
                "file_name": file_name,
                "height": record.height,
                "width": record.width,
                "source_id": record.image_id,
            }
        )
        for (x_min, y_min, x_max, y_max), label in zip(record.boxes.tolist(), record.labels):
            name = record.concepts[label]
            width, height = x_max - x_min, y_max - y_min
            result["annotations"].append(
                {
                    "id": len(result["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids.setdefault(name, len(ids) + 1),
                    "bbox": [x_min, y_min, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    spelled: dict[int, str] = {}  # as the files spell the names
    for name in distinct.names():
        spelled.setdefault(ids.setdefault(normalize(name), len(ids) + 1), name)
    result["categories"] = [
        {"id": number, "name": spelled.get(number, name)} for name, number in ids.items()
    ]
    return result


def _recorded(examples: Iterable[Example], opened: list[inputs.Recorded]) -> Iterator[Example]:
    """Yield the examples with images that remember what was read, and append these to `opened`."""
    for example in examples:
        opened.append(inputs.Recorded(example.image))
        yield dataclasses.replace(example, image=opened[-1])


def _report(to: Path, content: Mapping[str, Any], drops: Drops) -> str:
    """Return what was written and left out, as the report of a source does."""
    lines = [
        f"{to}: {counted(len(content['images']), 'image')} for validation with "
        f"{counted(len(content['annotations']), 'box', 'boxes')} of "
        f"{counted(len(content['categories']), 'name')}"
    ]
    for title, counts in (("dropped", drops.dropped), ("changed", drops.changed)):
        for reason, count in sorted(counts.items()):
            lines.append(f"  {title + ' ' + reason:<36}{count:>10,}")
            lines += [f"      {sentence}" for sentence in drops.explained[reason][:1]]
    return "\n".join(lines)


def _read_info(to: Path) -> dict[str, Any] | None:
    try:
        info = json.loads((to / _INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and "created_from" in info else None
