"""Pictures from files, arrays or PIL, as training sees them, without TensorFlow."""

import dataclasses
import os
import pathlib

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from detclipv2_jax.common.errors import UserError

Source = str | os.PathLike | np.ndarray | Image.Image

_ORIENTATION = 0x0112  # EXIF's tag, and its values that swap height and width
_LYING = (5, 6, 7, 8)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A picture on its canvas; `size` is its (height, width) there, `original` in the file."""

    canvas: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    original: tuple[int, int]


def turned(canvas: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The canvas (H, W) or its transpose, whichever lets the picture be larger."""
    fit = lambda shape: min(shape[0] / height, shape[1] / width)
    return max(canvas, canvas[::-1], key=fit)


def place(source: Source, canvas: tuple[int, int], *, upright: bool = False) -> Placed:
    """Reads a picture and scales it into the canvas, aspect kept, top-left, zeros around it.

    The canvas turns with the picture (`turned`). Bilinear without antialiasing, after the JPEG
    decoder (or, for other pictures, averaging) has halved it until less than a factor of two is
    left: what training does. Of an animation it is the first picture. The EXIF orientation is
    ignored, as data sets' boxes refer to the stored pixels; `upright` turns files as it says.

    Raises:
      UserError: a file that is missing or no image, an array that is no picture; names it.
    """
    pixels, original = _read(source, canvas, upright)
    shape = turned(canvas, *original)
    size = fitted(original, shape)
    while min(pixels.shape[0] / size[0], pixels.shape[1] / size[1]) >= 2:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    if pixels.shape[:2] != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    image = np.zeros((*shape, 3), np.uint8)
    image[: size[0], : size[1]] = pixels
    return Placed(image, size, original)


def read(source: Source, *, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """A picture's pixels as RGB; what is transparent shows white. Turns and raises as `place`."""
    return _read(source, None, upright)[0]


def fitted(original: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of a picture scaled into `shape`, each at least one pixel."""
    scale = min(shape[0] / original[0], shape[1] / original[1])
    sides = [min(limit, max(1, round(side * scale))) for limit, side in zip(shape, original)]
    return sides[0], sides[1]


def _read(
    source: Source, canvas: tuple[int, int] | None, upright: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """Pixels, for a canvas perhaps scaled down by the decoder, and the true (height, width)."""
    if isinstance(source, np.ndarray):
        pixels = _array_pixels(source)
        return pixels, pixels.shape[:2]
    if isinstance(source, Image.Image):
        try:
            return _image_pixels(source), (source.height, source.width)
        except (OSError, SyntaxError, ValueError) as error:  # PIL decodes when it is asked
            raise UserError(f"a PIL image cannot be read ({error}).") from None
    path = pathlib.Path(source)
    try:
        with Image.open(path) as image:
            lies = upright and image.getexif().get(_ORIENTATION, 1) in _LYING
            original = (image.width, image.height) if lies else (image.height, image.width)
            if canvas is not None:
                size = fitted(original, turned(canvas, *original))
                _draft(image, size[::-1] if lies else size)
            return _image_pixels(ImageOps.exif_transpose(image) if upright else image), original
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path of the image.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; name the image files in it.") from None
    except Image.DecompressionBombError:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(
            f"{path}: holds more than {limit:,} pixels, PIL's limit for files from strangers; "
            "scale it down, or give it as an array."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        # PIL's own sentence for what is no image repeats the path.
        reason = "no known image format" if "cannot identify" in str(error) else str(error)
        raise UserError(f"{path}: cannot be read as an image ({reason}).") from None


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Lets the JPEG decoder scale by 1/8, 1/4 or 1/2, so that less than a factor of two is left."""
    for ratio in (8, 4, 2):
        if image.height >= ratio * size[0] and image.width >= ratio * size[1]:
            image.draft(image.mode, (image.width // ratio, image.height // ratio))
            return


def _array_pixels(array: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    gray = array.ndim == 2
    color = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not (gray or color) or 0 in array.shape:
        raise UserError(
            f"an image array of shape {array.shape} and type {array.dtype} was given; "
            "give uint8 (height, width, 3), RGB from 0 to 255."
        )
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    return _image_pixels(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _image_pixels(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of any mode of picture; what is transparent shows white. ValueError where it has none."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} does not say what is white; make it 8 bits a channel"
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
