"""XProf traces of a few training steps: `--profile=FIRST:LAST`."""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.checkpoint import first_line


def parse_steps(text: str, total_steps: int) -> range:
    """Return the steps that `FIRST:LAST` names, LAST excluded; no steps for "".

    Steps have the numbers of metrics.jsonl: 1 to `total_steps`.

    Raises:
        UserError: `text` has another form, or names no step or one that the run does not have.
    """
    if not text:
        return range(0)
    if not (match := re.fullmatch(r"(\d+):(\d+)", text)):
        raise UserError(f"--profile={text} must be FIRST:LAST, two step numbers such as 100:103.")
    first, last = int(match[1]), int(match[2])
    if first >= last:
        raise UserError(
            f"--profile={text} selects no step: it means the steps from {first} up to, but not "
            f"including, {last}. Use a larger second number."
        )
    if first < 1 or last > total_steps + 1:
        raise UserError(
            f"--profile={text} is outside of the run, which has steps 1 to {total_steps}. Use "
            f"numbers from 1 to {total_steps + 1}; the second one is excluded."
        )
    return range(first, last)


class Profiler:
    """Trace some steps of the first process into WORKDIR/profile.

    A trace never ends a run: an error of the profiler is printed and the trace is given up. Use it
    as a context manager, which writes a trace that the run left unfinished.
    """

    def __init__(self, steps: range, workdir: Path, resumed_at: int):
        """Trace `steps`, those of them that come after the step that the run resumes from."""
        self._directory = workdir / "profile"
        self._steps = range(max(steps.start, resumed_at + 1), steps.stop)
        self._first_step: int | None = None  # of the trace that is being recorded
        self._latest_step = 0
        if steps and not self._steps:
            print(f"profile: steps up to {steps.stop - 1} are already done, so no trace is written")
        if jax.process_index() != 0:
            self._steps = range(0)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    @contextlib.contextmanager
    def step(self, step: int, before: Any) -> Iterator[None]:
        """Mark the block as `step`, and start the trace if this is its first step.

        Args:
            step: number of the step.
            before: outputs of the step before. The trace starts once they are computed.
        """
        if self._steps and step == self._steps.start:
            self._start(step, before)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def step_dispatched(self, step: int, outputs: Any) -> None:
        """Write the trace if `step` is its last one, once its `outputs` are computed."""
        self._latest_step = step
        if self._first_step is not None and step == self._steps.stop - 1:
            jax.block_until_ready(outputs)
            self._stop()

    def _start(self, step: int, before: Any) -> None:
        jax.block_until_ready(before)
        try:
            jax.profiler.start_trace(self._directory)
            self._first_step = step
        except Exception as error:  # whatever the file system or another profiler reports
            self._give_up(error)

    def _stop(self) -> None:
        if self._first_step is None:
            return
        first, self._first_step = self._first_step, None
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._give_up(error)
            return
        print(
            f"\nprofile: steps {first} to {self._latest_step} are in {self._directory}. To open "
            f"them: `pip install xprof`, then `tensorboard --logdir={self._directory}` or "
            f"`xprof --logdir={self._directory}`.",
            flush=True,
        )

    def _give_up(self, error: Exception) -> None:
        print(
            f"\nwarning: no profile is written ({first_line(error)})", file=sys.stderr, flush=True
        )
