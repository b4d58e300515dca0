"""Read MDETR's JSON (GoldG: Flickr30k Entities, GQA): boxes tied to spans of a caption."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_fields import as_identifier, box, entry_object, identifier, shorten
from detclipv2_jax.common.json_file import read_json, read_lists
from detclipv2_jax.data.prepare.examples import (
    Archive,
    Drops,
    Example,
    ImageFile,
    ImageFolder,
)
from detclipv2_jax.data.prepare.sources.entries import (
    MALFORMED,
    BoxTable,
    ImageEntries,
    annotation_label,
    describe,
    explain,
    find_image,
    near,
)
from detclipv2_jax.text.phrases import spanned_phrase

#: Collection -> folders of its images, as published and as MDETR and GLIP name them. Flickr30k and
#: Visual Genome both name images by numbers, so each is searched for in its own folders only.
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
GENOME_FILE = "image_data.json"  # of Visual Genome; it says which of its images are COCO's
_COCO_NAME = re.compile(r"(?:COCO_\w+2014_)?(\d{12})\.jpg")


class Exclusion:
    """Decides which images a grounding source must not have because they are COCO's."""

    def __init__(self, directories: Sequence[Path], evaluation: Sequence[Path] = ()):
        """Exclude all of COCO's images, or only those of some COCO or LVIS files.

        Args:
            directories: searched, with their folders, for Visual Genome's image_data.json.
            evaluation: COCO or LVIS files; if given, only their images are excluded.
        """
        self._directories = directories
        ids = [_coco_ids(path) for path in evaluation]
        self._coco_ids = frozenset().union(*ids) if ids else None

    def reason(self, entry: dict[str, Any]) -> str:
        """Return why an image entry is excluded, or "" if it is kept.

        Raises:
            UserError: the entry is of Visual Genome and its image_data.json is missing or damaged.
                Half of Visual Genome's images are COCO's, and only this file says which.
        """
        name = str(entry.get("file_name", "")).rpartition("/")[2]
        if match := _COCO_NAME.fullmatch(name):
            return "a COCO image" if self._has(int(match[1])) else ""
        # Flickr30k's images are named by numbers too, but they are not Visual Genome's.
        of_genome = entry.get("data_source", "vg") == "vg" and entry.get("dataset_name") != "flickr"
        if of_genome and re.fullmatch(r"\d{1,9}\.jpg", name):
            coco_id = self.genome.get(int(name.removesuffix(".jpg")))
            if coco_id is not None and self._has(coco_id):
                return "a COCO image in Visual Genome"
        return ""

    @functools.cached_property
    def genome(self) -> dict[int, int]:
        """COCO id of each Visual Genome image that has one, by its Visual Genome id."""
        for directory in self._directories:
            for path in (directory / GENOME_FILE, *sorted(directory.glob(f"*/{GENOME_FILE}"))):
                if path.is_file():
                    return _read_genome(path)
        raise UserError(
            f"{' or '.join(map(str, self._directories))}: no {GENOME_FILE} in it. It says which "
            "images of GQA are COCO's. Get it from Visual Genome, or keep all images with "
            "--keep_coco."
        )

    def _has(self, coco_id: int) -> bool:
        return self._coco_ids is None or coco_id in self._coco_ids


def _read_genome(path: Path) -> dict[int, int]:
    rows = read_json(path)
    try:
        return {int(r["image_id"]): int(r["coco_id"]) for r in rows if r["coco_id"] is not None}
    except MALFORMED as error:
        raise UserError(
            f'{path}: not a list of images with "image_id" and "coco_id" ({describe(error)}). Get '
            "it again from Visual Genome."
        ) from error


def _coco_ids(path: Path) -> frozenset[int]:
    """Return the image ids of a COCO or LVIS file."""
    entries = (entry for _, _, entry in read_lists(path, ("images",)))
    ids = (as_identifier(entry.get("id")) for entry in entries if isinstance(entry, dict))
    return frozenset(number for number in ids if isinstance(number, int))


def training_files(directory: Path) -> list[Path]:
    """Return MDETR's training files in a folder or its folders.

    Of the mixed files, GLIP's without COCO's images is preferred.
    """
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
    """Open an MDETR file without the images that are COCO's (see `read`).

    Args:
        path: the MDETR file.
        images: where its images are.
        keep_coco: keep COCO's images.
        exclude: COCO or LVIS files; if given, only their images are dropped.
    """
    path = Path(path)
    if keep_coco:
        return read(path, images)
    directories = (path.parent, path.parent.parent)
    return read(
        path, images, exclude=Exclusion(directories, [Path(file) for file in exclude or ()])
    )


def read(path: str | Path, images: ImageFolder, *, exclude: Exclusion | None = None) -> Archive:
    """Open an MDETR file: one grounding example per caption, in the order of the image entries.

    A box is named by the text of its `tokens_positive`, the spans joined and cleaned. The published
    files have sizes as strings, several spans per phrase and empty `categories`; all of these are
    accepted. The file is read twice, entry by entry. Malformed entries and the images that
    `exclude` names are dropped and counted.

    Raises:
        UserError: the file is not such JSON.
    """
    path, drops = Path(path), Drops()
    entries, excluded = ImageEntries(path, drops), set()
    for field, place, entry in read_lists(path, ("images", "annotations")):
        if field != "images":
            continue
        reason = exclude.reason(entry) if exclude and isinstance(entry, dict) else ""
        if reason:
            explanation = f"{path}: images[{place}]: {shorten(entry['file_name'])} is {reason}"
            drops.drop(f"images: {reason}", explanation)
            if (image_id := as_identifier(entry.get("id"))) is not None:
                excluded.add(image_id)
        else:
            entries.add(place, entry)
    boxes = _read_boxes(path, entries, excluded, drops)
    return Archive(
        path=path,
        kind="grounding",
        total=len(entries),
        examples=_examples(path, entries, boxes, images, drops),
        drops=drops,
    )


def _read_boxes(path: Path, entries: ImageEntries, excluded: set, drops: Drops) -> BoxTable:
    boxes = BoxTable()

    def drop(reason: str, why: str) -> None:
        drops.drop(f"boxes: {reason}", f"{path}: {annotation_label(number, place)}: {why}")

    for _, place, entry in read_lists(path, ("annotations",)):
        number = None
        try:
            number, image = entry_object(entry).get("id"), identifier(entry, "image_id")
            spans = entry["tokens_positive"]
            if image in excluded:
                continue
            if image not in entries:
                drop(*entries.why_missing(image))
                continue
            caption = entries[image].caption
            if caption is None:
                drop("no caption", f"image {shorten(image)} has no caption")
                continue
            xywh = box(entry, finite=False)
            phrase = spanned_phrase(caption, spans)
            if phrase:
                boxes.add(entries[image].row, xywh, phrase, number, place)
            else:
                marked = f'"tokens_positive" {shorten(spans)} marks no noun in {shorten(caption)}'
                drop("no phrase", marked)
        except MALFORMED as error:
            drops.drop("boxes: malformed entry", explain(f"{path}: annotations[{place}]", error))
    return boxes


def _examples(
    path: Path, entries: ImageEntries, table: BoxTable, images: ImageFolder, drops: Drops
) -> Iterator[Example]:
    images = near(path, entries, images)
    collections = {
        collection: images.only(*folders)
        for collection, names in IMAGE_FOLDERS.items()
        if (folders := [p for root in images.folders for n in names if (p := root / n).is_dir()])
    }
    for image_id, entry, boxes in table.by_image(entries):
        own = collections.get(entry.collection)
        found = own.find(*entry.file_names).path if own else None
        image = ImageFile(found) if found else find_image(entry, str(path), images, drops)
        if image is not None:
            yield Example(
                image=image,
                image_id=str(image_id),
                size=entry.size,
                boxes=boxes,
                caption=entry.caption or "",
            )
