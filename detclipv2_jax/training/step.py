"""One training step: loss, gradient, update (paper §3)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training import accumulate, spikes
from detclipv2_jax.training.objective import LossConfig, Losses
from detclipv2_jax.training.optimizer import AdamW
from detclipv2_jax.training.state import TrainState


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: Any,
    optimizer: AdamW,
    config: LossConfig,
    seed: int,
    micro_batches: Mapping[str, int],
    replicated: NamedSharding | None = None,
) -> tuple[TrainState, Losses]:
    """One update on one global batch of one kind.

    `micro_batches` says for each kind into how many micro-batches each device's images are cut, to
    be forwarded one after another; the update is that of the whole batch. `replicated` is how all
    devices hold an array whole; None on one device.

    A step whose loss or gradient is not finite, or whose gradient is a spike (`spikes.judge`),
    changes nothing but the counters and the usual norms.

    Returns:
      The new state, and scalars: the total `loss`, its parts, the global norm of the gradient, the
      similarity's scale, `skipped`, `skipped_in_row` and `spiked`.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    (loss, figures), gradients = accumulate.loss_and_gradient(
        state.params, batch, key, graphdef, config, micro_batches.get(batch.kind, 1), replicated
    )
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    spiked, norms = spikes.judge(
        state.norms, batch.kind, jnp.where(finite, norm, jnp.nan), optimizer.config
    )
    good = finite & ~spiked
    params, ema, moments = optimizer.update(
        state.params, state.ema, state.moments, gradients, norm, state.step, good
    )
    bad = (~good).astype(jnp.int32)
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema,
        moments=moments,
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + bad) * bad,
        spiked=state.spiked + spiked,
        norms=norms,
    )
    metrics = {
        "loss": loss,
        **figures,
        "gradient_norm": norm,
        "scale": jnp.exp(params["logit_scale"]),
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "spiked": state.spiked,
    }
    return state, metrics
