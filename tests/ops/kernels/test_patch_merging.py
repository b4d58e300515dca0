"""The patch merging kernel equals the plain layer on a simulated TPU: value and gradients.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from kernel_comparison import check_as_accurate, check_close, without_and_with

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.swin import PatchMerging
from detclipv2_jax.ops.kernels import patch_merging, place

SLOW = pytest.mark.slow


def merging(width, dtype=jnp.float32):
    random = np.random.default_rng(0)
    draws = Draws(jnp.asarray(random.normal(size=9 * width * width), jnp.float32))
    graph, state = nnx.split(PatchMerging(width, dtype=dtype, kernels="auto", rngs=draws))
    # Move the norm from its initial ones and zeros, which would hide mistakes.
    move = lambda leaf: leaf + 0.1 * jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return graph, jax.tree.map(move, state)


def both(graph, state, size, width, monkeypatch, dtype=jnp.float32):
    """Return output and gradients without and with the kernel."""
    random = np.random.default_rng(1)
    batch, height, one_row = size
    x = jnp.asarray(3 + random.normal(size=(*size, width)), dtype)
    smaller = batch, (height + 1) // 2, (one_row + 1) // 2, 2 * width
    grad_out = jnp.asarray(random.normal(size=smaller), dtype)
    return without_and_with(graph, state, x, grad_out, monkeypatch)


@pytest.mark.parametrize(
    ("size", "width"),
    [
        ((2, 6, 10), 6),
        pytest.param((1, 4, 4), 192, marks=SLOW),  # a tile of channels and a half
        pytest.param((3, 2, 64), 96, marks=SLOW),  # an odd number of images, no gaps
        pytest.param((1, 5, 7), 4, marks=SLOW),  # odd sides
        pytest.param((1, 1, 1), 4, marks=SLOW),
        pytest.param((2, 40, 90), 8, marks=SLOW),  # several steps
        pytest.param((1, 2, 2400), 4, marks=SLOW),  # a row is more than a step should take
    ],
)
def test_value_and_gradients_equal_those_without_the_kernel(size, width, monkeypatch):
    expected, found = both(*merging(width), size, width, monkeypatch)
    check_close(expected, found)


@SLOW
def test_bfloat16_is_as_accurate_as_without_the_kernel(monkeypatch):
    size, width = (2, 14, 22), 96
    exact, _ = both(*merging(width), size, width, monkeypatch)
    half = merging(width, jnp.bfloat16)
    plain, kernel = both(*half, size, width, monkeypatch, jnp.bfloat16)
    check_as_accurate(exact, plain, kernel)


def test_unsupported_inputs_use_xla(monkeypatch):
    made = lambda **options: PatchMerging(
        96, rngs=Draws(jnp.zeros(10**5)), **{"dtype": jnp.bfloat16, "kernels": "auto"} | options
    )
    shape = (4, 200, 336, 96)
    assert not made().has_kernels(shape)  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**27)
    assert made().has_kernels(shape)
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    assert not made().has_kernels((4, 2, 60_000, 96))


@pytest.mark.parametrize(
    ("mebibytes", "shape", "fits"),
    [
        (64, (4, 50, 84, 384), True),  # v5p: the largest of Swin-T
        (64, (64, 20, 20, 384), True),
        (64, (4, 50, 84, 768), False),  # of Swin-L
        (128, (4, 50, 84, 768), True),  # v5e
    ],
)
def test_vmem_bytes(mebibytes, shape, fits):
    assert (0.95 * mebibytes * 2**20 >= patch_merging.vmem_bytes(shape, 2 * shape[-1])) == fits


def test_it_lowers_to_tpu_kernels(monkeypatch):
    """Lower forward and backward for a TPU that is not there, without compiling."""
    monkeypatch.setattr(PatchMerging, "has_kernels", lambda *_: True)
    graph, state = merging(192, jnp.bfloat16)
    loss = lambda state, x: nnx.merge(graph, state)(x).astype(jnp.float32).sum()
    both = jax.jit(jax.value_and_grad(loss))
    x = jnp.zeros((2, 20, 30, 192), jnp.bfloat16)
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "patch_merging_forward" in text and "patch_merging_backward" in text
