"""A part of a source: some examples, their images opened, made records. What workers do.

Every image is decoded once, so that a broken one is found now and not in a run. What is left out is
counted by reason, the first few of each in words. Nothing here imports TensorFlow: the worker
processes import this module and have no use for it.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from detclipv2_jax.data.prepare import index_writer
from detclipv2_jax.data.prepare.examples import Drops, RawBox, RawExample
from detclipv2_jax.data.prepare.image_encoding import Options, Picture, open_image
from detclipv2_jax.data.records import Record, ShardWriter
from detclipv2_jax.text import phrases as phrases_lib
from detclipv2_jax.text.tokenizer import normalize

_MIN_SIDE = 1.0  # pixels; thinner boxes cannot be assigned or regressed
_SLACK = 0.5  # pixels that a box may lie outside without being called so: rounding of exporters
_TOLD = 32  # examples after which a worker tells how far it is


@dataclasses.dataclass(frozen=True)
class PartWriter:
    """Writes parts of one source to a directory: for each a file of records and its index.

    The bytes depend on the examples and the options alone.
    """

    directory: Path
    kind: str
    options: Options

    def write(
        self,
        number: int,
        examples: Sequence[RawExample],
        told: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Write part `number`; `told` hears every so often how many more examples are done."""
        drops, indexer = Drops(), index_writer.Indexer(self.kind)
        images, boxes = {"bytes": 0, "reencoded": 0, "shrunk": 0}, 0
        with ShardWriter(self.shard(number)) as shard:
            made = records_of(examples, self.kind, self.options, drops)
            for done, (picture, record) in enumerate(made, 1):
                if record is not None:
                    shard.write(record)
                    indexer.add(record)
                    boxes += len(record.boxes)
                    images["bytes"] += len(record.image)
                    images["reencoded"] += picture.reencoded
                    images["shrunk"] += picture.shrunk
                if done % _TOLD == 0 or done == len(examples):
                    told((done - 1) % _TOLD + 1)
        about = {"examples": len(examples), "records": len(indexer), "boxes": boxes}
        about |= {"shard_bytes": self._shard_bytes(number), "images": images}
        about |= {"drops": vars(drops), "digest": _digest(examples)}
        indexer.finish().save(self.index(number), about)  # last: with it, the part is finished

    def about(self, number: int) -> dict[str, Any] | None:
        """What a part says of itself; None if it is not finished."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            about = index_writer.about(self.index(number))
            if about["shard_bytes"] == self._shard_bytes(number):
                return about
        return None

    def finished(self, number: int, examples: Sequence[RawExample]) -> bool:
        """Whether a part is finished, of these very examples: images may have come or gone."""
        about = self.about(number)
        return about is not None and about["digest"] == _digest(examples)

    def shard(self, number: int) -> Path:
        """The file of a part's records; not there if it has none."""
        return self.directory / f"{number:06d}.array_record"

    def index(self, number: int) -> Path:
        """The file of a part's index."""
        return self.directory / f"{number:06d}.npz"

    def _shard_bytes(self, number: int) -> int:
        path = self.shard(number)
        return path.stat().st_size if path.is_file() else 0


def _digest(examples: Sequence[RawExample]) -> str:
    names = "\n".join(f"{example.image_id}\0{example.image}" for example in examples)
    return hashlib.blake2b(names.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def records_of(
    examples: Iterable[RawExample], kind: str, options: Options, drops: Drops
) -> Iterator[tuple[Picture, Record | None]]:
    """Each example's picture and record; None, counted in `drops`, where it is of no use."""
    examples, captioned = itertools.tee(examples)
    phrases: Iterable[Sequence[str]] = itertools.repeat(())
    if kind == "image_text":
        captions = (example.caption for example in captioned)
        phrases = phrases_lib.noun_phrases(
            captions, model=options.phrase_model, limit=options.phrase_limit
        )
    else:
        del captioned  # or tee would keep every example for it
    for example, found in zip(examples, phrases):
        picture = open_image(example.image, options.store_side if kind == "image_text" else None)
        yield picture, _record(example, picture, found, kind, drops)


def clip_boxes(
    boxes: Sequence[RawBox], height: int, width: int, where: str, drops: Drops
) -> tuple[Float32[np.ndarray, "n 4"], list[str]]:
    """Boxes as (x_min, y_min, x_max, y_max) within the picture, and their names.

    A box that reaches outside is clipped; one that is not finite, or that has (or keeps) no area,
    is dropped; both are counted.
    """
    kept, names = [], []
    limits = np.array([width, height, width, height], np.float64)
    for box in boxes:
        x, y, w, h = box.xywh
        told = f"{where}, {box.origin}: box {[round(v, 2) for v in box.xywh]}"
        if not np.isfinite(box.xywh).all():
            drops.drop("boxes: not finite", f"{told} is not finite")
            continue
        if min(w, h) < _MIN_SIDE:
            drops.drop("boxes: no area", f"{told} has a side under {_MIN_SIDE:g} pixel")
            continue
        corners = np.array([x, y, x + w, y + h])
        inside = np.clip(corners, 0.0, limits)
        if (inside[2:] - inside[:2]).min() < _MIN_SIDE:
            drops.drop("boxes: outside the image", f"{told} lies outside {width}x{height} pixels")
            continue
        if np.abs(corners - inside).max() > _SLACK:
            drops.mend("boxes: clipped", f"{told} reached out of {width}x{height} pixels")
        kept.append(inside)
        names.append(box.name)
    return np.array(kept, np.float32).reshape(-1, 4), names


def _record(
    example: RawExample, picture: Picture, phrases: Sequence[str], kind: str, drops: Drops
) -> Record | None:
    """The record of an example, or None (counted) where it is of no use."""
    where = f"{example.image} (image {example.image_id})"
    if picture.problem:
        drops.drop("images: unreadable", f"{where}: {picture.problem}")
        return None
    size = picture.original_size
    if example.size is not None and example.size != size:
        # Its boxes are in pixels of another picture: a turned one (EXIF), or another resolution.
        annotated = f"annotated as {example.size[1]}x{example.size[0]}"
        drops.drop(
            "images: another size", f"{where}: {annotated}, the file has {size[1]}x{size[0]}"
        )
        return None
    boxes, names = clip_boxes(example.boxes, *size, where, drops)
    if kind == "grounding" and not len(boxes):
        drops.drop("captions: no box", f"{where}: no usable box is tied to its caption")
        return None
    names = [normalize(name) for name in names]
    texts = names
    if kind == "image_text":
        texts = [normalize(text) for text in (example.caption, *phrases)]
    concepts = tuple(dict.fromkeys(texts))
    return Record(
        image=picture.jpeg,
        height=picture.height,
        width=picture.width,
        image_id=example.image_id,
        boxes=boxes,
        labels=np.array([concepts.index(name) for name in names], np.int32),
        concepts=concepts,
    )
