"""Statistics of prepared sources: sizes, boxes, concepts, tokens, duplicate images.

Sizes and concepts come from the index and cost nothing. Boxes are in the records, of which a sample
is read. Duplicates are found by a perceptual hash of every image.
"""

import concurrent.futures
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float, Int, UInt64

from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import report
from detclipv2_jax.text.tokenizer import CONTEXT, END

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CHUNK = 512  # records per task of a process
# Bands of 16 bits in a hash: two hashes that differ in fewer bits than bands share a band.
_BANDS = 4
_MAX_PAIRS = 1 << 22  # pairs of hashes that are compared at once


def index_statistics(source: Source) -> dict[str, Any]:
    """Return the statistics that need only the index.

    Returns:
        "records", "concepts", "captions": counts. "unused": concepts that no record has.
        "height", "width" (pixels), "aspect" (width / height), "concepts_a_record", "tokens":
        `quantiles`. "tokens_at_limit": share of the concepts that fill all tokens. "frequent": the
        most frequent names and the number of records that have them. "all_boxes": their number.
        Of detection also "images_without_boxes" and "boxes_per_name", the most frequent first.
    """
    counts = np.diff(source.positives_offsets)
    uses = np.bincount(source.positives, minlength=len(source.keys))
    names = np.flatnonzero(source.vocabulary)
    frequent = names[np.argsort(-uses[names], kind="stable")[:20]]
    lengths = 1 + (np.asarray(source.tokens) == END).argmax(axis=1)
    height, width = source.height.astype(np.float64), source.width.astype(np.float64)
    boxes: dict[str, Any] = {"all_boxes": source.info.get("boxes")}
    if source.kind == "detection":
        per_name = report.boxes_per_name(source)
        boxes = {
            "all_boxes": sum(per_name.values()),
            "images_without_boxes": report.images_without_boxes(source),
            "boxes_per_name": per_name,
        }
    return {
        **boxes,
        "records": len(source),
        "height": quantiles(height),
        "width": quantiles(width),
        "aspect": quantiles(width / np.maximum(height, 1)),
        "concepts_a_record": quantiles(counts),
        "concepts": int(len(source.keys)),
        "captions": int(len(source.keys) - len(names)),
        "unused": int(np.count_nonzero(uses == 0)),
        "tokens": quantiles(lengths),
        "tokens_at_limit": share(lengths == CONTEXT),
        "frequent": {source.concepts[i]["name"]: int(uses[i]) for i in frequent if uses[i]},
    }


def box_statistics(
    counts: Int[np.ndarray, " n"], boxes: Float[np.ndarray, "b 4"]
) -> dict[str, Any]:
    """Return statistics of the boxes of n records.

    Args:
        counts: boxes of each record.
        boxes: of all records, (x_min, y_min, x_max, y_max) in pixels.

    Returns:
        "side" is the square root of the area, in pixels. "small", "medium" and "large" are shares
        by COCO's limits (sides under 32, 32 to 96, and over).
    """
    sides = np.sqrt(np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 0))
    return {
        "records_read": len(counts),
        "boxes_a_record": quantiles(counts),
        "without_boxes": share(counts == 0),
        "side": quantiles(sides),
        "small": share(sides < 32),
        "medium": share((sides >= 32) & (sides < 96)),
        "large": share(sides >= 96),
    }


def quantiles(values: np.ndarray) -> list[float] | None:
    """Return the QUANTILES of some numbers; None if there are no numbers."""
    return np.quantile(values, QUANTILES).round(4).tolist() if len(values) else None


def share(mask: np.ndarray) -> float | None:
    """Return the share of True values; None if there are no values."""
    return round(float(np.mean(mask)), 6) if len(mask) else None


def sample_boxes(
    source: Source, count: int, jobs: int = 1
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "b 4"]]]:
    """Yield the boxes of about `count` evenly spaced records, chunk by chunk.

    Each chunk is (boxes per record, all boxes as xyxy in pixels).
    """
    step = max(1, len(source) // max(count, 1))
    return _map_records(_read_boxes, source, range(0, len(source), step), jobs)


def image_hashes(source: Source, jobs: int = 1) -> Iterator[UInt64[np.ndarray, " n"]]:
    """Yield the `image_hash` of every image, in the order of the records, chunk by chunk."""
    return _map_records(_hash_images, source, range(len(source)), jobs)


def image_hash(jpeg: bytes) -> np.uint64:
    """Return a 64-bit hash that changes little when an image is scaled or compressed again.

    This is a "difference hash": each bit says whether one of 8 × 8 cells of the gray image is
    darker than its right neighbor. It is 0 for an image that cannot be decoded or has one color;
    0 matches no other hash.
    """
    buffer = np.frombuffer(jpeg, np.uint8)
    gray = cv2.imdecode(buffer, cv2.IMREAD_REDUCED_GRAYSCALE_2) if len(buffer) else None
    if gray is None:
        return np.uint64(0)
    cells = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    darker = cells[:, :-1] < cells[:, 1:]
    return np.packbits(darker.reshape(-1)).view(np.uint64)[0]


def match_hashes(
    first: UInt64[np.ndarray, " n"], second: UInt64[np.ndarray, " m"], distance: int = 3
) -> Int[np.ndarray, "p 2"]:
    """Return the pairs (i, j) of hashes that differ in at most `distance` < 4 bits, ascending.

    Such hashes are equal in at least one of four bands of 16 bits. Only hashes that share a band
    are compared, so time and memory grow with their number, not with n × m.
    """
    if not 0 <= distance < _BANDS:
        raise ValueError(f"distance {distance} must lie in 0 … {_BANDS - 1}")
    found = [np.zeros((0, 2), np.int64)]
    here, there = np.flatnonzero(first), np.flatnonzero(second)  # 0 matches nothing
    for band in range(_BANDS):
        shift = np.uint64(16 * band)
        ours, theirs = (
            ((hashes[places] >> shift) & np.uint64(0xFFFF)).astype(np.int64)
            for hashes, places in ((first, here), (second, there))
        )
        order = np.argsort(theirs, kind="stable")
        begin = np.searchsorted(theirs[order], ours, "left")
        counts = np.searchsorted(theirs[order], ours, "right") - begin
        for chunk in _chunks(counts, _MAX_PAIRS):
            i = np.repeat(here[chunk], counts[chunk])
            within = np.arange(counts[chunk].sum()) - np.repeat(
                np.cumsum(counts[chunk]) - counts[chunk], counts[chunk]
            )
            j = there[order[np.repeat(begin[chunk], counts[chunk]) + within]]
            close = np.bitwise_count(first[i] ^ second[j]) <= distance
            found.append(np.stack([i[close], j[close]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def count_repeated(hashes: UInt64[np.ndarray, " n"]) -> int:
    """Return the number of images whose hash equals that of an earlier image."""
    known = hashes[hashes != 0]
    return int(len(known) - len(np.unique(known)))


def count_overlaps(
    hashes: Mapping[str, UInt64[np.ndarray, " n"]],
) -> dict[tuple[str, str], int]:
    """Return, for each pair of sources, how many images of the first match one of the second."""
    return {
        (a, b): len(np.unique(match_hashes(hashes[a], hashes[b])[:, 0]))
        for a, b in itertools.combinations(hashes, 2)
    }


def _chunks(counts: Int[np.ndarray, " n"], limit: int) -> Iterator[slice]:
    """Yield consecutive slices whose counts sum to at most `limit`, or that have one element."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, "right")), start + 1)
        yield slice(start, stop)
        start = stop


def _map_records(work, source: Source, numbers: Sequence[int], jobs: int) -> Iterator[Any]:
    """Yield `work(serialized records)` for chunks of records, in order, with `jobs` processes."""
    chunks = [numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)]
    paths, starts = source.shard_paths, source.shard_starts
    tasks = ((work, paths, starts, np.asarray(chunk)) for chunk in chunks)
    if jobs == 1 or len(chunks) == 1:
        yield from map(_run_task, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with pool:
        yield from pool.map(_run_task, tasks)


def _run_task(task) -> Any:
    work, paths, starts, numbers = task
    return work(_read_records(paths, starts, numbers))


def _read_records(
    paths: Sequence[str], starts: Int[np.ndarray, " s"], numbers: Int[np.ndarray, " n"]
) -> list[bytes]:
    shards = np.searchsorted(starts, numbers, side="right") - 1
    serialized: list[bytes] = []
    for shard in np.unique(shards):  # ascending, as the numbers are
        reader = array_record_module.ArrayRecordReader(paths[shard])
        serialized += reader.read((numbers[shards == shard] - starts[shard]).tolist())
    return serialized


def _read_boxes(serialized: Sequence[bytes]):
    from detclipv2_jax.data import records

    boxes = [records.decode(data).boxes for data in serialized]
    counts = np.array([len(b) for b in boxes], np.int64)
    return counts, np.concatenate([np.zeros((0, 4), np.float32), *boxes])


def _hash_images(serialized: Sequence[bytes]):
    from detclipv2_jax.data import records

    hashes = (image_hash(records.decode(data).image) for data in serialized)
    return np.fromiter(hashes, np.uint64, len(serialized))
