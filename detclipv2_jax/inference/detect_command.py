"""What `detclip detect` does: detect in image files, folders and videos, and write the results.

In the output directory it writes

    street.png, drive.webm    each image and video with its boxes drawn
    detections.json           boxes, scores and names of all files, and the settings
    coco.json                 the same in COCO's format

It replaces only what it wrote there itself. If it is stopped, the JSON files have what was answered
and say that it is not complete.
"""

import argparse
import collections
import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.interruption import Stopped
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.common.printable import counted, printable
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detect_results import Entry, Results
from detclipv2_jax.inference.detections import ImageDetections, summary
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.images import read
from detclipv2_jax.inference.input_files import InputFile, input_files
from detclipv2_jax.inference.names import cut_off_text, names_from_flags
from detclipv2_jax.inference.predictor import EncodedNames
from detclipv2_jax.inference.video import Video
from detclipv2_jax.inference.video_writer import video_writer


def run(args: argparse.Namespace) -> int:
    """Detect in the files of the command line; return how many of them could not be read.

    Raises:
      UserError: the names, the checkpoint or an option is not valid, a folder has no images, or a
        file of the user's would be replaced.
      Stopped: by a signal; what was answered is written.
    """
    names = names_from_flags(args.names, args.names_file)
    inputs, output = input_files(args.images), OutputFolder(args.output)
    written = ["detections.json", "coco.json", *(file.drawn for file in inputs.files)]
    output.check(written)
    detector = Detector(
        args.checkpoint,
        step=args.step,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        batch_size=args.batch_size,
        definitions=args.definitions,
        prompts=args.prompts,
        cache=args.cache,
    )
    encoded = detector.encode(names)
    if sentence := cut_off_text(encoded):
        print(f"warning: {sentence}", file=sys.stderr)
    print(f"{detector.threshold}\ncompiling; the first time this takes a minute", flush=True)
    settings = {
        **dataclasses.asdict(detector.predictor.config),
        **detector.threshold.to_json(),
        **detector.prompter.settings(encoded),
    }
    about = {
        "made_by": "detclip detect",
        "checkpoint": str(args.checkpoint),
        "step": detector.step,
        "names": names,
        "prompts": encoded.prompts,
        "settings": settings,
    }
    output.begin(written)
    results = Results(output.path / "detections.json", about, inputs, names)
    with guarded(output), results.kept():
        for entry in results.failed:
            tqdm.write(f"error: {entry['error']}", file=sys.stderr)
        _detect_images(detector, encoded, inputs.files, output.path, results)
        for number, file in enumerate(inputs.files):
            if file.is_video:
                try:
                    _detect_video(detector, encoded, number, file, output.path, results)
                except UserError as error:
                    results.failed.append(report_failure(file, error))
    print(results.summary())
    return results.problems()


# ---- Detection and drawing.


def _detect_images(
    detector: Detector,
    encoded: EncodedNames,
    files: list[InputFile],
    output: pathlib.Path,
    results: Results,
) -> None:
    """Detect in the image files, draw the boxes, and add the entries to the results."""
    numbers = [number for number, file in enumerate(files) if not file.is_video]
    stream = detector.predictor.stream([files[number].path for number in numbers], encoded)
    for place, found in tqdm(stream, total=len(numbers), unit="image", disable=None):
        file = files[numbers[place]]
        if isinstance(found, UserError):
            results.failed.append(report_failure(file, found))
            continue
        try:
            pixels = read(file.path)
        except UserError as error:  # it was there a moment ago
            results.failed.append(report_failure(file, error))
            continue
        drawn = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
        drawing.save_png(drawn, output / file.drawn)
        results.images[numbers[place]] = {
            "image": file.path,
            "picture": file.drawn,
            "height": found.size[0],
            "width": found.size[1],
            **_to_json(found),
        }
        tqdm.write(f"{printable(file.path)}: {found} -> {printable(output / file.drawn)}")


def _detect_video(
    detector: Detector,
    encoded: EncodedNames,
    number: int,
    file: InputFile,
    output: pathlib.Path,
    results: Results,
) -> None:
    """Detect in every frame of a video, draw the boxes, and add its entry to the results.

    Raises:
      UserError: no frame can be decoded.
      Stopped: by a signal; the frames that were answered are drawn and in the entry.
    """
    video = Video(file.path)
    frames, entry = _Frames(video), _video_entry(file, video)
    counts, best, stopped = collections.Counter(), None, None
    stream = detector.predictor.stream(iter(frames), encoded)
    progress = tqdm(
        stream, total=video.frames or None, unit="frame", desc=printable(file.path), disable=None
    )
    with video_writer(output / file.drawn, video.grid_rate) as add_frame:
        try:
            for place, found in progress:
                if isinstance(found, UserError):
                    raise found
                pixels, seconds = frames.waiting.pop(place)
                drawn = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
                add_frame(np.asarray(drawn), seconds)
                counts.update(found.names)
                if best is None or (found.best_score or 0.0) > (best.best_score or 0.0):
                    best = found
                entry |= {"height": found.size[0], "width": found.size[1]}
                time = {} if seconds is None else {"seconds": round(seconds, 3)}
                entry["frames"].append({"frame": place, **time, **_to_json(found)})
                results.videos[number] = entry
        except Stopped as error:
            stopped = error
        if not entry["frames"]:
            raise stopped or UserError(
                f"{printable(file.path)}: cannot be read as a video (no frame can be decoded)."
            )
    if stopped:
        raise stopped
    entry["complete"] = True
    if entry["frames_per_second"] is None:
        entry["frames_per_second"] = _mean_rate(entry["frames"])
    if video.problem:
        entry["error"] = video.problem
        tqdm.write(f"error: {printable(file.path)}: {video.problem}.", file=sys.stderr)
    what = summary(counts.elements(), best)
    drawn = printable(output / file.drawn)
    note = f" ({video.problem})" if video.problem else ""
    shown = counted(len(entry["frames"]), "frame")
    tqdm.write(f"{printable(file.path)}: {shown}{note}, {what} -> {drawn}")


class _Frames:
    """The frames of a video for the predictor; keeps those whose detections are still to come."""

    def __init__(self, video: Video):
        self.waiting: dict[int, tuple[np.ndarray, float | None]] = {}
        self._video = video

    def __iter__(self) -> Iterator[np.ndarray]:
        for number, (frame, seconds) in enumerate(self._video.timed()):
            self.waiting[number] = frame, seconds
            yield frame


def _video_entry(file: InputFile, video: Video) -> Entry:
    return {
        "video": file.path,
        "picture": file.drawn,
        "complete": False,
        "height": 0,
        "width": 0,
        "frames_per_second": None if video.rate is None else round(video.rate, 3),
        "frames": [],
    }


def _mean_rate(frames: list[Entry]) -> float | None:
    """Return the frames per second by the times of the frames; None if they are not known."""
    times = [frame["seconds"] for frame in frames if "seconds" in frame]
    if len(times) < 2:
        return None
    return round((len(times) - 1) / (times[-1] - times[0]), 3)


def report_failure(file: InputFile, error: UserError) -> Entry:
    """Print why a file could not be read; return its entry."""
    tqdm.write(f"error: {error}", file=sys.stderr)
    return {"video" if file.is_video else "image": file.path, "error": str(error)}


def _to_json(found: ImageDetections) -> dict[str, Any]:
    """Return the detections of an image, and the best score whatever the threshold."""
    detections = [
        {
            "name": name,
            "score": round(float(score), 6),
            "box": [round(float(x), 2) for x in box],
        }
        for name, score, box in zip(found.names, found.scores, found.boxes)
    ]
    best = None if found.best_score is None else round(found.best_score, 6)
    return {"detections": detections, "best_score": best, "best_name": found.best_name}
