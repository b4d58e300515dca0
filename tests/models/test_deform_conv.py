import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deform_conv2d import deform_conv2d

from detclipv2_jax.models.deform_conv import deform_conv_levels
from detclipv2_jax.models.packed_levels import PackedLevels

RNG = np.random.default_rng(0)


def naive(x, offsets, mask, kernel):
    """Compute the definition point by point in float64."""
    batch, height, width, channels = x.shape
    out = np.zeros((batch, height, width, kernel.shape[-1]))
    for b, i, j in np.ndindex(batch, height, width):
        for tap, (u, v) in enumerate(np.ndindex(3, 3)):
            y = i + u - 1 + offsets[b, i, j, 2 * tap]
            x_ = j + v - 1 + offsets[b, i, j, 2 * tap + 1]
            sample = np.zeros(channels)
            for yy in (int(np.floor(y)), int(np.floor(y)) + 1):
                for xx in (int(np.floor(x_)), int(np.floor(x_)) + 1):
                    if 0 <= yy < height and 0 <= xx < width:
                        sample += (1 - abs(y - yy)) * (1 - abs(x_ - xx)) * x[b, yy, xx]
            out[b, i, j] += mask[b, i, j, tap] * sample @ kernel[u, v]
    return out


def case(batch=2, height=4, width=5, channels=3, out=2, spread=2.0):
    return (
        RNG.normal(size=(batch, height, width, channels)),
        RNG.normal(size=(batch, height, width, 18)) * spread,
        RNG.uniform(size=(batch, height, width, 9)),
        RNG.normal(size=(3, 3, channels, out)),
    )


def single(arrays):
    return [jnp.asarray(a, jnp.float32) for a in arrays]


@pytest.mark.parametrize("height, width", [(4, 5), (1, 1), (1, 6), (7, 2)])
@pytest.mark.parametrize("spread", [0.3, 3.0, 1e4])
def test_equals_the_definition(height, width, spread):
    arrays = case(height=height, width=width, spread=spread)
    arrays = [np.asarray(a, np.float32).astype(np.float64) for a in arrays]
    np.testing.assert_allclose(jax.jit(deform_conv2d)(*single(arrays)), naive(*arrays), atol=1e-4)


def test_gradients_equal_finite_differences():
    arrays = case(batch=1, height=3, width=4)
    # Bilinear sampling has a kink at every pixel: keep the points away from them.
    fraction = RNG.uniform(0.1, 0.9, arrays[1].shape)
    arrays = (arrays[0], np.floor(arrays[1]) + fraction, *arrays[2:])
    weights = RNG.normal(size=(1, 3, 4, 2))
    loss = lambda *a: jnp.sum(jnp.asarray(weights, jnp.float32) * deform_conv2d(*a))
    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(*single(arrays))
    step = 1e-4
    for which, gradient in enumerate(gradients):
        for flat in RNG.choice(arrays[which].size, 25, replace=False):
            place = np.unravel_index(flat, arrays[which].shape)
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in arrays]
                moved[which][place] += sign * step
                ends.append(np.sum(weights * naive(*moved)))
            expected = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient[place], expected, rtol=1e-3, atol=1e-3)


def test_tap_by_tap_equals_all_taps_together():
    """Values and gradients of map, offsets, mask and kernel, on two levels."""
    packed = PackedLevels(((4, 5), (2, 3)))
    pixels = 4 * 5 + 2 * 3
    levels = single((RNG.normal(size=(2, 4, 5, 3)), RNG.normal(size=(2, 2, 3, 3))))
    offsets, mask = RNG.normal(size=(2, pixels, 18)), RNG.uniform(size=(2, pixels, 9))
    arrays = single((packed.pack(levels), offsets, mask, RNG.normal(size=(3, 3, 3, 2))))

    def loss(x, offsets, mask, kernel, by_tap):
        out = deform_conv_levels(x, packed, offsets, mask, kernel, by_tap=by_tap)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True), static_argnames=("by_tap",))
    together, apart = run(*arrays, by_tap=False), run(*arrays, by_tap=True)
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_offsets_it_is_a_convolution():
    x, offsets, mask, kernel = single(case(height=6, width=7))
    out = jax.jit(deform_conv2d)(x, jnp.zeros_like(offsets), jnp.ones_like(mask), kernel)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_levels_do_not_sample_each_other():
    sizes = ((6, 8), (3, 4), (2, 2), (1, 1))
    packed = PackedLevels(sizes)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 3, 2)), jnp.float32)
    levels = [single(case(height=h, width=w)[:3]) for h, w in sizes]
    flat = lambda which: jnp.concatenate(
        [level[which].reshape(2, -1, level[which].shape[-1]) for level in levels], axis=1
    )
    x = packed.pack([level[0] for level in levels])
    run = jax.jit(deform_conv_levels, static_argnums=1)
    out = run(x, packed, flat(1), flat(2), kernel)
    expected = [naive(*map(np.float64, level), np.float64(kernel)) for level in levels]
    expected = np.concatenate([e.reshape(2, -1, 2) for e in expected], axis=1)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_far_points_sample_zero_with_finite_gradients():
    x, offsets, mask, kernel = single(case())
    far = jnp.where(offsets > 0, 1e30, -1e30)
    run = lambda x, o: jnp.sum(deform_conv2d(x, o, mask, kernel) ** 2 + x.sum())
    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1)))(x, far)
    np.testing.assert_allclose(value, x.sum() * 2 * 4 * 5 * 2, rtol=1e-3)
    assert all(np.isfinite(g).all() for g in gradients)


def test_bfloat16_has_float32_coordinates():
    width = 400
    x = jnp.arange(width, dtype=jnp.float32)[None, None, :, None] % 7
    offsets = jnp.zeros((1, 1, width, 18))
    mask = jnp.zeros((1, 1, width, 9)).at[..., 4].set(1)
    kernel = jnp.ones((3, 3, 1, 1))
    out = jax.jit(deform_conv2d)(x.astype(jnp.bfloat16), offsets, mask, kernel)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0, 0, :, 0].astype(jnp.float32), x[0, 0, :, 0])
