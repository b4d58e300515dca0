"""AdamW as in paper §4.1, with one rule a parameter for its learning rate and its weight decay."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.parameters import match_rules

# Parameters that weight decay would only hurt: biases, norms, Swin's bias tables, learned positions
# and scalars. The rest are the kernels of convolutions and dense layers, and the token embedding.
NO_DECAY = r".*(bias|scales?|position.*|relative_position_bias_table)"


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Paper §4.1: AdamW, 1000 warm-up steps, cosine, text side ×0.1. Clipping and EMA are ours."""

    learning_rate: float = 2.8e-4
    warmup_steps: int = 1000
    final_fraction: float = 0.0  # the cosine ends at this share of the peak
    # Instead of the cosine: at these shares of the run the rate falls to a tenth of what it was.
    drops: tuple[float, ...] = ()
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.05
    clip_norm: float = 10.0  # global norm of the gradient [ours]
    spike_factor: float = 20.0  # times its kind's usual norm: step skipped; 0: never [ours]
    spike_after: int = 100  # steps of a kind before its usual norm is known [ours]
    ema_decay: float = 0.9998  # moving average of the parameters, used to evaluate [ours]
    # (pattern on a parameter's path, factor on its learning rate or decay): the first that matches.
    lr_rules: tuple[tuple[str, float], ...] = ((r"text/.*", 0.1), (r".*", 1.0))
    decay_rules: tuple[tuple[str, float], ...] = ((NO_DECAY, 0.0), (r".*", 1.0))

    def __post_init__(self):
        if not all(0 < share < 1 for share in self.drops):
            raise UserError(
                f"config.optimizer.drops {self.drops} must be shares of the run in (0, 1)"
            )


def learning_rate(config: OptimizerConfig, total_steps: int) -> Callable[[Array], Float[Array, ""]]:
    """Linear warm-up from 0, then half a cosine that reaches its end at `total_steps`, or drops."""
    warmup = min(config.warmup_steps, max(total_steps - 1, 0))
    if config.drops:
        places = jnp.asarray([round(share * total_steps) for share in config.drops])
        level = lambda step: config.learning_rate * 0.1 ** jnp.sum(step >= places)
        return lambda step: level(step) * jnp.minimum(1.0, step / warmup if warmup else 1.0)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(total_steps, 1),
        end_value=config.final_fraction * config.learning_rate,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square."""

    mean: PyTree
    square: PyTree


@dataclasses.dataclass(frozen=True)
class AdamW:
    """The update rule of a run, with a factor on rate and on decay for every parameter.

    What optax's `clip_by_global_norm`, `adamw` and a factor a parameter would do together (a test
    holds it to that). Written out so that the step's scalars are computed once, outside the branch
    that updates: in chained transformations XLA computes the schedule and the bias corrections anew
    in every parameter's loops, which took half of the time that a program compiles.
    """

    config: OptimizerConfig
    schedule: Callable[[Array], Float[Array, ""]]
    factors: PyTree  # on the learning rate, a float a parameter
    decays: PyTree  # on the weight decay, a float a parameter

    def init(self, params: PyTree) -> Moments:
        """Zero moments."""
        return Moments(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(
        self,
        params: PyTree,
        ema: PyTree,
        moments: Moments,
        gradients: PyTree,
        norm: Float[Array, ""],
        step: Int[Array, ""],
        apply: Bool[Array, ""],
    ) -> tuple[PyTree, PyTree, Moments]:
        """Parameters, their average and the moments after one step; unchanged where not `apply`.

        `norm` is the global norm of `gradients`, `step` the number of steps before this one.
        """
        c = self.config
        count = (step + 1).astype(jnp.float32)
        scalars = {
            "clip": jnp.minimum(1.0, c.clip_norm / jnp.maximum(norm, 1e-12)),
            "rate": self.schedule(step),
            "mean": 1.0 / (1.0 - c.beta1**count),
            "square": 1.0 / (1.0 - c.beta2**count),
            # The average warms up with the run, so that it forgets the random start.
            "ema": 1.0 - jnp.minimum(c.ema_decay, count / (9.0 + count)),
        }

        def leaf(
            s: dict[str, Array], p: Array, e: Array, m: Array, v: Array, g: Array, factor, decay
        ) -> tuple[Array, Array, Array, Array]:
            g = g * s["clip"]
            mean = c.beta1 * m + (1.0 - c.beta1) * g
            square = c.beta2 * v + (1.0 - c.beta2) * jnp.square(g)
            direction = mean * s["mean"] / (jnp.sqrt(square * s["square"]) + 1e-8)
            new = p - s["rate"] * factor * (direction + c.weight_decay * decay * p)
            return new, e + s["ema"] * (new - e), mean, square

        def change(s: dict[str, Array], *old: PyTree) -> PyTree:
            return jax.tree.map(functools.partial(leaf, s), *old, self.factors, self.decays)

        def keep(_: dict[str, Array], *old: PyTree) -> PyTree:
            return jax.tree.map(lambda p, e, m, v, g: (p, e, m, v), *old)

        old = (params, ema, moments.mean, moments.square, gradients)
        results = jax.lax.cond(apply, change, keep, scalars, *old)
        outer, inner = jax.tree.structure(params), jax.tree.structure((0, 0, 0, 0))
        params, ema, mean, square = jax.tree.transpose(outer, inner, results)
        return params, ema, Moments(mean, square)


def create(config: OptimizerConfig, params: PyTree, total_steps: int) -> AdamW:
    """The update rule for these parameters; they may be abstract, only paths are read."""
    return AdamW(
        config=config,
        schedule=learning_rate(config, total_steps),
        factors=match_rules(config.lr_rules, params, "learning-rate"),
        decays=match_rules(config.decay_rules, params, "weight-decay"),
    )
