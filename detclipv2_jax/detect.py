"""The command `detclip detect`: find named things in images, folders of images and videos.

    python -m detclipv2_jax.detect --checkpoint=DIR --names="cat, traffic light" --output=DIR IMAGE…

It draws the boxes on each image and video, and writes what it found to `detections.json` and, in
COCO's format, to `coco.json`. In Python, use `Detector`. Neither needs TensorFlow.
"""

import argparse
import sys
from collections.abc import Sequence

from detclipv2_jax.common.cli import refuse_renamed
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DEFINITIONS
from detclipv2_jax.inference.detect_command import run
from detclipv2_jax.inference.detector import Detector as Detector

_DESCRIPTION = """\
Find named things in images, folders of images and videos.

Any words or short phrases can be names. The output directory gets each image
and video with its boxes drawn, detections.json (boxes as [x_min, y_min, x_max,
y_max] in pixels of the image) and coco.json (the same in COCO's format)."""

_EXAMPLES = """\
examples:
  detclip detect --checkpoint=runs/quickstart --names="cat, traffic light" \\
      --output=found street.jpg
  detclip detect --checkpoint=runs/quickstart --names_file=names.txt \\
      --score_threshold=0.5 --batch_size=8 --output=found photos/ drive.mp4
  detclip detect --checkpoint=runs/quickstart --names="cat" \\
      --prompts="a photo of a {}." --prompts="a drawing of a {}." --output=found cat.png

`python -m detclipv2_jax.detect` is the same command. Exit status: 0, or 2 if an
option is not valid or a file could not be read."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    result = argparse.ArgumentParser(
        prog="detclip detect",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(result)
    _add_names(result)
    _add_selection(result)
    refuse_renamed(result, {"--keep": "--max_detections"})
    return result


def _add_files(result: argparse.ArgumentParser) -> None:
    result.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, video file, or folder (its images and those of its subfolders)",
    )
    files = result.add_argument_group("model and output")
    files.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="workdir of a training run"
    )
    files.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="training step of the checkpoint (default: the newest)",
    )
    files.add_argument("--output", required=True, metavar="DIR", help="directory for the results")


def _add_names(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("names (give one of the first two)")
    names = group.add_mutually_exclusive_group(required=True)
    names.add_argument(
        "--names", help='what to look for, separated by commas: "cat, traffic light"'
    )
    names.add_argument("--names_file", metavar="FILE", help="text file with one name per line")
    group.add_argument(
        "--definitions",
        choices=DEFINITIONS,
        help="whether to ask for each name with its definition (default: as the config of the "
        "training run says)",
    )
    group.add_argument(
        "--prompts",
        action="append",
        metavar="SENTENCE",
        help="ask for each name in a sentence, for example 'a photo of a {}.'. Repeat the option "
        "for several sentences; the mean of their embeddings is used",
    )
    group.add_argument(
        "--cache",
        metavar="DIR",
        help="directory that caches embeddings of long lists of names; empty: no cache (default: "
        "$XDG_CACHE_HOME/detclipv2_jax or ~/.cache/detclipv2_jax)",
    )


def _add_selection(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("boxes and speed")
    group.add_argument(
        "--score_threshold",
        type=float,
        default=0.3,
        metavar="X",
        help="only keep boxes with a score above this, 0 to 1 (default: %(default)s)",
    )
    group.add_argument(
        "--max_detections",
        type=int,
        default=300,
        metavar="N",
        help="at most this many boxes per image (default: %(default)s)",
    )
    group.add_argument(
        "--batch_size",
        type=int,
        default=1,
        metavar="N",
        help="images processed together (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 if an option is not valid or a file could not be read."""
    args = parser().parse_args(arguments)
    try:
        return 2 if run(args) else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
