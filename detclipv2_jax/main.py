"""Pre-training.

    python -m detclipv2_jax.main --config=configs/pretrain.py[:nano|swin_t|swin_l] --workdir=DIR

Any field of the config can be set behind it: `--config.train.epochs=1`. The same command goes on
where a killed run stopped.
"""

import logging as python_logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import config_flags

from detclipv2_jax.training import flags as flags_lib

_BEGAN = time.monotonic()  # what comes before the first step is part of what a run takes
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "File with the run's config.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes, and where it goes on from.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of the first process, where no cluster tells it."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
_INDEX = flags.DEFINE_integer("process_id", None, "Number of this process.", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])


def _train(argv: list[str]) -> None:
    """Starts the processes of the run, reads the config, trains."""
    import jax

    from detclipv2_jax.common import distributed
    from detclipv2_jax.training import config, train

    logging.set_verbosity(logging.WARNING)  # orbax tells of every file
    _say_failures_once()
    parsed, workdir = config.parse(_CONFIG.value.to_dict()), Path(_WORKDIR.value).absolute()
    if not distributed.start(_COORDINATOR.value, _COUNT.value, _INDEX.value):
        _split_cpu(parsed)
    elif jax.process_index():  # one voice; what goes wrong is said by each on stderr
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if not jax.config.jax_compilation_cache_dir:
        # A run that goes on, or that only evaluates, finds its programs compiled.
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compilation_cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    train.train(parsed, workdir, _BEGAN)


def _end_at_once(number: int, _: Any) -> None:
    """Ends the process without waiting for its threads; what is on disk is whole."""
    name = signal.Signals(number).name
    sys.stderr.write(f"\nstopped by {name}; the same command goes on from the last checkpoint\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _say_failures_once() -> None:
    """Of a file that cannot be written only what the run says of it is shown.

    Orbax logs the error from each of its threads, with its stack; what still arrives for a save
    that was given up is shown by asyncio and by Python; and TensorBoard's thread dies of it.
    """
    python_logging.getLogger("asyncio").setLevel("CRITICAL")
    logging.get_absl_logger().addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )

    def unraisable(problem: Any) -> None:
        if str(problem.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(problem)

    def of_thread(problem: Any) -> None:
        if not type(problem.thread).__module__.startswith("tensorboard."):
            threading.__excepthook__(problem)

    sys.unraisablehook, threading.excepthook = unraisable, of_thread


def _split_cpu(parsed: Any) -> None:
    """Makes a device of every CPU core, as far as all batches can be split over them.

    XLA computes most of a small model's operations on one core; split over the batch they keep all
    cores busy. Accelerators, and a number set in XLA_FLAGS, are left alone.
    """
    import jax

    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    batch = math.gcd(
        *(k.batch_size // max(k.micro_batches, 1) for k in parsed.data.kinds().values())
    )
    if batch:
        cores = os.cpu_count() or 1
        jax.config.update(
            "jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch % n == 0)
        )


def _run(argv: list[str]) -> None:
    """Run `_train`; a run that a signal ended exits with 128 + the number of the signal."""
    import jax

    from detclipv2_jax.common.errors import UserError
    from detclipv2_jax.common.interruption import Interrupted

    try:
        _train(argv)
    except Interrupted as interrupted:
        print(f"{interrupted}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + interrupted.signal)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # Python's own end would wait for the other processes, which wait for this one.
        if mendable := isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if mendable else 1)


def main() -> None:
    """Run the command line and end the process with its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_at_once)  # until the training loop takes over
    flags_lib.run_with_config(_run)


if __name__ == "__main__":
    main()
