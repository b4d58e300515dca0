"""Pre-train or fine-tune a detector.

    detclip train --config=pretrain.py[:nano|swin_t|swin_l] --workdir=DIR

`--config.FIELD=VALUE` sets any field of the config, such as `--config.train.epochs=1`;
`--config=RECIPE --help` lists the fields. The same command resumes a run that was stopped.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from detclipv2_jax.common.interruption import end_at_once
from detclipv2_jax.common.printable import print_any_text
from detclipv2_jax.common.quiet import quiet_libraries
from detclipv2_jax.training import flags as flags_lib

_BEGAN = time.monotonic()  # imports and set-up count as time of the run
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe and size of the model, such as pretrain.py:swin_t.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run; if it holds a checkpoint, the run resumes from it."
)
_PRINT_CONFIG = flags.DEFINE_boolean(
    "print_config", False, "Print the config as JSON, with all fields set as given, and end."
)
_PROFILE = flags.DEFINE_string(
    "profile", "", "Steps to trace into WORKDIR/profile: FIRST:LAST, LAST excluded, e.g. 100:103."
)
_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "host:port of the first process, if no cluster manager sets it."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_INDEX = flags.DEFINE_integer("process_id", None, "Number of this process.", lower_bound=0)


def main() -> None:
    """Run the command line and end the process with its exit status."""
    # From before the imports of jax, which take seconds, until the training loop handles signals.
    end_at_once("Run the same command to resume from the last checkpoint.")
    print_any_text()
    quiet_libraries()
    flags_lib.run_with_config(_run, handles_signals=False)


def _end_without_lock() -> None:
    """End the process, because another one trains in its workdir."""
    print(
        f"error: {_WORKDIR.value}: another process took over, because this one gave no sign of "
        "life for a minute.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _run(argv: list[str]) -> None:
    """Train, and turn what ends the training into an exit status and a message."""
    import jax

    from detclipv2_jax.common.errors import UserError
    from detclipv2_jax.common.interruption import Interrupted

    try:
        _train()
    except Interrupted as interrupted:
        print(f"{interrupted}. Run the same command to resume.", file=sys.stderr)
        sys.exit(128 + interrupted.signal)
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # A normal exit would wait for the other processes, which wait for this one.
        if is_user_error := isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if is_user_error else 1)


def _train() -> None:
    """Read the config, join the other processes, and train."""
    import jax

    from detclipv2_jax.common import atomic, cache, config_dict, distributed, lock
    from detclipv2_jax.common.errors import UserError
    from detclipv2_jax.training import config, startup, train

    parsed = config.parse(_CONFIG.value.to_dict())
    if _PRINT_CONFIG.value:
        print(json.dumps(config_dict.to_dict(parsed), indent=2))
        return
    if not _WORKDIR.value:
        raise UserError(
            "--workdir is missing. Name the directory that the run writes to, such as "
            "--workdir=runs/my_photos."
        )
    workdir = Path(_WORKDIR.value).absolute()
    if distributed.start(_ADDRESS.value, _COUNT.value, _INDEX.value):
        cache.keep_compiled_programs(workdir / "compilation_cache")
        if jax.process_index() != 0:
            startup.mute_stdout()
    else:
        startup.use_all_cpu_cores(parsed)
        cache.keep_compiled_programs()
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:  # for all processes of the run
            stack.enter_context(
                lock.held(workdir, "trains here", "give another --workdir", _end_without_lock)
            )
            atomic.remove_leftovers(workdir)
        train.train(parsed, workdir, began=_BEGAN, profile=_PROFILE.value)


if __name__ == "__main__":
    main()
