import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common import pictures

# EXIF 2.32, 4.6.4.A, orientation: where the 0th row and the 0th column of the stored pixels are in
# the upright picture.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def scene(height=24, width=40):
    """A smooth picture without any symmetry; height and width of stored pixels."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    channels = [255 * x, 255 * y, 255 * (1 - x) * (1 - y)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def upright(stored, orientation):
    """The upright picture, pixel by pixel, from where the specification puts rows and columns."""
    row, column = SIDES[orientation]
    height, width = stored.shape[:2]
    shape = (height, width) if row in ("top", "bottom") else (width, height)
    out = np.zeros((*shape, *stored.shape[2:]), stored.dtype)
    for i in range(height):
        for j in range(width):
            place = {}
            for side, number, count in ((row, i, height), (column, j, width)):
                axis = "y" if side in ("top", "bottom") else "x"
                place[axis] = number if side in ("top", "left") else count - 1 - number
            out[place["y"], place["x"]] = stored[i, j]
    return out


def encoded(image, form="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def raw_exif(*entries, order="<"):
    """A block of EXIF of (tag, type, count, four bytes of value or offset)."""
    head = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    fields = [struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries]
    return head + struct.pack(order + "H", len(entries)) + b"".join(fields) + bytes(4)


def opencv(data):
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def difference(a, b):
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).max()


# ---- Turning.


@pytest.mark.parametrize("orientation", SIDES)
def test_turned_is_the_specification(orientation):
    stored = np.arange(3 * 5 * 2).reshape(3, 5, 2)
    found = pictures.turned(stored, orientation)
    np.testing.assert_array_equal(found, upright(stored, orientation))
    assert pictures.turned_size((3, 5), orientation) == found.shape[:2]


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "MPO"])
def test_every_orientation_of_every_format(form, orientation):
    options = {"lossless": True} if form == "WEBP" else {"quality": 95}
    options = {} if form in ("PNG", "TIFF") else options
    data = encoded(scene(), form, exif=exif(orientation), **options)
    found = pictures.read(data)
    wanted = upright(scene(), orientation)
    assert (found.orientation, found.turned) == (orientation, orientation)
    assert found.size == wanted.shape[:2] == found.pixels.shape[:2]
    assert difference(found.pixels, wanted) <= (0 if form in ("PNG", "WEBP", "TIFF") else 25)
    stored = pictures.read(data, annotated=scene().shape[:2])
    if orientation in (5, 6, 7, 8):  # the annotation lies, as the stored pixels do
        assert (stored.turned, stored.size) == (1, (24, 40))
        assert difference(pictures.turned(stored.pixels, orientation), found.pixels) == 0
    if form not in ("MPO", "AVIF"):  # OpenCV reads not the one, and the other unturned
        limit = 3 if form == "JPEG" else 0
        assert difference(found.pixels, opencv(data)) <= limit


@pytest.mark.parametrize("orientation", SIDES)
def test_scaled_by_the_decoder_and_turned(orientation):
    data = encoded(scene(240, 400), "JPEG", exif=exif(orientation), quality=95)
    found = pictures.read(data, at_least=lambda size: (size[0] // 4, size[1] // 4))
    wanted = upright(scene(240, 400).reshape(60, 4, 100, 4, 3).mean((1, 3)), orientation)
    assert found.size == pictures.turned_size((240, 400), orientation)
    assert difference(found.pixels, wanted) < 10


@pytest.mark.parametrize(
    "block",
    [
        exif(0),
        exif(9),
        raw_exif((0x0112, 2, 4, b"6\0\0\0")),  # text
        raw_exif((0x0112, 2, 9, b"\x08\0\0\0")),
        raw_exif((0x0112, 3, 2, b"\x06\0\x06\0")),  # two numbers
        raw_exif((0x0112, 12, 1, b"\x06\0\0\0")),  # a float64 that lies elsewhere
        raw_exif((0x0112, 3, 1, b"\xff\xff\0\0")),
        raw_exif((0x0110, 3, 1, b"\x06\0\0\0")),
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0II",
        b"Exif\0\0",
        b"Exif\0\0nonsense",
    ],
)
def test_what_is_no_orientation_turns_nothing(block):
    for form in ("JPEG", "PNG", "WEBP"):
        found = pictures.read(encoded(scene(), form, exif=block))
        assert (found.orientation, found.turned, found.size) == (1, 1, (24, 40))


@pytest.mark.parametrize(
    "block",
    [
        raw_exif((0x0112, 3, 1, b"\x06\0\0\0"), (0x011A, 5, 1, b"\xff\xff\xff\x7f")),
        raw_exif((0x010F, 2, 99, b"\xff\xff\xff\x7f"), (0x0112, 3, 1, b"\x06\0\0\0")),  # before it
        raw_exif((0x0112, 3, 1, b"\0\x06\0\0"), order=">"),
        raw_exif((0x0112, 4, 1, b"\x06\0\0\0")),  # a long number
        raw_exif((0x0112, 3, 1, b"\x06\0\0\0"), (0x8769, 4, 1, b"\xff\xff\xff\xff")),
        raw_exif((0x0112, 3, 1, b"\x06\0\0\0"), (0x8825, 7, 1, b"\x01\0\0\0")),
        raw_exif((0x0112, 3, 1, b"\x06\0\0\0"))[:-4],  # cut off behind the tag
    ],
)
def test_an_orientation_beside_broken_exif_is_obeyed(block):
    for form in ("JPEG", "PNG", "WEBP"):
        found = pictures.read(encoded(scene(), form, exif=block))
        assert (found.orientation, found.turned, found.size) == (6, 6, (40, 24)), form


def test_a_resolution_of_minus_one_by_zero():
    """Pillow's exif_transpose writes the EXIF anew and raises struct.error."""
    rational = struct.pack("<iI", -1, 0)
    block = raw_exif((0x0112, 3, 1, b"\x06\0\0\0"), (0x011A, 10, 1, struct.pack("<I", 38)))
    found = pictures.read(encoded(scene(), "JPEG", exif=block + rational))
    assert found.turned == 6 and found.size == (40, 24)


def test_exif_behind_the_pixels_of_a_png():
    """The specification of PNG allows eXIf anywhere."""
    data = encoded(scene(), "PNG", exif=exif(6))
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4])
    moved = data[:at] + data[at + length : -12] + data[at : at + length] + data[-12:]
    found = pictures.read(moved)
    assert found.turned == 6
    np.testing.assert_array_equal(found.pixels, upright(scene(), 6))


def test_which_pixels_an_annotation_means():
    lying, standing, square = (30, 40), (40, 30), (35, 35)
    for orientation in (1, 2, 3, 4):  # the sides do not tell
        for annotated in (lying, standing, square, None):
            assert pictures.turn_for(orientation, lying, annotated) == orientation
    for orientation in (5, 6, 7, 8):
        turn = lambda stored, annotated, o=orientation: pictures.turn_for(o, stored, annotated)
        assert turn(lying, standing) == orientation and turn(standing, lying) == orientation
        assert turn(lying, lying) == turn(standing, standing) == 1
        assert turn(lying, (300, 400)) == 1 and turn(lying, (401, 300)) == orientation  # scaled
        assert turn(square, square) == turn(lying, square) == turn(square, lying) == orientation
        assert turn(lying, None) == orientation


def test_images_of_pillow_and_of_records_stay_as_they_are():
    for form in ("JPEG", "PNG", "WEBP"):
        data = encoded(scene(), form, exif=exif(6))
        with Image.open(io.BytesIO(data)) as image:
            assert pictures.read(image).size == (24, 40)
            assert pictures.read(image).pixels.shape == (24, 40, 3)
        assert pictures.read(data, turn=False).size == (24, 40)
