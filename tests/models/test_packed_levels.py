import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.models.packed_levels import PackedLevels

RNG = np.random.default_rng(0)


def pyramid(height, width):
    return tuple((-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128))


SIZES = [
    pyramid(96, 96),
    pyramid(97, 64),
    pyramid(33, 50),
    pyramid(8, 300),
    ((1, 1),) * 5,
    ((3, 4),),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_levels_come_back_in_anchor_order(sizes):
    packed = PackedLevels(sizes)
    levels = [jnp.asarray(RNG.normal(size=(2, *size, 3)), jnp.float32) for size in sizes]
    result = jax.jit(packed.pack)(levels)
    assert result.shape == (2, *packed.shape, 3)
    for a, b in zip(jax.jit(packed.unpack)(result), levels, strict=True):
        np.testing.assert_array_equal(a, b)
    flat = np.concatenate([np.asarray(x).reshape(2, -1, 3) for x in levels], axis=1)
    np.testing.assert_array_equal(jax.jit(packed.flatten)(result), flat)
    np.testing.assert_array_equal(jax.jit(packed.unflatten)(flat), result)
    assert packed.mask.sum() == sum(h * w for h, w in sizes)  # no two levels overlap
    assert (np.asarray(result)[:, ~packed.mask[..., 0]] == 0).all()


@pytest.mark.parametrize("sizes", SIZES)
def test_one_convolution_is_that_of_every_level(sizes):
    packed = PackedLevels(sizes)
    levels = [jnp.asarray(RNG.normal(size=(1, *size, 2)), jnp.float32) for size in sizes]
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 2, 4)), jnp.float32)

    def convolve(x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    def run(levels):
        return packed.unpack(convolve(packed.pack(levels))), [convolve(x) for x in levels]

    for a, b in zip(*jax.jit(run)(levels), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_large_image_wastes_few_pixels():
    for size in ((800, 1344), (1344, 800), (1088, 1088)):
        sizes = pyramid(*size)
        assert np.prod(PackedLevels(sizes).shape) < 1.15 * sum(h * w for h, w in sizes)
