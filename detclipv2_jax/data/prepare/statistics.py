"""What is in prepared sources: sizes, boxes, concepts, tokens, pictures that occur twice.

Sizes and concepts come from the index and cost nothing; boxes are in the records, of which a sample
is read; whether two pictures look alike needs every one of them.
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
from detclipv2_jax.text.tokenizer import CONTEXT, END

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_CHUNK = 512  # records that a process reads at once
_BANDS = 4  # of 16 bits: two looks that differ in fewer bits than bands agree in one of them


def of_index(source: Source) -> dict[str, Any]:
    """Figures that the index alone tells.

    Returns:
        {"records", "height", "width", "aspect", "concepts_a_record": quantiles, "concepts",
        "captions", "unused": concepts that no record has, "tokens": quantiles,
        "tokens_at_limit": share, "frequent": the most frequent names and how many records have
        them}.
    """
    counts = np.diff(source.positives_offsets)
    uses = np.bincount(source.positives, minlength=len(source.keys))
    names = np.flatnonzero(source.vocabulary)
    frequent = names[np.argsort(-uses[names], kind="stable")[:20]]
    lengths = 1 + (np.asarray(source.tokens) == END).argmax(axis=1)
    height, width = source.height.astype(np.float64), source.width.astype(np.float64)
    return {
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


def of_boxes(counts: Int[np.ndarray, " n"], boxes: Float[np.ndarray, "b 4"]) -> dict[str, Any]:
    """Figures of the boxes of some records: `counts` a record, xyxy in pixels of all of them.

    A side is the root of the area; small, medium and large are COCO's (under 32, 32 to 96, over).
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
    """The QUANTILES of some numbers; None of none."""
    return np.quantile(values, QUANTILES).round(4).tolist() if len(values) else None


def share(truth: np.ndarray) -> float | None:
    """The share of what is true, None of nothing."""
    return round(float(np.mean(truth)), 6) if len(truth) else None


def sample_boxes(
    source: Source, count: int, jobs: int = 1
) -> Iterator[tuple[Int[np.ndarray, " n"], Float[np.ndarray, "b 4"]]]:
    """Boxes of about `count` records, evenly spaced: (boxes a record, all boxes) a chunk."""
    step = max(1, len(source) // max(count, 1))
    return _over_records(_boxes, source, range(0, len(source), step), jobs)


def looks(source: Source, jobs: int = 1) -> Iterator[UInt64[np.ndarray, " n"]]:
    """What each picture looks like (`look`), in the order of the records, chunk by chunk."""
    return _over_records(_looks, source, range(len(source)), jobs)


def look(jpeg: bytes) -> np.uint64:
    """64 bits that a picture keeps when it is scaled or compressed anew.

    Each tells whether one of 8 × 8 cells of the grey picture is darker than its right neighbor
    (a "difference hash"). 0 for what cannot be decoded, and for a picture without any change, which
    is like nothing.
    """
    buffer = np.frombuffer(jpeg, np.uint8)
    grey = cv2.imdecode(buffer, cv2.IMREAD_REDUCED_GRAYSCALE_2) if len(buffer) else None
    if grey is None:
        return np.uint64(0)
    cells = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    darker = cells[:, :-1] < cells[:, 1:]
    return np.packbits(darker.reshape(-1)).view(np.uint64)[0]


def alike(
    first: UInt64[np.ndarray, " n"], second: UInt64[np.ndarray, " m"], distance: int = 3
) -> Int[np.ndarray, "p 2"]:
    """Pairs (i, j) of looks that differ in at most `distance` < 4 bits, ascending.

    Two of them agree in one of four bands of 16 bits, so only those that do are compared: memory
    and time grow with such pairs, not with n × m.
    """
    if not 0 <= distance < _BANDS:
        raise ValueError(f"distance {distance} must lie in 0 … {_BANDS - 1}")
    found = [np.zeros((0, 2), np.int64)]
    here, there = (np.flatnonzero(looks_) for looks_ in (first, second))  # 0 is like nothing
    for band in range(_BANDS):
        shift = np.uint64(16 * band)
        ours, theirs = (
            ((looks_[places] >> shift) & np.uint64(0xFFFF)).astype(np.int64)
            for looks_, places in ((first, here), (second, there))
        )
        order = np.argsort(theirs, kind="stable")
        begin = np.searchsorted(theirs[order], ours, "left")
        counts = np.searchsorted(theirs[order], ours, "right") - begin
        for part in _portions(counts, 1 << 22):
            i = np.repeat(here[part], counts[part])
            within = np.arange(counts[part].sum()) - np.repeat(
                np.cumsum(counts[part]) - counts[part], counts[part]
            )
            j = there[order[np.repeat(begin[part], counts[part]) + within]]
            close = np.bitwise_count(first[i] ^ second[j]) <= distance
            found.append(np.stack([i[close], j[close]], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def repeated(looks_: UInt64[np.ndarray, " n"]) -> int:
    """How many pictures look exactly as an earlier one does."""
    known = looks_[looks_ != 0]
    return int(len(known) - len(np.unique(known)))


def overlaps(all_looks: Mapping[str, UInt64[np.ndarray, " n"]]) -> dict[tuple[str, str], int]:
    """For each pair of sources, the pictures of the first that look like one of the second."""
    return {
        (a, b): len(np.unique(alike(all_looks[a], all_looks[b])[:, 0]))
        for a, b in itertools.combinations(all_looks, 2)
    }


def _portions(counts: Int[np.ndarray, " n"], limit: int) -> Iterator[slice]:
    """Slices of at most about `limit` in all, at least one element each."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, "right")), start + 1)
        yield slice(start, stop)
        start = stop


def _over_records(work, source: Source, numbers: Sequence[int], jobs: int) -> Iterator[Any]:
    """`work` on chunks of records, in order, by `jobs` processes."""
    chunks = [numbers[i : i + _CHUNK] for i in range(0, len(numbers), _CHUNK)]
    paths, starts = source.shard_paths, source.shard_starts
    tasks = ((work, paths, starts, np.asarray(chunk)) for chunk in chunks)
    if jobs == 1 or len(chunks) == 1:
        yield from map(_run, tasks)
        return
    pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    with pool:
        yield from pool.map(_run, tasks)


def _run(task) -> Any:
    work, paths, starts, numbers = task
    return work(_read(paths, starts, numbers))


def _read(
    paths: Sequence[str], starts: Int[np.ndarray, " s"], numbers: Int[np.ndarray, " n"]
) -> list[bytes]:
    shards = np.searchsorted(starts, numbers, side="right") - 1
    contents: list[bytes] = []
    for shard in np.unique(shards):  # ascending, as the numbers are
        reader = array_record_module.ArrayRecordReader(paths[shard])
        contents += reader.read((numbers[shards == shard] - starts[shard]).tolist())
    return contents


def _boxes(contents: Sequence[bytes]):
    from detclipv2_jax.data import records

    boxes = [records.decode(content).boxes for content in contents]
    counts = np.array([len(b) for b in boxes], np.int64)
    return counts, np.concatenate([np.zeros((0, 4), np.float32), *boxes])


def _looks(contents: Sequence[bytes]):
    from detclipv2_jax.data import records

    found = (look(records.decode(content).image) for content in contents)
    return np.fromiter(found, np.uint64, len(contents))
