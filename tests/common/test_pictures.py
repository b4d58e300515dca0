import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

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
        b"Exif\0\0" + raw_exif((0x0112, 3, 1, b"\x06\0\0\0")),  # headed twice
    ],
)
def test_an_orientation_beside_broken_exif_is_obeyed(block):
    for form in ("JPEG", "PNG", "WEBP"):
        found = pictures.read(encoded(scene(), form, exif=block))
        assert (found.orientation, found.turned, found.size) == (6, 6, (40, 24)), form


def test_a_resolution_of_minus_one_by_zero():
    """Pillow's exif_transpose writes the EXIF again and raises struct.error."""
    rational = struct.pack("<iI", -1, 0)
    block = raw_exif((0x0112, 3, 1, b"\x06\0\0\0"), (0x011A, 10, 1, struct.pack("<I", 38)))
    found = pictures.read(encoded(scene(), "JPEG", exif=block + rational))
    assert found.turned == 6 and found.size == (40, 24)


def test_orientations_outside_of_exif():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/>\xa8</x>'
    assert pictures.read(encoded(scene(), "JPEG", xmp=xmp)).turned == 6
    assert pictures.read(encoded(scene(), "WEBP", xmp=xmp)).turned == 6
    both = encoded(scene(), "JPEG", xmp=xmp, exif=exif(3))
    assert pictures.read(both).turned == 3
    text = PngImagePlugin.PngInfo()  # ImageMagick wrote EXIF into PNGs so
    block = exif(8).tobytes()
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n")
    assert pictures.read(encoded(scene(), pnginfo=text)).turned == 8
    # The second directory of EXIF is about the thumbnail.
    first = raw_exif((0x0110, 3, 1, bytes(4)))[:-4] + struct.pack("<I", 26)
    second = raw_exif((0x0112, 3, 1, b"\x06\0\0\0"))[14:]
    assert pictures.read(encoded(scene(), "JPEG", exif=first + second)).turned == 1


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


# ---- Modes.


def png(width, height, depth, color, rows, transparent=None, palette=None):
    """A PNG with what Pillow cannot write; color: 0 gray, 2 RGB, 3 palette, 4 LA, 6 RGBA."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    )
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))]
    chunks += [(b"PLTE", palette)] if palette else []
    chunks += [(b"tRNS", transparent)] if transparent else []
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def gray16_tiff(values, photometric):
    """A TIFF of 16 bits; photometric 0: white is 0, 1: black is 0."""
    height, width = values.shape
    tags = [(256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, photometric)]
    tags += [(273, 4, 122), (277, 3, 1), (278, 3, height), (279, 4, 2 * values.size)]
    fields = [struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(fields) + bytes(4) + values.astype("<u2").tobytes()


RAMP = np.linspace(0, 255, 12 * 16).astype(np.uint8).reshape(12, 16)
COLORS = np.stack([RAMP, 255 - RAMP, RAMP // 2], axis=-1)
ALPHA = RAMP[::-1, ::-1] // 3
OVER_WHITE = (COLORS * (ALPHA[..., None] / 255) + 255 - ALPHA[..., None]).round()


def rgba(mode="RGBA"):
    image = Image.fromarray(np.dstack([COLORS, ALPHA]))
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)])
    return image.convert(mode)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "TGA", "ICO", "JPEG2000", "memory"])
def test_alpha_is_over_white(form):
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    options = {"sizes": [(16, 12)]} if form == "ICO" else options
    source = rgba() if form == "memory" else encoded(rgba(), form, **options)
    assert difference(pictures.read(source).pixels, OVER_WHITE) <= 1


@pytest.mark.parametrize("form", ["PNG", "TIFF", "memory"])
def test_gray_alpha_is_over_white(form):
    source = rgba("LA") if form == "memory" else encoded(rgba("LA"), form)
    wanted = (RAMP * (ALPHA / 255) + 255 - ALPHA).round()
    assert difference(pictures.read(source).pixels, np.stack([wanted] * 3, -1)) <= 1
    clear = Image.new("La", (3, 2), (0, 51))
    assert (pictures.read(clear).pixels == 204).all()


PALETTE = bytes([0, 0, 0, 100, 100, 100, 200, 200, 200])
KEY = lambda *values: struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (png(3, 1, 8, 3, b"\0\0\1\2", b"\0", PALETTE), [255, 100, 200]),  # a transparent index
        (png(3, 1, 8, 3, b"\0\0\1\2", b"\x80\xff\0", PALETTE), [127, 100, 255]),  # alpha of each
        (png(4, 1, 2, 0, b"\0\x1b", KEY(1)), [0, 255, 170, 255]),  # gray of 2 bits: 0 1 2 3
        (png(2, 1, 4, 0, b"\0\x03", KEY(3)), [0, 255]),
        (png(2, 1, 4, 0, b"\0\x03", KEY(0)), [255, 51]),
        (png(2, 1, 1, 0, b"\0\x40", KEY(0)), [255, 255]),
        (png(2, 1, 1, 0, b"\0\x40", KEY(1)), [0, 255]),
        (png(2, 1, 8, 0, b"\0\0\x80", KEY(0)), [255, 128]),
        (png(3, 1, 16, 0, b"\0\0\0\x80\0\x80\x01", KEY(0x8001)), [0, 128, 255]),
        (png(2, 1, 8, 2, b"\0\1\1\1\x80\x80\x80", KEY(1, 1, 1)), [255, 128]),
        (png(2, 1, 16, 2, b"\0" + b"\x12\x34" * 3 + b"\x80\0" * 3, KEY(*[0x1234] * 3)), [255, 128]),
        (png(2, 1, 16, 4, b"\0\0\0\0\0\x80\0\xff\xff"), [255, 128]),
        (encoded(Image.new("RGBA", (2, 1)), "GIF"), [255, 255]),
    ],
)
def test_transparent_colors_are_white(data, wanted):
    assert pictures.read(data).pixels[0].tolist() == [[value] * 3 for value in wanted]


def test_deep_values_become_eight_bits():
    deep = RAMP.astype(np.uint16) * 257
    big_endian = Image.frombytes("I;16B", (16, 12), deep.astype(">u2").tobytes())
    wanted = np.stack([RAMP] * 3, -1)
    sources = {
        "png": encoded(deep),
        "tiff": encoded(deep, "TIFF"),
        "big-endian tiff": encoded(big_endian, "TIFF"),
        "memory": Image.fromarray(deep),
        "32 bits": encoded(deep.astype(np.int32), "TIFF"),
        "float": encoded((RAMP / 255).astype(np.float32), "TIFF"),
        "pgm": b"P5 16 12 65535\n" + deep.astype(">u2").tobytes(),
        "black is 0": gray16_tiff(deep, 1),
        "white is 0": gray16_tiff(65535 - deep, 0),
    }
    for name, source in sources.items():
        found = pictures.read(source)
        assert difference(found.pixels, wanted) == 0, name
    tops = b"P5 2 1 4095\n\0\0\x0f\xff"  # here the file says that white is 4,095
    assert pictures.read(tops).pixels[0].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (encoded(RAMP.astype(np.uint16) * 16), "4080 where the format's white is 65535"),
        (encoded(RAMP.astype(np.uint16), "TIFF"), "255 where"),
        (png(1, 1, 16, 2, b"\0" + b"\x0f\xff" * 3), "15 where the format's white is 255"),
        (encoded(RAMP.astype(np.int32) - 5, "TIFF"), "from -5 to 250"),
        (encoded(RAMP.astype(np.int32) * 1000, "TIFF"), "to 255000"),
        (encoded(RAMP.astype(np.float32), "TIFF"), "0 to 255 instead of 0 to 1"),
        (encoded(np.full((2, 2), np.nan, np.float32), "TIFF"), "nan"),
        (encoded(np.full((2, 2), np.inf, np.float32), "TIFF"), "inf"),
    ],
)
def test_values_of_unknown_range_are_refused(source, reason):
    with pytest.raises(pictures.PictureError, match=reason):
        pictures.read(source)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "RGBX"])
@pytest.mark.parametrize("form", ["TIFF", "JPEG", "PNG"])
def test_other_modes(mode, form):
    image = Image.fromarray(COLORS).convert(mode)
    if (mode, form) in {("P", "JPEG"), ("CMYK", "PNG"), ("YCbCr", "PNG"), ("RGBX", "PNG")}:
        return
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    found = pictures.read(encoded(image, form, **options))
    assert difference(found.pixels, np.asarray(image.convert("RGB"))) <= 4
    assert found.is_plain_jpeg == (form == "JPEG" and mode != "CMYK")
    assert found.is_gray == (mode in ("1", "L"))


def test_the_first_frame_counts():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "lime", "blue")]
    for form in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
        assert difference(pictures.read(data).pixels, np.asarray(frames[0])) <= 2, form


# ---- Limits and damage.


def test_pictures_that_would_fill_the_memory_are_refused_by_their_header(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    bomb = png(12000, 12000, 1, 0, (b"\0" + bytes(1500)) * 12000)
    cases = {
        "12,000x12,000 pixels in a file of 17,": bomb,
        "more than 178,956,970": png(14000, 14000, 1, 0, b""),
        "more than 178,956,970 pixels;": png(2**31 - 1, 2**31 - 1, 8, 0, b""),
    }
    for reason, data in cases.items():
        with pytest.raises(pictures.PictureError, match=reason):
            pictures.read(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs turn Pillow's limit off
    with pytest.raises(pictures.PictureError, match="14,000x14,000 pixels, more than 178,956,970"):
        pictures.read(png(14000, 14000, 1, 0, b""))


def test_large_photos_are_read():
    data = encoded(Image.new("L", (8000, 5000), 128), "JPEG")  # 40 million pixels, 50 a byte
    found = pictures.read(data, at_least=lambda size: (600, 960))
    assert found.size == (5000, 8000) and found.pixels.shape == (625, 1000, 3)
    one = encoded(Image.new("RGB", (1, 1), "red"))
    assert pictures.read(one).pixels.tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("x"), struct.error("x"), OverflowError(), ZeroDivisionError(), IndexError("x"),
     KeyError("x"), AssertionError(), RecursionError(), SyntaxError("x"), OSError(), EOFError()],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_one_error(monkeypatch, error):
    def load(self):
        raise error

    data = encoded(COLORS)
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(pictures.PictureError, match=type(error).__name__):
        pictures.read(data)


def test_ctrl_c_is_not_swallowed(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pictures.read(encoded(COLORS))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\xef\xbb\xbf\n <?xml version='1.0'?><svg>", "an SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "an AVIF that is damaged"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1avif", "an AVIF that is damaged"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "it is a video"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "PostScript"),
        (b"GIF89a", "its header is damaged"),
        (png(0, 0, 8, 0, b""), "its header is damaged"),
        (b"PK\x03\x04", "not a known image format"),
        (3, "of type int"),
        (io.StringIO("text"), "binary mode"),
    ],
)
def test_what_is_no_picture_is_told(data, reason):
    with pytest.raises(pictures.PictureError, match=reason):
        pictures.read(data)


def test_files_that_cannot_be_opened(tmp_path):
    for path, reason in ((tmp_path / "none.jpg", pictures.NO_FILE), (tmp_path, "Is a directory")):
        with pytest.raises(pictures.PictureError, match=reason):
            pictures.read(path)


def test_cut_pictures_are_refused():
    smooth = scene(120, 160)
    for form, options in (
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("TIFF", {}),
        ("AVIF", {}), ("GIF", {}), ("BMP", {}), ("JPEG2000", {}),
    ):  # fmt: skip
        data = encoded(smooth, form, **options)
        pictures.read(data)
        for share in (0.3, 0.6, 0.9):
            with pytest.raises(pictures.PictureError):
                pictures.read(data[: int(len(data) * share)])
                pytest.fail(f"{form}, {share} of the file")


def test_flipped_bits_of_a_png_are_found():
    """Pillow does not check the sum of the pixels, and reads noise or black."""
    data = encoded(COLORS)
    start = data.index(b"IDAT") + 4
    end = start + int.from_bytes(data[start - 8 : start - 4])
    for bit in range(8 * start, 8 * end, 7):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(pictures.PictureError):
            pictures.read(bytes(changed))


@pytest.mark.parametrize("path", ["pipe.jpg", "/dev/zero"])
def test_pipes_and_devices_are_not_waited_for(tmp_path, path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(pictures.PictureError, match="it is a pipe or a device, not a file"):
        pictures.read(tmp_path / path)
