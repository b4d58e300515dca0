"""The norm of a map by a kernel is the plain one, on a simulated TPU: value and all gradients.

The simulation fills memory that nobody wrote with NaN and raises at a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from without_and_with import without_and_with

from detclipv2_jax.models.swin import MapNorm
from detclipv2_jax.ops.kernels import place

SLOW = pytest.mark.slow


def both(size, monkeypatch, dtype=jnp.float32):
    """Output and gradients without and with the kernel."""
    random = np.random.default_rng(0)
    noise = lambda size: jnp.asarray(random.normal(size=size))
    graph, state = nnx.split(MapNorm(size[-1], dtype=dtype))
    state = jax.tree.map(lambda leaf: (leaf + 0.1 * noise(leaf.shape)).astype(leaf.dtype), state)
    x, slope = (3 + noise(size)).astype(dtype), noise(size).astype(dtype)
    return without_and_with(graph, state, x, slope, monkeypatch)


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
def test_value_and_all_gradients_are_the_plain_ones(size, monkeypatch):
    expected, found = both(size, monkeypatch)
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max(), jax.tree_util.keystr(path)


@SLOW
def test_bfloat16_is_as_near_to_float32_as_the_plain_one(monkeypatch):
    size = (2, 14, 22, 96)
    exact, _ = both(size, monkeypatch)
    plain, kernel = both(size, monkeypatch, jnp.bfloat16)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, kernel)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_what_the_kernel_cannot_do_is_left_to_the_compiler(monkeypatch):
    made = lambda **options: MapNorm(96, **{"dtype": jnp.bfloat16, "kernels": "auto"} | options)
    shape = (4, 200, 336, 96)
    assert not made().has_kernels(shape)  # no TPU here
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)
    assert made().has_kernels(shape)
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    assert not made().has_kernels((4, 2, 60_000, 96))


def test_it_becomes_kernels_of_a_tpu(monkeypatch):
    """Lowered without one, forward and backward; XLA's part is left out."""
    monkeypatch.setattr(MapNorm, "has_kernels", lambda *_: True)
    graph, state = nnx.split(MapNorm(192, dtype=jnp.bfloat16))
    loss = lambda state, x: nnx.merge(graph, state)(x).astype(jnp.float32).sum()
    both = jax.jit(jax.value_and_grad(loss))
    x = jnp.zeros((2, 20, 30, 192), jnp.bfloat16)
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "layer_norm_forward" in text and "layer_norm_backward" in text
