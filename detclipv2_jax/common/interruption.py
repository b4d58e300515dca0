"""Stopping a command: Ctrl-C, SIGTERM, SIGHUP or a preemption notice end it with one sentence.

`stops` is for every command: the first signal raises `Stopped` where the command is, the second
ends the process. `StopRequest` is for training, which ends between two steps.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from detclipv2_jax.common import atomic

_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
_GRACE_SECONDS = 2.0  # for code outside Python, such as a compilation, to return


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, what: str, number: signal.Signals):
        """Store the message `what` and the signal that caused the stop."""
        super().__init__(what)
        self.signal = number


class Stopped(KeyboardInterrupt):
    """A signal asked the command to stop; `str` says which.

    It is a `KeyboardInterrupt`, so that code that handles errors does not take it for one.
    """

    def __init__(self, number: int):
        """Store the signal."""
        self.signal = signal.Signals(number)
        name = "Ctrl-C" if number == signal.SIGINT else self.signal.name
        super().__init__(f"stopped by {name}")

    def told(self, message: str) -> "Stopped":
        """Return the same stop with another message."""
        told = Stopped(self.signal)
        told.args = (message,)
        return told


@contextlib.contextmanager
def stops(what_next: str = "") -> Iterator[None]:
    """Within the block, the first signal raises `Stopped`, and the second ends the process.

    A compilation takes minutes in which no exception can be raised. If the command is in such code,
    a thread calls what `at_stop` names, prints the sentence and ends the process.

    Signals that are ignored stay ignored, as after `nohup`. Does nothing outside the main thread.

    Args:
      what_next: a sentence for the message of a process that the thread ends.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = _Watch(what_next)
    before = {
        number: signal.signal(number, watch.handle)
        for number in _SIGNALS
        if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }
    _watches.append(watch)
    try:
        yield
    finally:
        _watches.remove(watch)
        for number, handler in before.items():
            signal.signal(number, handler)
        watch.close()


@contextlib.contextmanager
def at_stop(finish: Callable[[Stopped], str | None]) -> Iterator[None]:
    """Within the block, call `finish` if a signal ends the process from outside Python.

    It is called in another thread while the block waits for code that is not Python, and returns
    what to print. Where `Stopped` is raised, the block handles that itself.
    """
    watch = _watches[-1] if _watches else None
    if watch is None:
        yield
        return
    before, watch.finish = watch.finish, finish
    try:
        yield
    finally:
        watch.finish = before


def end_at_once(what_next: str) -> None:
    """Let the first signal end the process at once, also outside Python, until a `StopRequest`.

    For a program whose files on disk are always complete.
    """
    watch = _Watch(what_next, at_once=True)
    _watches.append(watch)
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, watch.handle)


_watches: list["_Watch"] = []


class _Watch:
    """A thread that learns of signals at once, also while the main thread is outside Python."""

    def __init__(self, what_next: str, at_once: bool = False):
        self.finish: Callable[[Stopped], str | None] | None = None
        self._what_next, self._at_once = what_next, at_once
        self._is_disabled = False
        self._is_raised = threading.Event()
        self._is_closed = threading.Event()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def handle(self, number: int, _: Any) -> None:
        """Raise `Stopped` in the main thread, once: the thread handles a second signal."""
        if self._at_once:
            end_process(number, f"{Stopped(number)}. {self._what_next}")
        if not self._is_raised.is_set():
            self._is_raised.set()
            raise Stopped(number)

    def disable(self) -> None:
        """Leave signals to the handlers that are installed after this call."""
        self._is_disabled = True

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(self._wakeup_before)
        self._is_closed.set()
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _watch(self) -> None:
        number = self._next_signal()
        if number is None:
            return
        threading.Thread(target=self._wait_for_python, args=(number,), daemon=True).start()
        if (second := self._next_signal()) is not None:
            end_process(second, "")

    def _next_signal(self) -> int | None:
        """Return the next signal, None when the watch is closed."""
        while byte := os.read(self._reader, 1):
            if self._is_closed.is_set():
                return None
            if byte[0] in _SIGNALS and not self._is_disabled:
                return byte[0]
        return None

    def _wait_for_python(self, number: int) -> None:
        """End the process if the main thread cannot raise the exception soon."""
        if self._is_raised.wait(_GRACE_SECONDS) or self._is_closed.is_set():
            return
        stopped = Stopped(number)
        try:
            told = self.finish(stopped) if self.finish else None
        except Exception as error:
            told = f"{stopped}. error: {error}"
        end_process(number, told or f"{stopped}. {self._what_next}".strip())


def end_process(number: int, message: str) -> None:
    """Print a message and end the process at once; files on disk are always complete."""
    atomic.remove_unfinished()
    lock = sys.modules.get("detclipv2_jax.common.lock")  # None if it is not used
    getattr(lock, "release_all", lambda: None)()
    if message:
        sys.stderr.write(f"\n{message}\n")
        sys.stderr.flush()
    os._exit(128 + number)


class StopRequest:
    """Remembers SIGTERM, SIGHUP or Ctrl-C until the training loop checks for it after a step.

    With several processes, JAX handles SIGTERM: its coordinator picks a step that no process has
    reached yet, and all processes stop after that step.
    """

    def __init__(self):
        """Install the signal handlers, if this is the main thread of a single process."""
        import jax

        self.signal = signal.SIGTERM  # the first that arrived; SIGTERM if JAX handles it
        self._requested = False
        self._count = jax.process_count()
        for watch in _watches:
            watch.disable()
        if self._count == 1 and threading.current_thread() is threading.main_thread():
            self._default_handler = signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                signal.signal(signal.SIGHUP, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if not self._requested:
            self.signal, self._requested = signal.Signals(number), True
        if number == signal.SIGINT:
            print(
                "\nstopping after this step; press Ctrl-C again to stop at once",
                file=sys.stderr,
                flush=True,
            )
            signal.signal(signal.SIGINT, self._default_handler)

    def is_due(self, step: int) -> bool:
        """Return whether all processes should stop after `step`."""
        if self._count > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
