"""Milliseconds of a step's plan by what its images are scored on, and the size of that mask.

    python scripts/benchmarks/benchmark_scoring.py

Batches of 128 images from sources in memory, of random concepts: two detection sources of 365 and
1,203 names, the second with lists of absent names as LVIS has them, and phrases among 14,000. The
plans take turns; medians of processor time on one core.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np

from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import IdLists, Kind, Source
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.slices import merge_boxes
from detclipv2_jax.data.vocabulary import Vocabulary

RECORDS, BATCH, ROUNDS = 4000, 128, 12
SMALL, LARGE = dict(table_size=384), dict(table_size=1664)
PHRASES = dict(table_size=8704, concepts_per_image=100)


class _Heads(Vocabulary):
    """A vocabulary without texts: its head nouns are random."""

    def groups(self, likeness):
        return np.random.default_rng(0).integers(0, 4000, len(self)).astype(np.int32)


def main() -> None:
    """Print a table."""
    rng = np.random.default_rng(0)
    first = _source(rng, "first", "detection", 365, 8)
    second = _source(rng, "second", "detection", 1203, 8)
    absent = IdLists(np.arange(RECORDS + 1) * 15, rng.integers(0, 1203, RECORDS * 15))
    none = IdLists(np.zeros(RECORDS + 1, np.int64), np.zeros(0, np.int32))
    second = dataclasses.replace(second, absent=absent, partial=none)
    phrases = _source(rng, "phrases", "grounding", 14_000, 6)
    plans = {
        "one detection source, table": _plan([first], SMALL),
        "one detection source, source": _plan([first], SMALL, scored_on="source"),
        "two, table": _plan([first, second], LARGE),
        "two, source": _plan([first, second], LARGE, scored_on="source"),
        "two, federated": _plan([first, second], LARGE, scored_on="source", federated=True),
        "phrases, table": _plan([phrases], PHRASES),
        "phrases, own": _plan([phrases], PHRASES, scored_on="own"),
        "phrases, heads": _plan([phrases], PHRASES, ignore_alike=("heads",)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in plans}
    for step in range(ROUNDS):
        for name, plan in plans.items():
            seconds[name].append(_timed(lambda plan=plan, step=step: plan.plan(step)))
    print("| plan | ms | mask, MB | scored | rows | negatives wanted |\n|---|---|---|---|---|---|")
    for name, plan in plans.items():
        step, median = plan.plan(0), statistics.median(seconds[name][1:])
        print(
            f"| {name} | {median * 1e3:.1f} | {step.scored.nbytes / 1e6:.2f} | "
            f"{step.scored.mean():.1%} | {step.positives + step.negatives} | "
            f"{step.wanted_negatives} |"
        )
    boxes = rng.uniform(0, 600, (BATCH, 100, 4)).astype(np.float32)
    kept = np.arange(100) < rng.integers(0, 40, (BATCH, 1))
    labels = rng.integers(0, 365, kept.shape)
    merging = [_timed(lambda: merge_boxes(boxes, labels, kept, 3)) for _ in range(ROUNDS)]
    print(f"\nmerging equal ones of {kept.sum()} boxes: {statistics.median(merging) * 1e3:.1f} ms")


def _source(rng: np.random.Generator, name: str, kind: Kind, names: int, owned: int) -> Source:
    """Return a source of `RECORDS` images that own about `owned` of its names each."""
    ids = [np.unique(rng.integers(0, names, owned)) for _ in range(RECORDS)]
    return Source(
        directory=Path(name),
        name=name,
        kind=kind,
        info={},
        height=np.full(RECORDS, 480, np.uint16),
        width=np.full(RECORDS, 640, np.uint16),
        positives_offsets=np.cumsum([0, *map(len, ids)]),
        positives=np.concatenate(ids).astype(np.int32),
        tokens=np.zeros((names, 16), np.uint16),
        keys=rng.integers(0, 2**63, names).astype(np.uint64),
        vocabulary=np.ones(names, bool),
    )


def _plan(group: list[Source], fields: dict, **policy) -> Plan:
    sources = {source.name: source for source in group}
    config = KindConfig(sources=tuple(sources), batch_size=BATCH, **fields, **policy)
    return Plan(sources, _Heads(sources), {group[0].kind: config}, 0)


def _timed(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
