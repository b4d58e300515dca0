"""AdamW (paper §4.1) with rules for the learning rate and weight decay of each parameter."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.parameters import match_rules
from detclipv2_jax.training.auto_step import AutoStepConfig

# Parameters without weight decay: biases, norms with their statistics, Swin's bias tables, learned
# positions and scalars. The others are the kernels of convolutions and dense layers, and the token
# embedding.
NO_DECAY = r".*(bias|scales?|position.*|relative_position_bias_table|region_norm/.*)"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; the defaults are the paper's (§4.1) except where marked [ours]."""

    learning_rate: float = 2.8e-4  # the peak, after the warm-up
    warmup_steps: int = 1000  # steps in which the rate rises linearly from 0
    final_fraction: float = 0.0  # learning rate at the end of the cosine, as a share of its peak
    # Instead of the cosine: the learning rate falls tenfold at each of these shares of the run.
    drops: tuple[float, ...] = ()
    # Instead of both: the rate falls where the validation score stalls, and the run ends early.
    auto_step: AutoStepConfig = AutoStepConfig()
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.999  # AdamW's decay of the mean squared gradient
    weight_decay: float = 0.05  # share of a parameter subtracted per unit of learning rate
    clip_norm: float = 10.0  # global norm of the gradient [ours]
    # Upper limit of exp(a), the scale of the similarity: after each step a is set back to it, as in
    # CLIP. [ours]
    max_scale: float = 100.0
    # A step whose gradient norm is above this factor times the usual norm of its kind is skipped
    # (spikes.py); 0 skips none. [ours]
    spike_factor: float = 20.0
    spike_after: int = 100  # steps of a kind before its usual norm counts as known [ours]
    ema_decay: float = 0.9998  # of the moving average of the parameters, which is evaluated [ours]
    # (regular expression on a parameter's path, factor on its learning rate or weight decay): the
    # first that matches counts.
    lr_rules: tuple[tuple[str, float], ...] = ((r"text/.*", 0.1), (r".*", 1.0))
    # As `lr_rules`, on the weight decay.
    decay_rules: tuple[tuple[str, float], ...] = ((NO_DECAY, 0.0), (r".*", 1.0))

    def __post_init__(self):
        if not all(0 < share < 1 for share in self.drops):
            raise UserError(
                f"config.optimizer.drops is {self.drops}: each must be a share of the run, above 0 "
                "and below 1."
            )
        if self.auto_step.on and self.drops:
            raise UserError(
                f"config.optimizer.auto_step.on is True, and drops is {self.drops}. Choose one."
            )
        if self.max_scale <= 0:
            raise UserError(
                f"config.optimizer.max_scale is {self.max_scale}. Choose a positive number."
            )


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[Array], Float[Array, ""]]:
    """Return the schedule: step -> learning rate.

    Linear warm-up from 0, then half a cosine that ends at `total_steps`, or the tenfold drops of
    `config.drops`. With `config.auto_step` it stays at the peak, and the state has a factor.
    """
    warmup = min(config.warmup_steps, max(total_steps - 1, 0))
    if config.drops or config.auto_step.on:
        drops = jnp.asarray([round(share * total_steps) for share in config.drops])
        level = lambda step: config.learning_rate * 0.1 ** jnp.sum(step >= drops)
        return lambda step: level(step) * jnp.minimum(1.0, step / warmup if warmup else 1.0)
    # Its type allows numbers instead of arrays; for an array it returns an array.
    return optax.warmup_cosine_decay_schedule(  # pyright: ignore[reportReturnType]
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, 1),
        end_value=config.final_fraction * config.learning_rate,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square, shaped like the parameters."""

    mean: PyTree
    square: PyTree


class Updated(NamedTuple):
    """Parameters, their moving average and the moments after a step."""

    params: PyTree
    ema: PyTree
    moments: Moments


class _Scalars(NamedTuple):
    """The scalars of a step, the same for all parameters."""

    clip: Float[Array, ""]  # factor on the gradient
    ema_rate: Float[Array, ""]  # 1 - decay of the moving average
    mean_correction: Float[Array, ""]  # 1 / (1 - β₁ᵗ)
    learning_rate: Float[Array, ""]
    square_correction: Float[Array, ""]  # 1 / (1 - β₂ᵗ)


class _Leaf(NamedTuple):
    """One parameter, its moving average and its moments; or trees of them."""

    param: PyTree
    ema: PyTree
    mean: PyTree
    square: PyTree


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The update rule of a run, with factors on learning rate and decay for every parameter.

    It equals optax's `clip_by_global_norm` and `adamw` with a factor per parameter (a test compares
    them). It is written out so that the scalars of a step are computed once: in chained optax
    transformations XLA computes the schedule and the bias corrections again in the loops of every
    parameter, which took half of a program's compilation time.
    """

    config: OptimizerConfig
    schedule: Callable[[Array], Float[Array, ""]]
    factors: PyTree  # on the learning rate: a float per parameter
    decays: PyTree  # on the weight decay: a float per parameter

    def init(self, params: PyTree) -> Moments:
        """Return zero moments."""
        return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    @jax.named_scope("optimizer")
    def update(
        self,
        params: PyTree,
        ema: PyTree,
        moments: Moments,
        gradients: PyTree,
        norm: Float[Array, ""],
        step: Int[Array, ""],
        apply: Bool[Array, ""],
        rate_factor: Float[Array, ""] | None = None,
    ) -> Updated:
        """Return parameters, moving average and moments after a step.

        For each parameter p with gradient g, in step t = step + 1:

            g ← g · min(1, clip_norm / norm)
            m ← β₁ m + (1 - β₁) g                 v ← β₂ v + (1 - β₂) g²
            d = m / (1 - β₁ᵗ) / (√(v / (1 - β₂ᵗ)) + 1e-8)
            p ← p - rate(step) · factor · (d + weight_decay · decay · p)
            ema ← ema + (1 - min(ema_decay, t / (9 + t))) · (p - ema)

        Args:
          params: the parameters.
          ema: their moving average.
          moments: m and v.
          gradients: the gradient by the parameters.
          norm: the global norm of `gradients`.
          step: the number of steps before this one.
          apply: False leaves everything unchanged.
          rate_factor: on the rate of all parameters (auto_step.py); None for 1.
        """
        old = _Leaf(params, ema, moments.mean, moments.square)

        def changed(scalars: _Scalars, old: _Leaf, gradients: PyTree) -> PyTree:
            leaf = functools.partial(self._update_leaf, scalars)
            return jax.tree.map(leaf, *old, gradients, self.factors, self.decays)

        def unchanged(_: _Scalars, old: _Leaf, gradients: PyTree) -> PyTree:
            return jax.tree.map(_Leaf, *old)

        scalars = self._scalars(norm, step)
        if rate_factor is not None:
            scalars = scalars._replace(learning_rate=scalars.learning_rate * rate_factor)
        leaves = jax.lax.cond(apply, changed, unchanged, scalars, old, gradients)
        outer, inner = jax.tree.structure(params), jax.tree.structure(_Leaf(0, 0, 0, 0))
        new = jax.tree.transpose(outer, inner, leaves)
        return Updated(new.param, new.ema, Moments(new.mean, new.square))

    def _scalars(self, norm: Float[Array, ""], step: Int[Array, ""]) -> _Scalars:
        c = self.config
        t = (step + 1).astype(jnp.float32)
        return _Scalars(
            clip=jnp.minimum(1.0, c.clip_norm / jnp.maximum(norm, 1e-12)),
            learning_rate=self.schedule(step),
            mean_correction=1.0 / (1.0 - c.beta1**t),
            square_correction=1.0 / (1.0 - c.beta2**t),
            # The decay warms up with the run, so that the average forgets the random start.
            ema_rate=1.0 - jnp.minimum(c.ema_decay, t / (9.0 + t)),
        )

    def _update_leaf(
        self,
        scalars: _Scalars,
        param: Array,
        ema: Array,
        mean: Array,
        square: Array,
        gradient: Array,
        factor: float,
        decay: float,
    ) -> _Leaf:
        c = self.config
        gradient = gradient * scalars.clip
        mean = c.beta1 * mean + (1.0 - c.beta1) * gradient
        square = c.beta2 * square + (1.0 - c.beta2) * jnp.square(gradient)
        direction = (
            mean * scalars.mean_correction / (jnp.sqrt(square * scalars.square_correction) + 1e-8)
        )
        new = param - scalars.learning_rate * factor * (direction + c.weight_decay * decay * param)
        with jax.named_scope("moving_average"):
            ema = ema + scalars.ema_rate * (new - ema)
        return _Leaf(new, ema, mean, square)


def create(config: OptimizerConfig, params: PyTree, total_steps: int) -> AdamW:
    """Return the update rule of a run; of `params` only the paths are read."""
    return AdamW(
        config=config,
        schedule=learning_rate(config, total_steps),
        factors=match_rules(config.lr_rules, params, "learning-rate"),
        decays=match_rules(config.decay_rules, params, "weight-decay"),
    )
