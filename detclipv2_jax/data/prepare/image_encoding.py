"""Image files opened: what a stored picture is, and what is said of one that is none."""

import dataclasses
import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from detclipv2_jax.data.prepare.examples import ImageFile
from detclipv2_jax.text import phrases as phrases_lib

_JPEG_QUALITY = 95
_SHRUNK_QUALITY = 90  # of a picture that is stored to be small
_REDUCING_GAP = (
    2.0  # the decoder shrinks to no less than twice the size, antialiasing does the rest
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a source is prepared, whatever it is made from."""

    phrase_model: str | None = None  # spaCy pipeline; None: the first of phrases.MODELS
    phrase_limit: int = phrases_lib.LIMIT  # noun phrases a caption, beside the caption itself
    store_side: int | None = None  # pixels; a captioned picture's longer side is stored no larger
    jobs: int = max(1, os.cpu_count() or 1)  # processes that decode images and parse captions


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image file, opened: JPEG bytes and their size, or what is wrong with it."""

    jpeg: bytes = b""
    height: int = 0
    width: int = 0
    original_size: tuple[int, int] = (0, 0)  # (height, width) in the file
    reencoded: bool = False  # the file was no JPEG in grey or RGB
    shrunk: bool = False
    problem: str = ""


def open_image(file: ImageFile, store_side: int | None = None) -> Picture:
    """Read and decode an image. A JPEG in grey or RGB is kept as it is, all else becomes one.

    With `store_side`, a picture whose longer side has more pixels is shrunk to it.

    Never raises: whatever a decoder has to say about a file is the `problem`.
    """
    try:
        data = file.read()
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            kept = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            shrunk = store_side is not None and max(size) > store_side
            if shrunk:
                image = image if kept else _rgb(image)
                bounds = (store_side, store_side)
                image.thumbnail(bounds, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
                stored = _jpeg(image, _SHRUNK_QUALITY)
            elif kept:
                image.load()
                stored = data
            else:
                stored = _jpeg(_rgb(image), _JPEG_QUALITY, subsampling=0)
            width, height = image.size
            return Picture(stored, height, width, size[::-1], not kept, shrunk)
    except UnidentifiedImageError:
        return Picture(problem=f"{len(data)} bytes that are no image")
    except Exception as error:  # decoders raise all there is: OSError, SyntaxError, struct.error, …
        return Picture(problem=str(error) or type(error).__name__)


def _jpeg(image: Image.Image, quality: int, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: PIL would cut, not scale
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")
