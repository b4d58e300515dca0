"""The state that a start of a run begins with: new, or from the newest checkpoint."""

import json
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.training import initialize, sharding
from detclipv2_jax.training import state as state_lib
from detclipv2_jax.training.auto_step import AutoStep
from detclipv2_jax.training.checkpointer import Checkpointer, abstract_state
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.optimizer import AdamW
from detclipv2_jax.training.state import TrainState


class Start(NamedTuple):
    """Where a start of a run begins."""

    state: TrainState  # on the devices
    shardings: TrainState
    seconds: dict[str, float]  # wall time by part up to the checkpoint (clock.py); {} of a new run
    auto_step: AutoStep | None  # None: the config has none


def new_or_resumed(
    config: RunConfig,
    params: PyTree,
    rule: AdamW,
    mesh: jax.sharding.Mesh,
    checkpointer: Checkpointer,
) -> Start:
    """Return the state of the newest checkpoint, or the initial state if there is none.

    Args:
        config: of the run.
        params: freshly created parameters. A new run loads the files of `config.init` into them.
        rule: the optimizer.
        mesh: the devices that hold the state.
        checkpointer: of the run.

    Raises:
        UserError: no checkpoint can be read, or one is of another model; a file of `config.init`
            is missing or does not fit, or a random parameter has a reduced learning rate.
    """
    is_new = checkpointer.latest is None
    if is_new:
        if config.init.model:
            initialize.check_same_function(config.model, config.init.model)
        params, origins = initialize.initialize(params, config.init)
        initialize.check_rates(params, origins, rule.factors)
        print(initialize.table(origins), end="\n" * bool(origins))
    state = state_lib.create(params, rule)
    shardings = sharding.state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    if is_new:
        return Start(state, shardings, {}, AutoStep() if config.optimizer.auto_step.on else None)
    state, meta = checkpointer.restore(abstract_state(state, shardings))
    print(f"resuming after step {int(state.step)}{config_changes(meta['config'], config)}")
    auto_step = AutoStep.from_meta(meta["auto_step"]) if config.optimizer.auto_step.on else None
    return Start(state, shardings, meta["seconds"], auto_step)


def config_changes(stored: dict[str, Any], config: RunConfig) -> str:
    """Return a text that lists the fields that differ from a checkpoint's config; "" if none do."""
    present = json.loads(json.dumps(config_dict.to_dict(config)))  # lists for tuples, as stored
    old, new = _flat(config_dict.with_current_names(RunConfig, stored)), _flat(present)
    changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    return f", with a changed config ({'; '.join(changed)})" if changed else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with keys like 'train.epochs'."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, dict)
        result |= _flat(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return result
