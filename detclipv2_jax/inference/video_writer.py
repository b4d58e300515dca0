"""Writing frames to a video that browsers play: VP8 or VP9 in WebM."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from jaxtyping import UInt8

from detclipv2_jax.common.atomic import replacing, unfinished
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable

SUFFIX = ".webm"
# OpenCV's packages have no encoder for H.264. VP8 is encoded three times as fast as VP9.
_CODES = ("VP80", "VP90")
_LONGEST = 3600  # repetitions of a frame, for files whose times jump


class VideoWriter:
    """A video of a constant rate whose frames are shown at given times.

    A frame is repeated until the next one is due. A frame that has no place of its own, because
    another is due at the same time, is replaced by that one.
    """

    def __init__(self, path: pathlib.Path, rate: float):
        """Write to `path`; it has at least one frame per second."""
        self._path, self._rate = path, max(rate, 1.0)
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)  # width and height
        self._pending: np.ndarray | None = None
        self._written = 0

    def add(self, frame: UInt8[np.ndarray, "h w 3"], seconds: float | None = None) -> None:
        """Append an RGB frame, shown `seconds` after the first one; None: after the last one."""
        slot = self._written + (self._pending is not None)
        if seconds is not None:
            slot = max(self._written, round(seconds * self._rate))
        self._repeat(slot)
        self._pending = frame

    def close(self) -> None:
        """Write the last frame and end the file."""
        self._repeat(self._written + 1)
        if self._writer is not None:
            self._writer.release()

    def release(self) -> None:
        """End the file as it is."""
        if self._writer is not None:
            self._writer.release()

    def _repeat(self, slot: int) -> None:
        """Write the frame that waits until the place `slot`."""
        if self._pending is None:
            return
        frame = self._prepared(self._pending)
        for _ in range(min(slot - self._written, _LONGEST)):
            assert self._writer is not None
            self._writer.write(frame)
        self._written = max(self._written, slot)

    def _prepared(self, frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
        """Return a frame in BGR, with even sides and the size of the first one."""
        frame = np.pad(frame, [(0, side == 1) for side in frame.shape[:2]] + [(0, 0)], mode="edge")
        if self._writer is None:
            height, width = (side - side % 2 for side in frame.shape[:2])
            self._size = (width, height)
            self._writer = self._opened()
        width, height = self._size
        if not (0 <= frame.shape[0] - height <= 1 and 0 <= frame.shape[1] - width <= 1):
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(frame[:height, :width, ::-1])

    def _opened(self) -> cv2.VideoWriter:
        for code in _CODES:
            with _silent():
                writer = cv2.VideoWriter(
                    str(self._path),
                    cv2.CAP_FFMPEG,
                    cv2.VideoWriter.fourcc(*code),
                    self._rate,
                    self._size,
                )
            if writer.isOpened():
                return writer
        raise UserError(
            f"{printable(self._path)}: this OpenCV has no encoder for WebM. Install "
            "opencv-python-headless."
        )


@contextlib.contextmanager
def video_writer(path: str | os.PathLike, rate: float) -> Iterator[Callable[..., None]]:
    """Yield `VideoWriter.add` of a new WebM, which appears if the block ends without an error.

    An odd last row or column is dropped, and frames of another size than the first are scaled.

    Raises:
      UserError: the file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(replacing(path))
        # OpenCV chooses the format by the end of the name.
        partial = temporary.with_name(f"{temporary.name}{SUFFIX}")
        stack.enter_context(unfinished(partial))
        writer = VideoWriter(partial, rate)
        try:
            yield writer.add
            writer.close()
        finally:
            writer.release()
        if not partial.exists():
            raise UserError(f"{printable(path)}: cannot be written as a video of no frames.")
        os.replace(partial, temporary)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide what OpenCV prints of WebM, which has no codes of four characters."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
