"""How a training process sets up its libraries before it uses a device."""

import logging as python_logging
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import jax
from absl import logging

from detclipv2_jax.training.config import RunConfig


def use_all_cpu_cores(config: RunConfig) -> None:
    """Make one JAX device per CPU core, or as many as divide the batch of every kind.

    XLA runs most of a small model's operations on one core. With the batch split over devices, all
    cores are busy. Accelerators, and a device count set in XLA_FLAGS, stay as they are. Call it
    before JAX initializes its devices.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    kinds = config.data.kinds().values()
    batch = math.gcd(*(kind.batch_size // max(kind.micro_batches, 1) for kind in kinds))
    if batch:
        cores = os.cpu_count() or 1
        count = max(n for n in range(1, cores + 1) if batch % n == 0)
        jax.config.update("jax_num_cpu_devices", count)


def keep_compiled_programs(workdir: Path) -> None:
    """Cache compiled programs in the workdir, unless JAX has a cache already.

    A resumed run, or one that only evaluates again, then finds its programs compiled.
    """
    # JAX adds its options to the class at run time.
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)


def silence_libraries() -> None:
    """Hide what libraries log about unwritable files; the run reports each error once itself.

    Orbax logs the error in each of its threads, with the stack, and each file that it writes.
    asyncio and Python report results that still arrive for a save that was given up. TensorBoard's
    writer thread dies of the error.
    """
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    python_logging.getLogger("asyncio").setLevel("CRITICAL")

    def show_unraisable(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    def show_thread_error(error: Any) -> None:
        if not type(error.thread).__module__.startswith("tensorboard."):
            threading.__excepthook__(error)

    sys.unraisablehook, threading.excepthook = show_unraisable, show_thread_error


def mute_stdout() -> None:
    """Drop what this process prints: only the first process of a run prints. Errors use stderr."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
