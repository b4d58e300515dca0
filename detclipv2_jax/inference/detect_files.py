"""Detecting in files: images, folders of images and videos."""

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
from detclipv2_jax.inference.predictor import Texts
from detclipv2_jax.inference.video import SUFFIXES, Video, writing


def asked_names(names: str | None, file: str | None) -> list[str]:
    """The names of `--names`, between commas, or of the lines of `--names_file`.

    Raises:
      UserError: there are none, or the file cannot be read; names it.
    """
    if file is None:
        found = [name for name in map(str.strip, (names or "").split(",")) if name]
        if not found:
            raise UserError(
                f"--names={names!r} holds no name; give for example 'cat, traffic light'."
            )
        return found
    try:
        lines = pathlib.Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is no UTF-8 text (byte {error.start}); save it as such."
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
    found = [name for name in map(str.strip, lines) if name]
    if not found:
        raise UserError(f"{file}: holds no name; write one on each line.")
    return found


def run(args: argparse.Namespace) -> int:
    """Answers for what the command line names; the number of files that could not be read."""
    names = asked_names(args.names, args.names_file)
    output = pathlib.Path(args.output)
    files = _files(args.images, output)
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
    texts = detector.encode(names)
    pictures = [file for file in files if not file.video]
    images, failures = _detect_images(detector, texts, pictures, output)
    videos = []
    for file in files:
        if file.video:
            try:
                videos.append(_detect_video(detector, texts, file, output))
            except UserError as error:
                failures.append(_failed(file, error))
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
            "images": images,
            "videos": videos,
            "failed": failures,
        },
    )
    write_json(output / "coco.json", as_coco(names, images, videos))
    return len(failures)


@dataclasses.dataclass(frozen=True)
class _File:
    """An image or a video of the command line, and the name under the output of what is drawn."""

    path: str
    video: bool
    drawn: str


def _files(asked: Sequence[str], output: pathlib.Path) -> list[_File]:
    """The files asked for, and the images in the folders asked for, but none of the output's."""
    taken: set[str] = set()
    files = []
    for path in asked:
        found = [pathlib.Path(path)]
        if folder := found[0].is_dir():
            found = _images_under(found[0], output)
        for file in found:
            stem = str(file.relative_to(path).with_suffix("")) if folder else file.stem
            variants = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            stem = next(variant for variant in variants if variant not in taken)
            taken.add(stem)
            video = not folder and _is_video(file)
            files.append(_File(str(file), video, f"{stem}.mp4" if video else f"{stem}.png"))
    return files


def _images_under(folder: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
    known = Image.registered_extensions()
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in known
        and path.is_file()
        and not path.name.startswith(".")
        and not path.absolute().is_relative_to(output.absolute())
    ]
    if not found:
        raise UserError(f"{folder}: holds no image; name a folder that does.")
    return found


def _is_video(path: pathlib.Path) -> bool:
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except (OSError, SyntaxError, ValueError):
        return False  # what is wrong with it is told when it is read


def _detect_images(
    detector: Detector, texts: Texts, files: Sequence[_File], output: pathlib.Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was found in each, and which could not be read; draws them."""
    answers: dict[int, dict[str, Any]] = {}
    failures = []
    stream = detector.predictor.stream([file.path for file in files], texts)
    for number, found in tqdm(stream, total=len(files), unit="image", disable=None):
        file = files[number]
        if isinstance(found, UserError):
            failures.append(_failed(file, found))
            continue
        pixels = read(file.path, upright=True)
        picture = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
        drawing.save(picture, output / file.drawn)
        tqdm.write(f"{file.path}: {_summary(found.names)} -> {output / file.drawn}")
        answers[number] = {
            "image": file.path,
            "picture": file.drawn,
            "height": found.size[0],
            "width": found.size[1],
            "detections": _as_json(found),
        }
    return [answers[number] for number in sorted(answers)], failures


def _detect_video(
    detector: Detector, texts: Texts, file: _File, output: pathlib.Path
) -> dict[str, Any]:
    """What was found in each frame; draws them."""
    video = Video(file.path)
    waiting: dict[int, np.ndarray] = {}  # frames that were read ahead

    def frames() -> Iterator[np.ndarray]:
        for number, frame in enumerate(video):
            waiting[number] = frame
            yield frame

    rows, every = [], collections.Counter()
    stream = detector.predictor.stream(frames(), texts)
    bar = tqdm(stream, total=video.frames or None, unit="frame", desc=file.path, disable=None)
    with writing(output / file.drawn, video.rate) as add:
        for number, found in bar:
            pixels = waiting.pop(number)
            picture = drawing.draw_boxes(pixels, found.boxes, found.names, found.scores)
            add(np.asarray(picture))
            every.update(found.names)
            seconds = round(number / video.rate, 3)
            rows.append({"frame": number, "seconds": seconds, "detections": _as_json(found)})
    tqdm.write(f"{file.path}: {len(rows)} frames, {_summary(every)} -> {output / file.drawn}")
    return {
        "video": file.path,
        "picture": file.drawn,
        "height": found.size[0],
        "width": found.size[1],
        "frames_per_second": round(video.rate, 3),
        "frames": rows,
    }


def _failed(file: _File, error: UserError) -> dict[str, Any]:
    tqdm.write(f"error: {error}", file=sys.stderr)
    return {"video" if file.video else "image": file.path, "error": str(error)}


def _summary(names: Iterable[str]) -> str:
    counts = collections.Counter(names).most_common()
    return ", ".join(f"{count} {name}" for name, count in counts) or "nothing found"


def _as_json(found: ImageDetections) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "score": round(float(score), 6),
            "box": [round(float(x), 2) for x in box],
        }
        for name, score, box in zip(found.names, found.scores, found.boxes)
    ]


def as_coco(
    names: Sequence[str], images: Sequence[dict[str, Any]], videos: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """What `detections.json` holds of images and videos, as a COCO file with a score a box.

    Categories are the names in their order, from 1 on; a frame of a video is an image of its own.
    """
    rows = [({"file_name": row["image"]}, row, row["detections"]) for row in images]
    for row in videos:
        for frame in row["frames"]:
            named = {"file_name": row["video"], "frame": frame["frame"]}
            rows.append((named, row, frame["detections"]))
    ids = {name: number for number, name in enumerate(names, start=1)}
    result: dict[str, Any] = {
        "images": [],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": [],
    }
    for number, (named, row, detections) in enumerate(rows, start=1):
        size = {"height": row["height"], "width": row["width"]}
        result["images"].append({"id": number, **named, **size})
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
