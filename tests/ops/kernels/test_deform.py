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
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.ops.kernels import place

SLOW = pytest.mark.slow
PYRAMID = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))
WIDE = ((12, 38), (6, 19), (3, 3), (2, 2), (1, 1))  # blocks of two levels and of gaps alone


def arguments(sizes, images, channels, outputs, spread=2.0, dtype=jnp.float32):
    packed, random = PackedLevels(sizes), np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    x, slope = noise(images, *packed.shape, channels), noise(images, *packed.shape, outputs)
    given = (
        jnp.where(packed.mask, x, 0).astype(dtype),
        spread * noise(images, *packed.shape, 18),
        jax.nn.sigmoid(noise(images, *packed.shape, 9)),
        noise(3, 3, channels, outputs),
    )
    return packed, given, slope.astype(dtype)


def plain(x, packed, offsets, mask, kernel):
    flat = packed.flatten(offsets), packed.flatten(mask)
    return packed.unflatten(deform_conv.deform_conv_levels(x, packed, *flat, kernel))


def everything(function, packed, given, slope):
    def run(x, *rest):
        value, back = jax.vjp(lambda x, *rest: function(x, packed, *rest), x, *rest)
        return value, back(slope)

    return jax.jit(run)(*given)


def by_kernel(packed, given, slope):
    with pltpu.force_tpu_interpret_mode():
        return everything(deform_conv.deform_conv_by_kernel, packed, given, slope)


@pytest.mark.parametrize(
    ("sizes", "images", "channels", "spread"),
    [
        (PYRAMID, 2, (8, 6), 2.0),
        pytest.param(WIDE, 3, (8, 130), 2.0, marks=SLOW),
        pytest.param(WIDE, 1, (8, 8), 100.0, marks=SLOW),  # beyond all borders
        pytest.param(PYRAMID, 2, (8, 8), 0.0, marks=SLOW),  # on the pixels and the borders
        pytest.param(((1, 1),), 1, (4, 4), 1.0, marks=SLOW),
    ],
)
def test_value_and_all_gradients_are_the_plain_ones(sizes, images, channels, spread):
    packed, given, slope = arguments(sizes, images, *channels, spread)
    expected = everything(plain, packed, given, slope)
    found = by_kernel(packed, given, slope)
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max(), jax.tree_util.keystr(path)


@SLOW
def test_bfloat16_is_as_near_to_float32_as_the_plain_one():
    exact = everything(plain, *arguments(WIDE, 2, 16, 16))
    half = arguments(WIDE, 2, 16, 16, dtype=jnp.bfloat16)
    usual = everything(plain, *half)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, usual, by_kernel(*half))), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_what_the_kernel_cannot_do_is_left_to_the_compiler(monkeypatch):
    made = lambda **options: DeformConv(
        256, HeadConfig(), remat="none", rngs=Draws(),
        **{"dtype": jnp.bfloat16, "kernels": "auto"} | options,
    )  # fmt: skip
    shape = (4, 100, 253, 256)
    assert not made().has_kernels(shape)  # no TPU here
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)  # v5p
    assert made().has_kernels(shape)
    assert made().has_kernels((4, 136, 205, 256))  # the largest of the recipe's canvases
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    assert not made().has_kernels((4, 200, 253, 256))
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**24)  # v4
    assert not made().has_kernels(shape)
