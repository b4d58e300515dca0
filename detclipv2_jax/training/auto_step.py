"""Auto-step: the learning rate falls where the validation score stalls, and the run ends early.

The schedule of ODinW13 fine-tuning (Yao et al. 2023, appendix): the rate is divided by ten when the
score has not improved for t₁ = 5 epochs; once the rate has reached 1e-8, the run ends after t₂ = 8
epochs without improvement. An evaluation ends every epoch. The best checkpoint is kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from detclipv2_jax.common.errors import UserError

if TYPE_CHECKING:
    from detclipv2_jax.training.optimizer import OptimizerConfig
    from detclipv2_jax.training.state import TrainState

DROP = 0.1  # factor on the learning rate


@dataclasses.dataclass(frozen=True)
class AutoStepConfig:
    """When the rate falls and when the run ends; the defaults are the paper's."""

    on: bool = False  # instead of the cosine and of `drops`
    patience: int = 5  # t₁: epochs without a better score before the rate falls tenfold
    least_rate: float = 1e-8  # the rate does not fall below
    exit_patience: int = 8  # t₂: epochs without a better score at the least rate that end the run

    def __post_init__(self):
        for field in ("patience", "exit_patience"):
            if getattr(self, field) < 1:
                raise UserError(
                    f"config.optimizer.auto_step.{field} is {getattr(self, field)}. Choose 1 or "
                    "more."
                )
        if self.least_rate <= 0:
            raise UserError(
                f"config.optimizer.auto_step.least_rate is {self.least_rate}. Choose a positive "
                "number."
            )


@dataclasses.dataclass(frozen=True)
class AutoStep:
    """Where the schedule stands; a checkpoint stores it.

    Attributes:
        factor: on the learning rate.
        best: the highest score so far.
        stale: evaluations since then, or since the rate fell.
        is_over: whether the run has ended.
    """

    factor: float = 1.0
    best: float = float("-inf")
    stale: int = 0
    is_over: bool = False

    @classmethod
    def from_meta(cls, values: Mapping[str, Any]) -> "AutoStep":
        """Return what `dataclasses.asdict` stored."""
        return cls(**values)

    def after(self, score: float, optimizer: "OptimizerConfig") -> "AutoStep":
        """Return the schedule after another evaluation; a NaN score is no improvement."""
        config = optimizer.auto_step
        if score > self.best:
            return dataclasses.replace(self, best=score, stale=0)
        least = min(1.0, config.least_rate / optimizer.learning_rate)
        stale = self.stale + 1
        if self.factor <= least:
            return dataclasses.replace(self, stale=stale, is_over=stale >= config.exit_patience)
        if stale < config.patience:
            return dataclasses.replace(self, stale=stale)
        return dataclasses.replace(self, factor=max(self.factor * DROP, least), stale=0)

    def applied(self, state: "TrainState") -> "TrainState":
        """Return the state with this schedule's factor on its devices."""
        factor = jax.device_put(np.float32(self.factor), state.step.sharding)
        return dataclasses.replace(state, rate_factor=factor)
