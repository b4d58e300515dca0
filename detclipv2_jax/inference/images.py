"""Images scaled onto a canvas, as training does, without TensorFlow."""

import dataclasses
import io
import os
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detclipv2_jax.common import pictures
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable


@dataclasses.dataclass(frozen=True)
class AnnotatedImage:
    """An image file with the size that its annotations are for.

    The size tells whether boxes refer to a photo turned by EXIF or not: `pictures.turn_for`.
    """

    path: str | os.PathLike
    size: tuple[int, int] | None  # (height, width) in pixels; None: they do not say


#: An image: a path, the bytes of a file, a binary file object, PIL's, or a uint8 array (h, w),
#: (h, w, 1), (h, w, 3) RGB or (h, w, 4) RGBA.
ImageSource = (
    str | os.PathLike | bytes | bytearray | io.IOBase | np.ndarray | Image.Image | AnnotatedImage
)


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


def fit_to_canvas(source: ImageSource, canvas: tuple[int, int]) -> CanvasImage:
    """Read an image and scale it, with its aspect ratio kept, to fit into a canvas.

    The result equals what training computes: the JPEG decoder (for other formats, averaging)
    halves the image until less than a factor of two is left; the rest is bilinear scaling without
    antialiasing.

    Args:
      source: files are read by the rules of `common/pictures.py`: turned as EXIF says, transparent
        parts white, the first frame. Arrays and PIL images are not turned.
      canvas: (height, width) in pixels; transposed if the image is then larger.

    Raises:
      UserError: the file is missing or is not an image, or the array is not an image.
    """
    fitted = lambda size: fitted_size(size, oriented_canvas(canvas, *size))
    picture = _read(source, fitted)
    pixels, (height, width) = picture.pixels, oriented_canvas(canvas, *picture.size)
    size = fitted(picture.size)
    while min(pixels.shape[0] / size[0], pixels.shape[1] / size[1]) >= 2:
        half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)
    if pixels.shape[:2] != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR)
    padded = np.zeros((height, width, 3), np.uint8)
    padded[: size[0], : size[1]] = pixels
    return CanvasImage(padded, size, picture.size)


def read(source: ImageSource) -> UInt8[np.ndarray, "h w 3"]:
    """Return the RGB pixels of an image at its original size, as `fit_to_canvas` reads them."""
    return _read(source, None).pixels


def oriented_canvas(canvas: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """Return the canvas or its transpose, whichever shows an image of that size larger."""
    scale = lambda shape: min(shape[0] / height, shape[1] / width)
    return max(canvas, (canvas[1], canvas[0]), key=scale)


def fitted_size(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) of an image scaled to fit into a canvas, at least 1 pixel each."""
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    sides = [min(limit, max(1, round(side * scale))) for limit, side in zip(canvas, size)]
    return sides[0], sides[1]


def _read(source: ImageSource, at_least: Any) -> pictures.Picture:
    """Read an image; `UserError` with its name if it cannot be read."""
    annotated, name = None, "an image"
    if isinstance(source, AnnotatedImage):
        source, annotated = source.path, source.size
    if isinstance(source, np.ndarray):
        pixels = _array_to_rgb(source)
        return pictures.Picture(pixels, pixels.shape[:2])
    if isinstance(source, str | os.PathLike):
        name = printable(source)
        if os.path.isdir(source):
            raise UserError(f"{name}: is a directory. Give the image files in it.")
    try:
        return pictures.read(source, annotated=annotated, at_least=at_least)
    except pictures.PictureError as error:
        if str(error) == pictures.NO_FILE:
            raise UserError(f"{name}: no such file. Check the path of the image.") from None
        raise UserError(f"{name}: cannot be read as an image ({error}).") from None


def check_source(source: Any, what: str) -> None:
    """Raise `UserError` if a value is not an `ImageSource`; files are not opened.

    Args:
      source: the value.
      what: how to call it, for example "image 2 of 5".
    """
    if isinstance(source, np.ndarray):
        _check_array(source, what)
    elif not isinstance(source, ImageSource):
        kind = f"{type(source).__module__}.{type(source).__name__}".removeprefix("builtins.")
        shape = f" of shape {tuple(source.shape)}" if hasattr(source, "shape") else ""
        array = " Convert it with numpy.asarray." if shape else ""
        raise UserError(
            f"{what} is a {kind}{shape}, expected a path, a PIL image or a uint8 array (height, "
            f"width, 3), RGB from 0 to 255.{array}"
        )


def _check_array(array: np.ndarray, what: str) -> None:
    is_gray = array.ndim == 2
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if array.dtype == np.uint8 and (is_gray or has_channels) and 0 not in array.shape:
        return
    hint = ""
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and not has_channels:
        hint = " Its channels come first: use array.transpose(1, 2, 0)."
    if array.dtype.kind == "f":
        hint += (
            " Whether its values end at 1 or at 255 is not known: scale them to 0 to 255, round "
            "them and use array.astype('uint8')."
        )
    raise UserError(
        f"{what} is an array of shape {array.shape} and type {array.dtype}, expected uint8 "
        f"(height, width, 3), RGB from 0 to 255.{hint}"
    )


def _array_to_rgb(array: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    _check_array(array, "an image")
    if array.ndim == 3 and array.shape[2] == 3:
        return array
    image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    return pictures.read(image).pixels
