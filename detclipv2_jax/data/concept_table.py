"""The concept table of a step: the concepts of the batch's records, then random negatives.

Pure functions of arrays and a random generator; `plan.py` calls them. Concepts are global ids of
the run's vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from detclipv2_jax.data.index import Source


@dataclasses.dataclass(frozen=True, eq=False)
class Positives:
    """The concepts that the records of a batch own: one entry per record and concept."""

    ids: Int[np.ndarray, " k"]  # global ids; several records may own the same concept
    slots: Int[np.ndarray, " k"]  # the slot of the batch that the record is in
    ranks: Int[np.ndarray, " k"]  # place among its record's concepts; image_text: 0 is the caption

    @classmethod
    def of_source(
        cls,
        source: Source,
        local_to_global: Int32[np.ndarray, " c"],
        records: Int[np.ndarray, " r"],
        slots: Int[np.ndarray, " r"],
    ) -> "Positives":
        """Return the positives of some records of one source, given the slot of each record."""
        starts = source.positives_offsets[records]
        counts = source.positives_offsets[records + 1] - starts
        before = np.cumsum(counts) - counts
        ranks = np.arange(counts.sum()) - np.repeat(before, counts)
        local = source.positives[np.repeat(starts, counts) + ranks]
        return cls(local_to_global[local], np.repeat(slots, counts), ranks)

    @classmethod
    def joined(cls, by_source: Sequence["Positives"]) -> "Positives":
        """Return the positives of several sources as one."""
        fields = [(one.ids, one.slots, one.ranks) for one in by_source]
        return cls(*(np.concatenate(arrays) for arrays in zip(*fields)))

    def first(self, count: int) -> "Positives":
        """Return the first `count` positives of each record."""
        kept = self.ranks < count
        return Positives(self.ids[kept], self.slots[kept], self.ranks[kept])


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The rows of a step's concept table."""

    concepts: Int32[np.ndarray, " M"]  # positives ascending, negatives ascending, -1 pads
    positives: int  # how many of the rows are positives
    dropped: int  # positives of the batch that have no row

    def rows(self, ids: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """Return the row of each id; -1 for ids that are not in the table."""
        return rows_of(self.concepts, ids)


def rows_of(concepts: Int[np.ndarray, " M"], ids: Int[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
    """Return the row of each id in a table of unique ids (-1 pads); -1 for ids not in the table."""
    used = np.flatnonzero(concepts >= 0)
    if not used.size:
        return np.full(len(ids), -1, np.int32)
    rows = used[np.argsort(concepts[used])]
    ascending = concepts[rows]
    at = np.minimum(np.searchsorted(ascending, ids), len(rows) - 1)
    return np.where(ascending[at] == ids, rows[at], -1).astype(np.int32)


def make_table(
    size: int, positives: Int32[np.ndarray, " p"], negatives: Int32[np.ndarray, " n"], dropped: int
) -> Table:
    """Return a table of `size` rows, of which p + n are used."""
    concepts = np.full(size, -1, np.int32)
    concepts[: positives.size] = positives
    concepts[positives.size : positives.size + negatives.size] = negatives
    return Table(concepts, positives=int(positives.size), dropped=dropped)


class Wanted(NamedTuple):
    """The concepts that a batch needs in its table."""

    ids: Int32[np.ndarray, " w"]  # ascending and unique
    ranks: Int[np.ndarray, " w"]  # the lowest rank of each


def wanted_concepts(positives: Positives) -> Wanted:
    """Return the distinct concepts of the positives, with the lowest rank of each."""
    order = np.lexsort((positives.ranks, positives.ids))
    ids, ranks = positives.ids[order], positives.ranks[order]
    is_first = np.ones(len(ids), bool)
    is_first[1:] = ids[1:] != ids[:-1]
    return Wanted(ids[is_first].astype(np.int32), ranks[is_first])


def keep_positives(
    generator: np.random.Generator, wanted: Wanted, size: int, *, captions_first: bool
) -> Int32[np.ndarray, " p"]:
    """Return the wanted ids, ascending; at most `size` of them.

    If there are more, chance decides which ones stay, so that no concept is left out at every step.
    With `captions_first` a caption stays rather than the phrases taken out of it.
    """
    if wanted.ids.size <= size:
        return wanted.ids
    priority = wanted.ranks if captions_first else np.zeros_like(wanted.ranks)
    kept = np.lexsort((generator.random(wanted.ids.size), priority))[:size]
    return np.sort(wanted.ids[kept])


def draw_negatives(
    generator: np.random.Generator,
    pool: Int[np.ndarray, " P"],
    excluded: Int[np.ndarray, " e"],
    missing: Int[np.ndarray, " b"],
    room: int,
) -> Int[np.ndarray, " n"]:
    """Draw the negatives of a batch: `missing` different ones per image, their union, at most
    `room`.

    Args:
        generator: source of randomness.
        pool: ids to draw from, ascending and unique.
        excluded: ids that no image may draw, ascending and unique: the positives of *all* images
            of the batch and their synonyms.
        missing: how many negatives each image needs.
        room: rows of the table that are left.

    Returns:
        Ids, ascending and unique.
    """
    # The pool may be large, so it is not filtered. Numbers are drawn among the ids that are left,
    # then shifted past the excluded ids before them.
    at = np.searchsorted(pool, excluded)
    if len(pool):
        at = at[(at < len(pool)) & (pool[np.minimum(at, len(pool) - 1)] == excluded)]
    else:
        at = at[:0]
    left = len(pool) - len(at)
    draws = [
        generator.choice(left, min(int(count), left), replace=False, shuffle=False)
        for count in missing
    ]
    union = np.unique(np.concatenate(draws)) if draws else np.zeros(0, np.int64)
    if union.size > room:
        union = np.sort(generator.choice(union, room, replace=False, shuffle=False))
    shift = np.searchsorted(at - np.arange(len(at)), union, side="right")
    return pool[(union + shift).astype(np.int64)]
