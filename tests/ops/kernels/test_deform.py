"""The deformable convolution by a kernel is the plain one, on a simulated TPU.

The simulation fills memory that nobody wrote with NaN and raises at a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from detclipv2_jax.models import deform_conv
from detclipv2_jax.models.atss_head import DeformConv, HeadConfig
from detclipv2_jax.models.canvas import Canvas
from detclipv2_jax.models.initialise import Draws
from detclipv2_jax.ops.kernels import place

PYRAMID = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))
WIDE = ((13, 12), (3, 3), (2, 2), (1, 1), (1, 1))  # 171 pixels: a block and a part of one


def arguments(sizes, images, channels, outputs, dtype=jnp.float32):
    canvas, random = Canvas(sizes), np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    pixels = sum(height * width for height, width in sizes)
    given = (
        noise(images, *canvas.shape, channels).astype(dtype),
        2 * noise(images, pixels, 18),
        jax.nn.sigmoid(noise(images, pixels, 9)),
        noise(3, 3, channels, outputs),
    )
    return canvas, given, noise(images, pixels, outputs).astype(dtype)


def everything(function, canvas, given, slope):
    def run(x, *rest):
        value, back = jax.vjp(lambda x, *rest: function(x, canvas, *rest), x, *rest)
        return value, back(slope)

    return jax.jit(run)(*given)


def by_kernel(canvas, given, slope):
    with pltpu.force_tpu_interpret_mode():
        return everything(deform_conv.deform_conv_by_kernel, canvas, given, slope)


@pytest.mark.parametrize(
    ("sizes", "images", "channels", "parts"),
    [
        (PYRAMID, 2, (8, 6), 1),
        pytest.param(WIDE, 4, (8, 130), 2, marks=pytest.mark.slow),
        pytest.param(WIDE, 3, (8, 8), 3, marks=pytest.mark.slow),
        pytest.param(((1, 1),), 1, (4, 4), 1, marks=pytest.mark.slow),
    ],
)
def test_value_and_all_gradients_are_the_plain_ones(monkeypatch, sizes, images, channels, parts):
    canvas, given, slope = arguments(sizes, images, *channels)
    bytes_of_one = given[2][0].size * 4 * channels[0] * 4
    monkeypatch.setattr(deform_conv, "_GATHERED", images // parts * bytes_of_one)
    expected = everything(deform_conv.deform_conv_levels, canvas, given, slope)
    found = by_kernel(canvas, given, slope)
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max(), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_the_plain_one():
    exact = everything(deform_conv.deform_conv_levels, *arguments(WIDE, 2, 16, 16))
    half = arguments(WIDE, 2, 16, 16, jnp.bfloat16)
    plain = everything(deform_conv.deform_conv_levels, *half)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, by_kernel(*half))), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_what_the_kernel_cannot_do_is_left_to_the_compiler(monkeypatch):
    made = lambda **options: DeformConv(
        256, HeadConfig(), remat="none", rngs=Draws(),
        **{"dtype": jnp.bfloat16, "kernels": "auto"} | options,
    )  # fmt: skip
    assert not made().has_kernels()  # no TPU here
    monkeypatch.setattr(place, "room", lambda: 0.95 * 2**26)
    assert made().has_kernels()
    assert not made(kernels="xla").has_kernels()
    assert not made(dtype=jnp.float32).has_kernels()
    # The compiler was seen to want 12 to 14 MiB.
    for mebibytes, fits in ((16, True), (12, False)):
        monkeypatch.setattr(place, "room", lambda room=mebibytes: 0.95 * room * 2**20)
        assert made().has_kernels() == fits
