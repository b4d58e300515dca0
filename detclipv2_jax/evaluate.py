"""The command `detclip evaluate`: measure checkpoints and results files on LVIS and COCO.

    python -m detclipv2_jax.evaluate --checkpoint=DIR --dataset=NAME --output=DIR
    python -m detclipv2_jax.evaluate --predictions=FILE.json --dataset=NAME --output=DIR

The model is asked for all names of a dataset at once. Devices and processes share the images, and
a killed job can resume. Runs without TensorFlow.
"""

import argparse
import sys
from collections.abc import Sequence

# Functions import the rest: Ctrl-C is handled from the start.
from detclipv2_jax.common.cli import exit_status, local_text, start
from detclipv2_jax.inference.config import DEFINITIONS

_DESCRIPTION = """\
Measure a checkpoint, several checkpoints of a run, or a results file.

LVIS datasets get standard and fixed AP, other datasets COCO's twelve metrics.
The command prints a table and writes results.json (all metrics and settings),
pictures of detections, and for LVIS categories.json (the AP of each category).
If it is stopped, the same command resumes."""

_EXAMPLES = """\
examples:
  detclip evaluate --checkpoint=runs/swin_t --dataset=lvis_minival \\
      --output=evaluation/minival
  detclip evaluate --checkpoint=runs/swin_t --dataset=my/annotations.json \\
      --images=my/images --output=evaluation/mine
  detclip evaluate --checkpoint=runs/swin_t --dataset=coco --step=all \\
      --output=evaluation/steps
  detclip evaluate --predictions=predictions.json --dataset=coco \\
      --output=evaluation/other_tool

`python -m detclipv2_jax.evaluate` is the same command. docs/evaluation.md
describes the datasets, the protocols, and jobs on several machines. Exit status:
0, 2 if an option or a file is not valid, 130 after Ctrl-C, 143 after SIGTERM."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="detclip evaluate",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model(result)
    _add_dataset(result)
    _add_output(result)
    _add_names(result)
    _add_processes(result)
    return result


def _add_model(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("what to measure")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint", type=local_text, metavar="DIR", help="workdir of a training run"
    )
    model.add_argument(
        "--predictions",
        type=local_text,
        metavar="FILE.json",
        help="results file in COCO's and LVIS's format, from any tool",
    )
    group.add_argument(
        "--step",
        type=_step_option,
        default="auto",
        metavar="STEP",
        help="which checkpoints: auto (as detect: the newest or, where training measured it, the "
        "best), newest, best (by the evaluations in training), all, a step, or several steps as in "
        "1000,2000 (default: %(default)s)",
    )
    group.add_argument(
        "--follow",
        action="store_true",
        help="evaluate every checkpoint of a running training as it is written; end after the "
        "last step",
    )


def _step_option(text: str) -> str | int | list[int]:
    """Return "auto", "newest", "best", "all", a step, or a list of steps."""
    if text in ("auto", "newest", "best", "all"):
        return text
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not auto, newest, best, all, a step, or steps separated by commas"
        ) from None
    return steps if "," in text else steps[0]


def _add_dataset(result: argparse.ArgumentParser) -> None:
    from detclipv2_jax.evaluation import datasets

    add = result.add_argument_group("dataset").add_argument
    add(
        "--dataset",
        required=True,
        type=local_text,
        metavar="NAME",
        help=f"{', '.join(datasets.NAMES)}, an annotation file (LVIS v1 or COCO instances), or a "
        "folder with one",
    )
    add(
        "--data_dir",
        type=local_text,
        default="data",
        metavar="DIR",
        help="directory of the datasets known by name, in coco/ and odinw/ (default: %(default)s)",
    )
    add(
        "--images",
        type=local_text,
        metavar="DIR",
        help="directory of the images (default: near the annotations)",
    )
    add(
        "--format",
        choices=("auto", "lvis", "coco"),
        default="auto",
        help="format of an annotation file (default: %(default)s)",
    )


def _add_output(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("output").add_argument
    add("--output", required=True, type=local_text, metavar="DIR", help="directory for the results")
    add(
        "--results_json",
        action="store_true",
        help="also write all detections as predictions.json, in COCO's and LVIS's format",
    )
    add(
        "--store_threshold",
        action="store_true",
        help="store the score threshold with the best F1 in the run (thresholds.json), from where "
        "detect, page and export take it; of a set that is not for testing",
    )


def _add_names(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("prompts and batches").add_argument
    add(
        "--definitions",
        choices=DEFINITIONS,
        help="whether to ask for each name with its definition (default: as in the training run)",
    )
    add(
        "--prompts",
        action="append",
        metavar="SENTENCE",
        help="sentence with {} for the name, such as 'a photo of a {}.'; give it several times to "
        "use the mean of the embeddings (default: as in the training run)",
    )
    add(
        "--batch_size",
        type=int,
        metavar="N",
        help="images per device and call of the model (default: as in the training run)",
    )


def _add_processes(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group(
        "several processes", "Give all three, or none on a cluster that JAX detects."
    ).add_argument
    add("--coordinator_address", metavar="HOST:PORT", help="address of the first process")
    add("--num_processes", type=int, metavar="N", help="number of processes")
    add("--process_id", type=int, metavar="N", help="number of this process, from 0")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return exit_status(_run, arguments, what_next="Run the same command to resume.")


def _run(arguments: Sequence[str] | None) -> None:
    start()
    args = parser().parse_args(arguments)
    from detclipv2_jax.evaluation import job

    job.run(args)


if __name__ == "__main__":
    sys.exit(main())
