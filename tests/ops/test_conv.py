"""The 3×3 convolution and its gradients compared with their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.ops import conv

RNG = np.random.default_rng(0)
# One pixel, one row, one column, odd sizes; heights that are a multiple of the block and not.
SHAPES = [(1, 1, 1, 3, 2), (2, 1, 6, 2, 3), (2, 7, 1, 3, 1), (3, 5, 9, 4, 6), (2, 65, 96, 5, 4)]


def case(batch, height, width, channels, out):
    shapes = (batch, height, width, channels), (3, 3, channels, out), (batch, height, width, out)
    return [RNG.normal(size=shape).astype(np.float32) for shape in shapes]


def definition(x, kernel, grad_out):
    """Return the convolution and its two gradients, tap by tap, in float64."""
    x, kernel, grad_out = (a.astype(np.float64) for a in (x, kernel, grad_out))
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, grad_x, grad_kernel = np.zeros_like(grad_out), np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(3, 3):
        tap = np.s_[:, i : i + height, j : j + width]
        y += padded[tap] @ kernel[i, j]
        grad_x[tap] += grad_out @ kernel[i, j].T
        grad_kernel[i, j] = np.einsum("bhwc,bhwo->co", padded[tap], grad_out)
    return y, grad_x[:, 1:-1, 1:-1], grad_kernel


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_definition(shape, monkeypatch):
    monkeypatch.setattr(conv, "_WORTH", 0)
    x, kernel, grad_out = case(*shape)
    y, pullback = jax.vjp(jax.jit(conv.conv3x3), x, kernel)
    for actual, expected in zip(
        (y, *pullback(grad_out)), definition(x, kernel, grad_out), strict=True
    ):
        close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_kernel_gradients_equal_the_definition(shape):
    """Both are compared with float64, within the same bounds."""
    x, kernel, grad_out = case(*shape)
    expected = definition(x, kernel, grad_out)[2]
    for way in (conv.kernel_gradient_by_products, conv.kernel_gradient_by_convolution):
        close(jax.jit(way)(x, grad_out), expected)


def test_bfloat16_sums_in_float32():
    """A bfloat16 sum of 5,000 ones would stop at 256."""
    ones = jnp.ones((1, 50, 100, 1), jnp.bfloat16)
    total = jax.jit(conv.kernel_gradient_by_products)(ones, ones)
    assert total.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(total[1, 1, 0, 0]), 5000, rtol=4e-3)


def test_only_large_maps_on_cpus_use_products():
    """TPUs and GPUs use XLA's convolution; no program contains both implementations."""

    def grad_kernel(x, kernel, grad_out):
        return jax.vjp(conv.conv3x3, x, kernel)[1](grad_out)[1]

    def ways(platform, *shape):
        traced = jax.jit(grad_kernel).trace(*case(*shape))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return {way for way in ("dot_general", "convolution") if f"stablehlo.{way}" in text}

    large, small = (1, 64, 64, 96, 96), (1, 8, 8, 96, 96)
    assert ways("cpu", *large) == {"dot_general"}
    assert ways("cpu", *small) == {"convolution"}
    assert ways("tpu", *large) == ways("cuda", *large) == {"convolution"}


def test_a_precise_convolution_rounds_neither_the_kernel_nor_the_result():
    x, kernel, grad_out = case(2, 9, 7, 16, 5)
    x = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    y, grad_x, grad_kernel = definition(x, kernel, grad_out)
    found, pullback = jax.vjp(jax.jit(conv.conv3x3_float32), jnp.bfloat16(x), kernel)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, y, atol=2e-5 * np.abs(y).max())  # rounded: 3e-3
    found_x, found_kernel = pullback(jnp.asarray(grad_out))
    assert (found_x.dtype, found_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    for actual, expected in ((found_x, grad_x), (found_kernel, grad_kernel)):
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, atol=1e-2 * np.abs(expected).max())
    wide, exact = (jax.jit(f)(x, kernel) for f in (conv.conv3x3_float32, conv.conv3x3))
    np.testing.assert_array_equal(wide, exact)


def test_the_parts_of_a_kernel_add_up_to_it_and_have_its_gradient():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 4, 5)), jnp.float32)
    high, low = jax.jit(conv.high_and_low)(kernel)
    np.testing.assert_array_equal(high, high.astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(high + low, kernel)
    assert 0 < np.abs(low).max() <= 2**-9 * 4
    gradient = jax.grad(lambda k: jnp.vdot(jnp.sin(sum(conv.high_and_low(k))), kernel))(kernel)
    np.testing.assert_allclose(gradient, jnp.cos(kernel) * kernel, rtol=1e-6)
