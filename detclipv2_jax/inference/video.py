"""Video files as pictures, one after another, and back."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
_USUAL_RATE = 25.0  # frames a second, of a file that does not say


class Video:
    """A video file.

    `frames` is the number it claims to hold, 0 where it does not say; `rate` is frames a second.

    Raises:
      UserError: the file is missing or holds no video; names it.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; check the path of the video.")
        with self._open() as capture:
            if not capture.grab():
                raise UserError(f"{path}: cannot be read as a video (no frame can be decoded).")
            rate = capture.get(cv2.CAP_PROP_FPS)
            self.rate = rate if 0 < rate < 1000 else _USUAL_RATE
            self.frames = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """The frames in RGB, as far as they can be decoded, turned as the file says."""
        with self._open() as capture:
            while True:
                there, frame = capture.read()
                if not there:
                    return
                yield np.ascontiguousarray(frame[..., ::-1])

    @contextlib.contextmanager
    def _open(self) -> Iterator[cv2.VideoCapture]:
        capture = cv2.VideoCapture(str(self.path))
        try:
            yield capture
        finally:
            capture.release()


@contextlib.contextmanager
def writing(
    path: str | os.PathLike, rate: float
) -> Iterator[Callable[[UInt8[np.ndarray, "h w 3"]], None]]:
    """A function that adds an RGB frame to a new MP4; the file is there when the block ends well.

    All frames have the size of the first one, less a row or column where that is odd, which the
    format does not hold.
    """
    writer: cv2.VideoWriter | None = None
    with replacing(path) as temporary:
        # The end of the name tells the format.
        unfinished = temporary.with_name(f"{temporary.name}.mp4")

        def add(frame: UInt8[np.ndarray, "h w 3"]) -> None:
            nonlocal writer
            height, width = (side - side % 2 for side in frame.shape[:2])
            if writer is None:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
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
