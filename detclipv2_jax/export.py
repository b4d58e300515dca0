"""A checkpoint as files for other programs.

    python -m detclipv2_jax.export --checkpoint=DIR --format=NAME --output=DIR

`stablehlo`, `savedmodel` and `onnx` are detectors that run without this package: pictures in,
boxes, scores and names out, suppression included. With `--names` the vocabulary is inside; without,
it is an input, and the text encoder and its tokenizer lie beside. `safetensors` are the averaged
parameters by name; `--config.init.model=FILE` starts a run from them.

Beside each lie a model card (`README.md`), `manifest.json` and, for the detectors, `example.py`,
which runs them on an image. docs/export.md tells of each.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import exit_status, refuse_renamed
from detclipv2_jax.exporters.export import DETECTORS, run
from detclipv2_jax.inference.config import DEFINITIONS


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.export",
        description="Writes a checkpoint's model as a file for other programs.",
    )
    add = result.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="the workdir of a training run")
    add(
        "--format",
        choices=("safetensors", *DETECTORS),
        default="safetensors",
        help="safetensors: the averaged parameters, float32, by name; the others: a detector for "
        "JAX, TensorFlow or ONNX (default: %(default)s)",
    )
    add("--output", required=True, metavar="DIR", help="where to write")
    add("--step", type=int, help="which of the run's checkpoints (default: the newest)")
    names = result.add_mutually_exclusive_group()
    names.add_argument("--names", help='what a detector looks for, "cat, dog" (default: an input)')
    names.add_argument("--names_file", metavar="FILE", help="the same, a file, a name on each line")
    add("--canvas", metavar="HxW", help="a detector's pictures, 800x1344 (default: as evaluated)")
    add(
        "--score_threshold",
        type=float,
        default=0.05,
        help="a detector answers what scores more than this (default: %(default)s)",
    )
    add(
        "--max_detections",
        type=int,
        default=300,
        help="at most so many boxes an image (default: %(default)s)",
    )
    add(
        "--rows",
        type=int,
        default=256,
        help="stablehlo with names as an input: how many it has room for (default: %(default)s)",
    )
    add(
        "--definitions",
        choices=DEFINITIONS,
        help="ask for names with their definitions (default: as in the training run)",
    )
    add("--license", help="what the model card says of it, for example apache-2.0")
    refuse_renamed(result, {"--keep": "--max_detections", "--licence": "--license"})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, one sentence each."""
    return exit_status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
