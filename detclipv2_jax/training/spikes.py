"""Steps whose gradient is far above the usual, told from what each kind of data has shown."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.data.index import KINDS, Kind
from detclipv2_jax.training.optimizer import OptimizerConfig

IN_ROW = 5  # spikes of a kind in a row, after which the next such norm counts as its new level
_MEMORY = 100  # steps of a kind over which its norm is averaged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UsualNorms:
    """Each kind's usual gradient norm, in the order of `KINDS`."""

    log_norm: Float[Array, " kinds"]  # mean of the logarithm
    seen: Int[Array, " kinds"]  # finite steps in that mean
    spiked_in_row: Int[Array, " kinds"]


def create() -> UsualNorms:
    """Before the first step."""
    count = (len(KINDS),)
    return UsualNorms(
        jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32)
    )


def judge(
    norms: UsualNorms, kind: Kind, norm: Float[Array, ""], config: OptimizerConfig
) -> tuple[Bool[Array, ""], UsualNorms]:
    """Is this norm a spike for its kind? And the norms with it taken in.

    A spike is above `spike_factor` times the usual norm, once `spike_after` steps of the kind have
    been seen. It goes into the mean as a norm of just that factor would, so one spike hardly moves
    it (3 % at a factor of 20) and many do. A change that lasts blocks at most `IN_ROW` = 5 steps of
    its kind in a row, however large it is: the norm after them is no spike, and the mean starts
    anew from it. A norm that is not finite is no spike and changes nothing.
    """
    place, finite = KINDS.index(kind), jnp.isfinite(norm)
    mean, seen, in_row = norms.log_norm[place], norms.seen[place], norms.spiked_in_row[place]
    log_norm = jnp.log(jnp.maximum(norm, 1e-12))

    limit = math.log(config.spike_factor) if config.spike_factor > 0 else jnp.inf
    high = finite & (seen >= config.spike_after) & (log_norm > mean + limit)
    spiked, anew = high & (in_row < IN_ROW), high & (in_row >= IN_ROW)

    reach = jnp.where(seen >= config.spike_after, limit, jnp.inf)
    change = jnp.clip(log_norm - mean, -reach, reach) / jnp.minimum(seen + 1, _MEMORY)
    mean = jnp.where(anew, log_norm, mean + change)
    seen = jnp.where(anew, 1, seen + 1)
    in_row = jnp.where(spiked, in_row + 1, 0)

    def put(array: Array, value: Array) -> Array:
        return jnp.where(finite, array.at[place].set(value), array)

    return spiked, UsualNorms(
        put(norms.log_norm, mean), put(norms.seen, seen), put(norms.spiked_in_row, in_row)
    )
