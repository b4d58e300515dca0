"""What `detclip detect` does with captions: show the region that fits each noun phrase best.

In the output directory it writes

    street.png      each image with the best region of each phrase, and its caption below
    phrases.json    boxes, scores and similarities of all phrases
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.common.printable import printable
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detect_command import report_failure
from detclipv2_jax.inference.detect_results import Results
from detclipv2_jax.inference.detections import PhraseRegions
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.images import read
from detclipv2_jax.inference.input_files import InputFile, input_files
from detclipv2_jax.inference.predictor import EncodedNames
from detclipv2_jax.text import phrases as phrases_lib


def run(args: argparse.Namespace, captions: Sequence[tuple[str, str]] | None) -> int:
    """Show the phrases of captions in their images; return how many images could not be read.

    Args:
      args: of the command line.
      captions: (image file, caption); None: `args.caption`, for all images of the command line.

    Raises:
      UserError: no caption has a noun phrase, spaCy is missing, the checkpoint is not valid, or an
        image is a video.
    """
    output = OutputFolder(args.output)
    paths = args.images if captions is None else [path for path, _ in captions]
    inputs = input_files(paths, each=captions is not None)
    files = inputs.files
    output.check(written := ["phrases.json", *(file.drawn for file in files)])
    if videos := [file.path for file in files if file.is_video]:
        raise UserError(f"{videos[0]}: is a video, and a caption is of an image. Give images.")
    texts = [args.caption] * len(files) if captions is None else [text for _, text in captions]
    phrases = [list(own) for own in _phrases(texts, args.phrases)]
    detector = Detector(
        args.checkpoint, step=args.step, batch_size=args.batch_size, cache=args.cache
    )
    encoded = detector.predictor.encode_each(phrases)

    output.begin(written)
    about = {
        "made_by": "detclip detect",
        "checkpoint": str(args.checkpoint),
        "step": detector.step,
        "canvas": list(detector.predictor.canvas),
    }
    results = Results(output.path / "phrases.json", about, inputs)
    with guarded(output), results.kept():
        for entry in results.failed:
            tqdm.write(f"error: {entry['error']}", file=sys.stderr)
        _show(detector, encoded, files, texts, output.path, results)
    print(results.summary())
    return results.problems()


def _show(
    detector: Detector,
    encoded: Sequence[EncodedNames],
    files: Sequence[InputFile],
    texts: Sequence[str],
    output: pathlib.Path,
    results: Results,
) -> None:
    """Find and draw the phrases of each image, and add the entries to the results."""
    stream = detector.predictor.stream_phrases([file.path for file in files], encoded)
    for number, found in tqdm(stream, total=len(files), unit="image", disable=None):
        file, caption = files[number], texts[number]
        if isinstance(found, UserError):
            results.failed.append(report_failure(file, found))
            continue
        drawn = drawing.draw_caption(read(file.path), caption, found)
        drawing.save_png(drawn, output / file.drawn)
        drawn = printable(output / file.drawn)
        tqdm.write(f"{printable(file.path)}: {len(found.phrases)} phrases -> {drawn}")
        results.images[number] = {
            "image": file.path,
            "picture": file.drawn,
            "height": found.size[0],
            "width": found.size[1],
            "caption": caption,
            "phrases": _to_json(found),
        }


def _phrases(captions: Sequence[str], given: str | None) -> list[list[str]]:
    """Return the phrases of each caption: those that were `given`, or those that spaCy finds.

    Raises:
      UserError: there are none, or spaCy is missing.
    """
    if given is not None:
        own = list(dict.fromkeys(filter(None, map(phrases_lib.clean, given.split(";")))))
        if not own:
            raise UserError(
                f"--phrases={given!r} names nothing. Give for example 'a man; a horse'."
            )
        return [own] * len(captions)
    different = list(dict.fromkeys(captions))
    try:
        found = dict(zip(different, phrases_lib.noun_phrases(different)))
    except UserError as error:
        raise UserError(f"{error} Or give the phrases: --phrases='a man; a horse'.") from error
    if not any(found.values()):
        raise UserError(
            f"no noun phrase is found in {different[0]!r}"
            f"{' and the other captions' * (len(different) > 1)}. Give the phrases: "
            "--caption=TEXT --phrases='a man; a horse'."
        )
    return [found[caption] for caption in captions]


def _to_json(found: PhraseRegions) -> list[dict[str, Any]]:
    rows = zip(found.phrases, found.scores, found.similarities, found.boxes)
    return [
        {
            "phrase": phrase,
            "score": round(float(score), 6),
            "similarity": round(float(similarity), 6),
            "box": [round(float(x), 2) for x in box],
        }
        for phrase, score, similarity, box in rows
    ]
