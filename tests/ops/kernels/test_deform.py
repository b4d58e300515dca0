"""The deformable convolution by a kernel is the plain one, on a simulated TPU.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from kernel_comparison import check_as_accurate, check_close

from detclipv2_jax.data import rungs
from detclipv2_jax.models import deform_conv
from detclipv2_jax.models.atss_head import DeformConv, HeadConfig
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.ops.kernels import place
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes

SLOW = pytest.mark.slow
PYRAMID = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))
WIDE = ((12, 38), (6, 19), (3, 3), (2, 2), (1, 1))  # blocks of two levels and of gaps alone


def arguments(sizes, images, channels, outputs, spread=2.0, dtype=jnp.float32):
    packed, random = PackedLevels(sizes), np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    x, grad_out = noise(images, *packed.shape, channels), noise(images, *packed.shape, outputs)
    given = (
        jnp.where(packed.mask, x, 0).astype(dtype),
        spread * noise(images, *packed.shape, 18),
        jax.nn.sigmoid(noise(images, *packed.shape, 9)),
        noise(3, 3, channels, outputs),
    )
    return packed, given, grad_out.astype(dtype)


def plain(x, packed, offsets, mask, kernel):
    flat = packed.flatten(offsets), packed.flatten(mask)
    return packed.unflatten(deform_conv.deform_conv_levels(x, packed, *flat, kernel))


def everything(function, packed, given, grad_out):
    def run(x, *rest):
        value, back = jax.vjp(lambda x, *rest: function(x, packed, *rest), x, *rest)
        return value, back(grad_out)

    return jax.jit(run)(*given)


def by_kernel(packed, given, grad_out):
    with pltpu.force_tpu_interpret_mode():
        return everything(deform_conv.deform_conv_by_kernel, packed, given, grad_out)


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
def test_value_and_gradients_equal_those_without_the_kernel(sizes, images, channels, spread):
    packed, given, grad_out = arguments(sizes, images, *channels, spread)
    expected = everything(plain, packed, given, grad_out)
    found = by_kernel(packed, given, grad_out)
    check_close(expected, found)


@SLOW
def test_bfloat16_is_as_accurate_as_without_the_kernel():
    exact = everything(plain, *arguments(WIDE, 2, 16, 16))
    half = arguments(WIDE, 2, 16, 16, dtype=jnp.bfloat16)
    usual = everything(plain, *half)
    check_as_accurate(exact, usual, by_kernel(*half))


def test_unsupported_inputs_use_xla(monkeypatch):
    made = lambda **options: DeformConv(
        256, HeadConfig(), remat="none", rngs=Draws(),
        **{"dtype": jnp.bfloat16, "kernels": "auto"} | options,
    )  # fmt: skip
    shape = (4, 100, 253, 256)
    assert not made().has_kernels(shape)  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)  # v5p
    assert made().has_kernels(shape)
    assert made().has_kernels((4, 136, 205, 256))
    recipe = config_lib.parse(recipes.load("pretrain").get_config("swin_t").to_dict())
    for height, width in rungs.canvases(recipe.data.detection):
        levels = [(-(-height // s), -(-width // s)) for s in recipe.model.anchors.strides]
        assert made().has_kernels((4, *PackedLevels(tuple(levels)).shape, 256))
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    assert not made().has_kernels((4, 200, 253, 256))
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**24)  # v4
    assert not made().has_kernels(shape)
