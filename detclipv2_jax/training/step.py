"""One training step: loss, gradient, update."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, PyTree

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training import accumulate, spikes
from detclipv2_jax.training.objective import LossConfig, Scalars
from detclipv2_jax.training.optimizer import AdamW
from detclipv2_jax.training.state import TrainState

_MOMENTUM = 0.03  # of the running statistics of batch-normalized regions (YOLO-World)


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
) -> tuple[TrainState, Scalars]:
    """Update the state with one global batch of one kind.

    If the loss or gradient is not finite, or the gradient is a spike (`spikes.detect`), the update
    is skipped: only the counters and the usual norms change.

    Args:
      state: the state before the step.
      batch: the global batch.
      graphdef: of the model.
      optimizer: the update rule.
      config: of the losses.
      seed: of the run; with the step's number it determines the drop path.
      micro_batches: kind -> into how many micro-batches each device splits its images. They are
        computed one after another; the update is that of the whole batch.
      replicated: sharding of an array that every device holds; None on one device.

    Returns:
      The new state, and scalars for the log: `loss`, its terms, `gradient_norm`, `scale` and
      `bias` of the similarity, `scale_gradient`, `skipped`, `skipped_in_row` and `spiked`.
      `scale_gradient` is the derivative by a = log(scale), which all kinds share: it shows which
      kind of data moves the scale, and where to.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)

    with jax.named_scope("loss_and_gradient"):
        loss, gradient = accumulate.loss_and_gradient(
            state.params, batch, key, graphdef, config, micro_batches.get(batch.kind, 1), replicated
        )
    with jax.named_scope("gradient_norm"):
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
        spiked, norms = spikes.detect(
            state.norms, batch.kind, jnp.where(finite, norm, jnp.nan), optimizer.config
        )
    good = finite & ~spiked
    updated = optimizer.update(
        state.params, state.ema, state.moments, gradient, norm, state.step, good, state.rate_factor
    )
    terms, params = dict(loss.terms), updated.params
    if statistics := terms.pop("region_statistics", None):
        params = _move_running_statistics(params, statistics, good)
    bad = (~good).astype(jnp.int32)
    params, ema = (_limit_scale(tree, optimizer.config.max_scale) for tree in (params, updated.ema))
    state = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema,
        moments=updated.moments,
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + bad) * bad,
        spiked=state.spiked + spiked,
        norms=norms,
        rate_factor=state.rate_factor,
    )
    metrics = {
        "loss": loss.total,
        **terms,
        "gradient_norm": norm,
        "scale": jnp.exp(params["logit_scale"]),
        "bias": params["logit_bias"],
        "scale_gradient": gradient["logit_scale"],
        "skipped": state.skipped,
        "skipped_in_row": state.skipped_in_row,
        "spiked": state.spiked,
    }
    return state, metrics


def _limit_scale(params: PyTree, max_scale: float) -> PyTree:
    """Set a back to log(max_scale) where exp(a) is above `max_scale`.

    The parameter is limited rather than its use, so that it cannot move far beyond the limit while
    nobody sees it: the first step with a positive gradient brings the scale back.
    """
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], math.log(max_scale))}


def _move_running_statistics(params: PyTree, statistics: PyTree, good: Array) -> PyTree:
    """Move the running mean and variance of the batch norm of regions towards a batch's.

    Args:
      params: with "region_norm".
      statistics: sums over micro-batches of their mean and variance, and their number.
      good: False leaves the parameters unchanged.
    """
    norm = dict(params["region_norm"])
    for name in ("mean", "variance"):
        moved = norm[name] + _MOMENTUM * (statistics[name] / statistics["pieces"] - norm[name])
        norm[name] = jnp.where(good, moved, norm[name])
    return params | {"region_norm": norm}
