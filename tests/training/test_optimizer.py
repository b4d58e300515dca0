"""The update rule against optax, its schedules and its rules."""

import collections
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import detclip, parameters, sizes
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import optimizer, sharding
from detclipv2_jax.training.optimizer import OptimizerConfig
from detclipv2_jax.training.recipes import load


def _params():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {
        "backbone": {"dense": {"kernel": normal(3, 4), "bias": normal(4)}},
        "text": {"dense": {"kernel": normal(4, 2)}},
        "logit_scale": normal(),
    }


CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=3, clip_norm=1.0, weight_decay=0.3)


def test_update_equals_the_same_chain_of_optax_transformations():
    params, total = _params(), 20
    rule = optimizer.create(CONFIG, params, total)
    factors = jax.tree.map(lambda _: 1.0, params) | {"text": {"dense": {"kernel": 0.1}}}
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    chain = optax.chain(
        optax.clip_by_global_norm(CONFIG.clip_norm),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, total), weight_decay=0.3, mask=mask
        ),
    )
    ours, theirs = params, params
    ema, moments, state = params, rule.init(params), chain.init(params)
    update = jax.jit(rule.update)
    rng = np.random.default_rng(1)
    for step in range(8):
        # Some gradients are clipped (norm above 1), others are not.
        size = 10.0 ** (step % 3 - 2)
        grads = jax.tree.map(lambda p, s=size: jnp.float32(rng.normal(size=p.shape) * s), params)
        before = ours
        ours, ema, moments = update(
            ours, ema, moments, grads, optax.tree.norm(grads), jnp.int32(step), jnp.bool_(True)
        )
        updates, state = chain.update(grads, state, before)
        updates = jax.tree.map(jnp.multiply, updates, factors)
        theirs = optax.apply_updates(before, updates)
        close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-7)
        jax.tree.map(close, ours, theirs)


def test_a_skipped_update_changes_nothing():
    params = _params()
    rule = optimizer.create(CONFIG, params, 20)
    grads = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    old = optimizer.Updated(params, params, rule.init(params))
    nan, no = jnp.float32(jnp.nan), jnp.bool_(False)
    new = jax.jit(rule.update)(*old, grads, nan, jnp.int32(5), no)
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_moving_average_follows_its_formula():
    params = {"x": jnp.zeros(())}
    config = dataclasses.replace(CONFIG, ema_decay=0.6)
    rule = optimizer.create(config, params, 100)
    ema, moments, expected = params, rule.init(params), 0.0
    for step in range(12):
        grads = {"x": jnp.asarray(-1.0)}
        params, ema, moments = rule.update(
            params, ema, moments, grads, jnp.asarray(1.0), jnp.asarray(step), jnp.asarray(True)
        )
        decay = min(0.6, (step + 1) / (step + 10))
        expected = decay * expected + (1 - decay) * float(params["x"])
        np.testing.assert_allclose(ema["x"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0), (200, 0.0)]
)
def test_schedule_warms_up_and_follows_half_a_cosine(step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    np.testing.assert_allclose(optimizer.learning_rate(config, 110)(step), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (59, 1.0), (60, 0.1), (84, 0.1), (85, 0.01)],
)
def test_schedule_falls_tenfold_at_the_given_shares_of_the_run(step, expected):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10, drops=(0.6, 0.85))
    np.testing.assert_allclose(optimizer.learning_rate(config, 100)(step), expected, atol=1e-6)
    at_once = OptimizerConfig(learning_rate=1.0, warmup_steps=0, drops=(0.5,))
    assert float(optimizer.learning_rate(at_once, 100)(0)) == 1.0
    with pytest.raises(UserError, match="drops.*must be a share"):
        OptimizerConfig(drops=(1.0,))


@pytest.mark.parametrize("total", [1, 2, 5])
def test_schedule_of_a_run_shorter_than_its_warm_up_stays_finite(total):
    schedule = optimizer.learning_rate(OptimizerConfig(learning_rate=1.0, warmup_steps=1000), total)
    assert np.isfinite([float(schedule(step)) for step in range(total + 1)]).all()


def test_rules_cover_the_model_as_in_the_paper():
    _, params = detclip.abstract(sizes.NANO)
    rule = optimizer.create(OptimizerConfig(), params, 10)
    rates, decays = (parameters.parameter_paths(tree) for tree in (rule.factors, rule.decays))
    shapes = {path: leaf.shape for path, leaf in parameters.parameter_paths(params).items()}
    for path, shape in shapes.items():
        assert rates[path] == (0.1 if path.startswith("text/") else 1.0), path
        if len(shape) <= 1:
            assert decays[path] == 0.0, path
    kept = {path for path, value in decays.items() if value == 0.0 and len(shapes[path]) > 1}
    assert kept and all("position" in path for path in kept)


def _table(config):
    """Learning rate, decay and sharding of the parameters, numbers in paths replaced by *."""
    _, params = detclip.abstract(config.model)
    rule = optimizer.create(config.optimizer, params, 10)
    specs = parameters.match_rules(sharding.PARAMETER_RULES, params, "sharding")
    words = {None: "whole", -1: "last axis"}
    specs = jax.tree.map(words.get, specs, is_leaf=lambda axis: axis is None)
    trees = (rule.factors, rule.decays, specs)
    columns = [parameters.parameter_paths(tree) for tree in trees]
    rows = collections.Counter(
        (re.sub(r"(?<=/)\d+(?=/)", "*", path), *(column[path] for column in columns))
        for path in columns[0]
    )
    head = f"{'parameters':<68}{'count':>6}{'rate':>6}{'decay':>7}  sharding"
    lines = [
        f"{path:<68}{count:>6}{config.optimizer.learning_rate * rate:>9.2g}"
        f"{config.optimizer.weight_decay * decay:>7g}  {spec}"
        for (path, rate, decay, spec), count in sorted(rows.items())
    ]
    return "\n".join([head.replace("  rate", "     rate"), *lines]) + "\n"


def test_every_parameter_of_swin_t_has_the_rules_of_the_stored_table():
    """After an intended change of a rule, store the printed table in parameter_rules.txt."""
    table = _table(config_lib.parse(load("pretrain").get_config("swin_t").to_dict()))
    print(table)
    assert table == (Path(__file__).parent / "parameter_rules.txt").read_text()


def test_the_rules_of_centerness_are_those_of_the_other_proposal_scores():
    config = config_lib.parse(load("pretrain").get_config("swin_t").to_dict())
    head = dataclasses.replace(config.model.head, proposal_scores=("foreground", "iou"))
    model = dataclasses.replace(config.model, head=head)
    before, after = (
        _table(c).splitlines() for c in (config, dataclasses.replace(config, model=model))
    )
    named = lambda name: [
        re.sub("head/" + name, "head/x", line).split()
        for line in after
        if line.startswith(f"head/{name}/")
    ]
    assert set(before) < set(after) and len(after) == len(before) + 4
    assert len(named("iou")) == 2 and named("iou") == named("foreground") == named("centerness")


def test_a_parameter_that_no_rule_matches_is_named():
    with pytest.raises(UserError, match="logit_scale"):
        parameters.match_rules((("backbone/.*", 1.0), ("text/.*", 1.0)), _params(), "test")


def test_the_first_rule_that_matches_wins():
    rules = ((".*kernel", "a"), ("text/.*", "b"), (".*", "c"))
    found = parameters.match_rules(rules, _params(), "test")
    assert found["text"]["dense"]["kernel"] == "a"
    assert found["backbone"]["dense"]["bias"] == "c"
