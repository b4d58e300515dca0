"""Detection of spikes: steps whose gradient norm is far above the usual norm of their kind."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.data.index import KINDS, Kind
from detclipv2_jax.training.optimizer import OptimizerConfig

MAX_IN_ROW = 5  # after this many spikes of a kind in a row, the next norm is its new usual norm
_MEMORY = 100  # steps of a kind over which its norm is averaged


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UsualNorms:
    """The usual gradient norm of each kind, in the order of `KINDS`."""

    log_norm: Float[Array, " kinds"]  # running mean of the norm's logarithm
    seen: Int[Array, " kinds"]  # steps in that mean; those that were not finite do not count
    spiked_in_row: Int[Array, " kinds"]  # spikes since the last step that was none


def create() -> UsualNorms:
    """Return the norms before the first step."""
    count = (len(KINDS),)
    return UsualNorms(
        jnp.zeros(count, jnp.float32), jnp.zeros(count, jnp.int32), jnp.zeros(count, jnp.int32)
    )


def detect(
    norms: UsualNorms, kind: Kind, norm: Float[Array, ""], config: OptimizerConfig
) -> tuple[Bool[Array, ""], UsualNorms]:
    """Return whether a gradient norm is a spike for its kind, and the usual norms after it.

    A spike is above `spike_factor` times the usual norm, after `spike_after` steps of the kind. It
    enters the mean as a norm of exactly that factor, so that one spike hardly moves the mean (3 %
    at a factor of 20), and many spikes do. A lasting change of the norm blocks at most `MAX_IN_ROW`
    steps of its kind in a row, whatever its size: the norm after them is not a spike, and the mean
    restarts from it. A norm that is not finite is not a spike and changes nothing.
    """
    place, finite = KINDS.index(kind), jnp.isfinite(norm)
    mean, seen, in_row = norms.log_norm[place], norms.seen[place], norms.spiked_in_row[place]
    log_norm = jnp.log(jnp.maximum(norm, 1e-12))

    limit = math.log(config.spike_factor) if config.spike_factor > 0 else jnp.inf
    high = finite & (seen >= config.spike_after) & (log_norm > mean + limit)
    spiked, restarts = high & (in_row < MAX_IN_ROW), high & (in_row >= MAX_IN_ROW)

    reach = jnp.where(seen >= config.spike_after, limit, jnp.inf)
    change = jnp.clip(log_norm - mean, -reach, reach) / jnp.minimum(seen + 1, _MEMORY)
    mean = jnp.where(restarts, log_norm, mean + change)
    seen = jnp.where(restarts, 1, seen + 1)
    in_row = jnp.where(spiked, in_row + 1, 0)

    def put(array: Array, value: Array) -> Array:
        return jnp.where(finite, array.at[place].set(value), array)

    return spiked, UsualNorms(
        put(norms.log_norm, mean), put(norms.seen, seen), put(norms.spiked_in_row, in_row)
    )
