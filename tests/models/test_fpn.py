import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detclipv2_jax.models.fpn import FPN, conv3x3, upsample_to
from detclipv2_jax.models.initializers import Draws, normal

RNG = np.random.default_rng(0)


def draws(seed=0):
    return Draws(jax.random.normal(jax.random.key(seed), (100_000,)))


def naive_conv(x, kernel, bias, stride):
    """Convolve 3×3 with one pixel of zero padding, in float64."""
    batch, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = np.zeros((batch, -(-height // stride), -(-width // stride), kernel.shape[-1]))
    for i, j in np.ndindex(out.shape[1:3]):
        patch = padded[:, stride * i : stride * i + 3, stride * j : stride * j + 3]
        out[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel) + bias
    return out


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_convolutions_pad_both_sides(size, stride):
    conv = conv3x3(2, 3, jnp.float32, draws(), stride=stride, kernel_init=normal(0.5))
    conv.bias[...] = jnp.asarray([1.0, 2.0, 3.0])
    x = RNG.normal(size=(2, *size, 2)).astype(np.float32)
    expected = naive_conv(x, np.float64(conv.kernel[...]), np.float64(conv.bias[...]), stride)
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


@pytest.mark.parametrize("fine", [(6, 8), (5, 7), (5, 8), (1, 1)])
def test_upsampling_is_nearest_interpolation_to_the_finer_size(fine):
    coarse = tuple(-(-n // 2) for n in fine)
    x = RNG.normal(size=(1, *coarse, 2)).astype(np.float32)
    # PyTorch's rule, with which the published models were trained: source = floor(i · in / out).
    rows, columns = (np.arange(n) * m // n for n, m in zip(fine, coarse))
    expected = x[:, rows][:, :, columns]
    np.testing.assert_array_equal(upsample_to(jnp.asarray(x), jnp.zeros((1, *fine, 2))), expected)


def test_the_pyramid_equals_its_definition():
    fpn = FPN((2, 3, 4), 5, rngs=draws())
    sizes = ((9, 7), (5, 4), (3, 2))
    maps = [RNG.normal(size=(1, *size, c)).astype(np.float32) for size, c in zip(sizes, (2, 3, 4))]
    value = lambda p: np.float64(p[...])
    merged = [x @ value(m.kernel) + value(m.bias) for x, m in zip(maps, fpn.lateral)]
    for level in (1, 0):
        height, width = sizes[level]
        merged[level] += merged[level + 1].repeat(2, 1).repeat(2, 2)[:, :height, :width]
    convolve = lambda x, m, stride: naive_conv(x, value(m.kernel), value(m.bias), stride)
    expected = [convolve(x, m, 1) for x, m in zip(merged, fpn.output)]
    for extra in fpn.extra:
        expected.append(convolve(expected[-1], extra, 2))

    graph, state = nnx.split(fpn)
    levels = jax.jit(lambda state, maps: nnx.merge(graph, state)(maps))(state, maps)
    assert [x.shape[1:3] for x in levels] == [(9, 7), (5, 4), (3, 2), (2, 1), (1, 1)]
    for a, b in zip(levels, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
