"""The plan of a run: the batch of every step, as a pure function of (seed, step).

Given the sources' offline indexes, a plan says for every step: the kind of data, the canvas, the
records of the global batch, and the concepts that the global batch is scored on. Every process
computes the same plan and reads its slice of it. So a run resumes anywhere with nothing about data
in its checkpoint, and sees the same batches on any number of processes. Numpy only.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import concept_table
from detclipv2_jax.data import rungs as rungs_lib
from detclipv2_jax.data.concept_table import KeptPositives, Positives
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import KINDS, TEXT_KINDS, Kind, Source
from detclipv2_jax.data.scoring import Images, Scorer
from detclipv2_jax.data.vocabulary import Vocabulary

# Purposes of random streams: streams of one seed with different purposes are independent.
_SEQUENCE, _ORDER, _CONCEPTS, _MOSAIC, _RUNGS, _BARE = range(6)


@dataclasses.dataclass(frozen=True, eq=False)
class StepPlan:
    """The global batch of one step, before any image is read."""

    step: int
    epoch: int
    repetition: int  # which of the epoch's passes over the kind's records, from 0
    kind: Kind
    shape: tuple[int, int]  # canvas (height, width) in pixels
    sources: Int[np.ndarray, " B"]  # index into `all_sources` of the kind
    records: Int[np.ndarray, " B"]  # record number in its source; -1: an empty slot
    # Three more records for each canvas with a mosaic, drawn at random; -1: none.
    extra_sources: Int[np.ndarray, "B 3"]
    extra_records: Int[np.ndarray, "B 3"]
    # Kinds with texts: rows of `concepts` of each image, the caption or class name first; -1 pads
    texts: Int[np.ndarray, "B C"]
    concepts: Int[np.ndarray, " M"]  # global ids: positives ascending, negatives ascending, -1 pads
    scored: Bool[np.ndarray, "B M"]  # as in `Batch.scored`
    bare: Bool[np.ndarray, " M"]  # rows that are encoded without their definitions
    positives: int  # how many of `concepts` belong to a record of the batch
    dropped: int  # positives of the batch that the table has no row for
    negatives: int  # how many of `concepts` are negatives
    wanted_negatives: int  # how many the images drew: more than there were rows for, or equal

    def rows(self, ids: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the row of the concept table for each global id, int32; -1 where it has none."""
        return concept_table.rows_of(self.concepts, ids)


class _Records(NamedTuple):
    """Records of one kind: the index of the source and the number in it; -1: none."""

    sources: Int[np.ndarray, "..."]
    records: Int[np.ndarray, "..."]

    @classmethod
    def empty(cls, *shape: int) -> "_Records":
        return cls(np.zeros(shape, np.int16), np.full(shape, -1, np.int64))


@dataclasses.dataclass(frozen=True, eq=False)
class _Bucket:
    """The records of one kind that share a canvas, numbered through all sources of the kind.

    Records of sources that are only rehearsed have buckets of their own: their images must not be
    scored on names that nobody looked for when they were annotated, and the other way round.
    """

    kind: Kind
    shape_index: int
    rehearsed: bool
    members: Int[np.ndarray, " n"]
    records: int  # of the members, per pass
    passes: int  # per epoch
    batches: int  # per pass


class _Position(NamedTuple):
    """The place of a step's batch in the run."""

    epoch: int
    bucket: int  # index of the bucket
    repetition: int  # the pass over the bucket
    batch: int  # number of the batch in its pass
    rung: int  # index among the kind's `rungs`


@dataclasses.dataclass(frozen=True, eq=False)
class _Epoch:
    """The shuffled batches of one epoch."""

    buckets: Int[np.ndarray, " S"]  # bucket of each step
    batches: Int[np.ndarray, " S"]  # its batch in the bucket, through all passes
    rungs: Int[np.ndarray, " S"]  # index of its rung
    #: (bucket, repetition) → its records in the order of this pass
    orders: dict[tuple[int, int], Int[np.ndarray, " n"]]


class Plan:
    """The plan of every step of a run.

    An epoch holds each record of every kind's `sources` exactly `repeat` times, and of the sources
    in `rehearsal` some records, drawn at random in each epoch. Each repetition is a pass in an
    order of its own, with its own batches, so that no batch holds a record twice. All batches of
    all (kind, canvas) buckets form one shuffled sequence, so a kind is drawn in proportion to its
    batches left (paper §4). In the first epoch a kind may `begin` late. Empty slots fill the last
    batch of a pass. Each step draws its rung, a factor of its bucket's canvas (`rungs.py`).

    Args:
        sources: the prepared sources by name, at least those that `kinds` name.
        vocabulary: the concepts of those sources under global ids.
        kinds: the config of each kind to train on; checked already, as `DataConfig` does.
        seed: another seed gives another order and other negatives.

    Raises:
        UserError: no kind is given, a source is missing or of another kind, a kind has no records,
            or the seed is negative.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        vocabulary: Vocabulary,
        kinds: Mapping[Kind, KindConfig],
        seed: int,
    ):
        if seed < 0:
            raise UserError(f"config.seed is {seed}. It must be at least 0.")
        _check_sources(sources, kinds)
        self.kinds = dict(kinds)
        self.seed = seed
        self.vocabulary = vocabulary
        self._sources = {
            kind: [sources[name] for name in config.all_sources] for kind, config in kinds.items()
        }
        # Records are numbered through all sources of a kind; the number of each source's first one.
        self._starts = {
            kind: np.cumsum([0] + [len(source) for source in group])
            for kind, group in self._sources.items()
        }
        own = sum(len(sources[name]) for config in kinds.values() for name in config.sources)
        self._buckets = [bucket for kind in kinds for bucket in self._make_buckets(kind, own)]
        self.steps_per_epoch = sum(bucket.passes * bucket.batches for bucket in self._buckets)
        self._scorers = {
            kind: Scorer(kind, config, self._sources[kind], vocabulary)
            for kind, config in kinds.items()
        }
        self._lock = threading.Lock()
        self._epochs: dict[int, _Epoch] = {}

    @property
    def batches(self) -> dict[Kind, int]:
        """Batches of each kind per epoch."""
        return {
            kind: sum(b.passes * b.batches for b in self._buckets if b.kind == kind)
            for kind in self.kinds
        }

    @property
    def programs(self) -> list[tuple[Kind, tuple[int, int]]]:
        """The (kind, canvas) pairs that occur: one compiled step each."""
        pairs = (
            self._program(bucket, rung)
            for bucket in self._buckets
            for rung in range(len(self.kinds[bucket.kind].rungs))
        )
        return list(dict.fromkeys(pairs))

    @property
    def rehearsal_batches(self) -> int:
        """Batches of rehearsed records per epoch."""
        return sum(bucket.passes * bucket.batches for bucket in self._buckets if bucket.rehearsed)

    def program(self, step: int) -> tuple[Kind, tuple[int, int]]:
        """Return the (kind, canvas) of a step, without the rest of its plan."""
        position = self._position(step)
        return self._program(self._buckets[position.bucket], position.rung)

    def plan(self, step: int) -> StepPlan:
        """Return the plan of one step, counted from 0 over all epochs."""
        position = self._position(step)
        bucket = self._buckets[position.bucket]
        config = self.kinds[bucket.kind]
        own = self._own_records(position)
        extra = self._extra_records(step, bucket, own)
        images = Images.of(*own, *extra)
        positives = self._positives(bucket.kind, images)
        generator = self._generator(_CONCEPTS, step)
        kept = self._kept_positives(generator, bucket.kind, positives)
        scorer = self._scorers[bucket.kind]
        draws = scorer.draw(generator, images, positives, bucket.rehearsed)
        table = concept_table.make_table(generator, config.table_size, *kept, draws.ids)
        texts = np.full((config.batch_size, config.texts_per_image), -1, np.int32)
        if bucket.kind in TEXT_KINDS:
            texts[images.slots[positives.images], positives.ranks] = table.rows(positives.ids)
        return StepPlan(
            step=step,
            epoch=position.epoch,
            repetition=position.repetition,
            kind=bucket.kind,
            shape=self._program(bucket, position.rung)[1],
            sources=own.sources,
            records=own.records,
            extra_sources=extra.sources,
            extra_records=extra.records,
            texts=texts,
            concepts=table.concepts,
            bare=self._generator(_BARE, step).random(config.table_size) < config.definitions_drop,
            scored=scorer.scored(table, images, positives, draws),
            positives=table.positives,
            dropped=table.dropped,
            negatives=table.negatives,
            wanted_negatives=table.wanted_negatives,
        )

    def _own_records(self, position: _Position) -> _Records:
        """Return the epoch's own record of each slot of a batch (B)."""
        bucket = self._buckets[position.bucket]
        size = self.kinds[bucket.kind].batch_size
        order = self._order(position)
        numbers = order[position.batch * size : (position.batch + 1) * size]
        own, filled = _Records.empty(size), len(numbers)
        own.sources[:filled], own.records[:filled] = self._located(bucket.kind, numbers)
        return own

    def _extra_records(self, step: int, bucket: _Bucket, own: _Records) -> _Records:
        """Return three more records of the bucket for each slot that is a mosaic (B, 3)."""
        config = self.kinds[bucket.kind]
        extra = _Records.empty(config.batch_size, 3)
        if config.mosaic:
            generator = self._generator(_MOSAIC, step)
            filled = np.count_nonzero(own.records >= 0)
            slots = np.flatnonzero(generator.random(filled) < config.mosaic)
            drawn = generator.integers(len(bucket.members), size=(len(slots), 3))
            found = self._located(bucket.kind, bucket.members[drawn])
            extra.sources[slots], extra.records[slots] = found
        return extra

    def _positives(self, kind: Kind, images: Images) -> Positives:
        """Return the positives of the images of a batch, of texts the first few of each image."""
        config, by_source = self.kinds[kind], []
        for index, name in enumerate(config.all_sources):
            mine = np.flatnonzero(images.sources == index)
            source, to_global = self._sources[kind][index], self.vocabulary.local_to_global[name]
            by_source.append(Positives.of_source(source, to_global, images.records[mine], mine))
        positives = Positives.joined(by_source)
        return positives.first(config.texts_per_image) if kind in TEXT_KINDS else positives

    def _kept_positives(
        self, generator: np.random.Generator, kind: Kind, positives: Positives
    ) -> KeptPositives:
        """Return the positives that get a row of the step's concept table."""
        return concept_table.keep_positives(
            generator,
            concept_table.wanted_concepts(positives),
            self.kinds[kind].table_size,
            captions_first=kind in TEXT_KINDS,
        )

    def _located(self, kind: Kind, numbers: Int[np.ndarray, "..."]) -> _Records:
        """Return the source and the record of numbers that run through all sources of a kind."""
        starts = self._starts[kind]
        sources = np.searchsorted(starts, numbers, side="right") - 1
        return _Records(sources, numbers - starts[sources])

    def _make_buckets(self, kind: Kind, own_records: int) -> list[_Bucket]:
        """Return the buckets of a kind; `own_records`: the records in all kinds' `sources`."""
        config, group = self.kinds[kind], self._sources[kind]
        heights = np.concatenate([source.height for source in group])
        widths = np.concatenate([source.width for source in group])
        nearest = nearest_shape(heights, widths, config.shapes)
        dtype = np.int32 if len(heights) < 2**31 else np.int64
        rehearsed = np.arange(len(heights)) >= self._starts[kind][len(config.sources)]
        wanted = round(config.rehearsal_share * own_records)
        share = min(1.0, wanted / max(rehearsed.sum(), 1))
        buckets = []
        for flag, index in itertools.product((False, True), range(len(config.shapes))):
            members = np.flatnonzero((nearest == index) & (rehearsed == flag)).astype(dtype)
            records = round(share * members.size) if flag else members.size
            if records:
                batches = math.ceil(records / config.batch_size)
                passes = 1 if flag else config.repeat
                buckets.append(_Bucket(kind, index, flag, members, records, passes, batches))
        return buckets

    def _program(self, bucket: _Bucket, rung: int) -> tuple[Kind, tuple[int, int]]:
        config = self.kinds[bucket.kind]
        return bucket.kind, rungs_lib.canvas(config.shapes[bucket.shape_index], config.rungs[rung])

    def _position(self, step: int) -> _Position:
        if step < 0:
            raise ValueError(f"step is {step}, must not be negative")
        number, place = divmod(step, self.steps_per_epoch)
        epoch = self._epoch(number)
        bucket, batch = int(epoch.buckets[place]), int(epoch.batches[place])
        repetition, batch = divmod(batch, self._buckets[bucket].batches)
        return _Position(number, bucket, repetition, batch, int(epoch.rungs[place]))

    def _epoch(self, number: int) -> _Epoch:
        """Return an epoch's batches. Two epochs are kept, because readers run ahead."""
        with self._lock:
            if number not in self._epochs:
                while len(self._epochs) >= 2:
                    self._epochs.pop(next(iter(self._epochs)))
                self._epochs[number] = self._shuffled(number)
            return self._epochs[number]

    def _shuffled(self, number: int) -> _Epoch:
        """Return an epoch's batches in random order: sorted by moments drawn from [begin, 1)."""
        counts = [bucket.passes * bucket.batches for bucket in self._buckets]
        buckets = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        batches = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        begins = [self.kinds[bucket.kind].begin * (number == 0) for bucket in self._buckets]
        begin = np.asarray(begins)[buckets]
        moments = self._generator(_SEQUENCE, number).random(len(buckets))
        order = np.argsort(begin + (1 - begin) * moments, kind="stable")
        rungs = self._drawn_rungs(number, buckets[order])
        return _Epoch(buckets[order], batches[order], rungs, orders={})

    def _drawn_rungs(self, epoch: int, buckets: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
        """Return the index of the rung of each step of an epoch, from the steps' buckets."""
        kinds = list(self.kinds)
        kind_of = np.array([kinds.index(bucket.kind) for bucket in self._buckets])
        moments = epoch + np.arange(len(buckets)) / len(buckets)
        generator = self._generator(_RUNGS, epoch)
        return rungs_lib.draw(list(self.kinds.values()), kind_of[buckets], moments, generator)

    def _order(self, position: _Position) -> Int[np.ndarray, " n"]:
        """Return the records of a bucket in the order of a pass; made on first use."""
        orders = self._epoch(position.epoch).orders
        place = position.bucket, position.repetition
        with self._lock:
            if place not in orders:
                bucket = self._buckets[position.bucket]
                key = (_ORDER, position.epoch, KINDS.index(bucket.kind), bucket.shape_index)
                if bucket.rehearsed:
                    key += (1,)
                elif position.repetition:
                    key += (0, position.repetition)  # longer than the other two
                order = self._generator(*key).permutation(bucket.members)[: bucket.records]
                orders[place] = order
            return orders[place]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, *key))))


def nearest_shape(
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    shapes: Sequence[tuple[int, int]],
) -> Int[np.ndarray, " n"]:
    """Return the index of the canvas of nearest log aspect for each image, int8.

    Of canvases equally near, the first.
    """
    aspects = np.log(np.maximum(heights, 1).astype(np.float32) / np.maximum(widths, 1))
    best = np.zeros(len(aspects), np.int8)
    distance = np.full(len(aspects), np.inf, np.float32)
    for index, (height, width) in enumerate(shapes):
        this = np.abs(aspects - np.float32(math.log(height / width)))
        closer = this < distance
        best[closer], distance[closer] = index, this[closer]
    return best


def _check_sources(sources: Mapping[str, Source], kinds: Mapping[Kind, KindConfig]) -> None:
    """Raise `UserError` unless every kind has sources of its kind, with records."""
    if not kinds:
        raise UserError(
            f"config.data: no kind of data has sources. Set `sources` of one of {', '.join(KINDS)}."
        )
    for kind, config in kinds.items():
        for name in config.all_sources:
            field = "sources" if name in config.sources else "rehearsal"
            if name not in sources:
                raise UserError(
                    f"config.data.{kind}.{field}: source {name!r} is not open. Open it, or use one "
                    f"of {', '.join(sources)}."
                )
            if (found := sources[name].kind) != kind:
                raise UserError(
                    f"config.data.{kind}.{field}: source {name!r} was prepared as {found}. List it "
                    f"in config.data.{found}.{field}."
                )
        lists = [sources[name].absent for name in config.sources]
        if config.federated and lists and not any(lists):
            raise UserError(
                f"config.data.{kind}.federated is True, but {', '.join(config.sources)}: no lists "
                "of names that are absent from an image. Prepare the source again if its archive "
                "has them (LVIS), or set federated to False."
            )
        if not sum(len(sources[name]) for name in config.all_sources):
            names = ", ".join(config.all_sources) or "none are named"
            raise UserError(
                f"config.data.{kind}: its sources ({names}) have no records. Prepare them again or "
                "list others."
            )
