"""Annotation files and a folder of images become a source of records (its layout: index.py).

Every image is decoded once, so that a broken one is found now and not in a run. What is left out is
counted by reason, the first few of each in words, and the counts stay in `info.json`.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from detclipv2_jax.data.concepts import normalise
from detclipv2_jax.data.examples import Archive, Drops, RawBox, RawExample
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.pictures import Options, Picture, checked
from detclipv2_jax.data.records import Record, RecordWriter
from detclipv2_jax.errors import UserError

_MIN_SIDE = 1.0  # pixels; thinner boxes cannot be assigned or regressed
_SLACK = 0.5  # pixels that a box may lie outside without being called so: rounding of exporters


def prepare(
    archives: Sequence[Archive],
    to: Path,
    *,
    name: str,
    inputs: Mapping[str, Any] | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Source:
    """Write the examples of archives of one kind as a source; `inputs` goes to info.json as it is.

    `to` appears when all is written. `UserError` where nothing usable is left.
    """
    (kind,) = {archive.kind for archive in archives}
    drops = Drops()
    names = tuple(itertools.chain.from_iterable(archive.names for archive in archives))
    examples = itertools.chain.from_iterable(archive.examples for archive in archives)
    total = sum(archive.total for archive in archives)
    statistics = {"bytes": 0, "reencoded": 0}
    to.parent.mkdir(parents=True, exist_ok=True)
    with RecordWriter(to, name=name, kind=kind, names=names) as writer:
        pairs = checked(examples, with_phrases=kind == "image_text", options=options)
        for example, picture in tqdm(pairs, desc=name, total=total, unit=" records", disable=None):
            record = _record(example, picture, kind, drops)
            if record is not None:
                writer.write(record)
                statistics["bytes"] += len(record.image)
                statistics["reencoded"] += picture.reencoded
        for archive in archives:
            drops.add(archive.drops)
        _refuse_nothing(archives, kind, len(writer), sum(writer.concepts.counts), drops)
        return writer.finish(
            images=statistics,
            dropped=dict(drops.dropped),
            mended=dict(drops.mended),
            explained=drops.explained,
            created_from=dict(inputs or {}),
        )


def report(source: Source) -> str:
    """A table for people: what was written, what was left out or mended and why."""
    info, concepts = source.info, len(source.keys)
    rows = [("records", len(source)), ("concepts", concepts)]
    rows += [("of which captions", concepts - int(np.count_nonzero(source.vocabulary)))]
    rows += [("images stored anew as JPEG", info["images"]["reencoded"])]
    lines = [f"{source.name} ({source.kind}) in {source.directory}"]
    lines += [f"  {label:<36}{count:>10,}" for label, count in rows if count or label == "records"]
    for title, field in (("dropped", "dropped"), ("mended", "mended")):
        for reason, count in sorted(info[field].items()):
            lines.append(f"  {title + ' ' + reason:<36}{count:>10,}")
            lines += [f"      {sentence}" for sentence in info["explained"].get(reason, ())[:1]]
    return "\n".join(lines)


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


def _record(example: RawExample, picture: Picture, kind: str, drops: Drops) -> Record | None:
    """The record of an example, or None (counted) where it is of no use."""
    where = f"{example.image} (image {example.image_id})"
    if picture.problem:
        drops.drop("images: unreadable", f"{where}: {picture.problem}")
        return None
    size = (picture.height, picture.width)
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
    names = [normalise(name) for name in names]
    texts = names
    if kind == "image_text":
        texts = [normalise(text) for text in (example.caption, *picture.phrases)]
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


def _refuse_nothing(
    archives: Sequence[Archive], kind: str, records: int, named: int, drops: Drops
) -> None:
    """A source without records, or boxes that all had to go, is a mistake in the call: say so."""
    files = ", ".join(str(archive.path) for archive in archives)
    if not records:
        example = f", for example {drops.first()}" if drops.first() else ""
        raise UserError(
            f"{files}: nothing usable in it, {drops.dropped.total()} entries dropped{example}; "
            "check the file, and --images=DIR for where its images are"
        )
    lost = [reason for reason in drops.dropped if reason.startswith("boxes")]
    if kind == "detection" and lost and not named:
        raise UserError(
            f"{files}: not one of its boxes is usable, for example {drops.explained[lost[0]][0]}; "
            "mend the file"
        )
