"""The command `detclip export`: write a checkpoint's model as files for other programs.

    python -m detclipv2_jax.export --checkpoint=DIR --format=NAME --output=DIR

The formats `stablehlo`, `savedmodel` and `onnx` are complete detectors, which run without this
package. `safetensors` holds the parameters alone. docs/export.md describes all of them.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import exit_status, local_text, refuse_renamed, start
from detclipv2_jax.inference.config import DEFINITIONS

_DETECTORS = ("stablehlo", "savedmodel", "onnx")

_DESCRIPTION = """\
Write a checkpoint's model as files for other programs.

  safetensors  the averaged parameters by name, for fine-tuning and sharing
  stablehlo    a detector for JAX on CPU, CUDA and TPU
  savedmodel   a detector for TensorFlow
  onnx         a detector for ONNX Runtime

A detector takes images and returns boxes, scores and labels. It includes
normalization and suppression and runs without this package. The output
directory also gets a model card (README.md), manifest.json and, for a detector,
example.py, which runs it on an image."""

_EXAMPLES = """\
examples:
  detclip export --checkpoint=runs/quickstart --output=exported
  detclip export --checkpoint=runs/quickstart --format=onnx \\
      --names="cat, traffic light" --output=exported
  python exported/example.py street.jpg

`python -m detclipv2_jax.export` is the same command. docs/export.md describes the
formats and what each needs."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="detclip export",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(result)
    _add_detector(result)
    refuse_renamed(result, {"--keep": "--max_detections", "--licence": "--license"})
    return result


def _add_files(result: argparse.ArgumentParser) -> None:
    add = result.add_argument_group("model and output").add_argument
    add(
        "--checkpoint",
        required=True,
        type=local_text,
        metavar="DIR",
        help="workdir of a training run",
    )
    add(
        "--step",
        type=int,
        metavar="N",
        help="training step of the checkpoint (default: the newest or, where training measured it, "
        "the best)",
    )
    add(
        "--format",
        choices=("safetensors", *_DETECTORS),
        default="safetensors",
        help="what to write, see above (default: %(default)s)",
    )
    add("--output", required=True, type=local_text, metavar="DIR", help="directory for the files")
    add("--license", metavar="NAME", help="for the model card, for example apache-2.0")


def _add_detector(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("options of a detector (not of safetensors)")
    names = group.add_mutually_exclusive_group()
    names.add_argument(
        "--names",
        help='names that it detects, separated by commas: "cat, traffic light" (default: names '
        "are an input, and the text encoder is exported too)",
    )
    names.add_argument(
        "--names_file", type=local_text, metavar="FILE", help="text file with one name per line"
    )
    group.add_argument(
        "--definitions",
        choices=DEFINITIONS,
        help="whether to ask for each name with its definition (default: as the config of the "
        "training run says)",
    )
    group.add_argument(
        "--canvas",
        metavar="HxW",
        help="height and width in pixels that images are scaled into, for example 800x1344 "
        "(default: as the config of the training run says)",
    )
    group.add_argument(
        "--score_threshold",
        type=float,
        metavar="X",
        help="only return boxes with a score above this, 0 to 1 (default: 0.05, or the "
        "checkpoint's own threshold if that is lower; example.py then prints what is above the "
        "checkpoint's own)",
    )
    group.add_argument(
        "--max_detections",
        type=int,
        default=300,
        metavar="N",
        help="at most this many boxes per image (default: %(default)s)",
    )
    group.add_argument(
        "--rows",
        type=int,
        default=256,
        metavar="N",
        help="stablehlo with names as an input: the largest number of names (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after printing an error that the user can fix."""
    return exit_status(_run, arguments, what_next="Run the same command to start over.")


def _run(arguments: Sequence[str] | None) -> None:
    start()
    args = parser().parse_args(arguments)
    from detclipv2_jax.exporters.export import run

    run(args)


if __name__ == "__main__":
    sys.exit(main())
