"""The one place where pictures are read: preparation, training's drawings, detection, evaluation.

Every command gets its pixels from `read`, so all agree on these rules:

* **Turning.** A file that says in EXIF (or XMP, or AVIF's own fields) how it is to be turned is
  turned, as viewers and OpenCV do. A value that is not one of 1 to 8 turns nothing. Boxes that
  were annotated on the unturned pixels are known by the size of the annotation: `turn_for`.
* **Transparency** shows white, whatever the mode: alpha, a palette's alpha, a transparent color.
* **8 bits per channel.** 16-bit values keep their upper 8 bits, floats 0 to 1 become 0 to 255.
  Where the brightest value is below a quarter of that range, or one lies outside, the range is
  unknown (12 bits, degrees, meters): it is refused instead of read as black or white.
* **First frame** of an animation, first page of a TIFF. ICC profiles are not applied.
* **Limits** are checked on the header, before anything is decoded: `MAX_PIXELS`, and for small
  files `MAX_PIXELS_PER_BYTE`.
* **Damage.** Decoders raise everything; here it all becomes `PictureError` with the reason.
"""

import contextlib
import dataclasses
import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from detclipv2_jax.common import lfs_pointer

#: An encoded picture: a path, bytes or a binary file; or an image that Pillow has opened.
Source = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | io.IOBase | Image.Image

Size = tuple[int, int]  # (height, width) in pixels

RULES = 2  # version of these rules: what was read by others is not mixed with them
MAX_PIXELS = 178_956_970  # Pillow's limit: larger ones may be made to fill the memory
#: A picture above 2²⁵ pixels must not have more of them per byte of its file. Photos have under
#: 100; an empty picture of 20 kB can have 10⁸ and take gigabytes.
MAX_PIXELS_PER_BYTE = 1000
_ALWAYS_ALLOWED = 1 << 25  # pixels

_ORIENTATION = 0x0112  # the EXIF tag
_EXIF_NUMBERS = {1: "B", 3: "H", 4: "I"}  # EXIF's types of whole numbers
_SWAPS_SIDES = (5, 6, 7, 8)
_INVERSE = {6: 8, 8: 6}  # every other turn is its own inverse
_LEAST_BRIGHT = 0.25  # of the range of 16-bit and float values
NO_FILE = "no such file"  # the reason for a path that does not exist
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")  # brands of the container
_NOT_READ = ("EPS",)  # Pillow would run a PostScript program

# A folder of photos would fill the screen with Pillow's remarks on their EXIF; limits are ours.
# Once here: changing the filters around each read is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class PictureError(ValueError):
    """Why a picture cannot be read: a reason without its name, for example 'it is empty'."""


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture that was read.

    Attributes:
      pixels: RGB, turned by `turned`.
      size: (height, width) of the whole picture, turned alike. The pixels are fewer if the JPEG
        decoder scaled them down.
      orientation: 1 to 8, what the file says.
      turned: the orientation that was applied: `orientation`, or 1 where boxes refer to the
        pixels as stored.
      is_gray: the three channels are equal, because the file has only one.
      is_plain_jpeg: a JPEG in gray or RGB, which every decoder reads alike.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    size: Size
    orientation: int = 1
    turned: int = 1
    is_gray: bool = False
    is_plain_jpeg: bool = False


def read(
    source: Source,
    *,
    annotated: Size | None = None,
    at_least: Callable[[Size], Size] | None = None,
    turn: bool = True,
) -> Picture:
    """Read a picture by the rules of this module.

    An image that Pillow has opened already is not turned: boxes are to fit it as its owner has it.

    Args:
      source: the encoded picture.
      annotated: the size that the annotations of its boxes give, if any: see `turn_for`.
      at_least: from the turned size of the picture, the size that is needed. The JPEG decoder may
        then scale by 1/2, 1/4 or 1/8, to no less.
      turn: False for the images of records, whose boxes refer to the stored pixels.

    Raises:
      PictureError: it cannot be read.
    """
    with _picture_errors():
        if isinstance(source, Image.Image):
            return _from_pillow(source)
        with _opened(source) as file, _image_in(file) as image:
            if image.format == "PNG":
                _check_png(file)
            return _decoded(image, annotated, at_least, turn)


@contextlib.contextmanager
def animation(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open a picture for a block that seeks its frames, each to be read by `frame`.

    Raises:
      PictureError: it cannot be opened, or something in the block fails.
    """
    with _picture_errors(), _opened(path) as file, _image_in(file) as image:
        yield image


def frame(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of the current frame of an `animation`, turned; raises anything."""
    shown = image.copy()  # decodes
    pixels = _to_rgb(shown, _raw_mode(image))
    return np.ascontiguousarray(turned(pixels, orientation_of(image)))


def turn_for(orientation: int, stored: Size, annotated: Size | None) -> int:
    """Return the orientation to apply so that boxes of an annotation fit the pixels.

    Boxes refer to what viewers show, the turned picture, except where the annotation lies and the
    turned picture stands, or the reverse: those were made on the pixels as stored. Orientations 2,
    3 and 4 keep the sides, so that sizes cannot tell.

    Args:
      orientation: 1 to 8, what the file says.
      stored: (height, width) before turning.
      annotated: (height, width) in the annotations; None if they have none.
    """
    if orientation not in _SWAPS_SIDES or annotated is None:
        return orientation
    lies = lambda size: np.sign(size[1] - size[0])
    return 1 if lies(annotated) == lies(stored) != 0 else orientation


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels (h, w, …) turned as an EXIF orientation from 1 to 8 says.

    EXIF 2.32, 4.6.4.A: the orientation tells which side of the picture the first row and the
    first column of the stored pixels are.
    """
    if orientation in _SWAPS_SIDES:  # the first row is a side
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):  # … at the bottom, or the first column is there
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):  # … at the right
        pixels = pixels[:, ::-1]
    return pixels


def turned_size(size: Size, orientation: int) -> Size:
    """Return the (height, width) after turning."""
    return (size[1], size[0]) if orientation in _SWAPS_SIDES else size


def orientation_of(image: Image.Image) -> int:
    """Return the orientation that an open image asks for, 1 if it has none that is valid."""
    value = None
    with contextlib.suppress(Exception):  # read by hand: Pillow gives up at the first broken tag
        value = _orientation_in(image.info["exif"])
    if value is None:
        with contextlib.suppress(Exception):  # whatever broken EXIF makes Pillow raise
            value = image.getexif().get(_ORIENTATION)  # also of XMP, and of old PNGs
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


# ---- Opening.


@contextlib.contextmanager
def _picture_errors() -> Iterator[None]:
    """Turn whatever is raised into `PictureError`."""
    try:
        yield
    except PictureError:
        raise
    except MemoryError:
        raise PictureError("there is not enough memory for its pixels") from None
    except Image.DecompressionBombError:
        raise PictureError(f"it has more than {MAX_PIXELS:,} pixels; scale it down") from None
    except Exception as error:  # decoders raise anything: OSError, struct.error, RuntimeError, …
        raise PictureError(_reason(error)) from None


@contextlib.contextmanager
def _image_in(file: BinaryIO) -> Iterator[Image.Image]:
    """Open the image in a file, within the limits."""
    head = file.read(512)
    try:
        image = Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        raise PictureError(_what_it_is(head)) from None
    with image:
        _check_limits(image.size, _length(file))
        yield image


def _opened(source: Any) -> BinaryIO:
    """Return a file to read the encoded picture from."""
    if isinstance(source, str | os.PathLike):
        mode = os.stat(source).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a pipe may wait for ever
            raise PictureError("it is a pipe or a device, not a file")
        return open(source, "rb")
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if not hasattr(source, "read"):
        raise PictureError(f"it is of type {type(source).__name__}, not a picture")
    if hasattr(source, "seek"):
        source.seek(0)
    data = source.read()
    if not isinstance(data, bytes):
        raise PictureError("the file is not open in binary mode")
    return io.BytesIO(data)


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name not in _NOT_READ)


def _length(file: BinaryIO) -> int:
    """Return the bytes of a file, leaving its position as it is."""
    place = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(place)
    return length


def _check_limits(size: tuple[int, int], length: int) -> None:
    """Refuse, by the header alone, a (width, height) that may not fit into memory."""
    pixels, shown = size[0] * size[1], f"{size[0]:,}x{size[1]:,} pixels"
    if pixels > MAX_PIXELS:
        raise PictureError(f"it has {shown}, more than {MAX_PIXELS:,} in all; scale it down")
    if pixels > max(_ALWAYS_ALLOWED, MAX_PIXELS_PER_BYTE * length):
        raise PictureError(
            f"it has {shown} in a file of {length:,} bytes, as a picture that is made to fill the "
            "memory; save it with fewer pixels"
        )


def _check_png(file: BinaryIO) -> None:
    """Refuse a PNG whose compressed pixels have another checksum than the file says.

    Pillow does not look; the pixels behind the damage would be black or noise.
    """
    place = file.tell()
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IDAT":
            body, checksum = file.read(length), file.read(4)
            if len(checksum) == 4 and zlib.crc32(name + body) != int.from_bytes(checksum):
                raise PictureError("it is damaged: the checksum of its pixels is wrong")
        else:
            file.seek(length + 4, os.SEEK_CUR)
    file.seek(place)


# ---- Turning.


def _orientation_in(exif: bytes) -> int | None:
    """Return the orientation of an EXIF block, None without one; raises on broken blocks."""
    tiff = exif
    while tiff.startswith(b"Exif\0\0"):  # some programs write it twice
        tiff = tiff[6:]
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, length = struct.unpack_from(f"{order}HHI", tiff, entry)
        if tag == _ORIENTATION:
            if kind not in _EXIF_NUMBERS or length != 1:
                return 1
            return struct.unpack_from(order + _EXIF_NUMBERS[kind], tiff, entry + 8)[0]
    return None


# ---- Decoding.


def _from_pillow(image: Image.Image) -> Picture:
    """Return an image as its owner has it; raises anything."""
    raw_mode = _raw_mode(image)
    image.load()
    pixels = _to_rgb(image, raw_mode)
    return Picture(pixels, pixels.shape[:2])


def _decoded(
    image: Image.Image,
    annotated: Size | None,
    at_least: Callable[[Size], Size] | None,
    turn: bool,
) -> Picture:
    """Decode a file that is open; raises anything."""
    is_jpeg, raw_mode = image.format in ("JPEG", "MPO"), _raw_mode(image)
    before, stored = orientation_of(image), (image.height, image.width)
    if is_jpeg and at_least is not None:
        applied = turn_for(before, stored, annotated) if turn else 1
        needed = at_least(turned_size(stored, applied))
        _draft(image, turned_size(needed, applied))
    image.load()
    # Pillow itself turns a TIFF while loading. A PNG may say behind its pixels how it is turned.
    remaining = orientation_of(image)
    orientation = remaining if before == 1 else before
    pixels = _to_rgb(image, raw_mode)
    if image.format == "TIFF" and remaining != orientation:
        pixels = turned(pixels, _INVERSE.get(orientation, orientation))
    if not is_jpeg:
        stored = pixels.shape[:2]
    applied = turn_for(orientation, stored, annotated) if turn else 1
    return Picture(
        pixels=np.ascontiguousarray(turned(pixels, applied)),
        size=turned_size(stored, applied),
        orientation=orientation,
        turned=applied,
        is_gray=image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"),
        is_plain_jpeg=is_jpeg and image.mode in ("L", "RGB"),
    )


def _draft(image: Image.Image, size: Size) -> None:
    """Let the JPEG decoder scale by 1/8, 1/4 or 1/2: the smallest result not below `size`."""
    for ratio in (8, 4, 2):
        if image.height >= ratio * size[0] and image.width >= ratio * size[1]:
            image.draft(image.mode, (image.width // ratio, image.height // ratio))
            return


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels lie in the file, for example "RGB;16B"; "" if that is unknown."""
    tiles = getattr(image, "tile", None)
    layout = tiles[0][3] if tiles else ""
    layout = layout[0] if isinstance(layout, tuple) and layout else layout
    return layout if isinstance(layout, str) else ""


def _to_rgb(image: Image.Image, raw_mode: str) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of a loaded image of any mode, with transparent parts in white."""
    if 0 in image.size:
        raise PictureError("it has no pixels")
    mode, clear = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        if mode[0] == "I" and _is_white_zero(image):
            values = 65535 - values
        gray = _to_8_bits(values, 1.0 if mode == "F" else 65535.0)
        return _as_white(np.stack([gray] * 3, axis=-1), values, clear)
    if mode in ("1", "L", "RGB") and clear is not None:
        values = np.asarray(image)
        values = values.astype(np.uint8) * np.uint8(255) if mode == "1" else values
        pixels = values if values.ndim == 3 else np.stack([values] * 3, axis=-1)
        return _as_white(np.array(pixels), values, _in_8_bits(clear, raw_mode))
    if image.has_transparency_data:
        image = image.convert("LA") if mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    pixels = np.asarray(image.convert("RGB"))
    if ";16" in raw_mode:  # Pillow has kept the upper eight bits
        _check_bright(float(pixels.max()), 255.0)
    return pixels


def _to_8_bits(values: np.ndarray, top: float) -> UInt8[np.ndarray, "h w"]:
    """Map values from 0 to `top` to 0 to 255; `PictureError` if that is not their range."""
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also for NaN
        raise PictureError(
            f"its values go from {low:g} to {high:g} instead of 0 to {top:g}, so it is unknown "
            "which are black and white; save it with 8 bits per channel"
        )
    _check_bright(high, top)
    if top > 1:  # as Pillow does for colors of 16 bits, and OpenCV
        return (values >> 8).astype(np.uint8)
    return (values * np.float32(255) + np.float32(0.5)).astype(np.uint8)


def _check_bright(high: float, top: float) -> None:
    if high < _LEAST_BRIGHT * top:
        raise PictureError(
            f"its brightest value is {high:g} where the format's white is {top:g}, so the range of "
            "its values is unknown (12 bits, depth, temperature?); save it with 8 bits per channel"
        )


def _is_white_zero(image: Image.Image) -> bool:
    """Return whether a TIFF of 16 bits has white as 0, which Pillow ignores."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(262) == 0  # PhotometricInterpretation


def _as_white(pixels: np.ndarray, values: np.ndarray, clear: Any) -> np.ndarray:
    """Make the pixels white whose value is `clear`: a number, or one per channel."""
    if clear is not None:
        same = values == np.asarray(clear)
        pixels[same.all(-1) if same.ndim == 3 else same] = 255
    return pixels


def _in_8_bits(clear: Any, raw_mode: str) -> Any:
    """Return a PNG's transparent color, which has the bits of the file, as Pillow's pixels have."""
    scale = {"L;2": 85, "L;4": 17}.get(raw_mode, 1)
    return np.asarray(clear) >> 8 if ";16" in raw_mode else np.asarray(clear) * scale


# ---- Reasons.


def _what_it_is(head: bytes) -> str:
    """Return why bytes that begin so are no picture that can be read."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "it is empty"
    if lfs_pointer.is_pointer(head):
        return lfs_pointer.REASON
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<svg")):
        return "it is a web page or an SVG, not a picture"
    if head[4:8] == b"ftyp":  # ISO/IEC 14496-12, 4.3: the length of the list, then the brands
        end = max(12, min(len(head), int.from_bytes(head[:4])))
        brands = {head[at : at + 4] for at in range(8, end, 4)}
        if brands & {b"avif", b"avis"}:
            return "it is an AVIF that is damaged or cut off"
        if brands.isdisjoint(_HEIC):
            return "it is a video, not a picture"
        return "it is a HEIC photo, which cannot be read; convert it to JPEG"
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "it is a JPEG XL picture, which cannot be read; convert it to JPEG"
    if head.startswith(b"%!PS"):
        return "it is a PostScript program, which is not run; convert it to PNG"
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"II*\0", b"MM\0*", b"GIF8", b"RIFF", b"BM")):
        return "it begins as a picture, but its header is damaged or of an unknown kind"
    return "not a known image format"


def _reason(error: Exception) -> str:
    """Return in words what a decoder or the file system has raised."""
    if isinstance(error, FileNotFoundError):
        return NO_FILE
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and text:
        return text
    return f"its decoder failed with {type(error).__name__}{': ' if text else ''}{text}"
