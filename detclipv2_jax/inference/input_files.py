"""The files of a command line: images, videos, and the images in folders."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence

from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import valid_text
from detclipv2_jax.inference.video import VIDEO_SUFFIXES


@dataclasses.dataclass(frozen=True)
class InputFile:
    """An image or a video to detect in.

    Attributes:
      path: as the user wrote it, or below a folder that the user gave.
      is_video: whether it has several frames.
      drawn: path, relative to the output directory, of the drawing.
    """

    path: str
    is_video: bool
    drawn: str


def input_files(paths: Sequence[str], output: pathlib.Path) -> list[InputFile]:
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
            stem = valid_text(stem)  # detections.json names it, and JSON holds only valid text
            stems = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
            stem = next(free for free in stems if free not in taken)
            taken.add(stem)
            is_video = not in_folder and _is_video(file)
            files.append(InputFile(str(file), is_video, f"{stem}.{'mp4' if is_video else 'png'}"))
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
