"""Answers: images and free names in, boxes with names and scores out; as a class and a command.

    python -m detclipv2_jax.detect --checkpoint=DIR --names="cat, traffic light" --output=DIR IMAGE…

`Detector` is what a program asks; it runs without TensorFlow.
"""

import argparse
import collections
import dataclasses
import itertools
import os
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from detclipv2_jax import drawing
from detclipv2_jax.data.concepts import normalise
from detclipv2_jax.errors import UserError
from detclipv2_jax.files import write_json
from detclipv2_jax.images import Source, read
from detclipv2_jax.predictor import ImageDetections, Predictor, Texts, detect_config
from detclipv2_jax.prompting import CHOICES, Definitions, prompting

if TYPE_CHECKING:
    from detclipv2_jax.checkpoint import LoadedModel


class Detector:
    """Asks a checkpoint, or a model's parts, for named things in images.

    >>> detector = Detector("runs/quickstart")
    >>> found, = detector(["street.jpg"], ["cat", "traffic light"])
    >>> found.names, found.scores, found.boxes

    The canvas and the suppression come from the config of the run that made the checkpoint. Names
    are encoded once and remembered; asking for another number of names may compile another program.
    """

    def __init__(
        self,
        checkpoint: "str | os.PathLike | LoadedModel",
        *,
        step: int | None = None,
        score_threshold: float = 0.3,
        keep: int = 100,
        batch_size: int = 1,
        definitions: Definitions | None = None,
    ):
        """`checkpoint`: a run's workdir (the newest `step` by default), or a loaded model.

        `definitions`: ask for names with their definitions ('on', 'off'); by default as trained.
        """
        if isinstance(checkpoint, str | os.PathLike):
            from detclipv2_jax.checkpoint import load_model  # orbax, which parts do not need

            checkpoint = load_model(checkpoint, step)
        self.step = checkpoint.step
        evaluation = detect_config(checkpoint.config)
        config = dataclasses.replace(
            evaluation,
            score_threshold=score_threshold,
            keep=keep,
        )
        self.prompts = prompting(checkpoint.config, checkpoint.definitions, definitions)
        self.predictor = Predictor(
            checkpoint.graphdef,
            checkpoint.params,
            canvas=checkpoint.config["eval"]["canvas"],
            config=config,
            batch_size=batch_size,
        )

    def __call__(
        self, images: Source | Iterable[Source], names: Sequence[str]
    ) -> list[ImageDetections]:
        """What was found in each image, in their order; no images, no answers.

        Images are paths, uint8 RGB arrays (h, w, 3) or PIL images, of any sizes. Names that differ
        only in case or spacing are one name.

        Raises:
          UserError: no names, an empty one, one asked twice, or an image that cannot be read.
        """
        texts = self.encode(names)
        images = [images] if isinstance(images, Source) else list(images)
        found: list[Any] = [None] * len(images)
        for number, answer in self.predictor.stream(images, texts):
            if isinstance(answer, UserError):
                raise answer
            found[number] = answer
        return found

    def encode(self, names: Sequence[str]) -> Texts:
        """The names, checked and encoded. Raises UserError as a call does."""
        if isinstance(names, str):
            raise UserError(f"names is the one text {names!r}; give a list of names.")
        first: dict[str, int] = {}
        for number, name in enumerate(names, start=1):
            if (other := first.setdefault(normalise(name), number)) != number:
                raise UserError(
                    f"name {number}, {name!r}, is the same as name {other}; ask for it once."
                )
        return self.prompts.encode(self.predictor, names)


def run(args: argparse.Namespace) -> int:
    """Answers for the images of the command line; the number of those that could not be read."""
    names = [name for name in map(str.strip, args.names.split(",")) if name]
    if not names:
        raise UserError(
            f"--names={args.names!r} holds no name; give for example 'cat, traffic light'."
        )
    detector = Detector(
        args.checkpoint,
        step=args.step,
        score_threshold=args.score_threshold,
        keep=args.keep,
        definitions=args.definitions,
    )
    texts = detector.encode(names)
    output = pathlib.Path(args.output)
    answers, failures = [], []
    pictures = _picture_names(args.images)
    for number, found in detector.predictor.stream(args.images, texts):
        image = args.images[number]
        if isinstance(found, UserError):
            print(f"error: {found}", file=sys.stderr)
            failures.append({"image": image, "error": str(found)})
            continue
        picture = drawing.draw_boxes(read(image), found.boxes, found.names, found.scores)
        drawing.save(picture, output / pictures[number])
        counts = collections.Counter(found.names)
        summary = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        print(f"{image}: {summary or 'nothing found'} -> {output / pictures[number]}")
        answers.append((number, _as_json(image, pictures[number], found)))
    write_json(
        output / "detections.json",
        {
            "checkpoint": str(args.checkpoint),
            "step": detector.step,
            "names": names,
            "prompts": texts.prompts,
            "settings": {
                **dataclasses.asdict(detector.predictor.config),
                **detector.prompts.settings(texts),
            },
            "images": [answer for _, answer in sorted(answers, key=lambda pair: pair[0])],
            "failed": failures,
        },
    )
    return len(failures)


def _picture_names(images: Sequence[str]) -> list[str]:
    """A file name for the picture of each image: its own, numbered where two are the same."""
    stems = [pathlib.Path(image).stem for image in images]
    taken: set[str] = set()
    result = []
    for stem in stems:
        variants = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        name = next(variant for variant in variants if variant not in taken)
        taken.add(name)
        result.append(f"{name}.png")
    return result


def _as_json(image: str, picture: str, found: ImageDetections) -> dict[str, Any]:
    return {
        "image": image,
        "picture": picture,
        "height": found.size[0],
        "width": found.size[1],
        "detections": [
            {
                "name": name,
                "score": round(float(score), 6),
                "box": [round(float(x), 2) for x in box],
            }
            for name, score, box in zip(found.names, found.scores, found.boxes)
        ],
    }


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.detect",
        description="Finds named things in images: writes each image with its boxes drawn, and "
        "detections.json with boxes as [x_min, y_min, x_max, y_max] in the image's pixels.",
    )
    result.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    result.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="the workdir of a training run"
    )
    result.add_argument(
        "--names", required=True, help='what to look for, for example "cat, traffic light"'
    )
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
        "--keep",
        type=int,
        default=100,
        help="at most so many boxes an image (default: %(default)s)",
    )
    result.add_argument(
        "--definitions",
        choices=CHOICES,
        help="ask for names with their definitions (default: as in the training run)",
    )
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
