"""The plan carried out: records read, pictures drawn, batches ready for the device.

One thread of Python follows the plan and reads records by their number; tf.data parses, decodes,
resizes and stacks them in C++; what is left for numpy is small (boxes and labels). One tf.data
graph serves every kind and canvas of a run, in the order of the steps.

TensorFlow is imported by that thread, not by this module: `batches` returns at once, and the ten
seconds that the import takes are spent while the caller compiles its first step.
"""

import collections
import contextlib
import ctypes
import dataclasses
import logging
import os
import queue
import resource
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent import futures

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Bool, Float, Int

from detclipv2_jax.common.errors import UserError

# records here and not in the thread: TensorFlow Datasets, while it is imported, replaces the import
# of all threads, also of those that trace a step.
from detclipv2_jax.data import records as records_lib
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import Kind, Source
from detclipv2_jax.data.plan import Plan, StepPlan

_READ_THREADS = 16  # reads wait for disks and networks, not for cores
_READ_BYTES = 1 << 16  # of a file at once: about a picture, since the next one lies elsewhere
_CERTAIN = 1000  # records after which the share of broken ones is taken at its word
_PATIENCE = 30.0  # seconds for the thread to end; importing TensorFlow is the longest it can be at
_log = logging.getLogger(__name__)


def batches(
    plan: Plan,
    sources: Mapping[str, Source],
    transforms: Mapping[Kind, transforms_lib.TransformConfig],
    *,
    start: int,
    stop: int,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
    prefetch: int = 2,
    max_broken_share: float = 0.05,
) -> "Batches":
    """(StepPlan, Batch) of the steps from `start` to before `stop`, read in the background.

    The same for any `start`, and for any number of processes up to how it is sliced: process i of n
    holds rows i * B/n to (i + 1) * B/n of every array of the global batch but `tokens` and
    `token_mask`, which are everybody's. A record that cannot be read or decoded becomes an empty
    slot; its concepts stay in the table.

    Args:
        plan: what every step sees.
        sources: the opened sources by name.
        transforms: augmentation of each kind that is planned.
        start: first step.
        stop: the step after the last.
        process_index: which slice of the global batch to read.
        process_count: into how many slices it is cut; must divide every batch size.
        seed: of the augmentation; the plan's if None.
        prefetch: batches kept ready, beside about three in the making.
        max_broken_share: the share of a source's records that may be unreadable.

    Raises:
        UserError: at once, if a batch size cannot be sliced or a kind has no transform; while
            iterating, if too many records of a source are broken or a file cannot be opened.
    """
    for kind, config in plan.kinds.items():
        if kind not in transforms:
            raise UserError(f"{kind}: no transform is configured, add one for this kind")
        if config.batch_size % process_count:
            raise UserError(
                f"{kind}: `batch_size` {config.batch_size} cannot be sliced for {process_count} "
                "processes, choose a multiple"
            )
    reader = _Reader(
        plan=plan,
        sources=sources,
        transforms=transforms,
        steps=range(start, stop),
        process_index=process_index,
        process_count=process_count,
        seed=plan.seed if seed is None else seed,
    )
    return Batches(reader, prefetch, max_broken_share)


@dataclasses.dataclass(frozen=True)
class _Ready:
    """A batch on its way from the reader to the loop, with what went wrong in it."""

    plan: StepPlan
    batch: Batch
    read: Mapping[str, int]  # records by source
    broken: tuple[tuple[str, int, str], ...]  # (source, record, explanation)
    cut_boxes: int


class Batches(Iterator[tuple[StepPlan, Batch]]):
    """Iterator over the batches of a run. Close it, or let it go, to end its thread.

    Attributes tell what this process has handed out so far:
        read: records by source.
        broken: records by source that could not be read or decoded and became empty slots.
        cut_boxes: boxes beyond an image's `max_boxes`.
        dropped_concepts: positives beyond a step's `table_size`; their boxes and texts are gone.
    """

    def __init__(self, reader: "_Reader", prefetch: int, max_broken_share: float):
        names = [name for kind in reader.plan.kinds.values() for name in kind.sources]
        self.read = dict.fromkeys(names, 0)
        self.broken = dict.fromkeys(names, 0)
        self.cut_boxes = 0
        self.dropped_concepts = 0
        self._sizes = {name: len(reader.sources[name]) for name in names}
        self._share = max_broken_share
        self._told: set[tuple[str, int]] = set()
        self._queue: queue.Queue = queue.Queue(maxsize=max(prefetch, 1))
        thread = threading.Thread(
            target=_fill, args=(reader, self._queue), daemon=True, name="batches"
        )
        # Runs at the latest when the interpreter exits: TensorFlow's threads must not outlive it.
        self._finalizer = weakref.finalize(self, _end, reader, self._queue, thread)
        thread.start()

    def close(self) -> None:
        """End the thread; what it has read ahead is dropped."""
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

    @property
    def counts(self) -> dict[str, int]:
        """What was left out so far, as one flat dictionary for logs."""
        counts = {"cut_boxes": self.cut_boxes, "dropped_concepts": self.dropped_concepts}
        return counts | {f"broken/{name}": count for name, count in self.broken.items()}

    def _count(self, item: _Ready) -> None:
        self.cut_boxes += item.cut_boxes
        self.dropped_concepts += item.plan.dropped
        for name, count in item.read.items():
            self.read[name] += count
        for name, record, explanation in item.broken:
            self.broken[name] += 1
            if (name, record) not in self._told:
                self._told.add((name, record))
                _log.warning("skipped record %d of source %r: %s", record, name, explanation)
        for name, _, explanation in item.broken:
            self._check_share(name, explanation)

    def _check_share(self, name: str, explanation: str) -> None:
        # A few records prove nothing of a large source; of a small one there are no more to come.
        seen = max(self.read[name], min(self._sizes[name], _CERTAIN))
        if self.broken[name] > self._share * seen:
            self.close()
            raise UserError(
                f"source {name!r}: {self.broken[name]} of {self.read[name]} records read are "
                f"broken, more than the allowed share of {self._share:g} (last: {explanation}); "
                "prepare it again or raise `max_broken_share`"
            )


def _fill(reader: "_Reader", ready: queue.Queue) -> None:
    try:
        for item in reader.run():
            ready.put(item)
            if reader.stopped.is_set():
                return
        ready.put(None)
    except BaseException as error:  # whatever it is, it belongs into the caller's thread
        ready.put(error)


def _end(reader: "_Reader", ready: queue.Queue, thread: threading.Thread) -> None:
    """Stop the thread and see it end: it looks up between batches."""
    reader.stopped.set()
    deadline = time.monotonic() + _PATIENCE
    while thread.is_alive() and time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            ready.get(timeout=0.01)  # makes room for a put that waits


@dataclasses.dataclass(frozen=True, eq=False)
class _Slice:
    """This process's part of a step: b canvases with p pictures, one each or four of a mosaic."""

    plan: StepPlan
    texts: Int[np.ndarray, "b C"]
    canvases: Int[np.ndarray, " p"]  # which canvas each picture is on
    quarters: Int[np.ndarray, " p"]  # 0 to 3, row by row; 0 where it has a canvas of its own
    corners: Int[np.ndarray, "p 2"]  # (y, x) of its place there, pixels
    mosaic: Bool[np.ndarray, " b"]
    sources: Int[np.ndarray, " p"]
    records: Int[np.ndarray, " p"]
    data: list[bytes | None]  # serialized records; None: an empty slot, or unreadable
    concepts: Int[np.ndarray, " p"]  # how many concepts each picture's record has
    placement: transforms_lib.Placement


class _Reader:
    """Reads this process's slice of the steps, in its own thread."""

    def __init__(
        self,
        plan: Plan,
        sources: Mapping[str, Source],
        transforms: Mapping[Kind, transforms_lib.TransformConfig],
        steps: range,
        process_index: int,
        process_count: int,
        seed: int,
    ):
        self.plan = plan
        self.sources = sources
        self.stopped = threading.Event()
        self._transforms = transforms
        self._steps = steps
        self._process = process_index, process_count
        self._seed = seed
        self._files = _Files(sources)
        self._asked: collections.deque[_Slice] = collections.deque()
        self._error: Exception | None = None

    def run(self) -> Iterator[_Ready]:
        """Batches in the order of the steps."""
        graph = _dataset(self._ask, _cores())
        for drawn in graph.as_numpy_iterator():
            yield self._assemble(self._asked.popleft(), drawn)
        if self._error is not None:
            raise self._error

    def _ask(self):
        """What tf.data is fed, a step an element; runs ahead of `run`, in TensorFlow's thread."""
        for step in self._steps:
            if self.stopped.is_set():
                return
            try:
                part = self._slice(self.plan.plan(step))
            except Exception as error:  # tf.data would make a string of it
                self._error = error
                return
            self._asked.append(part)
            slots = [slot for slot, data in enumerate(part.data) if data is not None]
            yield {
                "slot": np.array(slots, np.int32),
                "record": np.array([part.data[slot] for slot in slots], object),
                "frame": part.placement.frames()[slots],
                "concepts": part.concepts[slots],
                "canvas": np.array(part.plan.shape, np.int32),
            }

    def _slice(self, plan: StepPlan) -> _Slice:
        """Read this process's records of a step and decide what is done to them."""
        kind = self.plan.kinds[plan.kind]
        index, count = self._process
        size = kind.batch_size // count
        rows = slice(index * size, (index + 1) * size)
        extra = plan.extra_records[rows]
        owners, numbers = np.nonzero(extra >= 0)
        canvases = np.concatenate([np.arange(size), owners])
        quarters = np.concatenate([np.zeros(size, np.int64), numbers + 1])
        mosaic = (extra >= 0).any(axis=1)
        sources = np.concatenate([plan.sources[rows], plan.extra_sources[rows][owners, numbers]])
        records = np.concatenate([plan.records[rows], extra[owners, numbers]])
        data: list[bytes | None] = [None] * len(records)
        heights, widths, concepts = np.ones((3, len(records)), np.int32)
        seeds = np.zeros(len(records), np.uint64)
        for number, name in enumerate(kind.sources):
            mine = np.flatnonzero((sources == number) & (records >= 0))
            source, wanted = self.sources[name], records[mine]
            heights[mine], widths[mine] = source.height[wanted], source.width[wanted]
            offsets = source.positives_offsets
            concepts[mine] = offsets[wanted + 1] - offsets[wanted]
            seeds[mine] = transforms_lib.seeds(self._seed, plan.epoch, name, wanted)
            for picture, content in zip(mine, self._files.read(name, wanted)):
                data[picture] = content
        half = np.array(plan.shape) // 2
        room = np.where(mosaic[canvases, None], half, plan.shape)
        config = self._transforms[plan.kind]
        placement = transforms_lib.place(config, room, heights, widths, seeds)
        corners = np.stack(np.divmod(quarters, 2), axis=1) * half
        return _Slice(
            plan, plan.texts[rows], canvases, quarters, corners, mosaic, sources, records, data,
            concepts, placement,
        )  # fmt: skip

    def _assemble(self, part: _Slice, drawn: Mapping[str, np.ndarray]) -> _Ready:
        """Put what was drawn into its slots, and the boxes and labels into the step's terms."""
        plan, size = part.plan, len(part.mosaic)
        good = np.zeros(len(part.records), bool)
        good[drawn["slot"]] = True
        filled = np.bincount(part.canvases[good], minlength=size) > 0
        images = drawn["image"]
        if not good.all() or part.mosaic.any():
            images = self._canvases(part, drawn)
        sizes = np.where(part.mosaic[:, None], plan.shape, part.placement.size[:size])
        boxes, labels, cut = self._boxes(part, good, drawn)
        batch = Batch(
            images=images,
            sizes=np.where(filled[:, None], sizes, 0).astype(np.int32),
            boxes=boxes,
            labels=labels,
            texts=np.where(filled[:, None], part.texts, -1),
            tokens=self.plan.vocabulary.tokens(plan.concepts, plan.kind),
            token_mask=plan.concepts >= 0,
            kind=plan.kind,
        )
        names = np.array(self.plan.kinds[plan.kind].sources, object)[part.sources]
        read = collections.Counter(names[part.records >= 0].tolist())
        broken = tuple(
            (names[slot], int(part.records[slot]), _explain(part.data[slot]))
            for slot in np.flatnonzero(~good & (part.records >= 0))
        )
        return _Ready(plan, batch, read, broken, cut)

    def _canvases(self, part: _Slice, drawn: Mapping[str, np.ndarray]) -> np.ndarray:
        """The drawn pictures in their places, where not each has a canvas of its own."""
        images = np.zeros((len(part.mosaic), *part.plan.shape, 3), np.uint8)
        shared = part.mosaic[part.canvases[drawn["slot"]]]
        images[part.canvases[drawn["slot"][~shared]]] = drawn["image"][~shared]
        height, width = np.array(part.plan.shape) // 2
        for picture in np.flatnonzero(shared):
            slot = drawn["slot"][picture]
            y, x = part.corners[slot]
            place = images[part.canvases[slot], y : y + height, x : x + width]
            place[:] = drawn["image"][picture, :height, :width]
        return images

    def _boxes(
        self, part: _Slice, good: np.ndarray, drawn: Mapping[str, np.ndarray]
    ) -> tuple[Float[np.ndarray, "b N 4"], Int[np.ndarray, "b N"], int]:
        """Boxes on the canvas and their rows of the table, largest first; how many are too many.

        A box whose concept found no row keeps its place with label -1: the loss must know that
        something is there.
        """
        kind = self.plan.kinds[part.plan.kind]
        ids = np.full((len(good), drawn["labels"].shape[1]), -1, np.int32)
        boxes = np.zeros((*ids.shape, 4), np.float32)
        ids[drawn["slot"]], boxes[drawn["slot"]] = drawn["labels"], drawn["boxes"]
        for number, name in enumerate(kind.sources):
            mine = np.flatnonzero(good & (part.sources == number))
            source, to_global = self.sources[name], self.plan.vocabulary.local_to_global[name]
            slots, places = np.nonzero(ids[mine] >= 0)
            slots = mine[slots]
            # A label is a place among its record's concepts, which the index lists in that order.
            starts = source.positives_offsets[part.records[slots]]
            ids[slots, places] = to_global[source.positives[starts + ids[slots, places]]]
        labels = part.plan.rows(ids.reshape(-1)).reshape(ids.shape)
        boxes, kept = transforms_lib.move_boxes(part.placement, boxes)
        kept &= ids >= 0
        boxes += np.tile(part.corners[:, None, ::-1], 2) * kept[..., None]
        boxes, labels, kept = self._by_canvas(part, boxes, labels, kept)
        area = np.where(kept, (boxes[..., 2:] - boxes[..., :2]).prod(-1), -1)
        order = np.argsort(-area, axis=1, kind="stable")[:, : kind.max_boxes]
        chosen = np.take_along_axis(kept, order, axis=1)
        boxes = np.take_along_axis(boxes, order[..., None], axis=1)
        labels = np.take_along_axis(labels, order, axis=1)
        padding = (0, 0), (0, kind.max_boxes - order.shape[1])
        return (
            np.pad(np.where(chosen[..., None], boxes, 0), (*padding, (0, 0))),
            np.pad(np.where(chosen, labels, -1), padding, constant_values=-1),
            int(kept.sum() - chosen.sum()),
        )

    def _by_canvas(self, part: _Slice, *arrays: np.ndarray) -> Iterator[np.ndarray]:
        """(p, N, …) arrays as (b, N, …), or (b, 4 N, …) where a canvas may have four pictures."""
        if not part.mosaic.any():
            yield from arrays
            return
        for array in arrays:
            gathered = np.zeros((len(part.mosaic), 4, *array.shape[1:]), array.dtype)
            gathered[part.canvases, part.quarters] = array
            yield gathered.reshape(len(gathered), -1, *array.shape[2:])


class _Files:
    """Random access to the records of several sources; files are opened when first asked for."""

    def __init__(self, sources: Mapping[str, Source]):
        self._paths = {name: source.shard_paths for name, source in sources.items()}
        self._starts = {name: source.shard_starts for name, source in sources.items()}
        self._open: dict[str, array_record_module.ArrayRecordReader] = {}
        self._pool = futures.ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="records")
        _allow_open_files(sum(map(len, self._paths.values())))

    def read(self, name: str, numbers: Int[np.ndarray, " n"]) -> list[bytes | None]:
        """Serialized records by number; None for each that cannot be read."""
        starts = self._starts[name]
        shards = np.searchsorted(starts, numbers, side="right") - 1
        groups = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
        paths = [self._paths[name][shards[group[0]]] for group in groups]
        local = [(numbers - starts[shards])[group].tolist() for group in groups]
        result: list[bytes | None] = [None] * len(numbers)
        for group, contents in zip(groups, self._pool.map(self._read_shard, paths, local)):
            for place, content in zip(group, contents):
                result[place] = content
        return result

    def _read_shard(self, path: str, numbers: list[int]) -> list[bytes | None]:
        # Calls come one after another, each with one group a file: no two threads share a reader.
        if path not in self._open:
            self._open[path] = _open(path)
        # One by one: the reader would spread a list over threads of its own, which costs more than
        # it saves where a file is cached, and of a source too large for that a step asks each of
        # its many files for a record or two.
        return [_read_one(self._open[path], number) for number in numbers]


def _read_one(reader: array_record_module.ArrayRecordReader, number: int) -> bytes | None:
    try:
        return reader.read([number])[0]
    except RuntimeError:  # a damaged stretch: its neighbors are good
        return None


def _open(path: str) -> array_record_module.ArrayRecordReader:
    options = "readahead_buffer_size:0,max_parallelism:0"  # for random access
    reader = array_record_module.ArrayRecordReader(
        path, options, file_reader_buffer_size=_READ_BYTES
    )
    if not reader.ok():
        raise UserError(f"{path}: cannot be opened as records; prepare its source again")
    return reader


def _allow_open_files(count: int) -> None:
    """Raise this process's limit where the system lets it: web-scale sources have many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024  # for everything else that the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Have malloc reuse what pictures leave instead of giving it back to the system.

    Each picture takes and frees some megabytes; returned and taken anew, their pages cost a tenth
    of the time of the whole pipeline. Only glibc has these settings; it caps the pieces at 32 MiB.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)  # the size of a thread's heap: none is ever taken down


def _dataset(generate, parallel: int):
    """The tf.data graph: elements of `generate` in, for each a stack of its pictures out.

    A record that cannot be parsed or drawn is left out of its stack; `slot` tells which are there.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banner about this processor
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    _keep_freed_memory()

    @tf.autograph.experimental.do_not_convert
    def picture(slot, record, frame, concepts):
        example = records_lib.parse(record)
        labels = tf.cast(example["labels"], tf.int32)
        counts = tf.shape(example["boxes"])[0], tf.shape(example["concepts"])[0]
        agree = tf.reduce_all(tf.stack(counts) == tf.stack([tf.shape(labels)[0], concepts]))
        places = tf.reduce_all((labels >= 0) & (labels < concepts))
        # The plain operation: `tf.debugging` would guard it by a condition, at each picture.
        valid = tf.raw_ops.Assert(condition=agree & places, data=["contradictory"])
        with tf.control_dependencies([valid]):
            image = transforms_lib.draw(example["image"], frame)
        return {"slot": slot, "image": image, "boxes": example["boxes"], "labels": labels}

    @tf.autograph.experimental.do_not_convert
    def stack(step):
        canvas = step["canvas"]
        rows = tuple(step[name] for name in ("slot", "record", "frame", "concepts"))
        pictures = tf.data.Dataset.from_tensor_slices(rows)
        pictures = pictures.map(picture, num_parallel_calls=parallel).ignore_errors()
        count = tf.maximum(tf.size(step["slot"], out_type=tf.int64), 1)
        # Stacking pads each picture to the canvas, in the one copy that it has to make.
        shape = tf.concat([tf.cast(canvas, tf.int64), [3]], axis=0)
        shapes = {"slot": [], "image": shape, "boxes": [None, 4], "labels": [None]}
        padding = {"slot": -1, "image": tf.constant(0, tf.uint8), "boxes": 0.0, "labels": -1}
        pictures = pictures.padded_batch(count, shapes, padding)
        # A step without a single picture is an element too.
        nothing = {
            "slot": tf.zeros([0], tf.int32),
            "image": tf.zeros([0, canvas[0], canvas[1], 3], tf.uint8),
            "boxes": tf.zeros([0, 0, 4]),
            "labels": tf.zeros([0, 0], tf.int32),
        }
        return pictures.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1)

    steps = tf.data.Dataset.from_generator(
        generate,
        output_signature={
            "slot": tf.TensorSpec([None], tf.int32),
            "record": tf.TensorSpec([None], tf.string),
            "frame": tf.TensorSpec([None, 8], tf.int32),
            "concepts": tf.TensorSpec([None], tf.int32),
            "canvas": tf.TensorSpec([2], tf.int32),
        },
    ).prefetch(1)
    # Two steps are worked on at once, so that no core waits for the last picture of a stack.
    stacks = steps.interleave(stack, cycle_length=2, num_parallel_calls=2, deterministic=True)
    options = tf.data.Options()
    # There is nothing to tune, and with it the end of the data took up to 40 s to pass.
    options.autotune.enabled = False
    return stacks.prefetch(1).with_options(options)


def _explain(data: bytes | None) -> str:
    """Why a record could not be used, with its image id if that can be read."""
    if data is None:
        return "its file is damaged there"
    import tensorflow as tf

    try:
        record = records_lib.decode(data)
    except ValueError:
        return "it is no valid record"
    try:
        height, width = tf.io.decode_jpeg(record.image, channels=3).shape[:2]
    except tf.errors.InvalidArgumentError:
        return f"image {record.image_id!r} cannot be decoded"
    return f"image {record.image_id!r}, {height}x{width} pixels, does not fit its index or labels"
