"""A run that is told to end, by SIGTERM, Ctrl-C or a preemption notice, ends between two steps."""

import signal
import sys
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was told to stop and has saved its state; the same command goes on."""

    def __init__(self, what: str, number: signal.Signals):
        """`what` happened, by which signal."""
        super().__init__(what)
        self.signal = number


class StopRequest:
    """Set by SIGTERM or Ctrl-C, asked for after each step.

    With several processes the last one to be told decides: JAX's coordinator, which handles SIGTERM
    there, picks a step that none has reached yet, and all stop after it.
    """

    def __init__(self):
        """Handles the signals from here on, where this is the main thread of a lone process."""
        self.signal, self._told = signal.SIGTERM, False  # the first that came; did one come?
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, _: Any) -> None:
        if not self._told:
            self.signal, self._told = signal.Signals(number), True
        if number == signal.SIGINT:
            print("\nending after this step; Ctrl-C again: at once", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, self._before)

    def is_due(self, step: int) -> bool:
        """Should all processes stop after this step?"""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told
