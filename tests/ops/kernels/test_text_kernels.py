"""A text block with kernels equals the plain block on a simulated TPU: value and gradients.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec
from kernel_comparison import check_as_accurate, check_close

from detclipv2_jax.models import text
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.ops.kernels import causal, mlp, place
from detclipv2_jax.training import encoding, sharding

SLOW = pytest.mark.slow


def make(module, dtype=jnp.float32, **sizes):
    cfg = text.TextConfig(**{"layers": 2, "vocab": 50, "embed_dim": 6} | sizes)
    graph, state = nnx.split(module(cfg, dtype=dtype, rngs=Draws()))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path[-2:-1])
        # Larger weights would make the softmax nearly one-hot, where float32 is inexact.
        spread = len(leaf) ** -0.5 if name == "['kernel']" else 0.2
        drawn = random.normal(name == "['scale']", spread, leaf.shape)
        return jnp.asarray(drawn, jnp.float32)

    return graph, jax.tree.map_with_path(draw, state)


def everything(run, state, x, grad_out):
    def both(state, x):
        value, back = jax.vjp(lambda state: run(state, x), state)
        return value, back(grad_out)[0]

    return jax.jit(both)(state, x)


def both(graph, state, concepts, length, *, dtype=jnp.float32):
    """Return output and gradients (also of x) of the plain block and of the kernels."""
    random, width = np.random.default_rng(1), state["ln_1"]["scale"].shape[0]
    x, grad_out = (
        jnp.asarray(random.normal(size=(concepts, length, width)), dtype) for _ in range(2)
    )
    run = lambda method: everything(
        lambda both, _: getattr(nnx.merge(graph, both[0]), method)(both[1]),
        (state, x),
        None,
        grad_out,
    )
    with pltpu.force_tpu_interpret_mode():
        kernels = run("_by_kernels")
    return run("__call__"), kernels


@pytest.mark.parametrize(
    ("width", "heads", "concepts", "length"),
    [
        (32, 2, 3, 16),  # less than a unit
        pytest.param(64, 1, 1, 16, marks=SLOW),
        pytest.param(64, 4, 48, 8, marks=SLOW),  # three units, one core
        pytest.param(64, 2, 131, 16, marks=SLOW),  # 17 units, the last with three sequences
        pytest.param(256, 4, 128, 16, marks=SLOW),  # two cores, two steps, two groups of heads
        pytest.param(192, 3, 24, 16, marks=SLOW),  # the second group half full
        pytest.param(32, 1, 1, 128, marks=SLOW),  # one sequence per unit
    ],
)
def test_a_block_equals_the_plain_block(width, heads, concepts, length):
    check_close(*both(*make(text.TextBlock, width=width, heads=heads), concepts, length), 2e-6)


def test_a_block_with_the_exact_gelu_equals_the_plain_block():
    graph, state = make(text.TextBlock, width=32, heads=2, activation="gelu")
    plain, kernels = both(graph, state, 3, 16)
    check_close(plain, kernels, 2e-6)
    quick, _ = both(make(text.TextBlock, width=32, heads=2)[0], state, 3, 16)
    assert np.abs(np.asarray(quick[0]) - np.asarray(plain[0])).max() > 1e-3


@SLOW
def test_bfloat16_is_as_accurate_as_without_kernels():
    exact, _ = both(*make(text.TextBlock, width=128, heads=2), 20, 16)
    half = make(text.TextBlock, jnp.bfloat16, width=128, heads=2)
    plain, kernels = both(*half, 20, 16, dtype=jnp.bfloat16)
    check_as_accurate(exact, plain, kernels)


def test_quick_gelu_and_its_derivative():
    x = jnp.linspace(-60, 60, 241)
    value, derivative = mlp._quick_gelu(x)
    np.testing.assert_allclose(value, text.quick_gelu(x), rtol=1e-6, atol=1e-12)
    by_jax = jax.vmap(jax.grad(text.quick_gelu))(x)
    np.testing.assert_allclose(derivative, by_jax, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("devices", "loop"), [(1, False), pytest.param(4, True, marks=SLOW)])
def test_a_tower_with_kernels_equals_the_plain_tower(monkeypatch, devices, loop):
    """The number of concepts is a multiple neither of the devices nor of a unit."""
    graph, state = make(text.TextTower, width=32, heads=2)
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, 50, (5, 16)), jnp.int32)
    grad_out = jnp.asarray(random.normal(size=(5, 6)), jnp.float32)

    def run(state, tokens):
        tower = nnx.merge(graph, state)
        tower.loop = loop
        return tower(tokens)

    expected = everything(run, state, tokens, grad_out)
    monkeypatch.setattr(text.TextBlock, "has_kernels", lambda *_: True)
    mesh = sharding.make_mesh(devices, 1)
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = everything(lambda *args: run(*args), state, tokens, grad_out)
    check_close(expected, found, 2e-6)


@SLOW
def test_each_device_encodes_its_concepts(monkeypatch):
    """As in a training step: parameters are sharded, features become replicated."""
    graph, state = make(text.TextTower, width=32, heads=2)
    mesh = sharding.make_mesh(2, 2)
    whole, shares = sharding.replicated(mesh), []
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, 50, (64, 16)), jnp.int32)
    grad_out = jnp.asarray(random.normal(size=(64, 6)), jnp.float32)

    def run(state, tokens):
        state = jax.lax.with_sharding_constraint(state, whole)
        model = types.SimpleNamespace(encode_text=nnx.merge(graph, state))
        return encoding.encode_concepts(model, tokens, whole)

    def attend(x, weights, *, heads, branch=causal.attention_branch):
        shares.append(len(x))
        return branch(x, weights, heads=heads)

    expected = everything(run, state, tokens, grad_out)
    monkeypatch.setattr(text.TextBlock, "has_kernels", lambda *_: True)
    monkeypatch.setattr(causal, "attention_branch", attend)
    columns = lambda x: PartitionSpec(*[None] * (x.ndim - 1), "fsdp")
    state = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, columns(x))), state)
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = everything(run, state, jax.device_put(tokens, sharding.split(mesh)), grad_out)
    check_close(expected, found, 2e-6)
    assert set(shares) == {16}


def test_unsupported_inputs_use_xla(monkeypatch):
    cfg = text.TextConfig()
    made = lambda cfg=cfg, **options: text.TextBlock(
        cfg, **{"dtype": jnp.bfloat16, "kernels": "auto"} | options, rngs=Draws()
    )
    shape = (384, 16, 512)
    assert not made().has_kernels(shape)  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)
    assert made().has_kernels(shape)
    assert not made().has_kernels((384, 15, 512))  # a unit is not a whole number of sequences
    assert not made(text.TextConfig(width=576, heads=6)).has_kernels((384, 16, 576))
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**24)  # v4
    assert not made().has_kernels(shape)


@pytest.mark.parametrize(
    ("width", "attend", "expand"), [(512, 19, 21), (768, 30, 31)]
)  # MiB that the compiler for a v5p needed; it failed with one less
def test_vmem_bytes_agree_with_what_the_compiler_needed(width, attend, expand):
    for seen, asked in [
        (attend, causal.vmem_bytes(width)),
        (expand, mlp.vmem_bytes((1, 16, causal.UNIT, width), 4 * width)),
    ]:
        assert seen <= asked / 2**20 <= 1.6 * seen


def test_a_block_lowers_to_tpu_kernels():
    """Lower forward and backward for a TPU that is not there, without compiling."""
    graph, state = make(text.TextBlock, jnp.bfloat16, width=128, heads=2)
    loss = lambda state, x: nnx.merge(graph, state)._by_kernels(x).astype(jnp.float32).sum()
    x = jnp.zeros((8, 16, 128), jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss))  # the last forward kernel is only for the value
    lowered = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("causal_attention", "mlp"):
        assert f"{name}_forward" in lowered and f"{name}_backward" in lowered


def test_the_mask_is_causal_within_each_sequence():
    mask = causal._mask(16) == 0
    assert mask.sum() == causal.UNIT // 16 * 16 * 17 // 2
    assert mask[17, 16] and mask[17, 17] and not mask[17, 18] and not mask[17, 15]
