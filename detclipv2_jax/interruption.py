"""A run that is told to end, by SIGTERM or a preemption notice, ends between two steps."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupted(Exception):
    """The run was told to stop and has saved its state; the same command goes on."""


class StopRequest:
    """Set by SIGTERM, asked for after each step.

    With several processes the last one to be told decides: JAX's coordinator, which handles the
    signal there, picks a step that none has reached yet, and all stop after it.
    """

    def __init__(self):
        """Handles SIGTERM from here on, where this is the main thread of a lone process."""
        self._told = threading.Event()
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self._told.set())

    def is_due(self, step: int) -> bool:
        """Should all processes stop after this step?"""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._told.is_set()
