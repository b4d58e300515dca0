"""The learning rate falls where the validation score stalls, and the run ends early."""

import dataclasses
import math

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import optimizer
from detclipv2_jax.training.auto_step import AutoStep, AutoStepConfig
from detclipv2_jax.training.optimizer import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=4e-5, warmup_steps=2, auto_step=AutoStepConfig(on=True))


def rates(scores, config=CONFIG):
    """Return the rate after each evaluation, and the number of evaluations until the end."""
    state, result = AutoStep(), []
    for score in scores:
        state = state.after(score, config)
        result.append(config.learning_rate * state.factor)
        if state.is_over:
            break
    return result


def test_the_rate_falls_after_five_epochs_and_the_run_ends_eight_after_the_least_rate():
    """Yao et al. 2023: t₁ = 5, down to 1e-8, then t₂ = 8. Written out by hand."""
    found = rates([0.5] + [0.4] * 100)
    expected = [4e-5] * 5 + [4e-6] * 5 + [4e-7] * 5 + [4e-8] * 5 + [1e-8] * 9
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_better_score_starts_the_patience_again():
    scores = [0.1, 0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.2]
    np.testing.assert_allclose(rates(scores), [4e-5] * 10)
    np.testing.assert_allclose(rates([*scores, 0.2])[-1], 4e-6)


def test_an_undefined_score_is_no_improvement():
    np.testing.assert_allclose(rates([math.nan] * 5), [4e-5] * 4 + [4e-6])


def test_a_checkpoint_keeps_where_the_schedule_stands():
    state = AutoStep()
    for score in (0.3, 0.2, 0.2):
        state = state.after(score, CONFIG)
    assert AutoStep.from_meta(dataclasses.asdict(state)) == state
    assert state == AutoStep(factor=1.0, best=0.3, stale=2)


def test_the_schedule_itself_stays_at_its_peak():
    schedule = optimizer.learning_rate(CONFIG, 1000)
    assert [float(schedule(step)) for step in (0, 1, 2, 999)] == pytest.approx(
        [0, 2e-5, 4e-5, 4e-5]
    )


def test_contradictions_are_refused():
    with pytest.raises(UserError, match="auto_step.on is True, and drops is"):
        dataclasses.replace(CONFIG, drops=(0.5,))
    with pytest.raises(UserError, match="auto_step.patience is 0"):
        AutoStepConfig(patience=0)
