"""Reading the frames of a video with the times at which they are shown."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # what is wrong is said by `Video.problem`

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detclipv2_jax.common import lfs_pointer, pictures
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable, valid_text
from detclipv2_jax.inference.video_container import exact_count, is_cut_off

VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".3gp", ".wmv", ".flv",
    ".mts", ".m2ts",
)  # fmt: skip
ANIMATION_SUFFIXES = (".gif", ".webp", ".png", ".apng", ".avif", ".avifs")
_HIGHEST_RATE = 240.0  # frames per second; files whose times have a step of 1 ms claim 1,000
_FAILURES = 30  # frames in a row that cannot be decoded: no more is tried
_LOOKED_AT = 300  # frames at the start whose times decide the rate of the drawn video
# What browsers and FFmpeg do with a frame of a GIF that is shown for 0.01 s or less.
_SHORTEST, _IN_ITS_PLACE = 0.02, 0.1


def is_animation(path: pathlib.Path) -> bool:
    """Return whether an image file has several frames; an error is left to who reads it."""
    try:
        with pictures.animation(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except pictures.PictureError:
        return False


class Video:
    """A video file or an animated image. Iterating over it yields its frames.

    Attributes:
      path: the file.
      frames: number of frames that the file claims; 0 if it is not known.
      rate: frames per second that the file claims; None if it claims none that can be.
      problem: after the last frame: what is missing of the file; None if nothing is.

    Raises:
      UserError: the file is missing, or no frame of it can be decoded.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path)
        self.problem: str | None = None
        if not self.path.is_file():
            raise UserError(f"{printable(path)}: no such file. Check the path of the video.")
        if self.path.suffix.lower() in ANIMATION_SUFFIXES:
            self.frames, self.rate, self.grid_rate = self._look_at_animation()
            return
        with self._open() as capture:
            if not _call(capture.grab):
                raise UserError(f"{printable(path)}: {_why_no_frame(self.path)}.")
            rate = capture.get(cv2.CAP_PROP_FPS)
            self.rate = rate if 0 < rate <= _HIGHEST_RATE else None
            count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
            self.frames = int(count) if 0 < count < 1e9 else 0
        self.grid_rate = self._grid_rate()

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Yield the frames in RGB, rotated as the file says; damaged ones are passed over."""
        for frame, _ in self.timed():
            yield frame

    def timed(self) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], float | None]]:
        """Yield the frames, and when each is shown, in seconds after the first.

        The time is None where the file does not say it.
        """
        if self.path.suffix.lower() in ANIMATION_SUFFIXES:
            yield from self._timed_animation()
            return
        count, failures, last = 0, 0, -1.0
        with self._open() as capture:
            while failures < _FAILURES:
                is_decoded, frame = _call(capture.read) or (False, None)
                if not is_decoded or frame is None:
                    failures += 1  # the end, or a damaged frame
                    continue
                failures = 0
                seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                is_known = np.isfinite(seconds) and seconds > last
                last = seconds if is_known else last
                yield np.ascontiguousarray(frame[..., ::-1]), seconds if is_known else None
                count += 1
        self.problem = self._missing(count)

    def _missing(self, count: int) -> str | None:
        """Return what is missing if `count` frames could be decoded."""
        cut, claimed = is_cut_off(self.path), exact_count(self.path, self.frames)
        if claimed and count < claimed and (cut or self._count_with_hidden_frames() < claimed):
            end = ": the file is cut off" if cut else ""
            return f"{count} of the {claimed} frames that the file claims could be decoded{end}"
        return f"the file is cut off: {count} frames of it could be decoded" if cut else None

    def _count_with_hidden_frames(self) -> int:
        """Return the number of frames with those that an edit list hides, as phones trim videos."""
        name = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
        before = os.environ.get(name)
        os.environ[name] = "ignore_editlist;1"
        try:
            with self._open() as capture:
                count, failures = 0, 0
                while failures < _FAILURES:
                    is_grabbed = bool(_call(capture.grab))
                    count, failures = count + is_grabbed, 0 if is_grabbed else failures + 1
                return count
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before

    def _grid_rate(self) -> float:
        """Return the frames per second at which the first frames all have a place of their own."""
        times: list[float] = []
        with self._open() as capture:
            while len(times) < _LOOKED_AT and _call(capture.grab):
                times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
        steps = np.diff(times)
        steps = steps[np.isfinite(steps) & (steps > 1e-3)]
        if not len(steps):
            return self.rate or 25.0
        if self.rate and np.abs(steps * self.rate - 1).max() < 0.05:
            return self.rate  # a constant rate
        return float(np.clip(1 / steps.min(), self.rate or 1.0, 60.0))

    @contextlib.contextmanager
    def _open(self) -> Iterator[cv2.VideoCapture]:
        with _safe_path(self.path) as path:
            # Only FFmpeg knows times. Others take a name with digits for a series of images.
            capture = cv2.VideoCapture(path, cv2.CAP_FFMPEG)
            try:
                yield capture
            finally:
                capture.release()

    # ---- Animated images.

    def _look_at_animation(self) -> tuple[int, float | None, float]:
        """Return the number of frames, the mean rate, and a rate that fits all times."""
        count, steps, reason = 0, [], _NO_FRAME
        try:
            with pictures.animation(self.path) as image:
                count = getattr(image, "n_frames", 1)
                for number in range(count):
                    image.seek(number)
                    if image.format in ("WEBP", "AVIF"):  # their times are known once decoded
                        image.load()
                    steps.append(_shown_for(image))
        except pictures.PictureError as error:
            reason = f"cannot be read as an animation ({error})"
        if not steps:
            raise UserError(f"{printable(self.path)}: {reason}.")
        step = np.gcd.reduce(np.round(np.multiply(steps, 100)).astype(int)) / 100
        return count, len(steps) / sum(steps), min(60.0, 1 / max(step, 0.01))

    def _timed_animation(self) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], float | None]]:
        count, seconds, reason = 0, 0.0, ""
        try:
            with pictures.animation(self.path) as image:
                for number in range(self.frames):
                    image.seek(number)
                    yield pictures.frame(image), round(seconds, 4)
                    seconds += _shown_for(image)
                    count += 1
        except pictures.PictureError as error:
            reason = f" ({error})"
        if count < self.frames:
            self.problem = (
                f"{count} of the {self.frames} frames that the file claims could be decoded{reason}"
            )


_NO_FRAME = "cannot be read as a video (no frame can be decoded)"


def _why_no_frame(path: pathlib.Path) -> str:
    """Return why not even the first frame of a video can be decoded."""
    if lfs_pointer.is_pointer_file(path):
        return lfs_pointer.REASON
    # The index of an MP4 stands at its end, unless it was written for the web.
    return "cannot be read as a video (the file is cut off)" if is_cut_off(path) else _NO_FRAME


def _shown_for(image: Image.Image) -> float:
    """Return how long the current frame of an animation is shown, in seconds."""
    seconds = float(image.info.get("duration") or 0) / 1000
    return seconds if seconds >= _SHORTEST else _IN_ITS_PLACE


def _call(function):
    """Return what OpenCV returns, None if it raises."""
    try:
        return function()
    except cv2.error:
        return None


@contextlib.contextmanager
def _safe_path(path: pathlib.Path) -> Iterator[str]:
    """Yield an absolute path in UTF-8: OpenCV crashes on others, and FFmpeg opens addresses."""
    if valid_text(str(path)) == str(path):
        yield str(path.absolute())
        return
    with tempfile.TemporaryDirectory() as folder:
        link = pathlib.Path(folder, "video" + valid_text(path.suffix))
        link.symlink_to(path.absolute())
        yield str(link)
