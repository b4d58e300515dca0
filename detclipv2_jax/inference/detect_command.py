"""What `detclip detect` does: detect in image files, folders and videos, and write the results.

In the output directory it writes

    street.png, drive.mp4    each image and video with its boxes drawn
    detections.json          boxes, scores and names of all files, and the settings
    coco.json                the same in COCO's format
"""

import argparse
import collections
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import ImageDetections, summary
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.images import read
from detclipv2_jax.inference.input_files import InputFile, input_files
from detclipv2_jax.inference.names import names_from_flags
from detclipv2_jax.inference.predictor import EncodedNames
from detclipv2_jax.inference.video import Video, video_writer

# What detections.json says of one image, one video or one file that failed.
_Entry = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Detect in the files of the command line; return how many of them could not be read.

    Raises:
      UserError: the names, the checkpoint or an option is not valid, or a folder has no images.
    """
    names = names_from_flags(args.names, args.names_file)
    output = pathlib.Path(args.output)
    files = input_files(args.images, output)
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
    print(detector.threshold)
    images, failed = _detect_images(
        detector, encoded, [file for file in files if not file.is_video], output
    )
    videos = []
    for file in files:
        if file.is_video:
            try:
                videos.append(_detect_video(detector, encoded, file, output))
            except UserError as error:
                failed.append(report_failure(file, error))
    settings = {
        **dataclasses.asdict(detector.predictor.config),
        **detector.threshold.to_json(),
        **detector.prompter.settings(encoded),
    }
    write_json(
        output / "detections.json",
        {
            "checkpoint": str(args.checkpoint),
            "step": detector.step,
            "names": names,
            "prompts": encoded.prompts,
            "settings": settings,
            "images": images,
            "videos": videos,
            "failed": failed,
        },
    )
    write_json(output / "coco.json", to_coco(names, images, videos))
    return len(failed)


# ---- Detection and drawing.


def _detect_images(
    detector: Detector, encoded: EncodedNames, files: Sequence[InputFile], output: pathlib.Path
) -> tuple[list[_Entry], list[_Entry]]:
    """Detect in image files and draw the boxes.

    Returns:
      The entries of the images in the order of the files, and those of files that failed.
    """
    entries: dict[int, _Entry] = {}
    failed = []
    stream = detector.predictor.stream([file.path for file in files], encoded)
    for number, found in tqdm(stream, total=len(files), unit="image", disable=None):
        file = files[number]
        if isinstance(found, UserError):
            failed.append(report_failure(file, found))
            continue
        pixels = read(file.path)
        drawn = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
        drawing.save_png(drawn, output / file.drawn)
        tqdm.write(f"{file.path}: {found} -> {output / file.drawn}")
        entries[number] = {
            "image": file.path,
            "picture": file.drawn,
            "height": found.size[0],
            "width": found.size[1],
            **_to_json(found),
        }
    return [entries[number] for number in sorted(entries)], failed


def _detect_video(
    detector: Detector, encoded: EncodedNames, file: InputFile, output: pathlib.Path
) -> _Entry:
    """Detect in every frame of a video, draw the boxes and return the video's entry."""
    video = Video(file.path)
    read_ahead: dict[int, np.ndarray] = {}  # frames whose detections are still to come

    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(video):
            read_ahead[number] = frame
            yield frame

    entries, counts, size, best = [], collections.Counter(), None, None
    stream = detector.predictor.stream(frames(), encoded)
    progress = tqdm(stream, total=video.frames or None, unit="frame", desc=file.path, disable=None)
    with video_writer(output / file.drawn, video.rate) as add_frame:
        for number, found in progress:
            if isinstance(found, UserError):
                raise found
            pixels = read_ahead.pop(number)
            drawn = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
            add_frame(np.asarray(drawn))
            counts.update(found.names)
            size = found.size
            if best is None or found.best_score > best.best_score:
                best = found
            seconds = round(number / video.rate, 3)
            entries.append({"frame": number, "seconds": seconds, **_to_json(found)})
        if size is None:
            raise UserError(f"{file.path}: cannot be read as a video (no frame can be decoded).")
    what = summary(counts.elements(), best)
    tqdm.write(f"{file.path}: {len(entries)} frames, {what} -> {output / file.drawn}")
    return {
        "video": file.path,
        "picture": file.drawn,
        "height": size[0],
        "width": size[1],
        "frames_per_second": round(video.rate, 3),
        "frames": entries,
    }


def report_failure(file: InputFile, error: UserError) -> _Entry:
    """Print why a file could not be read; return its entry."""
    tqdm.write(f"error: {error}", file=sys.stderr)
    return {"video" if file.is_video else "image": file.path, "error": str(error)}


# ---- Results as JSON.


def _to_json(found: ImageDetections) -> _Entry:
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


def to_coco(
    names: Sequence[str], images: Sequence[_Entry], videos: Sequence[_Entry]
) -> dict[str, Any]:
    """Return the content of detections.json in COCO's format, with a score for each box.

    Category ids count the names from 1. Each frame of a video is an image with the number of the
    frame in `frame`.
    """
    frames = [({"file_name": entry["image"]}, entry, entry["detections"]) for entry in images]
    for entry in videos:
        for frame in entry["frames"]:
            origin = {"file_name": entry["video"], "frame": frame["frame"]}
            frames.append((origin, entry, frame["detections"]))
    ids = {name: number for number, name in enumerate(names, start=1)}
    result: dict[str, Any] = {
        "images": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [],
    }
    for number, (origin, entry, detections) in enumerate(frames, start=1):
        size = {"height": entry["height"], "width": entry["width"]}
        result["images"].append({"id": number, **origin, **size})
        for detection in detections:
            x, y, x_max, y_max = detection["box"]
            width, height = round(x_max - x, 2), round(y_max - y, 2)
            result["annotations"].append(
                {
                    "id": len(result["annotations"]) + 1,
                    "image_id": number,
                    "category_id": ids[detection["name"]],
                    "bbox": [x, y, width, height],
                    "area": round(width * height, 2),
                    "iscrowd": 0,
                    "score": detection["score"],
                }
            )
    return result
