"""MDETR's JSON (GoldG: Flickr30k Entities, GQA): boxes tied to spans of their image's caption."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.data.examples import (
    Archive,
    Drops,
    ImageFile,
    ImageFolder,
    RawExample,
    parse_xywh,
)
from detclipv2_jax.data.json_stream import read_json, read_lists
from detclipv2_jax.data.phrases import spanned_phrase
from detclipv2_jax.data.sources.entries import (
    BROKEN,
    Boxes,
    ImageEntries,
    annotation,
    find,
    problem,
    shortly,
    widened,
)
from detclipv2_jax.errors import UserError

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
GENOME = "image_data.json"  # Visual Genome's, which tells which of its pictures are COCO's too
_COCO_NAME = re.compile(r"(?:COCO_\w+2014_)?(\d{12})\.jpg")


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Which of COCO's pictures a grounding source must not have."""

    coco_ids: frozenset[int] | None = None  # None: all of them
    genome: Mapping[int, int] = dataclasses.field(default_factory=dict)  # Visual Genome id -> COCO

    def reason(self, entry: dict[str, Any]) -> str:
        """Why an image entry is left out; empty if it stays."""
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

    def _has(self, coco_id: int) -> bool:
        return self.coco_ids is None or coco_id in self.coco_ids


def exclusion(directory: Path, evaluation: Iterable[Path] = ()) -> Exclusion:
    """All COCO pictures or, with COCO or LVIS files `evaluation`, only the pictures of these.

    Visual Genome's image_data.json is taken from `directory` or a folder in it. `UserError` where
    it is not there or is broken: half of Visual Genome's pictures are COCO's, by number alone.
    """
    found = [*directory.glob(GENOME), *directory.glob(f"*/{GENOME}")]
    if not found:
        raise UserError(
            f"{directory}: no {GENOME} in it, so nobody can tell which GQA pictures are COCO's; "
            "get it from Visual Genome, or keep COCO's pictures with --keep-coco"
        )
    ids = [_coco_ids(path) for path in evaluation]
    return Exclusion(frozenset().union(*ids) if ids else None, _genome(found[0]))


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
    ids = [entry.get("id") for _, _, entry in read_lists(path, ("images",)) if entry]
    return frozenset(number for number in ids if isinstance(number, int))


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
