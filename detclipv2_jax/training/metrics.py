"""The metrics of a run: metrics.jsonl, TensorBoard, and the progress line."""

import contextlib
import io
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer
from tqdm import tqdm

from detclipv2_jax.common.atomic import replacing

_ON_PROGRESS_LINE = ("loss", "align", "box", "centerness", "contrastive")


class MetricsLog:
    """Write `metrics.jsonl`, one JSON object with a `step` per line, and the same to TensorBoard.

    An error while writing never ends the run: lines wait until the file can be written again, and
    TensorBoard's events end.
    """

    def __init__(self, workdir: Path | None, resumed_at: int):
        """Open the log of a run.

        Args:
            workdir: where the files go. None writes nothing: all processes but the first.
            resumed_at: the step that the run resumes from. Later lines are removed: those steps
                are repeated.
        """
        self.seconds = 0.0  # the run's wall time at its last line, removed lines included
        self._file = self._events = None
        self._unwritten, self._has_warned = b"", False
        if workdir is None:
            return
        path = workdir / "metrics.jsonl"
        lines = list(read_log(path)) if path.exists() else []
        self.seconds = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= resumed_at]
        with replacing(path) as partial:
            partial.write_text("".join(kept))
        self._file = path.open("ab", buffering=0)
        with self._errors_end_events():
            self._events = Writer(str(workdir / "tensorboard"))

    def write(
        self,
        step: int,
        values: Mapping[str, Any],
        run: Mapping[str, float] | None = None,
        counters: Mapping[str, int] | None = None,
    ) -> None:
        """Append one line to the log.

        Args:
            step: the number of the step, from 1; 0 for an evaluation before the first step.
            values: of the step, or of an evaluation. Values that are not finite become null.
            run: figures of the whole run so far.
            counters: counts of the input pipeline, written as `input/NAME`.
        """
        if self._file is None:
            return
        values = {k: _finite_or_none(v) if isinstance(v, float) else v for k, v in values.items()}
        run = run or {}
        counters = {f"input/{name}": count for name, count in (counters or {}).items()}
        self._unwritten += json.dumps({"step": step, **values, **run, **counters}).encode() + b"\n"
        self._write_lines(self._file)
        prefix = values.get("kind", "evaluation")
        scalars = {f"{prefix}/{name}": value for name, value in values.items()}
        scalars |= {f"run/{name}": value for name, value in run.items()} | counters
        with self._errors_end_events():
            for name, value in scalars.items():
                if self._events is not None and isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)

    def _write_lines(self, file: io.FileIO) -> None:
        """Write what is pending. On a full disk, warn once and try again with the next line."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                print(
                    f"warning: {file.name}: cannot be written ({error.strerror}). Its lines "
                    "are kept in memory until it can be written again.",
                    flush=True,
                )
            self._has_warned = True

    @contextlib.contextmanager
    def _errors_end_events(self) -> Iterator[None]:
        """End TensorBoard's events at the first error; its type depends on the file system."""
        try:
            yield
        except Exception as error:
            self._events = None
            print(
                f"warning: TensorBoard's events cannot be written ({error}); no more are "
                "written until the run is started again.",
                flush=True,
            )

    def close(self) -> None:
        """Write everything that is pending and close the files."""
        if self._file is not None:
            self._write_lines(self._file)
            self._file.close()
            with self._errors_end_events():
                if self._events is not None:
                    self._events.close()


def read_log(path: Path, last_step: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl up to `last_step`, skipping lines that a kill cut."""
    with path.open() as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if last_step is None or values["step"] <= last_step:
                    yield values


class Progress:
    """The progress line: kind of data, losses, images per second, MFU, time left."""

    def __init__(self, total: int, start: int, shown: bool = True):
        """Show the line of a run of `total` steps, of which `start` are done."""
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=2.0,
            disable=not shown,
        )
        self._since = time.monotonic()
        self._images = 0

    def update(self, kind: str, images: int, values: Mapping[str, float], mfu: float) -> None:
        """Count one step of a `kind`, with its number of images, its metrics and its MFU."""
        self._images += images
        shown = {k: f"{v:.3g}" for k, v in values.items() if k in _ON_PROGRESS_LINE}
        if skipped := int(values["skipped"]):
            shown["skipped"] = str(skipped)
        rate = self._images / max(time.monotonic() - self._since, 1e-9)
        self._bar.set_description(f"{kind:<10}", refresh=False)
        shown |= {"images/s": f"{rate:.0f}", "MFU": f"{mfu:.1%}"}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def write(self, text: str) -> None:
        """Print a line above the progress line."""
        self._bar.write(text)

    def close(self) -> None:
        """Finish the line and leave it on the screen."""
        self._bar.close()


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
