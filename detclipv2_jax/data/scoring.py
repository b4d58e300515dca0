"""Which concepts each image of a batch is scored on, and which negatives are drawn for it.

An anchor that is matched with a box is always scored on the concepts of that box. What is decided
here is which *other* concepts of the step's table count as absent from an image. A source of
detection data has an exhaustive list of names, its label space: a name outside it was never looked
for. A federated source (LVIS) says even less: for each image it lists names that are absent, and
names of which not every object has a box. Phrases of captions have no label space.

All of it is numpy and a function of the batch and a random generator. Concepts are global ids of
the run's vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from detclipv2_jax.data import concept_table
from detclipv2_jax.data.concept_table import Positives, Table
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import TEXT_KINDS, IdLists, Kind, Source
from detclipv2_jax.data.vocabulary import Vocabulary


class Images(NamedTuple):
    """The n images of a batch: first the own image of each filled slot, then those of mosaics."""

    slots: Int[np.ndarray, " n"]
    sources: Int[np.ndarray, " n"]  # index into `all_sources` of the kind
    records: Int[np.ndarray, " n"]
    filled: int  # slots with an image: the first ones

    @classmethod
    def of(
        cls,
        sources: Int[np.ndarray, " B"],
        records: Int[np.ndarray, " B"],
        extra_sources: Int[np.ndarray, "B 3"],
        extra_records: Int[np.ndarray, "B 3"],
    ) -> "Images":
        """Return the images of a batch, given the records of its slots as in `StepPlan`."""
        filled = np.count_nonzero(records >= 0)
        owners, numbers = np.nonzero(extra_records >= 0)
        return cls(
            slots=np.concatenate([np.arange(filled), owners]),
            sources=np.concatenate([sources[:filled], extra_sources[owners, numbers]]),
            records=np.concatenate([records[:filled], extra_records[owners, numbers]]),
            filled=int(filled),
        )


class Draws(NamedTuple):
    """The negatives that are drawn for the slots of a batch: one entry per slot and concept."""

    ids: Int[np.ndarray, " d"]
    slots: Int[np.ndarray, " d"]

    @classmethod
    def none(cls) -> "Draws":
        """Return no negatives."""
        return cls(np.zeros(0, np.int32), np.zeros(0, np.int64))


class Scorer:
    """Draws the negatives of one kind's batches and decides what each image is scored on."""

    def __init__(
        self, kind: Kind, config: KindConfig, sources: Sequence[Source], vocabulary: Vocabulary
    ):
        """Prepare for the kind's sources, in the order of `config.all_sources`."""
        self._kind, self._config = kind, config
        self._sources, self._vocabulary = sources, vocabulary
        self._to_global = [vocabulary.local_to_global[name] for name in config.all_sources]
        # Phrases have no label space, so grounding draws for all images alike.
        self._by_source = kind == "detection" and config.scored_on != "table"
        if self._by_source:
            self._spaces = [vocabulary.pool(kind, [name]) for name in config.all_sources]
        elif config.concepts_per_image:
            #: whether rehearsed → ids that negatives are drawn from
            self._pools = {
                False: vocabulary.pool(kind, config.sources),
                True: vocabulary.pool(kind, config.rehearsal),
            }
        self._alike = [vocabulary.groups(likeness) for likeness in config.ignore_alike]

    def draw(
        self,
        generator: np.random.Generator,
        images: Images,
        positives: Positives,
        rehearsed: bool,
    ) -> Draws:
        """Draw negatives until each slot has `concepts_per_image` concepts, its own included.

        Where its source has few names, a slot also draws general names.

        None is a positive, or a synonym of a positive, of an image that may be scored on it. With
        label spaces each slot draws from that of its own image; of a federated source, from the
        names that are listed as absent from that image.

        Args:
            generator: source of randomness.
            images: of the batch.
            positives: the concepts that these images own.
            rehearsed: whether the batch is one of rehearsed records.
        """
        if not self._config.concepts_per_image:
            return Draws.none()
        owned = np.bincount(images.slots[positives.images], minlength=images.filled)
        missing = np.maximum(self._config.concepts_per_image - owned, 0)
        if not self._by_source:
            pool = self._pools[rehearsed]
            excluded = self._vocabulary.with_synonyms(np.unique(positives.ids), pool)
            slots = np.arange(images.filled)
            return _joined([(slots, self._drawn(generator, pool, excluded, missing))])
        excluded = self._excluded(images, positives)
        drawn = []
        for source in np.unique(images.sources[: images.filled]):
            slots = np.flatnonzero(images.sources[: images.filled] == source)
            absent = self._lists(source, "absent")
            if absent is None:
                ids = self._drawn(generator, self._spaces[source], excluded, missing[slots])
                drawn += [(slots, ids), (slots, self._general(generator, ids))]
                continue
            for slot in slots:
                pool = np.unique(self._to_global[source][absent.of(images.records[slot])])
                ids = self._drawn(generator, pool, excluded, missing[slot : slot + 1])
                drawn.append((slot[None], ids))
        return _joined(drawn)

    def _general(
        self, generator: np.random.Generator, drawn: list[Int[np.ndarray, " k"]]
    ) -> list[Int[np.ndarray, " g"]]:
        """Draw general names for slots that drew fewer negatives than `general_negatives`."""
        if not self._config.general_negatives:  # the generator must not be touched
            return []
        lacking = np.array([self._config.general_negatives - len(ids) for ids in drawn])
        none = np.zeros(0, np.int32)
        return self._drawn(generator, self._vocabulary.general, none, np.maximum(lacking, 0))

    def scored(
        self, table: Table, images: Images, positives: Positives, draws: Draws
    ) -> Bool[np.ndarray, "B M"]:
        """Return the rows of the table that each slot may be scored on as a negative.

        A mosaic is scored on what all of its images may be scored on. Kinds with texts: (B, 0).
        """
        size, used = self._config.batch_size, table.concepts >= 0
        if self._kind in TEXT_KINDS:
            return np.zeros((size, 0), bool)
        result = np.zeros((size, len(used)), bool)
        if self._config.scored_on == "table" and not self._alike:
            result[: images.filled] = used
            return result
        own = np.zeros((len(images.slots), len(used)), bool)
        _mark(own, positives.images, table.rows(positives.ids))
        masks = own | self._policy(table, images, draws)
        if self._config.federated:
            self._federate(masks, table, images, own)
        for groups in self._alike:
            masks &= own | ~_alike(groups, table, positives, len(own))
        order = np.argsort(images.slots, kind="stable")
        starts = np.searchsorted(images.slots[order], np.arange(images.filled))
        if images.filled:
            result[: images.filled] = np.logical_and.reduceat(masks[order], starts, axis=0)
        return result

    def _policy(self, table: Table, images: Images, draws: Draws) -> Bool[np.ndarray, "n M"]:
        """Return what `scored_on` allows each image, besides its own concepts."""
        policy, used = self._config.scored_on, table.concepts >= 0
        if policy == "source":
            present, numbers = np.unique(images.sources, return_inverse=True)
            spaces = [np.isin(table.concepts, self._spaces[source]) for source in present]
            if self._config.general_negatives:
                is_general = np.isin(table.concepts, self._vocabulary.general)
                spaces = [space | is_general for space in spaces]
            return np.array(spaces).reshape(-1, len(used))[numbers] & used
        if policy == "own":
            drawn = np.zeros((self._config.batch_size, len(used)), bool)
            _mark(drawn, draws.slots, table.rows(draws.ids))
            return drawn[images.slots]
        return np.broadcast_to(used, (len(images.slots), len(used)))

    def _federate(
        self,
        masks: Bool[np.ndarray, "n M"],
        table: Table,
        images: Images,
        own: Bool[np.ndarray, "n M"],
    ) -> None:
        """Restrict images of federated sources to what their lists say, in place."""
        for source in np.unique(images.sources):
            absent, partial = self._lists(source, "absent"), self._lists(source, "partial")
            if absent is None or partial is None:
                continue
            numbers = np.flatnonzero(images.sources == source)
            rows = table.rows(self._to_global[source])  # of each local id
            known = own[numbers]
            for lists, value in ((absent, True), (partial, False)):
                owners, ids = lists.of_all(images.records[numbers])
                _mark(known, owners, rows[ids], value)
            masks[numbers] = known

    def _excluded(self, images: Images, positives: Positives) -> Int[np.ndarray, " e"]:
        """Return the ids that nobody may draw, ascending: see `draw`."""
        excluded = []
        for source in np.unique(images.sources):
            ids = np.unique(positives.ids[images.sources[positives.images] == source])
            if self._lists(source, "absent") is None:
                ids = self._vocabulary.with_synonyms(ids, self._spaces[source])
            excluded.append(ids)
        return np.unique(np.concatenate(excluded or [np.zeros(0, np.int32)]))

    def _lists(self, source: int, field: str) -> IdLists | None:
        """Return the lists of a federated source; None if it is not one, or they are not used."""
        return getattr(self._sources[source], field) if self._config.federated else None

    def _drawn(
        self,
        generator: np.random.Generator,
        pool: Int[np.ndarray, " P"],
        excluded: Int[np.ndarray, " e"],
        missing: Int[np.ndarray, " b"],
    ) -> list[Int[np.ndarray, " k"]]:
        return concept_table.draw_negatives(generator, pool, excluded, missing)


def _joined(parts: Sequence[tuple[Int[np.ndarray, " b"], list[np.ndarray]]]) -> Draws:
    """Return the draws of several groups of slots as one."""
    drawn = [ids for _, group in parts for ids in group]
    if not drawn:
        return Draws.none()
    slots = np.concatenate([slots for slots, group in parts if group])
    return Draws(np.concatenate(drawn), np.repeat(slots, [len(ids) for ids in drawn]))


def _mark(
    masks: Bool[np.ndarray, "n M"],
    images: Int[np.ndarray, " k"],
    rows: Int[np.ndarray, " k"],
    value: bool = True,
) -> None:
    """Set `masks[image, row]` for each pair; a row of -1 is left out."""
    has_row = rows >= 0
    masks[images[has_row], rows[has_row]] = value


def _alike(
    groups: Int[np.ndarray, " V"], table: Table, positives: Positives, count: int
) -> Bool[np.ndarray, "n M"]:
    """Return which rows are of one group with any concept that each of `count` images owns.

    `groups` has the group of each global id; -1: none.
    """
    of_rows = np.where(table.concepts >= 0, groups[table.concepts], -1)
    values, columns = np.unique(of_rows, return_inverse=True)
    of_positives = groups[positives.ids]
    places = np.minimum(np.searchsorted(values, of_positives), len(values) - 1)
    is_known = (values[places] == of_positives) & (of_positives >= 0)
    owned = np.zeros((count, len(values)), bool)
    owned[positives.images[is_known], places[is_known]] = True
    return owned[:, columns]
