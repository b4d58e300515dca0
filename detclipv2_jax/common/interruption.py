"""Graceful stop: a run ends between two steps on SIGTERM, Ctrl-C or a preemption notice."""

import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the same command resumes it."""

    def __init__(self, what: str, number: signal.Signals):
        """Store the message `what` and the signal that caused the stop."""
        super().__init__(what)
        self.signal = number


class StopRequest:
    """Remembers SIGTERM or Ctrl-C until the training loop checks for it after a step.

    With several processes, JAX handles SIGTERM: its coordinator picks a step that no process has
    reached yet, and all processes stop after that step.
    """

    def __init__(self):
        """Install the signal handlers, if this is the main thread of a single process."""
        self.signal = signal.SIGTERM  # the first that arrived; SIGTERM if JAX handles it
        self._requested = False
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._default_handler = signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

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
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested
