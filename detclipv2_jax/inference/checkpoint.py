"""Read the checkpoints of a run (training/checkpointer.py writes them).

A checkpoint is the whole run: parameters, their average, optimizer, step, config and names. On
disk, `workdir/checkpoints/STEP/` has three items: `model` (the averaged parameters, all that
evaluation and detection read), `state` (the rest of the training state) and `meta` (JSON). Training
writes them (training/checkpointer.py).
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import threshold
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.text.tokenizer import TEMPLATE

SUBDIRECTORY = "checkpoints"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model, ready to build: `detclip.build(graphdef, params)`.

    Attributes:
      graphdef: structure of the model.
      params: the averaged parameters (EMA).
      model: the model's config.
      detect: how the model is queried and how its output becomes detections.
      step: training step of the checkpoint.
      names: the names of the detection data that the model trained on.
      definitions: name -> definition; empty if the model trained with bare names.
      template: joins {name} and {definition}.
      total_steps: steps of the whole run; None for an old checkpoint, which does not store it.
      run: the config of the run as stored.
      threshold: the score threshold fitted on a dataset (inference/threshold.py); None if the
        checkpoint has none.
    """

    graphdef: Any
    params: PyTree
    model: DetCLIPConfig
    detect: DetectConfig
    step: int
    names: list[str]
    definitions: dict[str, str]
    template: str = TEMPLATE
    total_steps: int | None = None
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    threshold: Mapping[str, Any] | None = None


# In all functions `directory` is the workdir of a run or its `checkpoints/`.


def steps(directory: str | os.PathLike) -> list[int]:
    """Return the steps of the complete checkpoints of a run, ascending; [] if there are none."""
    root = _root(directory)
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())


def require_steps(directory: str | os.PathLike) -> list[int]:
    """Return what `steps` returns; raise `UserError` if there are none."""
    found = steps(directory)
    if not found:
        raise UserError(
            f"there is no checkpoint in {directory}. Give the --workdir of a training run."
        )
    return found


def best_step(directory: str | os.PathLike) -> int:
    """Return the step with the best score in training's evaluations; of equal scores the last.

    Raises:
      UserError: there is no checkpoint, or training evaluated none of them.
    """
    scores = {step: stored_score(directory, step) for step in require_steps(directory)}
    evaluated = [step for step, score in scores.items() if score is not None]
    if not evaluated:
        raise UserError(
            f"{directory}: training evaluated none of its checkpoints (config.train.eval_every), "
            "so the best one is unknown. Give --step=all, --step=newest or a number."
        )
    return max(evaluated, key=lambda step: (scores[step], step))


def stored_score(directory: str | os.PathLike, step: int) -> float | None:
    """Return the score that training measured at `step`; None if it did not evaluate there."""
    with _open(directory) as manager:
        return _meta(manager, step).get("score")


def is_finished(directory: str | os.PathLike) -> bool:
    """Return whether the newest checkpoint is that of the run's last step.

    False for old checkpoints, which do not store the number of steps.
    """
    known = steps(directory)
    if not known:
        return False
    with _open(directory) as manager:
        return _meta(manager, known[-1]).get("total_steps") == known[-1]


def stored_model(directory: str | os.PathLike) -> DetCLIPConfig:
    """Return the config of the model in a run's newest checkpoint."""
    step = require_steps(directory)[-1]
    with _open(directory) as manager:
        return _model_config(_meta(manager, step)["config"])


def load_model(directory: str | os.PathLike, step: int | None = None) -> LoadedModel:
    """Load the model of one checkpoint onto the first local device of this process.

    Args:
      directory: the workdir of a run or its `checkpoints/`.
      step: which checkpoint. None: the newest.

    Raises:
      UserError: there is no such checkpoint, or its parameters do not fit its config.
    """
    known = require_steps(directory)
    if step is not None and step not in known:
        raise UserError(
            f"{_root(directory)} has no checkpoint of step {step}: it has "
            f"{', '.join(map(str, known))}. Choose one of these."
        )
    step = known[-1] if step is None else step
    with _open(directory) as manager:
        meta = _meta(manager, step)
        run = meta["config"]
        model = _model_config(run)
        graphdef, target = detclip.abstract(model)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), target
        )
        check_shapes(manager, step, target, _root(directory) / str(step))
        params = manager.restore(
            step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target))
        ).model
    return LoadedModel(
        graphdef=graphdef,
        params=params,
        model=model,
        detect=detect_config(run["eval"]),
        step=step,
        names=meta["names"],
        definitions=meta.get("definitions", {}),  # old checkpoints have none
        template=run.get("data", {}).get("template", TEMPLATE),
        total_steps=meta.get("total_steps"),
        run=run,
        threshold=threshold.stored(workdir(directory), step, meta),
    )


def _model_config(run: Mapping[str, Any]) -> DetCLIPConfig:
    return DetCLIPConfig.from_dict(config_dict.with_current_names(DetCLIPConfig, run["model"]))


def detect_config(section: Mapping[str, Any]) -> DetectConfig:
    """Return the `DetectConfig` in the section `eval` of a run's config.

    Accepts sections stored by older versions; fields of other configs are ignored.
    """
    values = config_dict.with_current_names(DetectConfig, section)
    return config_dict.from_dict(
        DetectConfig, config_dict.known_fields(DetectConfig, values), "config.eval"
    )


def check_shapes(manager: ocp.CheckpointManager, step: int, target: PyTree, where: Any) -> None:
    """Raise `UserError` if a checkpoint's parameters have other names or shapes than `target`.

    `where` names the checkpoint in the message.
    """
    found = _shapes(manager.item_metadata(step).model)
    wanted = _shapes(target)
    for name in sorted(found.keys() | wanted.keys()):
        stored, expected = (tree.get(name, "absent") for tree in (found, wanted))
        if stored != expected:
            raise UserError(
                f"the checkpoint {where} is of another model: {name} is {stored} in the "
                f"checkpoint, {expected} in this config. Use the config that made the checkpoint, "
                "or another --workdir."
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(v.shape) for p, v in leaves}


def item_handlers(processes: ocp.options.MultiprocessingOptions | None = None) -> dict[str, Any]:
    """Return Orbax's handler for each item of a checkpoint."""
    processes = processes or ocp.options.MultiprocessingOptions()
    return {
        "model": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "state": ocp.StandardCheckpointHandler(multiprocessing_options=processes),
        "meta": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
    }


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def _root(directory: str | os.PathLike) -> Path:
    root = Path(directory).absolute()
    return root / SUBDIRECTORY if (root / SUBDIRECTORY).is_dir() else root


def workdir(directory: str | os.PathLike) -> Path:
    """Return the workdir of a run, also if `directory` is its `checkpoints/`."""
    root = _root(directory)
    return root.parent if root.name == SUBDIRECTORY else root


def _open(directory: str | os.PathLike) -> ocp.CheckpointManager:
    """Return a read-only manager that does not wait for other processes."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(
        _root(directory), item_handlers=item_handlers(alone), options=options
    )


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
