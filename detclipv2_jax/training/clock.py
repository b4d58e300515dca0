"""Measurement of where the wall time of a run goes."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import jax


class Clock:
    """Assign each second of a run's wall time to one part of the work, over all its starts.

    The part is what the host is doing (`with clock("data"):`), except while the devices compute a
    step. Those seconds are `train`, or `skipped` if the step changed nothing, whatever the host
    does meanwhile. So `data` counts a wait for data only as far as it leaves the devices idle.
    """

    def __init__(self, began: float | None = None):
        """Start in the part `start`, at `began` (a value of time.monotonic(); None: now)."""
        self.seconds: dict[str, float] = defaultdict(float)
        self._earlier: dict[str, float] = {}  # seconds by part of earlier starts of the run
        self._since = time.monotonic() if began is None else began
        self._part, self._running_steps = "start", 0
        self._step_seconds = 0.0  # so far, of the step that the devices compute
        self._lock = threading.Lock()
        self._watcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="clock")

    def resume(self, seconds: Mapping[str, float], wall: float) -> None:
        """Add the time of earlier starts of the run.

        Args:
            seconds: by part, up to the checkpoint that this start resumes from.
            wall: all seconds of the earlier starts. The difference was spent after the checkpoint
                and has to be repeated: it counts as `lost`.
        """
        self._earlier = dict(seconds)
        if (lost := wall - sum(seconds.values())) > 0:
            self._earlier["lost"] = seconds.get("lost", 0.0) + lost
        with self._lock:
            for part, value in self._earlier.items():
                self.seconds[part] += value

    def enter(self, part: str) -> str:
        """Count the host's time as `part` from now on; return the part before."""
        with self._lock:
            self._tick()
            before, self._part = self._part, part
        return before

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the host's time inside the block as `part`."""
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def watch(self, skipped: jax.Array) -> Future[float]:
        """Follow a step that was just dispatched, in a thread of the clock; does not wait.

        Args:
            skipped: an output of the step that is nonzero if the step changed nothing.

        Returns:
            The seconds that the devices spend on the step, once it has ended.
        """
        self.step_begins()
        return self._watcher.submit(self._wait, skipped)

    def _wait(self, skipped: jax.Array) -> float:
        changed_nothing = False
        try:
            changed_nothing = bool(jax.device_get(skipped))
        finally:
            seconds = self.step_ends(changed_nothing)
        return seconds

    def step_begins(self) -> None:
        """Count one more step that the devices have to compute."""
        with self._lock:
            self._tick()
            self._running_steps += 1

    def step_ends(self, skipped: bool) -> float:
        """Count the oldest running step as computed; return the seconds that it took."""
        with self._lock:
            self._tick()
            self._running_steps -= 1
            seconds, self._step_seconds = self._step_seconds, 0.0
            if skipped:
                self.seconds["train"] -= seconds
                self.seconds["skipped"] += seconds
        return seconds

    def _tick(self) -> None:
        now = time.monotonic()
        passed, self._since = now - self._since, now
        # A dispatch (part `train`) may compute already: on CPU it can return late.
        if self._running_steps or self._part == "train":
            self._step_seconds += passed
        self.seconds["train" if self._running_steps else self._part] += passed

    def totals(self) -> dict[str, float]:
        """Return the seconds by part, over all starts, up to now."""
        with self._lock:
            self._tick()
            return dict(self.seconds)

    def figures(self) -> dict[str, float]:
        """Return the time metrics of a line of the log.

        Returns:
            `seconds` of all starts; `goodput` and `goodput_this_start`, the share of them, and of
            this start's, spent on training steps that were kept; `data_wait`, the share of this
            start in which the devices were idle because the host waited for data.
        """
        totals = self.totals()
        this_start = {part: s - self._earlier.get(part, 0.0) for part, s in totals.items()}
        return {
            "seconds": round(sum(totals.values()), 3),
            "goodput": round(_share(totals, "train"), 4),
            "goodput_this_start": round(_share(this_start, "train"), 4),
            "data_wait": round(_share(this_start, "data"), 4),
        }

    def summary(self) -> str:
        """Return one line: the goodput of all starts and of this one, and where the rest went."""
        totals, figures = self.totals(), self.figures()
        rest = sorted(((s, part) for part, s in totals.items() if part != "train"), reverse=True)
        return (
            f"goodput {figures['goodput']:.0%} of {figures['seconds']:.0f} s "
            f"(this start {figures['goodput_this_start']:.0%}); the rest: "
            + ", ".join(f"{part} {s:.0f} s" for s, part in rest if s >= 0.5)
        )


def _share(seconds: Mapping[str, float], part: str) -> float:
    return seconds.get(part, 0.0) / max(sum(seconds.values()), 1e-9)
