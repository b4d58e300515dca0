"""A training step: skipped updates, and several devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_batch import LOSS, make_batch

from detclipv2_jax.data.index import KINDS
from detclipv2_jax.models import detclip
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.training import optimizer, prefetch, sharding, state, step
from detclipv2_jax.training import sharding as sharding_lib
from detclipv2_jax.training.optimizer import OptimizerConfig
from detclipv2_jax.training.spikes import UsualNorms


@functools.cache
def _train_step():
    graphdef, params = tiny_model.parts()
    rule = optimizer.create(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), params, 100)
    fn = functools.partial(
        step.train_step, graphdef=graphdef, optimizer=rule, config=LOSS, seed=0, micro_batches={}
    )
    return fn, state.create(params, rule)


@functools.cache
def _compiled():
    fn, start = _train_step()
    return jax.jit(fn), start


def test_a_spike_is_skipped_and_counted():
    fn, start = _compiled()
    batch, place = make_batch("detection"), KINDS.index("detection")
    ordinary, metrics = fn(start, batch)
    assert (int(metrics["skipped"]), int(metrics["spiked"])) == (0, 0)
    norm = np.log(float(metrics["gradient_norm"]))
    assert float(ordinary.norms.log_norm[place]) == pytest.approx(norm, rel=1e-5)

    def known(log_norm):
        seen = jnp.full(len(KINDS), 100)
        norms = UsualNorms(jnp.full(len(KINDS), log_norm), seen, jnp.zeros_like(seen))
        return dataclasses.replace(start, norms=norms)

    after, metrics = fn(known(norm - np.log(21)), batch)
    for field in ("params", "ema", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(start, field))
    assert (int(after.step), int(after.skipped_in_row)) == (1, 1)
    assert (int(metrics["skipped"]), int(metrics["spiked"])) == (1, 1)
    after, metrics = fn(known(norm - np.log(19)), batch)
    assert int(metrics["spiked"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, ordinary.params)


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    fn, start = _compiled()
    batch = make_batch("detection")
    broken = dataclasses.replace(start, params=start.params | {"logit_bias": jnp.asarray(jnp.nan)})
    after, metrics = fn(broken, batch)
    for field in ("params", "ema", "moments"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, field), getattr(broken, field))
    assert (int(after.step), int(after.skipped), int(after.skipped_in_row)) == (1, 1, 1)
    after, _ = fn(after, batch)
    assert (int(after.skipped), int(after.skipped_in_row), int(after.spiked)) == (2, 2, 0)
    jax.tree.map(np.testing.assert_array_equal, after.norms, start.norms)
    healed, metrics = fn(dataclasses.replace(after, params=start.params), batch)
    assert (int(healed.skipped), int(healed.skipped_in_row)) == (2, 0)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.array_equal(healed.params["logit_bias"], start.params["logit_bias"])


def test_the_scale_is_limited_and_comes_back():
    """It stays at the limit while the gradient pushes up, and falls with the first that does not.

    With a low bias only positives matter, and opposite embeddings have the opposite gradient.
    """
    graphdef, params = tiny_model.parts()
    rule = optimizer.create(
        OptimizerConfig(learning_rate=1e-3, warmup_steps=0, max_scale=20.0), params, 100
    )
    fn = jax.jit(functools.partial(
        step.train_step, graphdef=graphdef, optimizer=rule, config=LOSS, seed=0, micro_batches={}
    ))  # fmt: skip
    batch, embed = make_batch("detection"), params["head"]["embed"]
    opposite = {**params["head"], "embed": jax.tree.map(jnp.negative, embed)}
    found = {}
    for head in (params["head"], opposite):
        at_limit = params | {"head": head, "logit_scale": jnp.log(20.0)}
        at_limit["logit_bias"] = jnp.float32(-30.0)
        after, metrics = fn(state.create(at_limit, rule), batch)
        found[float(metrics["scale_gradient"]) > 0] = float(metrics["scale"])
        assert metrics["bias"] == after.params["logit_bias"]
    assert found[False] == pytest.approx(20, rel=1e-6)
    assert found[True] == pytest.approx(20 * np.exp(-1e-3), rel=1e-5)
    beyond = params | {"logit_scale": jnp.log(500.0)}
    after, metrics = fn(state.create(beyond, rule), batch)
    for value in (
        metrics["scale"],
        *(jnp.exp(p["logit_scale"]) for p in (after.params, after.ema)),
    ):
        assert float(value) == pytest.approx(20, rel=1e-6)


def test_the_logged_gradient_of_the_scale_is_its_derivative():
    fn, start = _compiled()
    batch, a, h = make_batch("image_text"), start.params["logit_scale"], 1e-2
    at = lambda a: fn(dataclasses.replace(start, params=start.params | {"logit_scale": a}), batch)[
        1
    ]
    slope = (float(at(a + h)["loss"]) - float(at(a - h)["loss"])) / (2 * h)
    assert float(at(a)["scale_gradient"]) == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("detection", (2, 2)),
        ("image_text", (4, 1)),
        pytest.param("classification", (2, 2), marks=pytest.mark.slow),
        pytest.param("image_text", (1, 4), marks=pytest.mark.slow),
    ],
)
def test_four_devices_compute_what_one_computes(kind, mesh):
    fn, start = _train_step()
    batch, results = make_batch(kind), []
    for shape in ((1, 1), mesh):
        devices = sharding.make_mesh(*shape)
        shardings = sharding_lib.state_shardings(devices, start)
        layout = sharding.batch_shardings(devices, batch)
        whole = sharding.replicated(devices)
        run = jax.jit(
            functools.partial(fn, replicated=whole),
            in_shardings=(shardings, layout),
            out_shardings=(shardings, whole),
        )
        results.append(run(jax.device_put(start, shardings), prefetch.put_batch(batch, layout)))
    (one, a), (four, b) = results
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
    # Adam's first step has size `rate` for any gradient, so the gradient's mean is compared.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, one.moments.mean, four.moments.mean)
    split = {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(four.ema)}
    assert split == ({True} if mesh[1] == 1 else {True, False})


SCOPES = {
    "detection": ("assignment", "alignment_loss", "box_loss", "centerness_loss"),
    "image_text": ("select_regions", "word_region_similarity", "contrastive_loss"),
    "classification": ("select_regions", "word_region_similarity", "classification_loss"),
}


@pytest.mark.parametrize("kind", SCOPES)
def test_the_stages_of_a_step_are_named_in_a_profile(kind):
    fn, start = _train_step()
    program = jax.jit(fn).lower(start, make_batch(kind)).as_text(debug_info=True)
    for scope in (*SCOPES[kind], "encode_concepts", "optimizer", "moving_average"):
        assert re.search(rf'loc\("[^"]*\b{scope}\b', program), scope


@functools.cache
def _batch_normalized():
    swin = dataclasses.replace(tiny_model.CONFIG.swin, drop_path=0.0)
    cfg = dataclasses.replace(tiny_model.CONFIG, similarity="batch_norm", swin=swin)
    graphdef, params = detclip.create(cfg, 0)
    rule = optimizer.create(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), params, 100)
    run = functools.partial(step.train_step, graphdef=graphdef, optimizer=rule, config=LOSS, seed=0)
    return graphdef, run, state.create(params, rule)


def _raw_embeddings(batch):
    """Embeddings of the anchors inside the images, before their norm."""
    graphdef, _ = detclip.abstract(dataclasses.replace(tiny_model.CONFIG, similarity="dot"))
    params = {k: v for k, v in _batch_normalized()[2].params.items() if k != "region_norm"}
    run = jax.jit(lambda p, x: detclip.build(graphdef, p).encode_image(x).embeddings)
    anchors = box_ops.anchor_grid(64, 64, tiny_model.CONFIG.anchors)
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    found = np.asarray(run(params, batch.images), np.float64)
    return [
        x[(centers < size[::-1]).all(axis=1)] for x, size in zip(found, np.asarray(batch.sizes))
    ]


def _smaller(kind):
    sizes = np.int32([[64, 64], [40, 56], [0, 0], [64, 32]])
    return dataclasses.replace(make_batch(kind), sizes=sizes)


@pytest.mark.parametrize("kind", ["detection", "image_text"])
def test_running_statistics_move_towards_those_of_the_batch(kind):
    """Over all anchors inside images; with micro-batches, the mean over the micro-batches."""
    _, run, start = _batch_normalized()
    batch = _smaller(kind)
    raw = _raw_embeddings(batch)
    for count, pieces in ((1, [raw]), (2, [raw[:2], raw[2:]])):
        after, metrics = jax.jit(functools.partial(run, micro_batches={kind: count}))(start, batch)
        assert "region_statistics" not in metrics
        pieces = [np.concatenate(piece) for piece in pieces]
        norm = after.params["region_norm"]
        mean = np.mean([piece.mean(axis=0) for piece in pieces], axis=0)
        variance = np.mean([piece.var(axis=0) for piece in pieces], axis=0)
        np.testing.assert_allclose(norm["mean"], 0.03 * mean, rtol=1e-3, atol=1e-7)
        np.testing.assert_allclose(norm["variance"], 0.97 + 0.03 * variance, rtol=1e-5)
    broken = start.params | {"logit_scale": jnp.asarray(jnp.nan)}
    skipped, _ = jax.jit(functools.partial(run, micro_batches={}))(
        dataclasses.replace(start, params=broken), batch
    )
    jax.tree.map(
        np.testing.assert_array_equal, skipped.params["region_norm"], start.params["region_norm"]
    )


def test_four_devices_share_the_statistics_of_the_global_batch():
    _, run, start = _batch_normalized()
    batch, devices = _smaller("detection"), sharding.make_mesh(4, 1)
    layout, whole = sharding.batch_shardings(devices, batch), sharding.replicated(devices)
    shardings = sharding_lib.state_shardings(devices, start)
    sharded = jax.jit(
        functools.partial(run, micro_batches={}, replicated=whole),
        in_shardings=(shardings, layout), out_shardings=(shardings, whole),
    )  # fmt: skip
    four, metrics = sharded(jax.device_put(start, shardings), prefetch.put_batch(batch, layout))
    raw = np.concatenate(_raw_embeddings(batch))
    np.testing.assert_allclose(
        four.params["region_norm"]["mean"], 0.03 * raw.mean(axis=0), rtol=1e-3, atol=1e-7
    )
    one, expected = jax.jit(functools.partial(run, micro_batches={}))(start, batch)
    assert float(metrics["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-5)


def test_batch_normalized_regions_by_the_definition():
    """In training by the batch's statistics, at inference by the running ones."""
    graphdef, _, start = _batch_normalized()
    batch, random = _smaller("detection"), np.random.default_rng(0)
    norm = {name: random.uniform(0.5, 2, 8) for name in ("scale", "bias", "mean", "variance")}
    params = start.params | {"region_norm": jax.tree.map(jnp.float32, norm)}
    raw = _raw_embeddings(batch)
    together = np.concatenate(raw)
    for training in (True, False):
        encode = lambda p, b, t=training: detclip.build(graphdef, p).encode_image(
            b.images, None, b.sizes, training=t
        )
        found = jax.jit(encode)(params, batch).embeddings[0]
        mean, variance = norm["mean"], norm["variance"]
        if training:
            mean, variance = together.mean(axis=0), together.var(axis=0)
        expected = (raw[0] - mean) / (variance + 1e-3) ** 0.5 * norm["scale"] + norm["bias"]
        # The last anchor, of stride 128, has its center on the edge of the canvas.
        np.testing.assert_allclose(found[:-1], expected, rtol=1e-4, atol=1e-4)
