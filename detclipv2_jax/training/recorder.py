"""What a run reports: each step's metrics, and the summary at its end."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from detclipv2_jax.common import plots
from detclipv2_jax.common.atomic import write_errors_are_warnings
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import pipeline
from detclipv2_jax.data.plan import StepPlan
from detclipv2_jax.evaluation import report as report_lib
from detclipv2_jax.training import clock as clock_lib
from detclipv2_jax.training import metrics
from detclipv2_jax.training.checkpointer import Checkpointer
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.objective import Losses
from detclipv2_jax.training.validation import BEFORE, ZERO_SHOT, compared

_WHY_SKIPPED = "their loss or gradient was not finite, or far above the usual"


class Recorder:
    """Shows and writes a step's figures once the next step is under way: no step is waited for."""

    def __init__(
        self,
        config: RunConfig,
        log: metrics.MetricsLog,
        progress: metrics.Progress,
        clock: clock_lib.Clock,
        checkpointer: Checkpointer,
    ):
        """Nothing is pending."""
        self._config, self._log, self._progress = config.train, log, progress
        self._clock, self._checkpointer = clock, checkpointer
        self._pending: tuple[StepPlan, Losses] | None = None

    def add(self, planned: StepPlan, values: Losses) -> None:
        """Takes the figures of the step just started; finishes with those of the one before."""
        done, self._pending = self._pending, (planned, values)
        if done is not None:
            self._write(*done)

    def finish(self) -> None:
        """Writes what is pending."""
        if self._pending is not None:
            self._write(*self._pending)
            self._pending = None

    def _write(self, planned: StepPlan, values: Losses) -> None:
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        step = planned.step + 1
        self._progress.update(planned.kind, int((planned.records >= 0).sum()), values)
        if is_due(step, self._config.log_every):
            line = {"kind": planned.kind, "epoch": planned.epoch} | values
            self._log.write(step, line, self._clock.figures())
        if values["skipped_in_row"] >= self._config.max_skipped:
            records = planned.records[planned.records >= 0][:4].tolist()
            raise UserError(
                f"the last {self._config.max_skipped} steps up to step {step} ({planned.kind}, "
                f"records {records} …) were skipped: {_WHY_SKIPPED}; the last good "
                f"checkpoint is {self._checkpointer.latest}: start again from it with a lower "
                "config.optimizer.learning_rate, or look at these records."
            )


def report(
    workdir: Path | None,
    results: dict[str, Any] | None,
    clock: clock_lib.Clock,
    skipped: int,
    feed: pipeline.Batches,
) -> None:
    """Prints the table, where the time went and what was left out; draws the loss curves.

    All processes call it, for each knows only what it left out itself; without a `workdir` nothing
    is drawn.
    """
    if workdir is not None:
        with write_errors_are_warnings():
            plots.plot_losses(workdir / "metrics.jsonl", workdir / "losses.png")
    if results is not None:
        print(report_lib.table(results))
        if ZERO_SHOT in results:
            print(report_lib.table(results[ZERO_SHOT]))
        if workdir is not None and (path := workdir / BEFORE).exists():
            print("\n" + compared(json.loads(path.read_text()), results))
    print(f"\n{clock.summary()}")
    for source, (count, read) in _over_processes(feed.broken, feed.read).items():
        if count:
            print(f"{source}: {count} of {read} records could not be read")
    if skipped:
        print(f"{skipped} updates were skipped: {_WHY_SKIPPED}")
    print(f"\n{workdir}/: detections/*.png, losses.png, results.json, metrics.jsonl, checkpoints/")


def _over_processes(*counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The processes' counts by name, added up."""
    table = np.array([list(count.values()) for count in counts])
    if jax.process_count() > 1:
        table = multihost_utils.process_allgather(table).sum(axis=0)
    return {name: tuple(column.tolist()) for name, column in zip(counts[0], table.T)}


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0
