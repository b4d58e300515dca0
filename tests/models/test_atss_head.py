import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.atss_head import ATSSHead, HeadConfig
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.packed_levels import PackedLevels

CONFIG = HeadConfig(channels=8, convs=2, groups=2, embed_dim=6)
WITH_SCORES = dataclasses.replace(CONFIG, proposal_scores=("iou", "foreground"))
SIZES = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))


def levels():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, *size, 4)), jnp.float32) for size in SIZES]


def make(cfg=CONFIG, levels=5, **kwargs):
    """Return the graph and state of a head with random parameters."""
    head = ATSSHead(4, levels, cfg, rngs=Draws(), **kwargs)
    graph, state = nnx.split(head)
    rng = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32)
    return graph, jax.tree.map(draw, state)


@pytest.fixture(scope="module")
def head():
    graph, state = make(WITH_SCORES)
    return state, jax.jit(lambda state, levels: nnx.merge(graph, state)(levels))


def test_outputs_of_all_levels_are_in_anchor_order(head):
    """The outputs for all levels equal those for each level alone, with that level's scale."""
    state, run = head
    x = levels()
    outputs = run(state, x)
    graph, _ = make(WITH_SCORES, levels=1)
    alone = jax.jit(lambda state, level: nnx.merge(graph, state)([level]))
    start = 0
    for index, level in enumerate(x):
        pure = nnx.to_pure_dict(state)
        pure["scales"] = pure["scales"][index : index + 1]
        expected = alone(nnx.State(pure), level)
        end = start + level.shape[1] * level.shape[2]
        for got, wanted in zip(*map(jax.tree.leaves, (outputs, expected)), strict=True):
            np.testing.assert_allclose(got[:, start:end], wanted, atol=1e-4)
        start = end
    assert outputs.embeddings.shape == (2, start, 6)
    assert outputs.deltas.shape == (2, start, 4)
    assert outputs.centerness.shape == (2, start)
    assert {name: x.shape for name, x in outputs.proposal_logits.items()} == {
        "iou": (2, start),
        "foreground": (2, start),
    }


def test_a_scale_changes_only_the_boxes_of_its_level(head):
    state, run = head
    x = levels()
    before = run(state, x)
    pure = nnx.to_pure_dict(state)
    pure["scales"] = pure["scales"].at[1].multiply(3)
    after = run(nnx.State(pure), x)
    factor = np.ones(45)
    factor[30:39] = 3
    np.testing.assert_allclose(after.deltas, before.deltas * factor[:, None], rtol=1e-5)
    np.testing.assert_array_equal(after.embeddings, before.embeddings)


def gradients(cfg, loss, **kwargs):
    graph, state = make(cfg, **kwargs)
    x = levels()
    grad = jax.jit(jax.grad(lambda state: loss(nnx.merge(graph, state)(x))))
    return nnx.to_pure_dict(grad(state))


@pytest.mark.parametrize("deformable", [True, False])
def test_embeddings_train_the_regression_branch_through_the_deformable_convolution(deformable):
    cfg = dataclasses.replace(CONFIG, deformable=deformable)
    grad = gradients(cfg, lambda outputs: jnp.sum(jnp.sin(outputs.embeddings)))
    reached = [bool((g != 0).any()) for g in jax.tree.leaves(grad["reg_convs"])]
    assert all(reached) if deformable else not any(reached)
    assert not np.any(grad["box"]["kernel"])


def test_boxes_do_not_train_the_classification_branch():
    grad = gradients(CONFIG, lambda o: jnp.sum(jnp.sin(o.deltas)) + jnp.sum(jnp.sin(o.centerness)))
    for part in ("cls_convs", "dcn", "embed"):
        assert not any(np.any(g) for g in jax.tree.leaves(grad[part]))
    assert np.any(grad["reg_convs"][0]["conv"]["kernel"])


def test_proposal_scores_add_outputs_of_the_regression_branch_and_nothing_else():
    (graph, state), (plain_graph, plain_state) = make(WITH_SCORES), make()
    added = {"iou", "foreground"}
    assert set(nnx.to_pure_dict(state)) - set(nnx.to_pure_dict(plain_state)) == added
    start = ATSSHead(4, 5, WITH_SCORES, rngs=Draws())
    assert jax.nn.sigmoid(start.foreground.bias[...]) == pytest.approx(0.01)
    assert not start.iou.bias[...].any()
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    outputs = run(state, levels())
    rest = {k: v for k, v in nnx.to_pure_dict(state).items() if k not in added}
    plain = jax.jit(lambda state, x: nnx.merge(plain_graph, state)(x))(nnx.State(rest), levels())
    assert plain.proposal_logits == {}
    for name in ("embeddings", "deltas", "centerness"):
        np.testing.assert_allclose(getattr(outputs, name), getattr(plain, name), atol=1e-5)
    for name in added:
        grad = gradients(WITH_SCORES, lambda o, n=name: jnp.sum(jnp.sin(o.proposal_logits[n])))
        parts = {part for part in grad if any(np.any(g) for g in jax.tree.leaves(grad[part]))}
        assert parts == {name, "reg_convs"}


def test_bfloat16_outputs_are_float32():
    graph, state = make(dtype=jnp.bfloat16)
    run = jax.jit(lambda levels: nnx.merge(graph, state)(levels))
    outputs = run([x.astype(jnp.bfloat16) for x in levels()])
    for x in jax.tree.leaves(outputs):
        assert x.dtype == jnp.float32
        assert np.isfinite(x).all()


def test_groups_must_divide_channels():
    with pytest.raises(UserError, match="head: groups 5 must divide channels 8"):
        HeadConfig(channels=8, groups=5)


def test_boxes_and_centerness_of_a_bfloat16_head_have_the_precision_of_float32():
    """Compared with a float64 convolution of the same bfloat16 features by the float32 kernels."""
    graph, state = make(dtype=jnp.bfloat16)
    head, x = nnx.merge(graph, state), levels()[0].astype(jnp.bfloat16)
    packed = PackedLevels((SIZES[0],))

    @jax.jit
    def features(x):
        for layer in head.reg_convs:
            x = layer(x, packed)
        return x

    padded = np.pad(np.asarray(features(x), np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    outputs = jax.jit(lambda x: nnx.merge(*nnx.split(head))([x]))(x)
    found = {"box": outputs.deltas / head.scales[0], "centerness": outputs.centerness[..., None]}
    for name, value in found.items():
        layer = getattr(head, name)
        expected = np.asarray(layer.bias[...], np.float64)
        for i, j in np.ndindex(3, 3):
            tap = padded[:, i : i + SIZES[0][0], j : j + SIZES[0][1]]
            expected = expected + tap @ np.asarray(layer.kernel[i, j], np.float64)
        error = np.abs(np.asarray(value).reshape(expected.shape) - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), name  # bfloat16 alone: 2e-3
