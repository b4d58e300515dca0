"""The layer norm kernel equals the plain layer norm on a simulated TPU: value and gradients.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernel_comparison import check_as_accurate, check_close, without_and_with

from detclipv2_jax.models.swin import MapNorm
from detclipv2_jax.ops.kernels import place

SLOW = pytest.mark.slow


def both(size, monkeypatch, dtype=jnp.float32):
    """Return output and gradients without and with the kernel."""
    random = np.random.default_rng(0)
    noise = lambda size: jnp.asarray(random.normal(size=size))
    graph, state = nnx.split(MapNorm(size[-1], dtype=dtype))
    state = jax.tree.map(lambda leaf: (leaf + 0.1 * noise(leaf.shape)).astype(leaf.dtype), state)
    x, grad_out = (3 + noise(size)).astype(dtype), noise(size).astype(dtype)
    return without_and_with(graph, state, x, grad_out, monkeypatch)


@pytest.mark.parametrize(
    "size",
    [
        (2, 6, 10, 6),
        pytest.param((1, 1, 1, 4), marks=SLOW),
        pytest.param((3, 5, 700, 32), marks=SLOW),  # several steps, an odd number of rows
        pytest.param((1, 2, 2400, 32), marks=SLOW),  # a row is more than a step should take
        pytest.param((2, 4, 16, 192), marks=SLOW),
    ],
)
def test_value_and_gradients_equal_those_without_the_kernel(size, monkeypatch):
    expected, found = both(size, monkeypatch)
    check_close(expected, found)


@SLOW
def test_bfloat16_is_as_accurate_as_without_the_kernel(monkeypatch):
    size = (2, 14, 22, 96)
    exact, _ = both(size, monkeypatch)
    plain, kernel = both(size, monkeypatch, jnp.bfloat16)
    check_as_accurate(exact, plain, kernel)


def test_unsupported_inputs_use_xla(monkeypatch):
    made = lambda **options: MapNorm(96, **{"dtype": jnp.bfloat16, "kernels": "auto"} | options)
    shape = (4, 200, 336, 96)
    assert not made().has_kernels(shape)  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)
    assert made().has_kernels(shape)
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    assert not made().has_kernels((4, 2, 60_000, 96))


def test_it_lowers_to_tpu_kernels(monkeypatch):
    """Lower forward and backward for a TPU that is not there, without compiling."""
    monkeypatch.setattr(MapNorm, "has_kernels", lambda *_: True)
    graph, state = nnx.split(MapNorm(192, dtype=jnp.bfloat16))
    loss = lambda state, x: nnx.merge(graph, state)(x).astype(jnp.float32).sum()
    both = jax.jit(jax.value_and_grad(loss))
    x = jnp.zeros((2, 20, 30, 192), jnp.bfloat16)
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "layer_norm_forward" in text and "layer_norm_backward" in text
