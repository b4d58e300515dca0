"""The command `detclip page`: try a checkpoint on a local web page.

    python -m detclipv2_jax.page --checkpoint=DIR

The page is made with Gradio (`pip install -r requirements-page.txt`). By default only this machine
can open it. It loads nothing from other servers (fonts, scripts) and sends no telemetry.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import exit_status, local_text, start

_DESCRIPTION = """\
Open a local web page to try a checkpoint: drop an image, type names, see boxes.

The page runs until Ctrl-C. It needs Gradio: pip install -r requirements-page.txt"""

_EXAMPLES = """\
examples:
  detclip page --checkpoint=runs/quickstart
  detclip page --checkpoint=runs/quickstart --step=1000 --port=8000

`python -m detclipv2_jax.page` is the same command."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="detclip page",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = result.add_argument_group("model")
    model.add_argument(
        "--checkpoint",
        required=True,
        type=local_text,
        metavar="DIR",
        help="workdir of a training run",
    )
    model.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="training step of the checkpoint (default: the newest or, where training measured it, "
        "the best)",
    )
    address = result.add_argument_group("address")
    address.add_argument(
        "--port", type=int, default=7860, metavar="N", help="TCP port (default: %(default)s)"
    )
    address.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; with any other than the default, other machines can open the "
        "page without a password (default: %(default)s, only this machine)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 after a `UserError`."""
    return exit_status(_run, arguments)


def _run(arguments: Sequence[str] | None) -> None:
    start()
    args = parser().parse_args(arguments)
    from detclipv2_jax.evaluation.page import run

    run(args)


if __name__ == "__main__":
    sys.exit(main())
