"""Reading images and scaling them onto a canvas, as training does, without TensorFlow."""

import dataclasses
import os
import pathlib

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from detclipv2_jax.common.errors import UserError

#: An image: a path, a uint8 array (h, w), (h, w, 1), (h, w, 3) RGB or (h, w, 4) RGBA, or PIL's.
ImageSource = str | os.PathLike | np.ndarray | Image.Image

_ORIENTATION = 0x0112  # the EXIF tag
_SWAPS_SIDES = (5, 6, 7, 8)  # its values that exchange height and width


@dataclasses.dataclass(frozen=True)
class CanvasImage:
    """An image scaled into the top-left corner of a canvas.

    Attributes:
      pixels: RGB, zero outside the image.
      size: (height, width) of the scaled image on the canvas.
      original_size: (height, width) of the image before scaling.
    """

    pixels: UInt8[np.ndarray, "H W 3"]
    size: tuple[int, int]
    original_size: tuple[int, int]


def fit_to_canvas(
    source: ImageSource, canvas: tuple[int, int], *, upright: bool = False
) -> CanvasImage:
    """Read an image and scale it, with its aspect ratio kept, to fit into a canvas.

    The result equals what training computes: the JPEG decoder (for other formats, averaging)
    halves the image until less than a factor of two is left; the rest is bilinear scaling without
    antialiasing.

    Args:
      source: of an animation, the first frame is used.
      canvas: (height, width) in pixels; transposed if the image is then larger.
      upright: whether to rotate image files as their EXIF orientation says. False for datasets,
        whose boxes refer to the stored pixels.

    Raises:
      UserError: the file is missing or is not an image, or the array is not an image.
    """
    pixels, original_size = _decode(source, canvas, upright)
    height, width = oriented_canvas(canvas, *original_size)
    size = fitted_size(original_size, (height, width))
    while min(pixels.shape[0] / size[0], pixels.shape[1] / size[1]) >= 2:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    if pixels.shape[:2] != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: size[0], : size[1]] = pixels
    return CanvasImage(padded, size, original_size)


def read(source: ImageSource, *, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """Return the RGB pixels of an image at its original size; transparent parts become white.

    `upright` and errors are those of `fit_to_canvas`.
    """
    return _decode(source, None, upright)[0]


def oriented_canvas(canvas: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return the canvas or its transpose, whichever shows an image of that size larger."""
    scale = lambda shape: min(shape[0] / height, shape[1] / width)
    return max(canvas, (canvas[1], canvas[0]), key=scale)


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit into a canvas, at least 1 pixel each."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    sides = [min(limit, max(1, round(side * scale))) for limit, side in zip(canvas, size)]
    return sides[0], sides[1]


def _decode(
    source: ImageSource, canvas: tuple[int, int] | None, upright: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """Return the pixels and the original (height, width).

    With a canvas, the JPEG decoder may have scaled the pixels down already.
    """
    if isinstance(source, np.ndarray):
        pixels = _array_to_rgb(source)
        return pixels, pixels.shape[:2]
    if isinstance(source, Image.Image):
        try:
            return _pil_to_rgb(source), (source.height, source.width)
        except (OSError, SyntaxError, ValueError) as error:  # PIL decodes on first use
            raise UserError(f"a PIL image cannot be read ({error}).") from None
    path = pathlib.Path(source)
    try:
        return _decode_file(path, canvas, upright)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check the path of the image.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory. Give the image files in it.") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # None turns this error off
        raise UserError(
            f"{path}: has more than {limit:,} pixels, which PIL refuses for safety. Scale the "
            "image down, or pass it as an array."
        ) from None
    except (OSError, SyntaxError, ValueError) as error:
        # PIL's own message for a file that is not an image repeats the path.
        unknown = "cannot identify" in str(error)
        reason = "not a known image format" if unknown else str(error)
        raise UserError(f"{path}: cannot be read as an image ({reason}).") from None


def _decode_file(
    path: pathlib.Path, canvas: tuple[int, int] | None, upright: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[int, int]]:
    """Like `_decode`, of a file; raises PIL's errors."""
    with Image.open(path) as image:
        swapped = upright and image.getexif().get(_ORIENTATION, 1) in _SWAPS_SIDES
        size = (image.width, image.height) if swapped else (image.height, image.width)
        if canvas is not None:
            height, width = fitted_size(size, oriented_canvas(canvas, *size))
            _draft(image, (width, height) if swapped else (height, width))
        return _pil_to_rgb(ImageOps.exif_transpose(image) if upright else image), size


def _draft(image: Image.Image, size: tuple[int, int]) -> None:
    """Let the JPEG decoder scale by 1/8, 1/4 or 1/2: the smallest result not below `size`."""
    for ratio in (8, 4, 2):
        if image.height >= ratio * size[0] and image.width >= ratio * size[1]:
            image.draft(image.mode, (image.width // ratio, image.height // ratio))
            return


def _array_to_rgb(array: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    is_gray = array.ndim == 2
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype != np.uint8 or not (is_gray or has_channels) or 0 in array.shape:
        raise UserError(
            f"an image array has shape {array.shape} and type {array.dtype}, expected uint8 "
            "(height, width, 3), RGB from 0 to 255."
        )
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    return _pil_to_rgb(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array))


def _pil_to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Convert an image of any mode; transparent parts become white.

    Raises:
      ValueError: the mode does not define which value is white, or the image has no pixels.
    """
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} does not define white; convert it to 8 bits per channel"
        )
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
