"""Reading the frames of a video file, and writing frames to an MP4."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import valid_text

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_DEFAULT_RATE = 25.0  # frames per second, for a file that does not give a usable rate


class Video:
    """A video file. Iterating over it yields its frames.

    Attributes:
      path: the file.
      frames: number of frames according to the file's header; 0 if it has none.
      rate: frames per second.

    Raises:
      UserError: the file is missing, or no frame of it can be decoded.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file. Check the path of the video.")
        with self._open() as capture:
            if not capture.grab():
                raise UserError(f"{path}: cannot be read as a video (no frame can be decoded).")
            rate = capture.get(cv2.CAP_PROP_FPS)
            self.rate = rate if 0 < rate < 1000 else _DEFAULT_RATE
            self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield the frames in RGB, rotated as the file says, until one cannot be decoded."""
        with self._open() as capture:
            while True:
                is_decoded, frame = capture.read()
                if not is_decoded:
                    return
                yield np.ascontiguousarray(frame[..., ::-1])

    @contextlib.contextmanager
    def _open(self) -> Iterator[cv2.VideoCapture]:
        with _utf8_path(self.path) as path:
            capture = cv2.VideoCapture(path)
            try:
                yield capture
            finally:
                capture.release()


@contextlib.contextmanager
def _utf8_path(path: pathlib.Path) -> Iterator[str]:
    """Yield a path of the file in UTF-8; OpenCV crashes on any other."""
    if valid_text(str(path)) == str(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = pathlib.Path(folder, "video" + valid_text(path.suffix))
        link.symlink_to(path.absolute())
        yield str(link)


@contextlib.contextmanager
def video_writer(
    path: str | os.PathLike, rate: float
) -> Iterator[Callable[[UInt8[np.ndarray, "h w 3"]], None]]:
    """Yield a function that appends an RGB frame to a new MP4 of `rate` frames per second.

    The file appears when the block ends without an error. All frames must have the same size; MP4
    needs even sides, so an odd last row or column is dropped.

    Raises:
      UserError: the file cannot be written.
    """
    writer: cv2.VideoWriter | None = None
    with replacing(path) as temporary:
        # OpenCV chooses the format by the end of the name.
        unfinished = temporary.with_name(f"{temporary.name}.mp4")

        def add(frame: UInt8[np.ndarray, "h w 3"]) -> None:
            nonlocal writer
            height, width = (side - side % 2 for side in frame.shape[:2])
            if writer is None:
                code = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(unfinished), code, rate, (width, height))
                if not writer.isOpened():
                    raise UserError(f"{path}: cannot be written as an MP4 of {width}×{height}.")
            writer.write(np.ascontiguousarray(frame[:height, :width, ::-1]))

        try:
            yield add
            if writer is not None:
                writer.release()
                os.replace(unfinished, temporary)
        finally:
            if writer is not None:
                writer.release()
            unfinished.unlink(missing_ok=True)
