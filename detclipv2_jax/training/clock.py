"""Where the wall time of a run goes."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax


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
