"""Decode the image of an example and encode it as the JPEG that a record stores."""

import dataclasses
import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from detclipv2_jax.data.prepare.examples import ImageFile

_JPEG_QUALITY = 95
_SHRUNK_QUALITY = 90  # of an image that is stored smaller to save space
# The JPEG decoder shrinks to no less than twice the target size; the resampling filter does the
# rest without aliasing.
_REDUCING_GAP = 2.0


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image as a record stores it, or the reason why it cannot be stored."""

    jpeg: bytes = b""
    height: int = 0  # pixels of `jpeg`
    width: int = 0
    original_size: tuple[int, int] = (0, 0)  # (height, width) of the file, in pixels
    reencoded: bool = False  # the file was not a grayscale or RGB JPEG
    shrunk: bool = False  # stored smaller than the file
    problem: str = ""  # why the file cannot be decoded; "" if it can


def encode_image(file: ImageFile, store_side: int | None = None) -> StoredImage:
    """Read and fully decode an image, and return it as JPEG.

    A grayscale or RGB JPEG keeps its bytes. Any other format is encoded as JPEG.

    Args:
        file: where the image is.
        store_side: an image whose longer side has more pixels is shrunk to this side.

    Returns:
        The image. An image that cannot be decoded is returned with a `problem`, never raised.
    """
    try:
        data = file.read()
        with Image.open(io.BytesIO(data)) as image:
            size = image.size
            kept = image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")
            shrunk = store_side is not None and max(size) > store_side
            if shrunk:
                image = image if kept else _to_rgb(image)
                bounds = (store_side, store_side)
                image.thumbnail(bounds, Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
                jpeg = _to_jpeg(image, _SHRUNK_QUALITY)
            elif kept:
                image.load()
                jpeg = data
            else:
                jpeg = _to_jpeg(_to_rgb(image), _JPEG_QUALITY, subsampling=0)
            width, height = image.size
            return StoredImage(jpeg, height, width, size[::-1], not kept, shrunk)
    except UnidentifiedImageError:
        return StoredImage(problem=f"{len(data)} bytes that are not an image")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        return StoredImage(problem=str(error) or type(error).__name__)


def _to_jpeg(image: Image.Image, quality: int, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel: PIL would clip instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")
