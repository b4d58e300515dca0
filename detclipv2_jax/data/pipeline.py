"""The input pipeline: an iterator over the planned batches, read in the background.

One Python thread follows the plan and reads records by number (`slices.py`, `reader.py`); tf.data
parses, decodes, resizes and stacks them in C++ (`decoding.py`); numpy does the rest, which is small
(boxes and labels). One tf.data graph serves every kind and canvas of a run, in the order of the
steps.

TensorFlow is imported by that thread, not by this module: `batches` returns at once, and the ten
seconds that the import takes are spent while the caller compiles its first step.
"""

import collections
import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import decoding
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import Kind, Source
from detclipv2_jax.data.plan import Plan, StepPlan
from detclipv2_jax.data.slices import Decoded, ReadyBatch, Slice, SliceReader

_LEAST_RECORDS = 1000  # of a large source, before its share of unreadable records is checked
_PATIENCE = 30.0  # seconds to wait for the thread to end; its longest task imports TensorFlow
_log = logging.getLogger(__name__)


def batches(
    plan: Plan,
    sources: Mapping[str, Source],
    *,
    start: int,
    stop: int,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
    prefetch: int = 2,
    max_broken_share: float = 0.05,
) -> "Batches":
    """Return an iterator over (StepPlan, Batch) of the steps from `start` to before `stop`.

    The batches of a step are the same for any `start`. Process i of n gets rows i * B/n to
    (i + 1) * B/n of every array of the global batch, but all rows of `tokens` and `token_mask`. A
    record that cannot be read or decoded becomes an empty slot; its concepts stay in the table.

    Args:
        plan: what every step sees.
        sources: the open sources by name.
        start: first step.
        stop: the step after the last.
        process_index: which slice of the global batch to read.
        process_count: number of slices; must divide every batch size.
        seed: of the augmentation; the plan's if None.
        prefetch: batches kept ready, besides about three in progress.
        max_broken_share: the share of a source's records that may be unreadable.

    Raises:
        UserError: at once, if a batch size cannot be sliced; while iterating, if too many records
            of a source are unreadable or a file cannot be opened.
    """
    for kind, config in plan.kinds.items():
        if config.batch_size % process_count:
            raise UserError(
                f"config.data.{kind}.batch_size is {config.batch_size}, which {process_count} "
                "processes cannot share equally. Set it to a multiple of the number of processes."
            )
    reader = SliceReader(
        plan,
        sources,
        seed=plan.seed if seed is None else seed,
        process_index=process_index,
        process_count=process_count,
    )
    sizes = {
        name: len(sources[name]) for config in plan.kinds.values() for name in config.all_sources
    }
    # Of the whole batch, whichever process counts it: only the first one does.
    counts_concepts = process_index == 0
    producer = _Producer(plan, reader, range(start, stop))
    return Batches(producer, plan.kinds, sizes, prefetch, max_broken_share, counts_concepts)


class Batches(Iterator[tuple[StepPlan, Batch]]):
    """Iterator over the batches of a run. Close it, or drop it, to end its thread."""

    def __init__(
        self,
        producer: "_Producer",
        kinds: Collection[Kind],
        sizes: Mapping[str, int],
        prefetch: int,
        max_broken_share: float,
        counts_concepts: bool,
    ):
        """Start the thread. `sizes`: the records of each source of the `kinds`."""
        self._sizes = sizes
        self._max_broken_share = max_broken_share
        self._counts_concepts = counts_concepts
        names = ["cropped_boxes", "cut_boxes", "cut_labels", "dropped_concepts", "cut_negatives"]
        names += ["unflipped"]
        names += [f"{count}_pixels/{kind}" for count in ("image", "canvas") for kind in kinds]
        names += [f"{count}/{source}" for count in ("read", "unreadable") for source in sizes]
        self._counts = dict.fromkeys(names, 0)
        self._lock = threading.Lock()
        self._reported: set[tuple[str, int]] = set()
        self._queue: queue.Queue = queue.Queue(maxsize=max(prefetch, 1))
        thread = threading.Thread(
            target=_fill, args=(producer, self._queue), daemon=True, name="batches"
        )
        # Runs at the latest when the interpreter exits: TensorFlow's threads must not outlive it.
        self._finalizer = weakref.finalize(self, _end, producer, self._queue, thread)
        thread.start()

    def close(self) -> None:
        """End the thread and drop the batches that it has read ahead."""
        self._finalizer()

    def __next__(self) -> tuple[StepPlan, Batch]:
        item = self._queue.get() if self._finalizer.alive else None
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        self._count(item)
        return item.plan, item.batch

    def counters(self) -> dict[str, int]:
        """Return what happened to the data of the batches handed out so far, as cumulative counts.

        The counts are this process's; their sums over the processes are those of the run. Any
        thread may call this.

        Returns:
            read/NAME: records of source NAME, the unreadable ones included.
            unreadable/NAME: records that could not be read or decoded and became empty slots.
            cropped_boxes: boxes left out because augmentation left too little of them.
            cut_boxes: boxes left out because their canvas had more than `max_boxes`.
            cut_labels: names of boxes left out because a box had more than `labels_per_box`.
            dropped_concepts: concepts of records left out because the step's table had no row for
                them. Texts without a row are left out; boxes stay, without a label.
            unflipped: images that were drawn to be flipped and were not, because one of their
                texts says left or right.
            image_pixels/KIND: pixels of canvases that images of the kind cover.
            canvas_pixels/KIND: pixels of its canvases; what images do not cover is padding.
            cut_negatives: negatives that the images drew and the step's table had no row for.
        """
        with self._lock:
            return dict(self._counts)

    def _count(self, item: ReadyBatch) -> None:
        """Count a batch, and log each unreadable record once."""
        with self._lock:
            self._counts["cropped_boxes"] += item.cropped_boxes
            self._counts["cut_boxes"] += item.cut_boxes
            self._counts["unflipped"] += item.unflipped
            self._counts[f"image_pixels/{item.plan.kind}"] += item.image_pixels
            self._counts[f"canvas_pixels/{item.plan.kind}"] += item.canvas_pixels
            self._counts["cut_labels"] += item.cut_labels
            if self._counts_concepts:
                self._counts["dropped_concepts"] += item.plan.dropped
                cut = item.plan.wanted_negatives - item.plan.negatives
                self._counts["cut_negatives"] += cut
            for name, count in item.read.items():
                self._counts[f"read/{name}"] += count
            for found in item.unreadable:
                self._counts[f"unreadable/{found.source}"] += 1
        for found in item.unreadable:
            if (found.source, found.record) not in self._reported:
                self._reported.add((found.source, found.record))
                _log.warning(
                    "source %r, record %d is skipped: %s", found.source, found.record, found.reason
                )
        for found in item.unreadable:
            self._check_share(found.source, found.reason)

    def _check_share(self, name: str, reason: str) -> None:
        read, unreadable = self._counts[f"read/{name}"], self._counts[f"unreadable/{name}"]
        # The first records of a large source say little about its share. A small source is judged
        # by all of its records, even those not yet read.
        seen = max(read, min(self._sizes[name], _LEAST_RECORDS))
        if unreadable > self._max_broken_share * seen:
            self.close()
            raise UserError(
                f"source {name!r}: {unreadable} of {read} records are unreadable, more than the "
                f"allowed share of {self._max_broken_share:g} (last: {reason}). Prepare it again "
                "or raise config.data.max_broken_share."
            )


class _Producer:
    """Makes the batches of some steps, in a thread of its own."""

    def __init__(self, plan: Plan, reader: SliceReader, steps: range):
        self.stopped = threading.Event()
        self._plan = plan
        self._reader = reader
        self._steps = steps
        self._in_progress: collections.deque[Slice] = collections.deque()
        self._error: Exception | None = None

    def run(self) -> Iterator[ReadyBatch]:
        """Yield the batches in the order of the steps."""
        dataset = decoding.decoded_steps(self._undecoded, _cores())
        for decoded in dataset.as_numpy_iterator():
            yield self._reader.assemble(self._in_progress.popleft(), Decoded(**decoded))
        if self._error is not None:
            raise self._error

    def _undecoded(self) -> Iterator[dict[str, np.ndarray]]:
        """Yield each step's records to tf.data, whose thread runs ahead of `run`."""
        for step in self._steps:
            if self.stopped.is_set():
                return
            try:
                slice_ = self._reader.read(self._plan.plan(step))
            except Exception as error:  # tf.data would turn it into a string
                self._error = error
                return
            self._in_progress.append(slice_)
            yield slice_.undecoded()


def _fill(producer: _Producer, ready: queue.Queue) -> None:
    """Put the batches into the queue, then None, or the error that ended them."""
    try:
        for item in producer.run():
            ready.put(item)
            if producer.stopped.is_set():
                return
        ready.put(None)
    except BaseException as error:  # of whatever type, it must reach the caller's thread
        ready.put(error)


def _end(producer: _Producer, ready: queue.Queue, thread: threading.Thread) -> None:
    """Stop the thread and wait until it ends: it checks for that between batches."""
    producer.stopped.set()
    deadline = time.monotonic() + _PATIENCE
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            ready.get(timeout=0.01)  # makes room for a waiting put


def _cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
