"""What a run writes down and shows: metrics.jsonl, TensorBoard, a progress line, its clock."""

import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from tensorboard.summary import Writer
from tqdm import tqdm

from detclipv2_jax.files import replacing


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


class Clock:
    """Where the wall time of a run goes, over all its starts: each second belongs to one part.

    That is the part that the host is in, except while the devices compute a step: those seconds are
    `train` (`skipped` if that step changed nothing), whatever the host does meanwhile. So waiting
    for data counts as `data` only as far as it left the devices idle.
    """

    def __init__(self, began: float | None = None):
        """Counts from `began` (as time.monotonic() tells it; now if None), as `start`."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._before: dict[str, float] = {}  # what earlier starts of the run took
        self._since = time.monotonic() if began is None else began
        self._part, self._in_flight = "start", 0
        self._of_step = 0.0  # seconds of the step that the devices are at
        self._lock = threading.Lock()
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clock")

    def go_on(self, seconds: Mapping[str, float], wall: float) -> None:
        """Adds what earlier starts took: by part up to the checkpoint, and `wall` seconds in all.

        What they did after the checkpoint has to be done again: it is `lost`.
        """
        self._before = dict(seconds)
        if (lost := wall - sum(seconds.values())) > 0:
            self._before["lost"] = seconds.get("lost", 0.0) + lost
        with self._lock:
            for part, value in self._before.items():
                self.seconds[part] += value

    def enter(self, part: str) -> str:
        """The host's time is `part`'s from here on; returns whose it was."""
        with self._lock:
            self._tick()
            before, self._part = self._part, part
        return before

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The host's time inside the block is `part`'s."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def watch(self, skipped: jax.Array) -> None:
        """To be told of each step once it is handed to the devices; does not wait for it.

        `skipped`: of its figures the one that is not 0 if the step changed nothing.
        """
        self.step_begins()
        self._watcher.submit(self._wait, skipped)

    def _wait(self, skipped: jax.Array) -> None:
        changed_nothing = False
        try:
            changed_nothing = bool(jax.device_get(skipped))
        finally:
            self.step_ends(changed_nothing)

    def step_begins(self) -> None:
        """The devices have a step more to do."""
        with self._lock:
            self._tick()
            self._in_flight += 1

    def step_ends(self, skipped: bool) -> None:
        """The devices are done with the oldest of their steps."""
        with self._lock:
            self._tick()
            self._in_flight -= 1
            if skipped:
                self.seconds["train"] -= self._of_step
                self.seconds["skipped"] += self._of_step
            self._of_step = 0.0

    def _tick(self) -> None:
        now = time.monotonic()
        passed, self._since = now - self._since, now
        if self._in_flight:
            self._of_step += passed
        self.seconds["train" if self._in_flight else self._part] += passed

    def totals(self) -> dict[str, float]:
        """Seconds by part, over all starts, up to now."""
        with self._lock:
            self._tick()
            return dict(self.seconds)

    def figures(self) -> dict[str, float]:
        """For the log: all `seconds`, and the shares of them, and of this start's, that count.

        `goodput` is the share of training steps that were kept, `data_wait` that of idle devices
        while the host waited for data.
        """
        totals = self.totals()
        now = {part: value - self._before.get(part, 0.0) for part, value in totals.items()}
        return {
            "seconds": round(sum(totals.values()), 3),
            "goodput": round(_share(totals, "train"), 4),
            "goodput_this_start": round(_share(now, "train"), 4),
            "data_wait": round(_share(now, "data"), 4),
        }

    def summary(self) -> str:
        """One line: goodput over all starts, since this one, and where the rest went."""
        totals, figures = self.totals(), self.figures()
        rest = sorted(((s, part) for part, s in totals.items() if part != "train"), reverse=True)
        return (
            f"goodput {figures['goodput']:.0%} of {figures['seconds']:.0f} s "
            f"(this start {figures['goodput_this_start']:.0%}); the rest: "
            + ", ".join(f"{part} {s:.0f} s" for s, part in rest if s >= 0.5)
        )


def _share(seconds: Mapping[str, float], part: str) -> float:
    return seconds.get(part, 0.0) / max(sum(seconds.values()), 1e-9)


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
