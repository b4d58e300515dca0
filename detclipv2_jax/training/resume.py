"""The state that a start of a run begins with: new, or from the newest checkpoint."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.detclip import DetCLIPConfig
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
    threshold: dict[str, Any] | None = None  # the score threshold that the last evaluation fitted


def new_or_resumed(
    config: RunConfig,
    params: PyTree,
    rule: AdamW,
    mesh: jax.sharding.Mesh,
    checkpointer: Checkpointer,
    total_steps: int,
) -> Start:
    """Return the state of the newest checkpoint, or the initial state if there is none.

    Args:
        config: of the run.
        params: freshly created parameters. A new run loads the files of `config.init` into them.
        rule: the optimizer.
        mesh: the devices that hold the state.
        checkpointer: of the run.
        total_steps: of the run, by its config.

    Raises:
        UserError: no checkpoint is intact, or one is of another model or of a model that computes
            something else; the run is finished, and its settings have changed; a file of
            `config.init` is missing or does not fit, or a random parameter has a reduced learning
            rate.
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
    check_same_model(meta["config"], config, checkpointer.workdir)
    auto_step = AutoStep.from_meta(meta["auto_step"]) if config.optimizer.auto_step.on else None
    step, finished = int(state.step), ""
    if step >= total_steps or (auto_step and auto_step.is_over):
        check_unchanged(meta["config"], config, step, checkpointer.workdir)
        finished = ": the run is finished, and nothing is left to train"
    print(f"resuming after step {step}{config_changes(meta['config'], config)}{finished}")
    return Start(state, shardings, meta["seconds"], auto_step, meta.get("threshold"))


# Fields of config.model that change no value that a trained model computes, up to rounding: they
# set initial values, or how the program runs. drop_path acts in training only.
_FREE = {
    "neck_coarse_gain",
    "initial_scale",
    "prior",
    "text.projection_gain",
    "swin.drop_path",
    "dtype",
    "remat",
    "loop",
    "kernels",
}
# Sections and fields that may change in a finished run: they do not act on its training.
_NOT_OF_TRAINING = (
    "eval.",
    "mesh.",
    "model.dtype",
    "model.remat",
    "model.loop",
    "model.kernels",
    "data_dir",
    "data.prepare",
    "data.max_broken_share",
    "train.log_every",
    "train.checkpoint_every",
    "train.eval_every",
    "train.eval_first",
    "train.keep_checkpoints",
    "train.max_skipped",
)


def check_same_model(stored: dict[str, Any], config: RunConfig, workdir: Any) -> None:
    """Check that a checkpoint's parameters mean the same under a run's config.

    Args:
        stored: the config in the checkpoint.
        config: of the run.
        workdir: of the run.

    Raises:
        UserError: a field differs that changes what the model computes; names it and both values.
    """
    model = config_dict.with_current_names(DetCLIPConfig, stored["model"])
    old = config_dict.to_dict(DetCLIPConfig.from_dict(model))
    changed = _differences(old, config_dict.to_dict(config.model), "model.")
    changed = {k: v for k, v in changed.items() if k.removeprefix("model.") not in _FREE}
    if changed:
        raise UserError(
            f"{workdir}: the run's checkpoints are of a model that computes something else: "
            f"{_listed(changed)}. Set the old values, or give another --workdir."
        )


def check_unchanged(stored: dict[str, Any], config: RunConfig, step: int, workdir: Any) -> None:
    """Check that a finished run is started with its own settings.

    Args:
        stored: the config in its last checkpoint.
        config: of the start.
        step: of that checkpoint.
        workdir: of the run.

    Raises:
        UserError: a field differs that acts on the training, which would have no effect.
    """
    old = config_dict.with_current_names(RunConfig, stored)
    changed = _differences(old, config_dict.to_dict(config))
    changed = {k: v for k, v in changed.items() if not k.startswith(_NOT_OF_TRAINING)}
    if changed:
        raise UserError(
            f"{workdir}: the run has done its {step} steps, so new settings would train nothing: "
            f"{_listed(changed)}. Start from its model with another --workdir and "
            f"--config.init.model={workdir}, or train it longer with a higher config.train.epochs."
        )


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"config.{k} is {new!r}, was {old!r}" for k, (old, new) in changed.items())


def _differences(
    stored: Mapping[str, Any], present: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Return path -> (stored, present) of the fields that both have and that differ."""
    old, new = (_flat(json.loads(json.dumps(values)), prefix) for values in (stored, present))
    return {k: (old[k], new[k]) for k in old if k in new and old[k] != new[k]}


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
