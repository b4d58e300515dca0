import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detclipv2_jax.models.norms import GroupNorm, LayerNorm
from detclipv2_jax.models.packed_levels import PackedLevels

RNG = np.random.default_rng(0)
PACKED = PackedLevels(((5, 7), (3, 4), (2, 2), (1, 1)))


def normalize(x, axes):
    mean = x.mean(axes, keepdims=True)
    return (x - mean) / (((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5) ** 0.5


def naive_layer_norm(x, scale, bias):
    return normalize(x, (-1,)) * scale + bias


def naive_group_norm(x, scale, bias, groups=2):
    """Normalize in the layout (B, K, C) of the levels; JAX or NumPy."""
    levels, start = [], 0
    for height, width in PACKED.sizes:
        level = x[:, start : start + height * width]
        start += height * width
        grouped = level.reshape(*level.shape[:2], groups, -1)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = ((grouped - mean) ** 2).mean((1, 3), keepdims=True)
        levels.append(((grouped - mean) / (variance + 1e-5) ** 0.5).reshape(level.shape))
    module = jnp if isinstance(x, jax.Array) else np
    return module.concatenate(levels, axis=1) * scale + bias


def parameters(norm, width):
    norm.scale[...] = jnp.asarray(RNG.normal(size=width), jnp.float32)
    norm.bias[...] = jnp.asarray(RNG.normal(size=width), jnp.float32)
    return norm, np.asarray(norm.scale[...], np.float64), np.asarray(norm.bias[...], np.float64)


@pytest.mark.parametrize("offset, tolerance", [(0.0, 2e-6), (1e3, 2e-3)])
def test_layer_norm_survives_a_large_mean(offset, tolerance):
    norm, scale, bias = parameters(LayerNorm(16), 16)
    x = (RNG.normal(size=(3, 4, 16)) + offset).astype(np.float32)
    expected = naive_layer_norm(x.astype(np.float64), scale, bias)
    np.testing.assert_allclose(norm(x), expected, atol=tolerance)


def test_group_norm_has_statistics_per_level():
    norm, scale, bias = parameters(GroupNorm(6, 2), 6)
    pixels = RNG.normal(size=(2, 52, 6)).astype(np.float32)
    expected = naive_group_norm(pixels.astype(np.float64), scale, bias)

    @jax.jit
    def run(pixels):
        x = PACKED.unflatten(pixels)
        x = jnp.where(PACKED.mask, x, 1e4)  # values in the gaps must not matter
        return PACKED.flatten(norm(x, PACKED))

    np.testing.assert_allclose(run(pixels), expected, atol=1e-5)


def test_group_norm_of_images_smaller_than_their_canvas():
    """Values and gradients of each image's pixels, by the definition in float64."""
    norm, scale, bias = parameters(GroupNorm(6, 2), 6)
    extents = np.asarray([[[4, 5], [2, 3], [1, 2], [1, 1]], [[0, 0]] * 4])
    pixels = RNG.normal(size=(2, 52, 6)).astype(np.float32)
    weights = RNG.normal(size=(2, 52, 6)).astype(np.float32)
    covered = np.zeros((2, 52, 1), bool)
    for image, parts in enumerate(extents):
        start = 0
        for (height, width), (rows, columns) in zip(PACKED.sizes, parts):
            for row in range(rows):
                covered[image, start + row * width : start + row * width + columns] = True
            start += height * width

    def run(pixels):
        x = PACKED.unflatten(pixels)
        inside = PACKED.inside(jnp.asarray(extents))
        return PACKED.flatten(jnp.where(inside, norm(x, PACKED, inside), 0.0))

    value, back = jax.vjp(jax.jit(run), jnp.asarray(pixels))
    assert (np.asarray(value)[~covered[..., 0]] == 0).all()

    def exact(x):
        x, result, start = x.copy(), np.zeros((2, 52, 6)), 0
        for height, width in PACKED.sizes:
            here = np.zeros(52, bool)
            here[start : start + height * width] = True
            start += height * width
            here &= covered[0, :, 0]
            for group in (slice(0, 3), slice(3, 6)):
                part = x[0, here, group]
                result[0, here, group] = (part - part.mean()) / (part.var() + 1e-5) ** 0.5
        return np.where(covered, result * scale + bias, 0)

    wide = pixels.astype(np.float64)
    np.testing.assert_allclose(value, exact(wide), atol=1e-5)
    (gradient,) = back(jnp.asarray(weights))
    assert (np.asarray(gradient)[~covered[..., 0]] == 0).all()
    for index in np.argwhere(np.broadcast_to(covered, pixels.shape))[::17]:
        step = np.zeros_like(wide)
        step[tuple(index)] = 1e-5
        slope = np.vdot(weights, exact(wide + step) - exact(wide - step)) / 2e-5
        assert gradient[tuple(index)] == pytest.approx(slope, abs=2e-4)


def test_gradients_are_those_of_autodiff():
    layer, scale, bias = parameters(LayerNorm(6), 6)
    group = GroupNorm(6, 2)
    nnx.update(group, nnx.state(layer))
    pixels = jnp.asarray(RNG.normal(size=(2, 52, 6)), jnp.float32)
    weights = jnp.asarray(RNG.normal(size=(2, 52, 6)), jnp.float32)
    on_levels = lambda x: PACKED.flatten(group(PACKED.unflatten(x), PACKED))
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    pairs = [
        (layer, lambda x: naive_layer_norm(x, scale, bias)),
        (on_levels, lambda x: naive_group_norm(x, scale, bias)),
    ]
    for ours, plain in pairs:
        got, expected = (
            jax.jit(jax.grad(lambda x, f=f: jnp.sum(weights * jnp.sin(f(x)))))(pixels)
            for f in (ours, plain)
        )
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_bfloat16_has_float32_statistics():
    x = jnp.asarray(RNG.normal(size=(2, 4096)) + 50, jnp.bfloat16)
    y = LayerNorm(4096)(x)
    assert y.dtype == jnp.bfloat16
    expected = normalize(np.asarray(x, np.float64), (-1,))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-7, atol=2**-7)


def test_a_constant_input_is_finite_with_finite_gradient():
    x = jnp.full((2, 3, 8), 7.0)
    norm = LayerNorm(8)
    assert (norm(x) == 0).all()
    assert np.isfinite(jax.grad(lambda x: jnp.sum(norm(x) ** 2 + norm(x)))(x)).all()
