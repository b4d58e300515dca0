"""The command `detclip detect`: find named things in images, folders of images and videos.

    python -m detclipv2_jax.detect --checkpoint=DIR --names="cat, traffic light" --output=DIR IMAGE…
    python -m detclipv2_jax.detect --checkpoint=DIR --caption="a cat on a mat" --output=DIR IMAGE…

It draws the boxes on each image and video, and writes what it found to `detections.json` and, in
COCO's format, to `coco.json`. With a caption it draws the best region of each of its noun phrases,
and writes `phrases.json`. In Python, use `Detector`. Nothing here needs TensorFlow.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# Functions import the rest: --help answers at once, and Ctrl-C is handled from the start.
from detclipv2_jax.common.cli import exit_status, local_text, refuse_renamed, start
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DEFINITIONS

if TYPE_CHECKING:
    from detclipv2_jax.inference.detector import Detector as Detector

_DESCRIPTION = """\
Find named things in images, folders of images and videos.

Any words or short phrases can be names. The output directory gets each image
and video with its boxes drawn, detections.json (boxes as [x_min, y_min, x_max,
y_max] in pixels of the image) and coco.json (the same in COCO's format).

With a caption in place of names, each of its noun phrases is shown with the one
region that fits it best, whatever the score; the caption stands below in the
same colors. The output directory gets the pictures and phrases.json."""

_EXAMPLES = """\
examples:
  detclip detect --checkpoint=runs/quickstart --names="cat, traffic light" \\
      --output=found street.jpg
  detclip detect --checkpoint=runs/quickstart --names_file=names.txt \\
      --score_threshold=0.5 --batch_size=8 --output=found photos/ drive.mp4
  detclip detect --checkpoint=runs/quickstart --names="cat" \\
      --prompts="a photo of a {}." --prompts="a drawing of a {}." --output=found cat.png
  detclip detect --checkpoint=runs/quickstart --caption="a man in a red shirt rides a horse" \\
      --output=found ride.jpg
  detclip detect --checkpoint=runs/quickstart --captions_file=captions.jsonl \\
      --output=found photos/

A file that the command did not write is never replaced. If the command is
stopped, the JSON files have what was answered, with "complete": false.

`python -m detclipv2_jax.detect` is the same command. Exit status: 0, 2 if an option
is not valid or a file could not be read, 130 after Ctrl-C, 143 after SIGTERM."""


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from detclipv2_jax.inference.detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
        type=local_text,
        metavar="IMAGE",
        help="image file, video file, or folder (its images and those of its subfolders)",
    )
    files = result.add_argument_group("model and output")
    files.add_argument(
        "--checkpoint",
        required=True,
        type=local_text,
        metavar="DIR",
        help="workdir of a training run",
    )
    files.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="training step of the checkpoint (default: the newest or, where training measured it, "
        "the best)",
    )
    files.add_argument(
        "--output", required=True, type=local_text, metavar="DIR", help="directory for the results"
    )


def _add_names(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("names (give one of the first four)")
    names = group.add_mutually_exclusive_group(required=True)
    names.add_argument(
        "--names",
        help='what to look for, separated by commas: "cat, traffic light"; a name with a '
        "comma goes into --names_file, or between double quotes",
    )
    names.add_argument(
        "--names_file", type=local_text, metavar="FILE", help="text file with one name per line"
    )
    names.add_argument(
        "--caption",
        metavar="TEXT",
        help="what the image shows: draw the best region of each noun phrase (needs spaCy, or "
        "--phrases)",
    )
    names.add_argument(
        "--captions_file",
        type=local_text,
        metavar="FILE",
        help='the same for many images: lines {"image": FILE, "caption": TEXT}, caption<TAB>image '
        "file (.tsv), or COCO's captions; the images are looked for in the folders IMAGE",
    )
    group.add_argument(
        "--phrases",
        metavar="TEXTS",
        help="the phrases of --caption, separated by semicolons (default: those that spaCy finds, "
        "as in the preparation of captions)",
    )
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
        type=local_text,
        metavar="DIR",
        help="directory that caches embeddings of long lists of names; empty: no cache (default: "
        "$XDG_CACHE_HOME/detclipv2_jax or ~/.cache/detclipv2_jax)",
    )


def _add_selection(result: argparse.ArgumentParser) -> None:
    group = result.add_argument_group("boxes and speed")
    group.add_argument(
        "--score_threshold",
        type=float,
        metavar="X",
        help="only keep boxes with a score above this, 0 to 1 (default: the checkpoint's own, "
        "which training fits on its validation set, or 0.1 if it has none)",
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
    """Run the command line; return the exit status."""
    return exit_status(_run, arguments)


def _run(arguments: Sequence[str] | None) -> int:
    """Run the command line; return 2 if a file could not be read."""
    start()
    flags = parser()
    args = flags.parse_args(arguments)
    if args.caption is None and args.captions_file is None:
        from detclipv2_jax.inference import detect_command

        if args.phrases is not None:
            raise UserError("--phrases are those of a caption. Give --caption too.")
        return 2 if detect_command.run(args) else 0
    from detclipv2_jax.inference import caption_command

    for name in ("definitions", "prompts", "score_threshold", "max_detections"):
        if getattr(args, name) != flags.get_default(name):
            raise UserError(
                f"--{name} does not go with a caption: its phrases are encoded bare, as in "
                "training, and the best region of each is kept. Leave it out."
            )
    captions = None if args.captions_file is None else _read_captions(args)
    return 2 if caption_command.run(args, captions) else 0


def _read_captions(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return (image file, caption) of each pair of `--captions_file`.

    Raises:
      UserError: the file cannot be read, or it has no pair of an image that exists and a caption.
    """
    if args.phrases is not None:
        raise UserError("--phrases are those of one caption. Leave them out, or give --caption.")
    # Imported here: `Detector` needs none of it.
    from detclipv2_jax.data.prepare.examples import ImageFolder
    from detclipv2_jax.data.prepare.registry import open_archives

    path = pathlib.Path(args.captions_file)
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give a file of captions.")
    (archive,) = open_archives([path], ImageFolder(*args.images), "image_text")
    pairs = [(str(example.image), example.caption) for example in archive.examples]
    for reason, count in archive.drops.dropped.items():
        first = archive.drops.explained[reason][0]
        print(f"warning: {reason}: {count} left out. The first: {first}", file=sys.stderr)
    if not pairs:
        raise UserError(f"{path}: has no caption of an image that exists. Check its lines.")
    return pairs


if __name__ == "__main__":
    sys.exit(main())
