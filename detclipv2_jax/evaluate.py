"""Measures a model on sets with boxes, in a training run or as a job of its own.

    python -m detclipv2_jax.evaluate --checkpoint=DIR --dataset=NAME --output=DIR
    python -m detclipv2_jax.evaluate --predictions=FILE.json --dataset=NAME --output=DIR

All names of a set are asked at once. A job shares the images among devices and processes, keeps
the answers on disk (predictions.py) and goes on after a kill. Runs without TensorFlow.
"""

import argparse
import pathlib
import signal
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.interruption import Interrupted
from detclipv2_jax.evaluation import datasets
from detclipv2_jax.evaluation.measure import measure_results_file
from detclipv2_jax.evaluation.report import table
from detclipv2_jax.inference.config import DEFINITIONS


def run(args: argparse.Namespace) -> None:
    """Evaluates as the command line says, writes and prints the results."""
    _check(args)
    output = pathlib.Path(args.output)
    if not args.predictions:
        from detclipv2_jax.evaluation import job  # measures with what is in this module

        job.run(args, output)
        return
    sets = datasets.load(args.dataset, args.data_dir, args.images, args.format)
    if len(sets) > 1:
        raise UserError(f"a results file is of one set, and --dataset={args.dataset} are several.")
    print(table(measure_results_file(args.predictions, sets[0].truth, output=output)))
    print(f"\nwritten to {output}: results.json")


def _check(args: argparse.Namespace) -> None:
    if args.follow and args.step != "newest":
        raise UserError("--follow evaluates every checkpoint of the run; leave --step out.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size} must be at least 1.")
    if args.predictions and (args.follow or args.step != "newest" or args.results_json):
        raise UserError("--predictions takes no --step, --follow or --results_json.")


def _step_option(text: str) -> str | int | list[int]:
    if text in ("newest", "best", "all"):
        return text
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of newest, best, all, a number, or numbers between commas"
        ) from None
    return steps if "," in text else steps[0]


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.evaluate",
        description="Measures a checkpoint on an LVIS set (standard and fixed AP) or a COCO-format "
        "set (COCO's twelve figures); writes results.json and pictures, prints a table. Killed, "
        "the same command goes on.",
    )
    detector = result.add_mutually_exclusive_group(required=True)
    detector.add_argument("--checkpoint", metavar="DIR", help="the workdir of a training run")
    detector.add_argument(
        "--predictions",
        metavar="FILE.json",
        help="instead: a results file of COCO's and LVIS's format, of any tool",
    )
    result.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help=f"{', '.join(datasets.NAMES)}, or an annotation file (LVIS v1 or COCO "
        "instances), or a folder with one",
    )
    result.add_argument(
        "--data_dir",
        default="data",
        metavar="DIR",
        help="where the sets known by name lie, in coco/ and odinw/ (default: %(default)s)",
    )
    result.add_argument(
        "--images", metavar="DIR", help="where the images lie (default: near the annotations)"
    )
    result.add_argument(
        "--format", choices=("auto", "lvis", "coco"), default="auto", help="(default: %(default)s)"
    )
    result.add_argument("--output", required=True, metavar="DIR", help="where to write")
    result.add_argument(
        "--step",
        type=_step_option,
        default="newest",
        metavar="STEP",
        help="which of the run's checkpoints: newest, best (in training), a number, or several in "
        "one job: all, or 1000,2000 (default: %(default)s)",
    )
    result.add_argument(
        "--follow",
        action="store_true",
        help="evaluate every checkpoint of a running training as it is written, to its last step",
    )
    result.add_argument(
        "--batch_size", type=int, help="images at once, a device (default: as in the training run)"
    )
    result.add_argument(
        "--definitions",
        choices=DEFINITIONS,
        help="ask for names with their definitions (default: as in the training run)",
    )
    result.add_argument(
        "--prompts",
        action="append",
        metavar="SENTENCE",
        help="ask in a sentence, as 'a photo of a {}.'; may be given several times, then the mean "
        "of their embeddings is asked",
    )
    result.add_argument(
        "--results_json",
        action="store_true",
        help="write the detections as predictions.json too, in COCO's and LVIS's format",
    )
    result.add_argument(
        "--coordinator_address", help="host:port of the first process, where no cluster tells it"
    )
    result.add_argument("--num_processes", type=int, help="processes of the job")
    result.add_argument("--process_id", type=int, help="number of this process")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, in one sentence."""
    args = parser().parse_args(arguments)
    try:
        return exit_status(run, args)
    except (Interrupted, KeyboardInterrupt) as stopped:
        told = stopped if isinstance(stopped, Interrupted) else "stopped"
        print(f"{told}; the same command goes on from there", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stopped, Interrupted) else signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
