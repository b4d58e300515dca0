"""What a run carries from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from detclipv2_jax.training import spikes
from detclipv2_jax.training.optimizer import AdamW, Moments
from detclipv2_jax.training.spikes import UsualNorms


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step reads and writes; with the data plan's (seed, step) it is the whole run."""

    step: Int[Array, ""]  # steps done
    params: PyTree
    ema: PyTree  # moving average of the parameters, the ones that are evaluated and shipped
    moments: Moments
    skipped: Int[Array, ""]  # updates left out: a loss or gradient not finite, or a spike
    skipped_in_row: Int[Array, ""]
    spiked: Int[Array, ""]  # those of them that were spikes
    norms: UsualNorms  # of each kind's gradient: what a spike is measured by


def create(params: PyTree, optimizer: AdamW) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.array, params),  # a copy of its own: the step donates both
        moments=optimizer.init(params),
        skipped=jnp.array(zero),
        skipped_in_row=jnp.array(zero),
        spiked=jnp.array(zero),
        norms=spikes.create(),
    )
