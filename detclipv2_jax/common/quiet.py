"""Keep what libraries log for their developers off the terminal."""

import functools
import logging as python_logging
import os
import sys
import threading
from typing import Any

from absl import logging


@functools.cache
def quiet_libraries() -> None:
    """Hide notes of orbax and others; the commands report each error once themselves.

    Orbax warns of its own defaults, and logs the error of an unwritable file in each of its
    threads, with the stack. asyncio and Python report results that still arrive for a save that was
    given up. TensorBoard's writer thread dies of the error. The package's `__init__` sets
    `TF_CPP_MIN_LOG_LEVEL` for XLA and TensorFlow, which read it when they are imported. On new
    CPUs TensorFlow notes at every level that it uses oneDNN; what reads images has no use for it.
    """
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    python_logging.getLogger("asyncio").setLevel("CRITICAL")

    def show_unraisable(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    def show_thread_error(error: Any) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            threading.__excepthook__(error)

    sys.unraisablehook, threading.excepthook = show_unraisable, show_thread_error
