"""What `detclip detect` does: detect in image files, folders and videos, and write the results.

In the output directory it writes

    street.png, drive.mp4    each image and video with its boxes drawn
    detections.json          boxes, scores and names of all files, and the settings
    coco.json                the same in COCO's format
"""

import argparse
import collections
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.images import read
from detclipv2_jax.inference.names import names_from_flags
from detclipv2_jax.inference.predictor import EncodedNames
from detclipv2_jax.inference.video import VIDEO_SUFFIXES, Video, video_writer

# What detections.json says of one image, one video or one file that failed.
_Entry = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Detect in the files of the command line; return how many of them could not be read.

    Raises:
      UserError: the names, the checkpoint or an option is not valid, or a folder has no images.
    """
    names = names_from_flags(args.names, args.names_file)
    output = pathlib.Path(args.output)
    files = _input_files(args.images, output)
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
    images, failed = _detect_images(
        detector, encoded, [file for file in files if not file.is_video], output
    )
    videos = []
    for file in files:
        if file.is_video:
            try:
                videos.append(_detect_video(detector, encoded, file, output))
            except UserError as error:
                failed.append(_report_failure(file, error))
    settings = {
        **dataclasses.asdict(detector.predictor.config),
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


# ---- Input files.


@dataclasses.dataclass(frozen=True)
class _InputFile:
    """An image or a video to detect in.

    Attributes:
      path: as the user wrote it, or below a folder that the user gave.
      is_video: whether it has several frames.
      drawn: path, relative to the output directory, of the drawing.
    """

    path: str
    is_video: bool
    drawn: str


def _input_files(paths: Sequence[str], output: pathlib.Path) -> list[_InputFile]:
    """Return the files among `paths` and the images in the folders among them.

    Drawings keep the name of their file; a second one of the same name gets '-2' appended.
    """
    taken: set[str] = set()
    files = []
    for path in paths:
        given = pathlib.Path(path)
        in_folder = given.is_dir()
        for file in _images_under(given, output) if in_folder else [given]:
            stem = str(file.relative_to(given).with_suffix("")) if in_folder else file.stem
            stems = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            stem = next(free for free in stems if free not in taken)
            taken.add(stem)
            is_video = not in_folder and _is_video(file)
            files.append(_InputFile(str(file), is_video, f"{stem}.{'mp4' if is_video else 'png'}"))
    return files


def _images_under(folder: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
    """Return the images in a folder and its subfolders, except hidden ones and earlier output."""
    suffixes = Image.registered_extensions()
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not path.name.startswith(".")
        and not path.absolute().is_relative_to(output.absolute())
    ]
    if not found:
        raise UserError(f"{folder}: contains no image. Give a folder with images.")
    return found


def _is_video(path: pathlib.Path) -> bool:
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in VIDEO_SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, SyntaxError, ValueError):
        return False  # the error is reported when the file is read as an image


# ---- Detection and drawing.


def _detect_images(
    detector: Detector, encoded: EncodedNames, files: Sequence[_InputFile], output: pathlib.Path
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
            failed.append(_report_failure(file, found))
            continue
        pixels = read(file.path, upright=True)
        drawn = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
        drawing.save_png(drawn, output / file.drawn)
        tqdm.write(f"{file.path}: {_summary(found.names)} -> {output / file.drawn}")
        entries[number] = {
            "image": file.path,
            "picture": file.drawn,
            "height": found.size[0],
            "width": found.size[1],
            "detections": _to_json(found),
        }
    return [entries[number] for number in sorted(entries)], failed


def _detect_video(
    detector: Detector, encoded: EncodedNames, file: _InputFile, output: pathlib.Path
) -> _Entry:
    """Detect in every frame of a video, draw the boxes and return the video's entry."""
    video = Video(file.path)
    read_ahead: dict[int, np.ndarray] = {}  # frames whose detections are still to come

    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(video):
            read_ahead[number] = frame
            yield frame

    entries, counts, size = [], collections.Counter(), None
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
            seconds = round(number / video.rate, 3)
            entries.append({"frame": number, "seconds": seconds, "detections": _to_json(found)})
        if size is None:
            raise UserError(f"{file.path}: cannot be read as a video (no frame can be decoded).")
    tqdm.write(f"{file.path}: {len(entries)} frames, {_summary(counts)} -> {output / file.drawn}")
    return {
        "video": file.path,
        "picture": file.drawn,
        "height": size[0],
        "width": size[1],
        "frames_per_second": round(video.rate, 3),
        "frames": entries,
    }


def _report_failure(file: _InputFile, error: UserError) -> _Entry:
    """Print why a file could not be read; return its entry."""
    tqdm.write(f"error: {error}", file=sys.stderr)
    return {"video" if file.is_video else "image": file.path, "error": str(error)}


def _summary(names: Iterable[str]) -> str:
    """Return for example '2 cat, 1 dog'."""
    counts = collections.Counter(names).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts) or "nothing found"


# ---- Results as JSON.


def _to_json(found: ImageDetections) -> list[_Entry]:
    return [
        {
            "name": name,
            "score": round(float(score), 6),
            "box": [round(float(x), 2) for x in box],
        }
        for name, score, box in zip(found.names, found.scores, found.boxes)
    ]


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
