"""Decode the image of an example and encode it as the JPEG that a record stores."""

import dataclasses
import io
from typing import Protocol

from PIL import Image

from detclipv2_jax.common import pictures

_JPEG_QUALITY = 95
_SHRUNK_QUALITY = 90  # of an image that is stored smaller to save space
# The JPEG decoder shrinks to no less than twice the target size; the resampling filter does the
# rest without aliasing.
_REDUCING_GAP = 2.0
_LONGEST_SIDE = 65_500  # pixels that libjpeg writes


class Encoded(Protocol):
    """An encoded image somewhere: `ImageFile`, `ParquetImage`."""

    def read(self) -> bytes:
        """Return the encoded image; may raise anything."""
        ...


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An image as a record stores it, or the reason why it cannot be stored."""

    jpeg: bytes = b""
    height: int = 0  # pixels of `jpeg`
    width: int = 0
    original_size: tuple[int, int] = (0, 0)  # (height, width) of the turned file, in pixels
    orientation: int = 1  # what the file's EXIF says
    turned: int = 1  # the orientation that was applied (`pictures.turn_for`)
    reencoded: bool = False  # the file was not an upright JPEG in gray or RGB
    shrunk: bool = False  # stored smaller than the file
    problem: str = ""  # why the image cannot be stored; "" if it can
    reason: str = ""  # under which the problem is counted


def encode_image(
    file: Encoded, store_side: int | None = None, annotated: tuple[int, int] | None = None
) -> StoredImage:
    """Read and fully decode an image, and return it as JPEG, by the rules of `common/pictures.py`.

    A grayscale or RGB JPEG that is not to be turned keeps its bytes. Any other image is encoded as
    JPEG. No stored JPEG says how it is to be turned: decoders differ in whether they obey.

    Args:
        file: where the image is.
        store_side: an image whose longer side has more pixels is shrunk to this side.
        annotated: the (height, width) that its boxes are for, if its annotations have it.

    Returns:
        The image. An image that cannot be decoded or stored is returned with a `problem`.
    """
    try:
        data = file.read()
    except Exception as error:  # OSError; pyarrow raises more
        return StoredImage(problem=str(error) or type(error).__name__, reason="images: unreadable")
    at_least = lambda size: tuple(int(_REDUCING_GAP * side) for side in _shrunk(size, store_side))
    try:
        picture = pictures.read(
            data, annotated=annotated, at_least=None if store_side is None else at_least
        )
    except pictures.PictureError as error:
        return StoredImage(problem=str(error), reason="images: unreadable")
    size = _shrunk(picture.size, store_side)
    if max(size) > _LONGEST_SIDE:
        problem = (
            f"it is {size[1]:,} pixels wide and {size[0]:,} high, and records are JPEGs, which "
            f"have at most {_LONGEST_SIDE:,} a side; scale it down or cut it"
        )
        return StoredImage(problem=problem, reason="images: too wide or high")
    kept = picture.is_plain_jpeg and picture.turned == 1 and _has_end(data)
    shrunk = size != picture.size
    if kept and not shrunk:
        jpeg = data if picture.orientation == 1 else _without_exif(data)
    else:
        jpeg = _to_jpeg(picture, size)
    return StoredImage(
        jpeg=jpeg,
        height=size[0],
        width=size[1],
        original_size=picture.size,
        orientation=picture.orientation,
        turned=picture.turned,
        reencoded=not kept,
        shrunk=shrunk,
    )


def _shrunk(size: tuple[int, int], store_side: int | None) -> tuple[int, int]:
    """Return the (height, width) at which an image is stored."""
    longest = max(size)
    if store_side is None or longest <= store_side:
        return size
    height, width = (max(1, round(side * store_side / longest)) for side in size)
    return height, width


def _to_jpeg(picture: pictures.Picture, size: tuple[int, int]) -> bytes:
    """Return a picture as JPEG of a (height, width): shrunk, or with full colors at its size."""
    pixels = picture.pixels[..., 0] if picture.is_gray else picture.pixels
    image, options = Image.fromarray(pixels), {"quality": _JPEG_QUALITY, "subsampling": 0}
    if size != picture.size:
        options = {"quality": _SHRUNK_QUALITY}
        image = image.resize(size[::-1], Image.Resampling.BICUBIC, reducing_gap=_REDUCING_GAP)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


# ---- The bytes of a JPEG.


def _has_end(jpeg: bytes) -> bool:
    """Return whether a JPEG that Pillow decodes has an end marker; other decoders may ask for it.

    Phones put more behind it: a second picture, a video.
    """
    return b"\xff\xd9" in jpeg


def _without_exif(jpeg: bytes) -> bytes:
    """Return a JPEG without its segments of EXIF and XMP, which say how it is to be turned."""
    kept, place = [jpeg[:2]], 2
    while jpeg[place : place + 1] == b"\xff" and jpeg[place + 1] != 0xDA:  # start of scan
        if jpeg[place + 1] == 0xFF:  # a fill byte
            place += 1
            continue
        end = place + 2 + int.from_bytes(jpeg[place + 2 : place + 4])
        if jpeg[place + 1] != 0xE1:  # APP1
            kept.append(jpeg[place:end])
        place = end
    return b"".join([*kept, jpeg[place:]])
