"""MDETR's JSON (GoldG: Flickr30k Entities, GQA): boxes tied to spans of their image's caption."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_stream import read_json, read_lists
from detclipv2_jax.data.prepare.examples import (
    Archive,
    Drops,
    ImageFile,
    ImageFolder,
    RawExample,
    parse_xywh,
)
from detclipv2_jax.data.prepare.sources.entries import (
    BROKEN,
    Boxes,
    ImageEntries,
    annotation,
    find,
    problem,
    shortly,
    widened,
)
from detclipv2_jax.text.phrases import spanned_phrase

#: Where people keep each archive's pictures: its own folders, MDETR's and GLIP's. Both Flickr30k
#: and Visual Genome call them by numbers, so neither is looked for in the other's.
IMAGE_FOLDERS = {
    "flickr": (
        "flickr30k_images",
        "flickr30k-images",
        "flickr30k_images/train",
        "flickr30k/flickr30k_images",
        "flickr30k/flickr30k_images/train",
    ),
    "vg": ("gqa/images", "gqa", "vg", "VG_100K", "VG_100K_2", "vg/VG_100K", "vg/VG_100K_2"),
    "coco": ("train2014", "coco/train2014"),
}
FLICKR_FILE = "final_flickr_separateGT_train.json"
MIXED_FILES = ("final_mixed_train_no_coco.json", "final_mixed_train.json")
GENOME = "image_data.json"  # Visual Genome's, which tells which of its pictures are COCO's too
_COCO_NAME = re.compile(r"(?:COCO_\w+2014_)?(\d{12})\.jpg")


class Exclusion:
    """Which of COCO's pictures a grounding source must not have."""

    def __init__(self, directories: Sequence[Path], evaluation: Sequence[Path] = ()):
        """All of COCO's pictures or, with COCO or LVIS files `evaluation`, only those of these.

        Visual Genome's image_data.json is looked for in `directories` and in their folders.
        """
        self._directories = directories
        ids = [_coco_ids(path) for path in evaluation]
        self._coco_ids = frozenset().union(*ids) if ids else None

    def reason(self, entry: dict[str, Any]) -> str:
        """Why an image entry is left out; empty if it stays.

        `UserError` at the first picture of Visual Genome where its image_data.json is missing or
        broken: half of its pictures are COCO's, and nothing else tells which.
        """
        name = str(entry.get("file_name", "")).rpartition("/")[2]
        if match := _COCO_NAME.fullmatch(name):
            return "a COCO image" if self._has(int(match[1])) else ""
        # Flickr30k's pictures have numbers for names too, but they are not Visual Genome's.
        of_genome = entry.get("data_source", "vg") == "vg" and entry.get("dataset_name") != "flickr"
        if of_genome and re.fullmatch(r"\d{1,9}\.jpg", name):
            coco_id = self.genome.get(int(name.removesuffix(".jpg")))
            if coco_id is not None and self._has(coco_id):
                return "a COCO image in Visual Genome"
        return ""

    @functools.cached_property
    def genome(self) -> dict[int, int]:
        """COCO's ids of Visual Genome's pictures by their own, of those that have one."""
        for directory in self._directories:
            for path in (directory / GENOME, *sorted(directory.glob(f"*/{GENOME}"))):
                if path.is_file():
                    return _genome(path)
        raise UserError(
            f"{' or '.join(map(str, self._directories))}: no {GENOME} in it, so nobody can tell "
            "which GQA pictures are COCO's; get it from Visual Genome, or keep them all with "
            "--keep_coco"
        )

    def _has(self, coco_id: int) -> bool:
        return self._coco_ids is None or coco_id in self._coco_ids


def _genome(path: Path) -> dict[int, int]:
    rows = read_json(path)
    try:
        return {int(r["image_id"]): int(r["coco_id"]) for r in rows if r["coco_id"] is not None}
    except BROKEN as error:
        raise UserError(
            f'{path}: no list of images with "image_id" and "coco_id" ({problem(error)}); get it '
            "anew from Visual Genome"
        ) from error


def _coco_ids(path: Path) -> frozenset[int]:
    """Ids of the images of a COCO or LVIS file, which are COCO's."""
    entries = (entry for _, _, entry in read_lists(path, ("images",)))
    ids = (entry.get("id") for entry in entries if isinstance(entry, dict))
    return frozenset(number for number in ids if isinstance(number, int))


def training_files(directory: Path) -> list[Path]:
    """MDETR's training files in a folder or its folders; of mixed, GLIP's without COCO first."""
    found = {path.name: path for path in (*directory.glob("*/*.json"), *directory.glob("*.json"))}
    mixed = next((name for name in MIXED_FILES if name in found), None)
    return [found[name] for name in (FLICKR_FILE, mixed) if name in found]


def read_without_coco(
    path: str | Path,
    images: ImageFolder,
    *,
    keep_coco: bool = False,
    exclude: Sequence[str | Path] | None = None,
) -> Archive:
    """`read` without COCO's pictures, or only without those of the COCO or LVIS files `exclude`."""
    path = Path(path)
    if keep_coco:
        return read(path, images)
    directories = (path.parent, path.parent.parent)
    return read(
        path, images, exclude=Exclusion(directories, [Path(file) for file in exclude or ()])
    )


def read(path: str | Path, images: ImageFolder, *, exclude: Exclusion | None = None) -> Archive:
    """Open an MDETR file: grounding examples, one a caption, as the file has its image entries.

    A box is named by the text under its `tokens_positive`, its spans joined and cleaned. What the
    published files are known for is taken as it comes: sizes as strings, several spans a phrase,
    empty `categories`. The file is read twice, entry by entry. `UserError` where it is no such
    JSON; broken entries are dropped and counted, and so are the images that `exclude` names.
    """
    path, drops = Path(path), Drops()
    entries, excluded = ImageEntries(path, drops), set()
    for field, place, entry in read_lists(path, ("images", "annotations")):
        if field != "images":
            continue
        reason = exclude.reason(entry) if exclude and isinstance(entry, dict) else ""
        if reason:
            told = f"{path}: images[{place}]: {shortly(entry['file_name'])} is {reason}"
            drops.drop(f"images: {reason}", told)
            if isinstance(entry.get("id"), int | str):
                excluded.add(entry["id"])
        else:
            entries.read(place, entry)
    boxes = _boxes(path, entries, excluded, drops)
    return Archive(
        path=path,
        kind="grounding",
        total=len(entries),
        examples=_examples(path, entries, boxes, images, drops),
        drops=drops,
    )


def _boxes(path: Path, entries: ImageEntries, excluded: set, drops: Drops) -> Boxes:
    boxes = Boxes()

    def drop(reason: str, why: str) -> None:
        drops.drop(f"boxes: {reason}", f"{path}: {annotation(number, place)}: {why}")

    for _, place, entry in read_lists(path, ("annotations",)):
        number = None
        try:
            number, image, spans = entry.get("id"), entry["image_id"], entry["tokens_positive"]
            if image in excluded:
                continue
            if image not in entries:
                drop("unknown image", f'"image_id" {shortly(image)} is not among "images"')
                continue
            caption = entries[image].caption
            if caption is None:
                drop("no caption", f"image {shortly(image)} has no caption")
                continue
            xywh = parse_xywh(entry["bbox"])
            phrase = spanned_phrase(caption, spans)
            if phrase:
                boxes.add(entries[image].row, xywh, phrase, number, place)
            else:
                marked = f'"tokens_positive" {shortly(spans)} marks no noun in {shortly(caption)}'
                drop("no phrase", marked)
        except BROKEN as error:
            drops.drop("boxes: malformed entry", f"{path}: annotations[{place}]: {problem(error)}")
    return boxes


def _examples(
    path: Path, entries: ImageEntries, boxes: Boxes, images: ImageFolder, drops: Drops
) -> Iterator[RawExample]:
    places = {
        collection: [
            root / name for root in images.roots for name in names if (root / name).is_dir()
        ]
        for collection, names in IMAGE_FOLDERS.items()
    }
    images = widened(images, path.parent)
    for image_id, entry, of_it in boxes.by_image(entries):
        found = _first(places.get(entry.collection, ()), entry.file_names[0])
        image = ImageFile(found) if found else find(entry, str(path), images, drops)
        if image is not None:
            yield RawExample(image=image, image_id=str(image_id), size=entry.size, boxes=of_it)


def _first(places: Iterable[Path], name: str) -> Path | None:
    try:
        return next((place / name for place in places if (place / name).is_file()), None)
    except OSError:  # a name longer than the file system allows
        return None
