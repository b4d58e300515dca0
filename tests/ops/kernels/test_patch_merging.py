"""Swin's patch merging by a kernel is the plain one, on a simulated TPU: value and all gradients.

The simulation fills memory that nobody wrote with NaN and raises at a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from without_and_with import without_and_with

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.swin import PatchMerging
from detclipv2_jax.ops.kernels import patch_merging, place

SLOW = pytest.mark.slow


def merging(width, dtype=jnp.float32):
    random = np.random.default_rng(0)
    draws = Draws(jnp.asarray(random.normal(size=9 * width * width), jnp.float32))
    graph, state = nnx.split(PatchMerging(width, dtype=dtype, kernels="auto", rngs=draws))
    # The norm is a trained one: its initial ones and zeros would hide mistakes.
    move = lambda leaf: leaf + 0.1 * jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return graph, jax.tree.map(move, state)


def both(graph, state, size, width, monkeypatch, dtype=jnp.float32):
    """Output and gradients without and with the kernel."""
    random = np.random.default_rng(1)
    batch, height, one_row = size
    x = jnp.asarray(3 + random.normal(size=(*size, width)), dtype)
    smaller = batch, (height + 1) // 2, (one_row + 1) // 2, 2 * width
    slope = jnp.asarray(random.normal(size=smaller), dtype)
    return without_and_with(graph, state, x, slope, monkeypatch)


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
def test_value_and_all_gradients_are_the_plain_ones(size, width, monkeypatch):
    expected, found = both(*merging(width), size, width, monkeypatch)
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= 2e-6 * np.abs(a).max(), jax.tree_util.keystr(path)


@SLOW
def test_bfloat16_is_as_near_to_float32_as_the_plain_one(monkeypatch):
    size, width = (2, 14, 22), 96
    exact, _ = both(*merging(width), size, width, monkeypatch)
    half = merging(width, jnp.bfloat16)
    plain, kernel = both(*half, size, width, monkeypatch, jnp.bfloat16)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, kernel)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_what_the_kernel_cannot_do_is_left_to_the_compiler(monkeypatch):
    made = lambda **options: PatchMerging(
        96, rngs=Draws(jnp.zeros(10**5)), **{"dtype": jnp.bfloat16, "kernels": "auto"} | options
    )
    shape = (4, 200, 336, 96)
    assert not made().has_kernels(shape)  # no TPU here
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
def test_the_room_that_is_asked_for(mebibytes, shape, fits):
    assert (0.95 * mebibytes * 2**20 >= patch_merging.vmem_bytes(shape, 2 * shape[-1])) == fits


def test_it_becomes_kernels_of_a_tpu(monkeypatch):
    """Lowered without one, forward and backward; XLA's part is left out."""
    monkeypatch.setattr(PatchMerging, "has_kernels", lambda *_: True)
    graph, state = merging(192, jnp.bfloat16)
    loss = lambda state, x: nnx.merge(graph, state)(x).astype(jnp.float32).sum()
    both = jax.jit(jax.value_and_grad(loss))
    x = jnp.zeros((2, 20, 30, 192), jnp.bfloat16)
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "patch_merging_forward" in text and "patch_merging_backward" in text
