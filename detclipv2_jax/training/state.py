"""The training state: everything that a step reads and changes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from detclipv2_jax.training import spikes
from detclipv2_jax.training.optimizer import AdamW, Moments
from detclipv2_jax.training.spikes import UsualNorms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of a run, as a checkpoint stores it.

    The data needs nothing stored: it is a function of the config's seed and `step`.
    """

    step: Int[Array, ""]  # completed steps
    params: PyTree
    ema: PyTree  # moving average of the parameters; this is evaluated and exported
    moments: Moments
    skipped: Int[Array, ""]  # skipped updates: loss or gradient not finite, or a spike
    skipped_in_row: Int[Array, ""]
    spiked: Int[Array, ""]  # those of `skipped` that were spikes
    norms: UsualNorms  # usual gradient norm of each kind, which spikes are compared with
    # On the learning rate, by the validation score (auto_step.py); None: the schedule alone.
    rate_factor: Float[Array, ""] | None = None


def create(params: PyTree, optimizer: AdamW) -> TrainState:
    """Return the state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.array, params),  # a copy: the step donates the buffers of both
        moments=optimizer.init(params),
        skipped=jnp.array(zero),
        skipped_in_row=jnp.array(zero),
        spiked=jnp.array(zero),
        norms=spikes.create(),
        rate_factor=jnp.ones(()) if optimizer.config.auto_step.on else None,
    )
