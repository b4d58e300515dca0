"""What every step of a run sees, as a pure function of (seed, step).

Numpy only, from the sources' offline indexes: the kind of data and the canvas of a step, the
records of its global batch, and the concepts that the global batch is scored against. Every process
computes the same plan and reads its slice of it, so a run resumes anywhere without a word about
data in its checkpoint, and sees the same batches on any number of processes.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import KINDS, Kind, Source
from detclipv2_jax.data.vocabulary import Vocabulary

# What a random stream is for: streams of one seed that differ here are independent.
_SEQUENCE, _ORDER, _CONCEPTS, _MOSAIC = range(4)


@dataclasses.dataclass(frozen=True)
class KindPlan:
    """How one kind of data is cut into steps.

    The numbers of the paper, section 4: detection 150 and grounding 100 concepts an image.
    """

    kind: Kind
    sources: tuple[str, ...]
    batch_size: int  # of the global batch
    shapes: tuple[
        tuple[int, int], ...
    ]  # canvases (height, width); a record goes to the one of nearest aspect
    table_size: int  # rows M of the step's concept table
    concepts_per_image: int = (
        0  # concepts an image is filled up to with random ones of the kind's vocabulary
    )
    max_boxes: int = 0  # box slots N an image
    texts_per_image: int = 0  # image_text: concepts C an image, its caption first
    begin: float = 0.0  # share of the first epoch's other batches that come before this kind's
    mosaic: float = 0.0  # share of the canvases that show four records, a quarter each
    # Those of `sources` that are only rehearsed: an epoch takes so many of their records at random.
    rehearsal: tuple[str, ...] = ()
    rehearsal_records: int = 0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"kind {self.kind!r} is unknown: choose one of {', '.join(KINDS)}")
        if not self.sources:
            raise UserError(f"{self.kind}: `sources` is empty, name at least one prepared source")
        if not self.shapes or min(min(shape) for shape in self.shapes) < 1:
            raise UserError(
                f"{self.kind}: `shapes` {self.shapes} must name canvases (height, width)"
            )
        if not 0 <= self.mosaic <= 1 or (self.mosaic and self.kind == "image_text"):
            raise UserError(
                f"{self.kind}: `mosaic` is {self.mosaic}, must lie in [0, 1]; image_text has none"
            )
        if not 0 <= self.begin < 1:
            raise UserError(f"{self.kind}: `begin` is {self.begin}, must lie in [0, 1)")
        for field in ("batch_size", "table_size"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"{self.kind}: `{field}` is {getattr(self, field)}, must be at least 1"
                )
        if strange := set(self.rehearsal) - set(self.sources):
            raise UserError(
                f"{self.kind}: {', '.join(sorted(strange))} cannot be rehearsed, being no source"
            )
        for field in ("concepts_per_image", "max_boxes", "texts_per_image", "rehearsal_records"):
            if getattr(self, field) < 0:
                raise UserError(
                    f"{self.kind}: `{field}` is {getattr(self, field)}, must not be negative"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The global batch of one step, before a byte of a picture is read."""

    step: int
    epoch: int
    kind: Kind
    shape: tuple[int, int]  # canvas (height, width) in pixels
    sources: Int[np.ndarray, " B"]  # index into the kind's sources
    records: Int[np.ndarray, " B"]  # record number in its source; -1: an empty slot
    # The three more records of a mosaic's canvas, drawn at random beside the epoch's own; -1: none.
    extra_sources: Int[np.ndarray, "B 3"]
    extra_records: Int[np.ndarray, "B 3"]
    texts: Int[
        np.ndarray, "B C"
    ]  # image_text: rows of `concepts` of each image, caption first; -1 pads
    concepts: Int[np.ndarray, " M"]  # global ids: positives ascending, negatives ascending, -1 pads
    positives: int  # how many of `concepts` belong to a record of the batch
    dropped: int  # positives of the batch that the table had no row for

    def rows(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Row of the concept table for each global id, int32; -1 for ids that the table lacks."""
        return rows_of(self.concepts, ids)


@dataclasses.dataclass(frozen=True, eq=False)
class _Bucket:
    """The records of one kind that share a canvas, numbered through all sources of the kind.

    What is rehearsed has buckets of its own: its images are not asked for names that nobody looked
    for when they were annotated, nor the others for its names.
    """

    kind: Kind
    shape_index: int
    rehearsed: bool
    members: Int[np.ndarray, " n"]
    records: int  # of the members, an epoch
    batches: int


class Plan:
    """Every step of a run.

    An epoch is each record of each kind exactly once, and of what is only rehearsed as many records
    as planned, drawn anew without repetition. Its batches are those of all (kind, canvas)
    buckets in one shuffled sequence, so a kind is drawn in proportion to its batches left (paper
    section 4); in the first epoch a kind may `begin` late. The last batch of a bucket is filled up
    with empty slots.

    Args:
        sources: the prepared sources by name, at least those that `kinds` name.
        vocabulary: the concepts of those sources under global ids.
        kinds: one entry a kind.
        seed: a non-negative integer; another seed is another order and other negatives.

    Raises:
        UserError: no kind is planned, or one twice; a source is missing, of another kind, or empty.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        vocabulary: Vocabulary,
        kinds: Sequence[KindPlan],
        seed: int,
    ):
        if seed < 0:
            raise UserError(f"seed is {seed}, must not be negative")
        _check(sources, kinds)
        self.kinds: dict[Kind, KindPlan] = {plan.kind: plan for plan in kinds}
        self.seed = seed
        self.vocabulary = vocabulary
        self._sources = {plan.kind: [sources[name] for name in plan.sources] for plan in kinds}
        self._first = {
            kind: np.cumsum([0] + [len(source) for source in group])
            for kind, group in self._sources.items()
        }
        self._buckets = [bucket for plan in kinds for bucket in self._cut(plan)]
        self.steps_per_epoch = sum(bucket.batches for bucket in self._buckets)
        self._pools = {
            (plan.kind, rehearsed): vocabulary.pool(plan.kind, names)
            if plan.concepts_per_image
            else None
            for plan in kinds
            for rehearsed, names in _parts(plan).items()
        }
        self._lock = threading.Lock()
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]] = {}

    @property
    def batches(self) -> dict[Kind, int]:
        """Batches an epoch of each kind."""
        return {
            kind: sum(bucket.batches for bucket in self._buckets if bucket.kind == kind)
            for kind in self.kinds
        }

    @property
    def programs(self) -> list[tuple[Kind, tuple[int, int]]]:
        """The (kind, canvas) pairs that occur: one compiled step each."""
        pairs = [(b.kind, self.kinds[b.kind].shapes[b.shape_index]) for b in self._buckets]
        return list(dict.fromkeys(pairs))

    @property
    def rehearsal_batches(self) -> int:
        """Of all batches of an epoch, those of what is only rehearsed."""
        return sum(bucket.batches for bucket in self._buckets if bucket.rehearsed)

    def program(self, step: int) -> tuple[Kind, tuple[int, int]]:
        """The (kind, canvas) of a step, without the rest of its plan."""
        bucket = self._buckets[self._slot(step)[1]]
        return bucket.kind, self.kinds[bucket.kind].shapes[bucket.shape_index]

    def plan(self, step: int) -> StepPlan:
        """The plan of one step, counted from 0 over all epochs."""
        epoch, number, batch = self._slot(step)
        bucket = self._buckets[number]
        kind = self.kinds[bucket.kind]
        flat = self._order(epoch, number)[batch * kind.batch_size : (batch + 1) * kind.batch_size]
        sources = np.zeros(kind.batch_size, np.int16)
        records = np.full(kind.batch_size, -1, np.int64)
        sources[: len(flat)], records[: len(flat)] = self._located(bucket.kind, flat)
        extra_sources, extra_records = self._extras(kind, step, bucket, len(flat))
        every = [np.concatenate([a, b.reshape(-1)]) for a, b in (
            (sources, extra_sources), (records, extra_records),
        )]  # fmt: skip
        ids, images, ranks = self._positives(kind, *every)
        images = np.where(images < len(records), images, (images - len(records)) // 3)
        pool = self._pools[kind.kind, bucket.rehearsed]
        concepts, positives, dropped = self._concepts(kind, pool, step, ids, ranks, images, records)
        texts = np.full((kind.batch_size, kind.texts_per_image), -1, np.int32)
        if bucket.kind == "image_text":
            texts[images, ranks] = rows_of(concepts, ids)
        return StepPlan(
            step=step,
            epoch=epoch,
            kind=bucket.kind,
            shape=kind.shapes[bucket.shape_index],
            sources=sources,
            records=records,
            extra_sources=extra_sources,
            extra_records=extra_records,
            texts=texts,
            concepts=concepts,
            positives=positives,
            dropped=dropped,
        )

    def _located(self, kind: Kind, flat):
        """Sources and records of numbers that run through all sources of a kind."""
        first = self._first[kind]
        sources = np.searchsorted(first, flat, side="right") - 1
        return sources, flat - first[sources]

    def _extras(self, kind: KindPlan, step: int, bucket: _Bucket, filled: int):
        """Three more records of the bucket for each slot that is a mosaic, -1 for the others."""
        sources = np.zeros((kind.batch_size, 3), np.int16)
        records = np.full((kind.batch_size, 3), -1, np.int64)
        if kind.mosaic:
            generator = self._generator(_MOSAIC, step)
            chosen = np.flatnonzero(generator.random(filled) < kind.mosaic)
            drawn = generator.integers(len(bucket.members), size=(len(chosen), 3))
            sources[chosen], records[chosen] = self._located(kind.kind, bucket.members[drawn])
        return sources, records

    def _cut(self, plan: KindPlan) -> list[_Bucket]:
        group = self._sources[plan.kind]
        heights = np.concatenate([source.height for source in group])
        widths = np.concatenate([source.width for source in group])
        nearest = nearest_shape(heights, widths, plan.shapes)
        dtype = np.int32 if len(heights) < 2**31 else np.int64
        only = [name in plan.rehearsal for name in plan.sources]
        rehearsed = np.repeat(only, [len(source) for source in group])
        share = min(1.0, plan.rehearsal_records / max(rehearsed.sum(), 1))
        buckets = []
        for flag, index in itertools.product((False, True), range(len(plan.shapes))):
            members = np.flatnonzero((nearest == index) & (rehearsed == flag)).astype(dtype)
            records = round(share * members.size) if flag else members.size
            if records:
                batches = math.ceil(records / plan.batch_size)
                buckets.append(_Bucket(plan.kind, index, flag, members, records, batches))
        return buckets

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, *key))))

    def _epoch(self, epoch: int):
        """The sequence of an epoch, a store for its orders. Two are kept, as readers run ahead."""
        with self._lock:
            if epoch not in self._epochs:
                numbers = np.repeat(
                    np.arange(len(self._buckets), dtype=np.int16),
                    [b.batches for b in self._buckets],
                )
                batch = np.concatenate(
                    [np.arange(b.batches, dtype=np.int32) for b in self._buckets]
                )
                # Batches in the order of their moments, uniform in [begin, 1).
                begins = [self.kinds[b.kind].begin * (epoch == 0) for b in self._buckets]
                begin = np.asarray(begins)[numbers]
                moments = self._generator(_SEQUENCE, epoch).random(len(numbers))
                shuffled = np.argsort(begin + (1 - begin) * moments, kind="stable")
                while len(self._epochs) >= 2:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[epoch] = (numbers[shuffled], batch[shuffled], {})
            return self._epochs[epoch]

    def _slot(self, step: int) -> tuple[int, int, int]:
        """Epoch, bucket and batch of the bucket that a step is."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, place = divmod(step, self.steps_per_epoch)
        numbers, batch, _ = self._epoch(epoch)
        return epoch, int(numbers[place]), int(batch[place])

    def _order(self, epoch: int, number: int) -> Int[np.ndarray, " n"]:
        """The records of a bucket in the order of an epoch; made when a step first asks for it."""
        orders = self._epoch(epoch)[2]
        with self._lock:
            if number not in orders:
                bucket = self._buckets[number]
                key = (_ORDER, epoch, KINDS.index(bucket.kind), bucket.shape_index)
                generator = self._generator(*key, *([1] * bucket.rehearsed))
                orders[number] = generator.permutation(bucket.members)[: bucket.records]
            return orders[number]

    def _concepts(self, kind: KindPlan, pool, step: int, ids, ranks, images, records):
        """The concept table of a step: its rows, how many are positives, how many found no room."""
        generator = self._generator(_CONCEPTS, step)
        wanted, lowest_rank = _unique_with_lowest(ids, ranks)
        table = wanted
        if wanted.size > kind.table_size:
            # A caption outlives the phrases taken out of it; otherwise chance decides, so that no
            # concept is left out at every step.
            priority = lowest_rank if kind.kind == "image_text" else np.zeros_like(lowest_rank)
            chosen = np.lexsort((generator.random(wanted.size), priority))[: kind.table_size]
            table = np.sort(wanted[chosen])
        concepts = np.full(kind.table_size, -1, np.int32)
        concepts[: table.size] = table
        room = kind.table_size - table.size
        if room and kind.concepts_per_image:
            owned = np.bincount(images, minlength=kind.batch_size)[records >= 0]
            missing = np.maximum(kind.concepts_per_image - owned, 0)
            taken = self._with_synonyms(wanted, pool)
            drawn = _draw(generator, pool, taken, missing, room)
            concepts[table.size : table.size + drawn.size] = drawn
        return concepts, int(table.size), int(wanted.size - table.size)

    def _with_synonyms(self, ids, pool):
        """Ids, ascending, and those of the pool that the prepared dictionary calls the same."""
        if self.vocabulary.meanings is None:
            return ids
        groups = self.vocabulary.meanings.groups
        present = np.unique(groups[ids])
        return np.union1d(ids, pool[np.isin(groups[pool], present[present >= 0])])

    def _positives(self, kind: KindPlan, sources, records):
        """Every positive of every record: global id, image of the batch, rank in its record."""
        ids, images, ranks = [], [], []
        for index, name in enumerate(kind.sources):
            slots = np.flatnonzero((sources == index) & (records >= 0))
            source = self._sources[kind.kind][index]
            starts = source.positives_offsets[records[slots]]
            counts = source.positives_offsets[records[slots] + 1] - starts
            before = np.cumsum(counts) - counts
            rank = np.arange(counts.sum()) - np.repeat(before, counts)
            local = source.positives[np.repeat(starts, counts) + rank]
            ids.append(self.vocabulary.local_to_global[name][local])
            images.append(np.repeat(slots, counts))
            ranks.append(rank)
        ids, images, ranks = (np.concatenate(parts) for parts in (ids, images, ranks))
        if kind.kind == "image_text":
            kept = ranks < kind.texts_per_image
            ids, images, ranks = ids[kept], images[kept], ranks[kept]
        return ids, images, ranks


def _parts(plan: KindPlan) -> dict[bool, list[str]]:
    """Whether only rehearsed → the sources of which that is so."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    for name in plan.sources:
        parts[name in plan.rehearsal].append(name)
    return parts


def rows_of(concepts: Int[np.ndarray, " M"], ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Row of a concept table (unique ids, -1 pads) for each id, int32; -1 for ids that it lacks."""
    used = np.flatnonzero(concepts >= 0)
    if not used.size:
        return np.full(len(ids), -1, np.int32)
    rows = used[np.argsort(concepts[used])]
    ascending = concepts[rows]
    at = np.minimum(np.searchsorted(ascending, ids), len(rows) - 1)
    return np.where(ascending[at] == ids, rows[at], -1).astype(np.int32)


def nearest_shape(
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    shapes: Sequence[tuple[int, int]],
) -> Int[np.ndarray, " n"]:
    """Index of the canvas of nearest log aspect for each picture, int8; the first of equals."""
    aspects = np.log(np.maximum(heights, 1).astype(np.float32) / np.maximum(widths, 1))
    best = np.zeros(len(aspects), np.int8)
    distance = np.full(len(aspects), np.inf, np.float32)
    for index, (height, width) in enumerate(shapes):
        this = np.abs(aspects - np.float32(math.log(height / width)))
        closer = this < distance
        best[closer], distance[closer] = index, this[closer]
    return best


def _unique_with_lowest(ids, ranks):
    """The unique ids, ascending, and the lowest rank of each."""
    order = np.lexsort((ranks, ids))
    ids, ranks = ids[order], ranks[order]
    first = np.ones(len(ids), bool)
    first[1:] = ids[1:] != ids[:-1]
    return ids[first].astype(np.int32), ranks[first]


def _draw(
    generator: np.random.Generator,
    pool: Int[np.ndarray, " P"],
    positives: Int[np.ndarray, " p"],
    missing: Int[np.ndarray, " b"],
    room: int,
) -> Int[np.ndarray, " n"]:
    """Negatives for a batch: each image draws `missing` different ones; `room` of their union.

    `pool` and `positives`, their synonyms among them, are ascending and unique. A positive of *any*
    image of the batch is drawn for none. Instead of filtering the pool, which may be large, a
    number is drawn among the ids that are left and shifted past the excluded ones before it.
    """
    at = np.searchsorted(pool, positives)
    excluded = (
        at[(at < len(pool)) & (pool[np.minimum(at, len(pool) - 1)] == positives)]
        if len(pool)
        else at[:0]
    )
    left = len(pool) - len(excluded)
    draws = [
        generator.choice(left, min(int(n), left), replace=False, shuffle=False) for n in missing
    ]
    union = np.unique(np.concatenate(draws)) if draws else np.zeros(0, np.int64)
    if union.size > room:
        union = np.sort(generator.choice(union, room, replace=False, shuffle=False))
    shift = np.searchsorted(excluded - np.arange(len(excluded)), union, side="right")
    return pool[(union + shift).astype(np.int64)]


def _check(sources: Mapping[str, Source], kinds: Sequence[KindPlan]) -> None:
    if not kinds:
        raise UserError(
            "no kind of data is planned: name sources for at least one of " + ", ".join(KINDS)
        )
    planned = [plan.kind for plan in kinds]
    for plan in kinds:
        if planned.count(plan.kind) > 1:
            raise UserError(f"{plan.kind} is planned twice: give all its sources to one entry")
        for name in plan.sources:
            if name not in sources:
                raise UserError(
                    f"{plan.kind}: source {name!r} is not among the opened: {', '.join(sources)}"
                )
            if sources[name].kind != plan.kind:
                raise UserError(
                    f"{plan.kind}: source {name!r} was prepared as {sources[name].kind}, "
                    f"list it under {sources[name].kind}"
                )
        if not sum(len(sources[name]) for name in plan.sources):
            raise UserError(f"{plan.kind}: its sources {', '.join(plan.sources)} hold no record")
