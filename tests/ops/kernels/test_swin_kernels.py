"""The kernels give what the plain block gives, on a simulated TPU: values and all gradients.

The simulation fills memory that nobody wrote with NaN and raises at a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.swin import SwinBlock, SwinConfig
from detclipv2_jax.ops.kernels import attention, mlp, place

SLOW = pytest.mark.slow


def block(window, heads, shifted, *, width=None, qkv_bias=True, dtype=jnp.float32):
    width = 32 * heads if width is None else width
    cfg = SwinConfig(window=window, qkv_bias=qkv_bias)
    random = np.random.default_rng(0)
    draws = Draws(jnp.asarray(random.normal(size=60 * width * width), jnp.float32))
    made = SwinBlock(width, heads, shifted, cfg, dtype=dtype, kernels="auto", rngs=draws)
    graph, state = nnx.split(made)
    # The norms and biases are trained ones: their initial ones and zeros would hide mistakes.
    move = lambda leaf: leaf + 0.1 * jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return graph, jax.tree.map(move, state)


def both(graph, state, size, *, dtype=jnp.float32, keep=True):
    """Output and gradients of the plain block and of the kernels."""
    random = np.random.default_rng(1)
    width = state["norm1"]["scale"].shape[0]
    x, slope = (jnp.asarray(random.normal(size=(*size, width)), dtype) for _ in range(2))
    factors = jnp.asarray(random.uniform(0.2, 2, (2, size[0])), jnp.float32) if keep else None

    def run(method):
        call = lambda state, x: getattr(nnx.merge(graph, state), method)(x, factors)
        value, back = jax.vjp(call, state, x)
        return value, back(slope)

    with pltpu.force_tpu_interpret_mode():
        kernels = jax.jit(run, static_argnums=0)("_by_kernels")
    return jax.jit(run, static_argnums=0)("__call__"), kernels


def check_close(expected, found, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found)):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("window", "heads", "shifted", "size"),
    [
        (4, 1, True, (2, 6, 10)),  # three windows of which a unit holds four; pads
        pytest.param(4, 2, True, (1, 8, 16), marks=SLOW),  # nothing to pad
        pytest.param(4, 2, False, (3, 9, 25), marks=SLOW),  # an odd number of images
        pytest.param(7, 3, True, (2, 14, 28), marks=SLOW),  # Swin-T's first stage
        pytest.param(7, 6, True, (1, 15, 23), marks=SLOW),  # two groups of heads, the last half
        pytest.param(7, 3, True, (2, 5, 3), marks=SLOW),  # smaller than a window
        pytest.param(7, 1, True, (1, 1, 1), marks=SLOW),
        pytest.param(12, 2, True, (1, 13, 30), marks=SLOW),  # Swin-L's window
        pytest.param(16, 1, True, (1, 17, 20), marks=SLOW),  # the largest
    ],
)
def test_a_block_is_the_plain_one(window, heads, shifted, size):
    check_close(*both(*block(window, heads, shifted), size), 2e-6)


@SLOW
def test_without_drop_path_without_bias_of_queries_and_with_other_head_sizes():
    check_close(*both(*block(4, 4, True, width=64, qkv_bias=False), (1, 7, 9), keep=False), 2e-6)


@SLOW
def test_bfloat16_is_as_near_to_float32_as_the_plain_block():
    size = (2, 14, 21)
    exact, _ = both(*block(7, 3, True), size)
    plain, kernels = both(*block(7, 3, True, dtype=jnp.bfloat16), size, dtype=jnp.bfloat16)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, kernels))):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_what_the_kernels_cannot_do_is_left_to_the_compiler(monkeypatch):
    assert attention.supports(768, 24, 7) and attention.supports(192, 6, 12)
    assert not attention.supports(96, 3, 17)
    assert not attention.supports(144, 3, 7)  # heads of 48 channels
    made = lambda **options: SwinBlock(
        32, 1, False, SwinConfig(), **{"dtype": jnp.bfloat16, "kernels": "auto"} | options,
        rngs=Draws(jnp.zeros(10**5)),
    )  # fmt: skip
    assert not made().has_kernels((1, 14, 14, 32))  # no TPU here
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**27)
    assert made().has_kernels((1, 14, 14, 32))
    assert not made(kernels="xla").has_kernels((1, 14, 14, 32))
    assert not made(dtype=jnp.float32).has_kernels((1, 14, 14, 32))
    assert not made().has_kernels((1, 14, 50_000, 32))


@pytest.mark.parametrize(
    ("mebibytes", "shape", "heads", "window", "fits"),
    [
        (64, (4, 25, 42, 768), 24, 7, True),  # v5p: Swin-T's last stage compiles
        (64, (4, 50, 84, 768), 24, 12, False),  # v5p: Swin-L's third does not, for want of memory
        (64, (4, 200, 336, 192), 6, 12, True),
        (128, (4, 50, 84, 768), 24, 12, True),  # v5e
        (128, (4, 25, 42, 1536), 48, 12, False),
        (16, (4, 25, 42, 768), 24, 7, False),  # v4
    ],
)
def test_the_room_that_is_asked_for_is_what_the_compiler_was_seen_to_want(
    mebibytes, shape, heads, window, fits
):
    wanted = attention.vmem_bytes(shape, heads, window), mlp.vmem_bytes(shape, 4 * shape[-1])
    assert (0.95 * mebibytes * 2**20 >= max(wanted)) == fits


def test_the_block_becomes_kernels_of_a_tpu():
    """Lowered without one, forward and backward; XLA's part is left out."""
    graph, state = block(7, 3, True, dtype=jnp.bfloat16)
    loss = lambda state, x: nnx.merge(graph, state)._by_kernels(x, None).astype(jnp.float32).sum()
    x = jnp.zeros((2, 20, 30, 96), jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss))  # of a gradient alone the last kernel is left out
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("window_attention", "mlp"):
        assert f"{name}_forward" in text and f"{name}_backward" in text
