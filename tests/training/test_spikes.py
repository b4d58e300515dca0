"""Spike detection on synthetic gradient norms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.training import spikes
from detclipv2_jax.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(spike_factor=20.0, spike_after=100)


@functools.cache
def rule(kind, config):
    return jax.jit(functools.partial(spikes.detect, kind=kind, config=config))


def follow(values, norms=None, kind="detection", config=CONFIG):
    """Return (which values are spikes, the norms after them)."""
    norms, found = norms or spikes.create(), []
    for value in values:
        spiked, norms = rule(kind, config)(norms, norm=jnp.float32(value))
        found.append(bool(spiked))
    return found, norms


def usual(norms, kind="detection"):
    return float(np.exp(norms.log_norm[spikes.KINDS.index(kind)]))


@functools.cache
def settled():
    """The norms after 100 steps around a norm of 2, distributed as in training."""
    values = 2 * np.exp(np.random.default_rng(0).normal(0, 0.5, 100))
    found, norms = follow(values)
    assert not any(found)
    np.testing.assert_allclose(usual(norms), np.exp(np.log(values).mean()), rtol=1e-5)
    return norms


def test_one_spike_is_detected_and_hardly_moves_the_usual_norm():
    before = usual(settled())
    found, norms = follow([1e6, 2.0, 15 * before, 25 * before], settled())
    assert found == [True, False, False, True]
    _, norms = follow([1e30], settled())
    np.testing.assert_allclose(usual(norms), before * 20**0.01, rtol=1e-5)


def test_nothing_is_a_spike_before_the_usual_norm_is_known_or_without_a_factor():
    assert not any(follow([1e-3] * 99 + [1e3])[0])
    assert follow([1e-3] * 100 + [1e3])[0][-1]
    assert not any(follow([1e3], settled(), config=OptimizerConfig(spike_factor=0.0))[0])


def test_each_kind_has_its_own_usual_norm():
    found, norms = follow([200.0] * 5, settled(), kind="image_text")
    assert not any(found)
    assert follow([200.0], norms)[0] == [True]
    assert usual(norms, "image_text") == pytest.approx(200, rel=1e-5)


@pytest.mark.parametrize("level", [50.0, 1e4, 1e30])
def test_a_lasting_change_of_level_is_accepted_after_five_steps(level):
    found, norms = follow([level] * 200, settled())
    assert found == [True] * spikes.MAX_IN_ROW + [False] * (200 - spikes.MAX_IN_ROW)
    assert spikes.MAX_IN_ROW == 5
    assert usual(norms) == pytest.approx(level, rel=1e-4)
    assert follow([level / 1e3, 30 * level], norms)[0] == [False, True]


def test_frequent_spikes_raise_the_usual_norm():
    """Four of five norms are far above: never five in a row, but not skipped for ever."""
    found, _ = follow(([2.0] + [300.0] * 4) * 100, settled())
    assert sum(found[:10]) == 8 and not any(found[-100:])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_changes_nothing(value):
    found, norms = follow([value] * 3, settled())
    assert not any(found)
    jax.tree.map(np.testing.assert_array_equal, norms, settled())
    # It does not end a row of spikes either.
    found, norms = follow([1e3] * 3 + [value] + [1e3] * 3, settled())
    assert found == [True] * 3 + [False] + [True] * 2 + [False]


def test_a_norm_of_zero_keeps_everything_finite():
    found, norms = follow([0.0] * 3 + [2.0] * 300, settled())
    assert not any(found) and usual(norms) == pytest.approx(2, rel=0.1)
    assert all(np.isfinite(getattr(norms, f.name)).all() for f in dataclasses.fields(norms))
