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
    images: Int[np.ndarray, " k"]  # the image of the batch that the record is
    ranks: Int[np.ndarray, " k"]  # place among its record's concepts; image_text: 0 is the caption

    @classmethod
    def of_source(
        cls,
        source: Source,
        local_to_global: Int32[np.ndarray, " c"],
        records: Int[np.ndarray, " r"],
        images: Int[np.ndarray, " r"],
    ) -> "Positives":
        """Return the positives of some records of one source, given the image of each record."""
        starts = source.positives_offsets[records]
        counts = source.positives_offsets[records + 1] - starts
        before = np.cumsum(counts) - counts
        ranks = np.arange(counts.sum()) - np.repeat(before, counts)
        local = source.positives[np.repeat(starts, counts) + ranks]
        return cls(local_to_global[local], np.repeat(images, counts), ranks)

    @classmethod
    def joined(cls, by_source: Sequence["Positives"]) -> "Positives":
        """Return the positives of several sources as one."""
        fields = [(one.ids, one.images, one.ranks) for one in by_source]
        return cls(*(np.concatenate(arrays) for arrays in zip(*fields)))

    def first(self, count: int) -> "Positives":
        """Return the first `count` positives of each record."""
        kept = self.ranks < count
        return Positives(self.ids[kept], self.images[kept], self.ranks[kept])


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """The rows of a step's concept table."""

    concepts: Int32[np.ndarray, " M"]  # positives ascending, negatives ascending, -1 pads
    positives: int  # how many of the rows are positives
    dropped: int  # positives of the batch that have no row
    negatives: int  # how many rows are negatives
    wanted_negatives: int  # how many negatives the images of the batch drew

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
    generator: np.random.Generator,
    size: int,
    positives: Int32[np.ndarray, " p"],
    dropped: int,
    drawn: Int[np.ndarray, " d"],
) -> Table:
    """Return a table of `size` rows: positives, then negatives, both ascending.

    Args:
        generator: source of randomness.
        size: rows of the table; at least p.
        positives: ascending and unique.
        dropped: how many positives had no room.
        drawn: the negatives that the images drew, in any order. If the distinct ones are too many
            for the rows that are left, chance decides which ones stay.
    """
    negatives, room = np.unique(drawn), size - positives.size
    wanted = negatives.size
    if wanted > room:
        negatives = np.sort(generator.choice(negatives, room, replace=False, shuffle=False))
    concepts = np.full(size, -1, np.int32)
    concepts[: positives.size] = positives
    concepts[positives.size : positives.size + negatives.size] = negatives
    return Table(
        concepts,
        positives=int(positives.size),
        dropped=dropped,
        negatives=int(negatives.size),
        wanted_negatives=int(wanted),
    )


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


class KeptPositives(NamedTuple):
    """The positives of a batch that have a row of the table."""

    ids: Int32[np.ndarray, " p"]  # ascending and unique
    dropped: int  # positives that have none


def keep_positives(
    generator: np.random.Generator, wanted: Wanted, size: int, *, captions_first: bool
) -> KeptPositives:
    """Return at most `size` of the wanted ids.

    If there are more, chance decides which ones stay, so that no concept is left out at every step.
    With `captions_first` a caption stays rather than the phrases taken out of it.
    """
    if wanted.ids.size <= size:
        return KeptPositives(wanted.ids, 0)
    priority = wanted.ranks if captions_first else np.zeros_like(wanted.ranks)
    kept = np.lexsort((generator.random(wanted.ids.size), priority))[:size]
    return KeptPositives(np.sort(wanted.ids[kept]), int(wanted.ids.size) - size)


def draw_negatives(
    generator: np.random.Generator,
    pool: Int[np.ndarray, " P"],
    excluded: Int[np.ndarray, " e"],
    missing: Int[np.ndarray, " b"],
) -> list[Int[np.ndarray, " k"]]:
    """Draw negatives: `missing` different ones for each image, fewer if the pool has fewer.

    Args:
        generator: source of randomness.
        pool: ids to draw from, ascending and unique.
        excluded: ids that no image may draw, ascending and unique.
        missing: how many negatives each image needs.

    Returns:
        For each image its ids, in no particular order.
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
    before = at - np.arange(len(at))
    return [pool[draw + np.searchsorted(before, draw, side="right")] for draw in draws]
