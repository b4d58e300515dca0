"""The kernels give what the plain text block gives, on a simulated TPU: values and all gradients.

The simulation fills memory that nobody wrote with NaN and raises at a read beyond an array.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from detclipv2_jax.models import text
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.ops.kernels import causal, mlp, place
from detclipv2_jax.training import objective, sharding

SLOW = pytest.mark.slow


def make(module, dtype=jnp.float32, **sizes):
    cfg = text.TextConfig(**{"layers": 2, "vocab": 50, "embed_dim": 6} | sizes)
    graph, state = nnx.split(module(cfg, dtype=dtype, rngs=Draws()))
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path[-2:-1])
        # Larger weights would make the softmax all or nothing, and float32 itself inexact.
        spread = len(leaf) ** -0.5 if name == "['kernel']" else 0.2
        drawn = random.normal(name == "['scale']", spread, leaf.shape)
        return jnp.asarray(drawn, jnp.float32)

    return graph, jax.tree.map_with_path(draw, state)


def everything(run, state, x, slope):
    def both(state, x):
        value, back = jax.vjp(lambda state: run(state, x), state)
        return value, back(slope)[0]

    return jax.jit(both)(state, x)


def both(graph, state, concepts, length, *, dtype=jnp.float32):
    """Output and gradients, by x too, of the plain block and of the kernels."""
    random, width = np.random.default_rng(1), state["ln_1"]["scale"].shape[0]
    x, slope = (jnp.asarray(random.normal(size=(concepts, length, width)), dtype) for _ in range(2))
    run = lambda method: everything(
        lambda both, _: getattr(nnx.merge(graph, both[0]), method)(both[1]), (state, x), None, slope
    )
    with pltpu.force_tpu_interpret_mode():
        kernels = run("_by_kernels")
    return run("__call__"), kernels


def check_close(expected, found, tolerance):
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("width", "heads", "concepts", "length"),
    [
        (32, 2, 3, 16),  # less than a unit
        pytest.param(64, 1, 1, 16, marks=SLOW),
        pytest.param(64, 4, 48, 8, marks=SLOW),  # three units, one core
        pytest.param(64, 2, 131, 16, marks=SLOW),  # 17 units, the last of three sequences
        pytest.param(256, 4, 128, 16, marks=SLOW),  # two cores, two steps, two groups of heads
        pytest.param(192, 3, 24, 16, marks=SLOW),  # the second group half
        pytest.param(32, 1, 1, 128, marks=SLOW),  # a sequence a unit
    ],
)
def test_a_block_is_the_plain_one(width, heads, concepts, length):
    check_close(*both(*make(text.TextBlock, width=width, heads=heads), concepts, length), 2e-6)


@SLOW
def test_bfloat16_is_as_near_to_float32_as_the_plain_block():
    exact, _ = both(*make(text.TextBlock, width=128, heads=2), 20, 16)
    half = make(text.TextBlock, jnp.bfloat16, width=128, heads=2)
    plain, kernels = both(*half, 20, 16, dtype=jnp.bfloat16)
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, kernels)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)


def test_quick_gelu_and_its_derivative():
    x = jnp.linspace(-60, 60, 241)
    value, derivative = mlp._quick_gelu(x)
    np.testing.assert_allclose(value, text.quick_gelu(x), rtol=1e-6, atol=1e-12)
    by_jax = jax.vmap(jax.grad(text.quick_gelu))(x)
    np.testing.assert_allclose(derivative, by_jax, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("devices", "loop"), [(1, False), pytest.param(4, True, marks=SLOW)])
def test_a_tower_by_kernels_is_the_plain_one(monkeypatch, devices, loop):
    """Concepts that neither the devices nor a unit divide."""
    graph, state = make(text.TextTower, width=32, heads=2)
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, 50, (5, 16)), jnp.int32)
    slope = jnp.asarray(random.normal(size=(5, 6)), jnp.float32)

    def run(state, tokens):
        tower = nnx.merge(graph, state)
        tower.loop = loop
        return tower(tokens)

    expected = everything(run, state, tokens, slope)
    monkeypatch.setattr(text.TextBlock, "has_kernels", lambda *_: True)
    mesh = sharding.make_mesh(devices, 1)
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = everything(lambda *args: run(*args), state, tokens, slope)
    check_close(expected, found, 2e-6)


@SLOW
def test_each_device_encodes_its_concepts(monkeypatch):
    """As in a training step: parameters come split, features go to every device."""
    graph, state = make(text.TextTower, width=32, heads=2)
    mesh = sharding.make_mesh(2, 2)
    whole, shares = sharding.replicated(mesh), []
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.integers(0, 50, (64, 16)), jnp.int32)
    slope = jnp.asarray(random.normal(size=(64, 6)), jnp.float32)

    def run(state, tokens):
        state = jax.lax.with_sharding_constraint(state, whole)
        model = types.SimpleNamespace(encode_text=nnx.merge(graph, state))
        return objective.encode_concepts(model, tokens, whole)

    def attend(x, weights, *, heads, branch=causal.attention_branch):
        shares.append(len(x))
        return branch(x, weights, heads=heads)

    expected = everything(run, state, tokens, slope)
    monkeypatch.setattr(text.TextBlock, "has_kernels", lambda *_: True)
    monkeypatch.setattr(causal, "attention_branch", attend)
    columns = lambda x: PartitionSpec(*[None] * (x.ndim - 1), "fsdp")
    state = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, columns(x))), state)
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        found = everything(run, state, jax.device_put(tokens, sharding.split(mesh)), slope)
    check_close(expected, found, 2e-6)
    assert set(shares) == {16}


def test_what_the_kernels_cannot_do_is_left_to_the_compiler(monkeypatch):
    cfg = text.TextConfig()
    made = lambda cfg=cfg, **options: text.TextBlock(
        cfg, **{"dtype": jnp.bfloat16, "kernels": "auto"} | options, rngs=Draws()
    )
    shape = (384, 16, 512)
    assert not made().has_kernels(shape)  # no TPU here
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)
    assert made().has_kernels(shape)
    assert not made().has_kernels((384, 15, 512))  # sequences that do not divide a unit
    assert not made(text.TextConfig(width=576, heads=6)).has_kernels((384, 16, 576))
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**24)  # v4
    assert not made().has_kernels(shape)


@pytest.mark.parametrize(
    ("width", "attend", "expand"), [(512, 19, 21), (768, 30, 31)]
)  # MiB with which a v5p's compiler was seen to do, and with one less not
def test_the_room_that_is_asked_for_is_what_the_compiler_was_seen_to_want(width, attend, expand):
    for seen, asked in [
        (attend, causal.vmem_bytes(width)),
        (expand, mlp.vmem_bytes((1, 16, causal.UNIT, width), 4 * width)),
    ]:
        assert seen <= asked / 2**20 <= 1.6 * seen


def test_the_block_becomes_kernels_of_a_tpu():
    """Lowered without one, forward and backward; XLA's part is left out."""
    graph, state = make(text.TextBlock, jnp.bfloat16, width=128, heads=2)
    loss = lambda state, x: nnx.merge(graph, state)._by_kernels(x).astype(jnp.float32).sum()
    x = jnp.zeros((8, 16, 128), jnp.bfloat16)
    both = jax.jit(jax.value_and_grad(loss))  # of a gradient alone the last kernel is left out
    lowered = both.trace(state, x).lower(lowering_platforms=("tpu",)).as_text()
    for name in ("causal_attention", "mlp"):
        assert f"{name}_forward" in lowered and f"{name}_backward" in lowered


def test_each_token_sees_its_own_sequence_so_far():
    mask = causal._mask(16) == 0
    assert mask.sum() == causal.UNIT // 16 * 16 * 17 // 2
    assert mask[17, 16] and mask[17, 17] and not mask[17, 18] and not mask[17, 15]
