"""The exported example.py reads pictures as the package does, without it."""

import io
import runpy
import shutil

import numpy as np
import pytest
import tiny_run
from PIL import Image

from detclipv2_jax.inference import images

PIXELS = np.dstack([np.add.outer(np.arange(24), np.arange(36)) * factor for factor in (1, 2, 4)])
PIXELS = PIXELS.astype(np.uint8)
VEIL = np.dstack([PIXELS, np.where(PIXELS[..., 0] < 20, 0, 255).astype(np.uint8)])


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    shutil.copy(tiny_run.ROOT / "detclipv2_jax/exporters/example.py", folder)
    (folder / "manifest.json").write_text("{}")
    return runpy.run_path(str(folder / "example.py"))["read"]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_orientation(read, tmp_path, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a", form, exif=exif)
    np.testing.assert_array_equal(np.asarray(read(tmp_path / "a")), images.read(tmp_path / "a"))


def test_broken_exif_beside_the_orientation(read, tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\1\3\0\1\0\0\0\6\0\0\0"
    exif += b"\x1a\1\x0a\0\1\0\0\0\x26\0\0\0" + bytes(4) + b"\xff\xff\xff\xff" + bytes(4)  # -1/0
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert read(tmp_path / "a.jpg").size == (24, 36)
    np.testing.assert_array_equal(
        np.asarray(read(tmp_path / "a.jpg")), images.read(tmp_path / "a.jpg")
    )


def test_modes(read, tmp_path):
    color, veil = Image.fromarray(PIXELS), Image.fromarray(VEIL)
    deep = Image.fromarray(PIXELS[..., 2].astype(np.uint16) * 257)
    for image in (veil, veil.convert("LA"), veil.quantize(16, method=2), color.convert("CMYK"),
                  color.convert("L"), color.convert("1"), deep):  # fmt: skip
        form = "TIFF" if image.mode == "CMYK" else "PNG"
        image.save(tmp_path / "a", form)
        found = np.asarray(read(tmp_path / "a")).astype(int)
        assert np.abs(found - images.read(tmp_path / "a")).max() <= 1, image.mode


def test_what_cannot_be_read_is_one_sentence(read, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "AVIF")
    (tmp_path / "a").write_bytes(buffer.getvalue()[:-60])
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "f", "TIFF")
    for name in ("a", "f", "none"):
        with pytest.raises(SystemExit, match=f"{tmp_path / name}: "):
            read(tmp_path / name)
