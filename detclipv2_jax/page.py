"""A web page to try a checkpoint: drop an image, type names, move the threshold, see boxes.

    python -m detclipv2_jax.page --checkpoint=DIR

The page is Gradio's (`pip install -r requirements-page.txt`). It is served to this machine alone
and asks nothing of any other: neither fonts nor scripts, no telemetry.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.evaluation.page import run


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.page",
        description="Opens a local web page on which a checkpoint can be tried.",
    )
    result.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="the workdir of a training run"
    )
    result.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    result.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    result.add_argument(
        "--host",
        default="127.0.0.1",
        help="the address to listen on; any but the default lets other machines in, who need no "
        "password (default: %(default)s, this machine alone)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, in one sentence."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
