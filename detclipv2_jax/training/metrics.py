"""What a run writes down and shows: metrics.jsonl, TensorBoard, a progress line, its clock."""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer
from tqdm import tqdm

from detclipv2_jax.common.atomic import replacing


class MetricsLog:
    """`metrics.jsonl`, a JSON object a line with `step` in each, and the same for TensorBoard."""

    def __init__(self, workdir: Path | None, resumed_at: int):
        """Goes on after step `resumed_at`; what was logged later is of a branch that was lost.

        Without a `workdir`, in all processes but the first, nothing is written.
        """
        self.seconds = 0.0  # that the run had taken when its last line was written, lost or not
        self._file = self._events = None
        self._unwritten, self._told = b"", False  # bytes of lines; was it said?
        if workdir is None:
            return
        path = workdir / "metrics.jsonl"
        lines = list(read_log(path)) if path.exists() else []
        self.seconds = max((line.get("seconds", 0.0) for line in lines), default=0.0)
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= resumed_at]
        with replacing(path) as partial:
            partial.write_text("".join(kept))
        self._file = path.open("ab", buffering=0)
        with self._without_events():
            self._events = Writer(str(workdir / "tensorboard"))

    def write(
        self, step: int, values: Mapping[str, Any], run: Mapping[str, float] | None = None
    ) -> None:
        """Appends one line: `values` of the step, and of the `run`. Not finite: written as null."""
        if self._file is None:
            return
        clean = {k: _finite(v) if isinstance(v, float) else v for k, v in values.items()}
        run = run or {}
        self._unwritten += json.dumps({"step": step} | clean | run).encode() + b"\n"
        self._write_lines()
        prefix = values.get("kind", "evaluation")
        scalars = {f"{prefix}/{name}": value for name, value in clean.items()}
        scalars |= {f"run/{name}": value for name, value in run.items()}
        with self._without_events():
            for name, value in scalars.items():
                if self._events is not None and isinstance(value, int | float):
                    self._events.add_scalar(name, value, step)

    def _write_lines(self) -> None:
        """On a full disk: said once, kept, and tried again with the next line."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._told = False
        except OSError as error:
            if not self._told:
                print(
                    f"{self._file.name}: cannot be written ({error.strerror}): its lines are kept "
                    "until it can",
                    flush=True,
                )
            self._told = True

    @contextlib.contextmanager
    def _without_events(self) -> Iterator[None]:
        """TensorBoard's copy of the log ends at the first error; what is raised depends on it."""
        try:
            yield
        except Exception as error:
            self._events = None
            print(f"TensorBoard's events cannot be written ({error}): none any more", flush=True)

    def close(self) -> None:
        """Everything that can be written is on disk."""
        if self._file is not None:
            self._write_lines()
            self._file.close()
            with self._without_events():
                if self._events is not None:
                    self._events.close()


def read_log(path: Path, last_step: int | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl up to `last_step`; a line that a kill cut short is left out."""
    with path.open() as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                values = json.loads(line)
                if last_step is None or values["step"] <= last_step:
                    yield values


class Progress:
    """The progress line: kind, loss and its parts, images a second, time left."""

    def __init__(self, total: int, start: int, shown: bool = True):
        """A line for steps `start` to `total`."""
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

    def update(self, kind: str, images: int, values: Mapping[str, float]) -> None:
        """One step more."""
        self._images += images
        shown = {k: f"{v:.3g}" for k, v in values.items() if k in _SHOWN}
        if skipped := int(values["skipped"]):
            shown["skipped"] = str(skipped)
        rate = self._images / max(time.monotonic() - self._since, 1e-9)
        self._bar.set_description(f"{kind:<10}", refresh=False)
        self._bar.set_postfix(shown | {"images/s": f"{rate:.0f}"}, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        self._bar.write(text)

    def close(self) -> None:
        """Leaves the finished line on the screen."""
        self._bar.close()


_SHOWN = ("loss", "align", "box", "centerness", "contrastive")


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
