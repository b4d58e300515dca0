import io

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common import pictures
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import images


def scene(height, width, seed=0):
    """A smooth image, so that methods of resizing agree up to rounding."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / width * a + y / height * b + seed) for a, b in ((5, 2), (1, 6), (4, 4))]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def bilinear(pixels, height, width):
    """Bilinear resizing with half-pixel centers and repeated edges, in float64."""
    grids = []
    for size, new in zip(pixels.shape, (height, width)):
        place = np.clip((np.arange(new) + 0.5) * size / new - 0.5, 0, size - 1)
        low = np.floor(place).astype(int)
        grids.append((low, np.minimum(low + 1, size - 1), place - low))
    (y0, y1, fy), (x0, x1, fx) = grids
    fx, fy = fx[None, :, None], fy[:, None, None]
    p = pixels.astype(np.float64)
    top = p[y0][:, x0] * (1 - fx) + p[y0][:, x1] * fx
    low = p[y1][:, x0] * (1 - fx) + p[y1][:, x1] * fx
    return top * (1 - fy) + low * fy


@pytest.mark.parametrize(
    "shape, canvas, size",
    [
        ((30, 40), (64, 96), (64, 85)),
        ((40, 30), (64, 96), (85, 64)),  # the canvas is transposed
        ((50, 90), (64, 96), (53, 96)),
        ((64, 96), (64, 96), (64, 96)),
        ((1, 500), (64, 96), (1, 96)),
        ((1, 1), (64, 96), (64, 64)),
    ],
)
def test_image_is_at_the_top_left_of_a_zero_canvas(shape, canvas, size):
    pixels = np.maximum(scene(*shape), 1)
    fitted = images.fit_to_canvas(pixels, canvas)
    assert fitted.size == size and fitted.original_size == shape
    assert fitted.pixels.shape == (*(canvas if size[1] >= size[0] else canvas[::-1]), 3)
    assert (fitted.pixels[: size[0], : size[1]] > 0).all()
    assert fitted.pixels[size[0] :].sum() == fitted.pixels[:, size[1] :].sum() == 0


def test_resizing_is_bilinear_with_half_pixel_centers():
    for shape in ((30, 40), (100, 150)):  # larger, and smaller by less than two
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        fitted = images.fit_to_canvas(pixels, (64, 96))
        wanted = bilinear(pixels, *fitted.size)
        found = fitted.pixels[: fitted.size[0], : fitted.size[1]]
        assert np.abs(found - wanted).max() <= 1.0


def test_large_images_are_averaged_from_any_source(tmp_path):
    checkers = np.indices((480, 720)).sum(0).astype(np.uint8) % 2
    pixels = scene(480, 720) // 2 + 60 * checkers[..., None]
    wanted = pixels.reshape(60, 8, 90, 8, 3).mean((1, 3))  # the checkerboard vanishes
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=98, subsampling=0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for source in (pixels, Image.fromarray(pixels), tmp_path / "a.jpg", str(tmp_path / "a.png")):
        fitted = images.fit_to_canvas(source, (60, 90))
        assert fitted.original_size == (480, 720) and fitted.size == (60, 90)
        assert np.abs(fitted.pixels - wanted).mean() < 3


def test_jpeg_decoder_scales_until_less_than_a_factor_of_two_is_left(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(scene(480, 720)).save(path)
    for canvas, decoded in (((60, 90), 60), ((61, 92), 120), ((230, 345), 240), ((300, 450), 480)):
        fitted = lambda size, canvas=canvas: images.fitted_size(size, canvas)
        picture = pictures.read(path, at_least=fitted)
        assert picture.pixels.shape[0] == decoded and picture.size == (480, 720)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_files_are_turned_and_images_in_memory_are_not(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(scene(400, 600)).save(path, exif=exif)
    wanted = np.rot90(images.read(Image.fromarray(scene(400, 600))), -1)
    fitted = images.fit_to_canvas(path, (60, 40))
    assert fitted.original_size == (600, 400) and fitted.pixels.shape == (60, 40, 3)
    mean = wanted.reshape(60, 10, 40, 10, 3).mean((1, 3))
    assert np.abs(fitted.pixels.astype(int) - mean).mean() < 3
    with open(path, "rb") as file:
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), file):
            assert isinstance(source, images.ImageSource)
            assert np.abs(images.read(source).astype(int) - wanted).max() < 12
    with Image.open(path) as image:
        assert images.read(image).shape == (400, 600, 3)
    for size, shape in (((600, 400), (600, 400)), ((400, 600), (400, 600)), (None, (600, 400))):
        assert images.read(images.AnnotatedImage(path, size)).shape[:2] == shape


def test_every_mode_becomes_rgb(tmp_path):
    color = Image.new("RGB", (12, 8), (200, 100, 50))
    cases = {
        "gray.png": (Image.new("L", (12, 8), 77), (77, 77, 77)),
        "deep.png": (Image.fromarray(np.full((8, 12), 77 * 256, np.uint16)), (77, 77, 77)),
        "bits.png": (Image.new("1", (12, 8), 1), (255, 255, 255)),
        "clear.png": (Image.new("RGBA", (12, 8), (200, 100, 50, 0)), (255, 255, 255)),
        "veil.png": (Image.new("LA", (12, 8), (0, 51)), (204, 204, 204)),
        "palette.png": (color.convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
        "cmyk.jpg": (color.convert("CMYK"), (200, 100, 50)),
        "gray.jpg": (Image.new("L", (12, 8), 77), (77, 77, 77)),
        "a.webp": (color, (200, 100, 50)),
    }
    for name, (image, wanted) in cases.items():
        image.save(tmp_path / name)
        for source in (tmp_path / name, image):
            fitted = images.fit_to_canvas(source, (8, 12))
            assert fitted.pixels.shape == (8, 12, 3)
            assert np.abs(fitted.pixels.astype(int) - wanted).max() <= 6, name


def test_arrays_of_one_and_four_channels():
    gray = np.full((8, 12), 9, np.uint8)
    assert (images.read(gray) == 9).all() and (images.read(gray[..., None]) == 9).all()
    clear = np.zeros((8, 12, 4), np.uint8)
    assert (images.read(clear) == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8, 3)),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.uint8(3),
    ],
)
def test_invalid_arrays_are_refused(array):
    with pytest.raises(UserError, match="uint8"):
        images.fit_to_canvas(np.asarray(array), (8, 8))


def test_invalid_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(scene(200, 200)).save(buffer, format="JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name, reason in {
        "half.jpg": "truncated",
        "text.jpg": "not a known image format",
        "empty.jpg": "it is empty",
        "missing.jpg": "no such file",
        ".": "is a directory",
    }.items():
        with pytest.raises(UserError, match=reason) as error:
            images.fit_to_canvas(tmp_path / name, (64, 64))
        assert str(tmp_path) in str(error.value)
