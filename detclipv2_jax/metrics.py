"""What a run writes down and shows: metrics.jsonl, TensorBoard, a progress line, its clock."""

import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer
from tqdm import tqdm

from detclipv2_jax.files import replacing


class MetricsLog:
    """`metrics.jsonl`, a JSON object a line with `step` in each, and the same for TensorBoard."""

    def __init__(self, workdir: Path | None, resumed_at: int):
        """Goes on after step `resumed_at`; what was logged later is of a branch that was lost.

        Without a `workdir`, in all processes but the first, nothing is written.
        """
        self._file = self._events = None
        if workdir is None:
            return
        path = workdir / "metrics.jsonl"
        lines = list(read_log(path, resumed_at)) if path.exists() else []
        with replacing(path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self._file = path.open("a", buffering=1)
        self._events = Writer(str(workdir / "tensorboard"))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; a value that is not finite is written as null."""
        if self._file is None:
            return
        clean = {k: _finite(v) if isinstance(v, float) else v for k, v in values.items()}
        self._file.write(json.dumps({"step": step} | clean) + "\n")
        prefix = values.get("kind", "evaluation")
        for name, value in clean.items():
            if isinstance(value, int | float):
                self._events.add_scalar(f"{prefix}/{name}", value, step)

    def close(self) -> None:
        """Everything written is on disk."""
        if self._file is not None:
            self._file.close()
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


class Clock:
    """Seconds spent by what for, over all the starts of a run."""

    def __init__(self, seconds: Mapping[str, float] | None = None):
        """Goes on from the totals in a checkpoint."""
        self.seconds = defaultdict(float, seconds or {})

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Adds the time inside the block to `part`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - start


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
