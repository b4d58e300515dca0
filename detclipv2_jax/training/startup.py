"""How a training process sets up its libraries before it uses a device."""

import math
import os
import sys

import jax

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


def mute_stdout() -> None:
    """Drop what this process prints: only the first process of a run prints. Errors use stderr."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open as long as the process lives
