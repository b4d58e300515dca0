"""A Swin block with kernels equals the plain block on a simulated TPU: value and gradients.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from kernel_comparison import check_as_accurate, check_close

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
    # Move norms and biases from their initial ones and zeros, which would hide mistakes.
    move = lambda leaf: leaf + 0.1 * jnp.asarray(random.normal(size=leaf.shape), leaf.dtype)
    return graph, jax.tree.map(move, state)


def both(graph, state, size, *, dtype=jnp.float32, drop_path=True):
    """Return output and gradients of the plain block and of the kernels."""
    random = np.random.default_rng(1)
    width = state["norm1"]["scale"].shape[0]
    x, grad_out = (jnp.asarray(random.normal(size=(*size, width)), dtype) for _ in range(2))
    factors = jnp.asarray(random.uniform(0.2, 2, (2, size[0])), jnp.float32) if drop_path else None

    def run(method):
        call = lambda state, x: getattr(nnx.merge(graph, state), method)(x, factors)
        value, back = jax.vjp(call, state, x)
        return value, back(grad_out)

    with pltpu.force_tpu_interpret_mode():
        kernels = jax.jit(run, static_argnums=0)("_by_kernels")
    return jax.jit(run, static_argnums=0)("__call__"), kernels


@pytest.mark.parametrize(
    ("window", "heads", "shifted", "size"),
    [
        (4, 1, True, (2, 6, 10)),  # three windows, where a unit could hold four; padding
        pytest.param(4, 2, True, (1, 8, 16), marks=SLOW),  # no padding
        pytest.param(4, 2, False, (3, 9, 25), marks=SLOW),  # an odd number of images
        pytest.param(7, 3, True, (2, 14, 28), marks=SLOW),  # Swin-T's first stage
        pytest.param(7, 6, True, (1, 15, 23), marks=SLOW),  # two groups of heads, one half full
        pytest.param(7, 3, True, (2, 5, 3), marks=SLOW),  # smaller than a window
        pytest.param(7, 1, True, (1, 1, 1), marks=SLOW),
        pytest.param(12, 2, True, (1, 13, 30), marks=SLOW),  # Swin-L's window
        pytest.param(16, 1, True, (1, 17, 20), marks=SLOW),  # the largest
    ],
)
def test_a_block_equals_the_plain_block(window, heads, shifted, size):
    check_close(*both(*block(window, heads, shifted), size), 2e-6)


@SLOW
def test_no_drop_path_no_qkv_bias_and_other_head_sizes():
    check_close(
        *both(*block(4, 4, True, width=64, qkv_bias=False), (1, 7, 9), drop_path=False), 2e-6
    )


@SLOW
def test_bfloat16_is_as_accurate_as_without_kernels():
    size = (2, 14, 21)
    exact, _ = both(*block(7, 3, True), size)
    plain, kernels = both(*block(7, 3, True, dtype=jnp.bfloat16), size, dtype=jnp.bfloat16)
    check_as_accurate(exact, plain, kernels)


def test_unsupported_inputs_use_xla(monkeypatch):
    assert attention.supports(768, 24, 7) and attention.supports(192, 6, 12)
    assert not attention.supports(96, 3, 17)
    assert not attention.supports(144, 3, 7)  # heads of 48 channels
    made = lambda **options: SwinBlock(
        32, 1, False, SwinConfig(), **{"dtype": jnp.bfloat16, "kernels": "auto"} | options,
        rngs=Draws(jnp.zeros(10**5)),
    )  # fmt: skip
    assert not made().has_kernels((1, 14, 14, 32))  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**27)
    assert made().has_kernels((1, 14, 14, 32))
    assert not made(kernels="xla").has_kernels((1, 14, 14, 32))
    assert not made(dtype=jnp.float32).has_kernels((1, 14, 14, 32))
    assert not made().has_kernels((1, 14, 50_000, 32))


@pytest.mark.parametrize(
    ("mebibytes", "shape", "heads", "window", "fits"),
    [
        (64, (4, 25, 42, 768), 24, 7, True),  # v5p: Swin-T's last stage compiles
        (64, (4, 50, 84, 768), 24, 12, False),  # v5p: Swin-L's third needs more memory
        (64, (4, 200, 336, 192), 6, 12, True),
        (128, (4, 50, 84, 768), 24, 12, True),  # v5e
        (128, (4, 25, 42, 1536), 48, 12, False),
        (16, (4, 25, 42, 768), 24, 7, False),  # v4
    ],
)
def test_vmem_bytes_agree_with_what_the_compiler_needed(mebibytes, shape, heads, window, fits):
    wanted = attention.vmem_bytes(shape, heads, window), mlp.vmem_bytes(shape, 4 * shape[-1])
    assert (0.95 * mebibytes * 2**20 >= max(wanted)) == fits


def test_a_block_lowers_to_tpu_kernels():
    """Lower forward and backward for a TPU that is not there, without compiling."""
    graph, state = block(7, 3, True, dtype=jnp.bfloat16)
    loss = lambda state, x: nnx.merge(graph, state)._by_kernels(x, None).astype(jnp.float32).sum()
    x = jnp.zeros((2, 20, 30, 96), jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss))  # the last forward kernel is only for the value
    text = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("window_attention", "mlp"):
        assert f"{name}_forward" in text and f"{name}_backward" in text
