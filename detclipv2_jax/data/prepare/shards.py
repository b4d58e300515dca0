"""Build one shard of a source: open the images of some examples and write their records.

Worker processes run this. Every image is decoded once, so that broken ones are found now and not
during training. Nothing here imports TensorFlow, which would slow down the start of each worker.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from detclipv2_jax.data.index import TEXT_KINDS
from detclipv2_jax.data.prepare import index_writer, inputs
from detclipv2_jax.data.prepare.examples import Box, Drops, Example
from detclipv2_jax.data.prepare.image_encoding import StoredImage, encode_image
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.records import Record, ShardWriter
from detclipv2_jax.text import phrases as phrases_lib
from detclipv2_jax.text.tokenizer import normalize

_MIN_SIDE = 1.0  # pixels; thinner boxes cannot be assigned or regressed
_SLACK = 0.5  # pixels by which a box may exceed the image without being counted: exporters round
_PROGRESS_EXAMPLES = 32  # examples between two reports of progress


@dataclasses.dataclass(frozen=True)
class ShardSummary:
    """What the index file of a finished shard says about the shard."""

    examples: int
    records: int
    boxes: int
    file_bytes: int  # of the file of records
    images: dict[str, int]  # "bytes" of the stored images; "reencoded", "shrunk": how many
    archives: dict[str, list[int]]  # number of an annotation file -> its records and boxes
    pictures: list[list]  # the fields of each `inputs.Picture`
    drops: dict[str, Any]  # Drops.to_json
    digest: str  # of the examples


@dataclasses.dataclass(frozen=True)
class ShardBuilder:
    """Writes the shards of one source to a directory: a file of records and an index for each.

    The bytes depend on the examples and the options only.
    """

    directory: Path
    kind: str
    options: PrepareOptions

    def build(
        self,
        number: int,
        examples: Sequence[Example],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write shard `number`.

        Args:
            number: of the shard, from 0.
            examples: of the shard.
            progress: called every so often with the number of examples done since the last call.
        """
        drops, indexer = Drops(), index_writer.Indexer(self.kind)
        images, boxes = {"bytes": 0, "reencoded": 0, "shrunk": 0}, 0
        archives: dict[str, list[int]] = {}
        pictures = []
        recorded = [inputs.Recorded(example.image) for example in examples]
        opened = [dataclasses.replace(e, image=image) for e, image in zip(examples, recorded)]
        with ShardWriter(self.record_file(number)) as writer:
            records = make_records(opened, self.kind, self.options, drops)
            for done, (example, (image, record)) in enumerate(zip(examples, records), 1):
                if record is not None:
                    writer.write(record)
                    indexer.add(record, example.absent, example.partial)
                    boxes += len(record.boxes)
                    images["bytes"] += len(record.image)
                    images["reencoded"] += image.reencoded
                    images["shrunk"] += image.shrunk
                    counts = archives.setdefault(str(example.archive), [0, 0])
                    counts[0] += 1
                    counts[1] += len(record.boxes)
                if picture := recorded[done - 1].picture(record is not None):
                    pictures.append(list(picture))
                if done % _PROGRESS_EXAMPLES == 0 or done == len(examples):
                    progress((done - 1) % _PROGRESS_EXAMPLES + 1)
        summary = ShardSummary(
            examples=len(examples),
            records=len(indexer),
            boxes=boxes,
            file_bytes=self._file_bytes(number),
            images=images,
            archives=archives,
            pictures=pictures,
            drops=drops.to_json(),
            digest=_digest(examples),
        )
        # The index comes last: a shard that has one is finished.
        indexer.finish().save(self.index_file(number), dataclasses.asdict(summary))

    def summary(self, number: int) -> ShardSummary | None:
        """Return the summary of a shard, or None if the shard is not finished or is damaged."""
        # A damaged archive can raise anything, such as zipfile.BadZipFile or NotImplementedError.
        with contextlib.suppress(Exception):
            summary = ShardSummary(**index_writer.read_summary(self.index_file(number)))
            if summary.file_bytes == self._file_bytes(number):
                return summary
        return None

    def finished(self, number: int, examples: Sequence[Example]) -> bool:
        """Return whether a shard was built from exactly these examples.

        They can differ between two runs of the same annotations: images may appear or disappear.
        """
        summary = self.summary(number)
        if summary is None or summary.digest != _digest(examples):
            return False
        if not all(inputs.Picture(*fields).is_unchanged for fields in summary.pictures):
            return False
        with contextlib.suppress(Exception), zipfile.ZipFile(self.index_file(number)) as archive:
            return archive.testzip() is None  # its checksums
        return False

    def record_file(self, number: int) -> Path:
        """Return the path of a shard's records. The file does not exist if there are none."""
        return self.directory / f"{number:06d}.array_record"

    def index_file(self, number: int) -> Path:
        """Return the path of a shard's index."""
        return self.directory / f"{number:06d}.npz"

    def _file_bytes(self, number: int) -> int:
        path = self.record_file(number)
        return path.stat().st_size if path.is_file() else 0


def _digest(examples: Sequence[Example]) -> str:
    names = "\n".join(f"{example.image_id}\0{example.image}" for example in examples)
    return hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def make_records(
    examples: Iterable[Example], kind: str, options: PrepareOptions, drops: Drops
) -> Iterator[tuple[StoredImage, Record | None]]:
    """Yield the image and the record of each example.

    The record is None where the example cannot be used; the reason is counted in `drops`.
    """
    examples, captioned = itertools.tee(examples)
    phrases: Iterable[Sequence[str]] = itertools.repeat(())
    if kind == "image_text":
        captions = (example.caption for example in captioned)
        phrases = phrases_lib.noun_phrases(
            captions, model=options.phrase_model, limit=options.phrase_limit
        )
    else:
        del captioned  # otherwise tee keeps every example for it
    store_side = options.store_side if kind in TEXT_KINDS else None
    for example, found in zip(examples, phrases):
        image = encode_image(example.image, store_side, example.size)
        yield image, _make_record(example, image, found, kind, drops)


def _make_record(
    example: Example, image: StoredImage, phrases: Sequence[str], kind: str, drops: Drops
) -> Record | None:
    """Return the record of an example, or None (counted in `drops`) if it cannot be used."""
    where = f"{example.image} (image {example.image_id})"
    if image.problem:
        drops.drop(image.reason, f"{where}: {image.problem}")
        return None
    size = image.original_size
    if example.size is not None and example.size != size:
        # The boxes are in pixels of a different image.
        annotated = f"annotated as {example.size[1]}x{example.size[0]}"
        drops.drop(
            "images: another size", f"{where}: {annotated}, the file has {size[1]}x{size[0]}"
        )
        return None
    _count_turn(image, where, drops)
    boxes, names = clip_boxes(example.boxes, *size, where, drops)
    if kind == "grounding" and not len(boxes):
        drops.drop("captions: no box", f"{where}: no usable box is tied to its caption")
        return None
    names = [normalize(name) for name in names]
    texts = names
    if kind in TEXT_KINDS:
        texts = [normalize(text) for text in (example.caption, *phrases)]
    concepts = tuple(dict.fromkeys(texts))
    return Record(
        image=image.jpeg,
        height=image.height,
        width=image.width,
        image_id=example.image_id,
        boxes=boxes,
        labels=np.array([concepts.index(name) for name in names], np.int32),
        concepts=concepts,
    )


def _count_turn(image: StoredImage, where: str, drops: Drops) -> None:
    """Count an image that EXIF says to turn: whether boxes refer to it turned is an assumption."""
    says = f"{where}: its EXIF orientation is {image.orientation}"
    if image.turned != 1:
        drops.change("images: turned as EXIF says", f"{says}, so it is turned, as viewers do")
    elif image.orientation != 1:
        drops.change(
            "images: not turned as EXIF says",
            f"{says}, but it is annotated in the size of the pixels that are not turned",
        )


def clip_boxes(
    boxes: Sequence[Box], height: int, width: int, where: str, drops: Drops
) -> tuple[Float32[np.ndarray, "n 4"], list[str]]:
    """Return boxes as (x_min, y_min, x_max, y_max) inside the image, and their names.

    A box that reaches outside is clipped. A box that is not finite, or has no area before or after
    clipping, is dropped. Both are counted.

    Args:
        boxes: as annotated, in pixels.
        height: of the image, in pixels.
        width: of the image, in pixels.
        where: the image, for explanations.
        drops: counts the boxes that are dropped or clipped.
    """
    kept, names = [], []
    limits = np.array([width, height, width, height], np.float64)
    for box in boxes:
        x, y, w, h = box.xywh
        shown = f"{where}, {box.origin}: box {[round(v, 2) for v in box.xywh]}"
        if not np.isfinite(box.xywh).all():
            drops.drop("boxes: not finite", f"{shown} is not finite")
            continue
        if min(w, h) < _MIN_SIDE:
            why = f"{shown} has a side under {_MIN_SIDE:g} pixel"
            if 0 < max(box.xywh) <= 1:
                why += " (bbox is in pixels, not in parts of the image)"
            drops.drop("boxes: no area", why)
            continue
        corners = np.array([x, y, x + w, y + h])
        inside = np.clip(corners, 0.0, limits)
        if (inside[2:] - inside[:2]).min() < _MIN_SIDE:
            drops.drop("boxes: outside the image", f"{shown} lies outside {width}x{height} pixels")
            continue
        if np.abs(corners - inside).max() > _SLACK:
            drops.change("boxes: clipped", f"{shown} reached out of {width}x{height} pixels")
        kept.append(inside)
        names.append(box.name)
    return np.array(kept, np.float32).reshape(-1, 4), names
