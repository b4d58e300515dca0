"""Answers: images and free names in, boxes with names and scores out; as a class and a command.

    python -m detclipv2_jax.detect --checkpoint=DIR --names="cat, traffic light" --output=DIR IMAGE…

`Detector` is what a program asks; it runs without TensorFlow. The command takes images, folders of
images and videos; it writes them with the boxes drawn, and what was found as `detections.json` and,
in COCO's form, `coco.json`.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import refuse_renamed
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DEFINITIONS
from detclipv2_jax.inference.detect_files import run
from detclipv2_jax.inference.detector import Detector as Detector


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.detect",
        description="Finds named things in images and videos: writes each with its boxes drawn, "
        "detections.json with boxes as [x_min, y_min, x_max, y_max] in the image's pixels, and "
        "coco.json.",
    )
    result.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of images (and of folders), videos",
    )
    result.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="the workdir of a training run"
    )
    names = result.add_mutually_exclusive_group(required=True)
    names.add_argument("--names", help='what to look for, for example "cat, traffic light"')
    names.add_argument("--names_file", metavar="FILE", help="a text file with a name on each line")
    result.add_argument("--output", required=True, metavar="DIR", help="where to write")
    result.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    result.add_argument(
        "--score_threshold",
        type=float,
        default=0.3,
        help="show what scores more than this, 0 to 1 (default: %(default)s)",
    )
    result.add_argument(
        "--max_detections",
        type=int,
        default=100,
        help="at most so many boxes an image (default: %(default)s)",
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
        "--cache",
        metavar="DIR",
        help="where the embeddings of long lists of names are kept; empty: nowhere (default: "
        "$XDG_CACHE_HOME/detclipv2_jax or ~/.cache/detclipv2_jax)",
    )
    result.add_argument(
        "--batch_size",
        type=int,
        default=1,
        help="images that are answered together (default: %(default)s)",
    )
    refuse_renamed(result, {"--keep": "--max_detections"})
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, one sentence each."""
    args = parser().parse_args(arguments)
    try:
        return 2 if run(args) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
