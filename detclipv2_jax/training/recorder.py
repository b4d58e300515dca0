"""What a run reports: the metrics of each step, and a summary at the end."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from detclipv2_jax.common import plots
from detclipv2_jax.common.atomic import write_errors_are_warnings
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.plan import StepPlan
from detclipv2_jax.evaluation import report as report_lib
from detclipv2_jax.training import validation
from detclipv2_jax.training.clock import Clock
from detclipv2_jax.training.config import TrainConfig
from detclipv2_jax.training.metrics import MetricsLog, Progress
from detclipv2_jax.training.objective import Scalars
from detclipv2_jax.training.utilization import Utilization

_WHY_SKIPPED = "loss or gradient was not finite, or far above its usual size"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step that the devices compute or have computed."""

    planned: StepPlan
    values: Scalars  # still on the devices
    seconds: Future[float]  # that the devices spend on it

    @property
    def number(self) -> int:
        return self.planned.step + 1  # the plan counts from 0


@dataclasses.dataclass
class Recorder:
    """Writes and shows the metrics of each step while the next one runs, so it delays no step."""

    config: TrainConfig
    log: MetricsLog
    progress: Progress
    clock: Clock
    utilization: Utilization
    counters: Callable[[], Mapping[str, int]]  # counts of the input pipeline so far
    # Given the first of the steps whose updates were skipped: `Checkpointer.fall_back_before`.
    fall_back_before: Callable[[int], str]
    _pending: _Step | None = None

    def add(self, planned: StepPlan, values: Scalars, seconds: Future[float]) -> None:
        """Take the outputs of the step just dispatched, and record the step before it.

        Raises:
            UserError: too many updates in a row were skipped.
        """
        before, self._pending = self._pending, _Step(planned, values, seconds)
        if before is not None:
            self._record(before)

    def flush(self) -> None:
        """Wait for the last step and record it."""
        if self._pending is not None:
            self._record(self._pending)
            self._pending = None

    def add_evaluation(self, step: int, results: dict[str, Any]) -> None:
        """Record the results of an evaluation after `step`; step 0 is before the first one."""
        self.log.write(step, validation.scalars(results))
        when = f"step {step}" if step else "before the first step"
        self.progress.write(f"{when}: {validation.headline(results):.4f} AP")

    def _record(self, step: _Step) -> None:
        planned = step.planned
        values = {name: float(value) for name, value in jax.device_get(step.values).items()}
        speed = self.utilization.metrics(planned.kind, planned.shape, step.seconds.result())
        images = int((planned.records >= 0).sum())
        self.progress.update(planned.kind, images, values, speed["mfu"])
        if is_due(step.number, self.config.log_every):
            canvas = "{}x{}".format(*planned.shape)  # height and width
            line = {"kind": planned.kind, "epoch": planned.epoch, "canvas": canvas}
            line |= concepts(planned) | values | speed
            self.log.write(step.number, line, self.clock.figures(), self.counters())
        if values["skipped_in_row"] >= self.config.max_skipped:
            first = step.number - int(values["skipped_in_row"]) + 1
            records = planned.records[planned.records >= 0][:4].tolist()
            raise UserError(
                f"the last {self.config.max_skipped} updates, up to step {step.number} "
                f"({planned.kind}, records {records} …), were skipped because "
                f"{_WHY_SKIPPED}. {self.fall_back_before(first)} Resume with a lower "
                "config.optimizer.learning_rate, or look at these records."
            )


def concepts(planned: StepPlan) -> dict[str, int]:
    """Return how a step's concept table is filled, by name in metrics.jsonl."""
    return {
        "concepts": planned.positives + planned.negatives,
        "negatives": planned.negatives,
        "wanted_negatives": planned.wanted_negatives,
    }


def report(
    workdir: Path | None,
    results: dict[str, Any] | None,
    clock: Clock,
    skipped: int,
    counters: Mapping[str, int],
) -> None:
    """Print the results, where the time went and what was left out, and draw the loss curves.

    All processes call it, because each has counted its own slice of the data.

    Args:
        workdir: of the run; None in all processes but the first, which draw nothing.
        results: of the last evaluation; None without one.
        clock: of the run.
        skipped: updates that were skipped.
        counters: of this process's input pipeline (`Batches.counters`).
    """
    if workdir is not None:
        with write_errors_are_warnings():
            plots.plot_losses(workdir / "metrics.jsonl", workdir / "losses.png")
    if results is not None:
        print(report_lib.results_table(results))
        if validation.ZERO_SHOT in results:
            print(report_lib.results_table(results[validation.ZERO_SHOT]))
        if workdir is not None and (path := workdir / validation.BEFORE).exists():
            print("\n" + validation.compared(json.loads(path.read_text()), results))
    print(f"\n{clock.summary()}")
    for line in input_report(sum_over_processes(counters)):
        print(line)
    if skipped:
        print(f"{skipped} updates were skipped: {_WHY_SKIPPED}")
    if workdir is not None:
        print(f"\n{workdir}/: {', '.join(written(workdir))}")
        if results is None:
            print(HOW_TO_MEASURE.format(workdir=workdir))


#: What a run writes, as patterns in its workdir, in the order of interest.
_WRITTEN = (
    "detections/*.png",
    "losses.png",
    "results.json",
    f"{validation.ZERO_SHOT}/results.json",
    validation.BEFORE,
    "metrics.jsonl",
    "checkpoints/*",
)
HOW_TO_MEASURE = (
    "nothing was measured, because the run has no validation set. Measure it on a file with boxes:"
    "\n  detclip evaluate --checkpoint={workdir} --dataset=VAL.json --output={workdir}/evaluation"
)


def written(workdir: Path) -> list[str]:
    """Return what a run has written, as people read it: only what exists."""
    names = [pattern for pattern in _WRITTEN if any(workdir.glob(pattern))]
    return [name.replace("checkpoints/*", "checkpoints/") for name in names]


def input_report(counters: Mapping[str, int]) -> list[str]:
    """Return a line for each count of data that was left out, from `Batches.counters`.

    A line per kind says how much of its canvases was not padding.
    """
    lines = []
    for name, count in counters.items():
        what, _, source = name.partition("/")
        if what in ("read", "canvas_pixels") or not count:
            continue
        if what == "image_pixels":
            share = count / counters[f"canvas_pixels/{source}"]
            lines.append(f"{source}: images covered {share:.1%} of the pixels of their canvases")
            continue
        if what == "unreadable":
            read = counters[f"read/{source}"]
            lines.append(f"{source}: {count} of {read} records could not be read")
        else:
            lines.append(f"input: {count} {_MEANINGS.get(what, what)}")
    return lines


_MEANINGS = {
    "cropped_boxes": "boxes were left out because augmentation cropped them",
    "cut_boxes": "boxes were left out because a canvas had more than max_boxes",
    "cut_labels": "names of boxes were left out because a box had more than labels_per_box",
    "dropped_concepts": "concepts were left out because a step's table was full (table_size)",
    "unflipped": "images were not flipped because a text of theirs says left or right",
    "cut_negatives": "negatives were left out because a step's table was full (table_size)",
}


def sum_over_processes(counters: Mapping[str, int]) -> dict[str, int]:
    """Return the sums of the processes' counts; all processes call it with the same names."""
    if jax.process_count() == 1:
        return dict(counters)
    counts = np.array([counters[name] for name in sorted(counters)])
    sums = multihost_utils.process_allgather(counts).sum(axis=0)
    return dict(zip(sorted(counters), sums.tolist()))


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every `every` steps (0: never) is due after `step`."""
    return every > 0 and step % every == 0
