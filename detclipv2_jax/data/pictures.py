"""Image files decoded and captions parsed, by several processes: what takes time in preparation.

Nothing here imports TensorFlow: the worker processes import this module and have no use for it.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from detclipv2_jax.data import phrases as phrases_lib
from detclipv2_jax.data.examples import ImageFile, RawExample
from detclipv2_jax.errors import UserError

_CHUNK = 128  # examples that a worker takes at once
_AHEAD = 3  # chunks a worker that wait for their turn: bounds the memory that images take
_JPEG_QUALITY = 95


@dataclasses.dataclass(frozen=True)
class Options:
    """How a source is prepared, whatever it is made from."""

    phrase_model: str | None = None  # spaCy pipeline; None: the first of phrases.MODELS
    phrase_limit: int = phrases_lib.LIMIT  # noun phrases a caption, beside the caption itself
    jobs: int = max(1, os.cpu_count() or 1)  # processes that decode images and parse captions


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file, opened by a worker: JPEG bytes and size, or what is wrong with it."""

    jpeg: bytes = b""
    height: int = 0
    width: int = 0
    reencoded: bool = False
    phrases: tuple[str, ...] = ()
    problem: str = ""


def open_image(file: ImageFile) -> Picture:
    """Read and decode an image. A JPEG in grey or RGB is kept as it is, all else becomes one.

    Never raises: whatever a decoder has to say about a file is the `problem`.
    """
    try:
        data = file.read()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            width, height = image.size
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                return Picture(data, height, width)
            buffer = io.BytesIO()
            _rgb(image).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
            return Picture(buffer.getvalue(), height, width, reencoded=True)
    except UnidentifiedImageError:
        return Picture(problem=f"{len(data)} bytes that are no image")
    except Exception as error:  # decoders raise all there is: OSError, SyntaxError, struct.error, …
        return Picture(problem=str(error) or type(error).__name__)


def checked(
    examples: Iterable[RawExample], *, with_phrases: bool, options: Options
) -> Iterator[tuple[RawExample, Picture]]:
    """Examples in order with their decoded images and captions' phrases, by several processes."""
    work = _Work(with_phrases, options.phrase_model, options.phrase_limit)
    if with_phrases:
        phrases_lib.load(options.phrase_model)  # a missing model is said at once, by this process
    examples = iter(examples)
    chunks = iter(lambda: list(itertools.islice(examples, _CHUNK)), [])
    if options.jobs == 1:
        for chunk in chunks:
            yield from zip(chunk, work([(e.image, e.caption) for e in chunk]))
        return
    # Fresh processes, not forked ones: TensorFlow's and spaCy's threads do not survive a fork.
    pool = concurrent.futures.ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    waiting: deque[tuple[list[RawExample], concurrent.futures.Future]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(work, [(e.image, e.caption) for e in chunk])))
            if len(waiting) > options.jobs * _AHEAD:
                done, future = waiting.popleft()
                yield from zip(done, future.result())
        for done, future in waiting:
            yield from zip(done, future.result())
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that decodes images was killed, probably for lack of memory; use fewer with "
            f"--jobs={max(1, options.jobs // 2)}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@dataclasses.dataclass(frozen=True)
class _Work:
    """What a worker does with a chunk of (image, caption)."""

    with_phrases: bool
    phrase_model: str | None
    phrase_limit: int

    def __call__(self, chunk: list[tuple[ImageFile, str]]) -> list[Picture]:
        pictures = [open_image(image) for image, _ in chunk]
        if not self.with_phrases:
            return pictures
        found = phrases_lib.noun_phrases(
            [caption for _, caption in chunk], model=self.phrase_model, limit=self.phrase_limit
        )
        return [
            dataclasses.replace(picture, phrases=tuple(phrases))
            for picture, phrases in zip(pictures, found, strict=True)
        ]


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when that is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL would cut, not scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")
