"""A checkpoint is the whole run: parameters, average, optimizer, step, config and vocabulary.

On disk, under `workdir/checkpoints/STEP/`, three items: `model` (the averaged parameters: all that
evaluation and detection read), `state` (the rest of the training state) and `meta` (JSON).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.text.tokenizer import TEMPLATE

SUBDIRECTORY = "checkpoints"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A checkpoint's model, ready to build: `detclip.build(graphdef, params)`."""

    graphdef: Any
    params: PyTree
    model: DetCLIPConfig
    detect: DetectConfig
    step: int
    names: list[str]  # the names of the detection data that it trained on
    definitions: dict[str, str]  # name → definition; empty: it trained on bare names
    template: str = TEMPLATE  # of a name with its definition
    total_steps: int | None = None  # of the run; None: the checkpoint is too old to know
    run: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the run's config as stored


def steps(directory: Path | str) -> list[int]:
    """The steps of the complete checkpoints of a run, ascending; none where there is no run yet."""
    root = _root(directory)
    if not root.is_dir():
        return []
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdigit())


def require_steps(directory: Path | str) -> list[int]:
    """As `steps`, but UserError where there is none."""
    found = steps(directory)
    if not found:
        raise UserError(
            f"there is no checkpoint in {directory}: give the --workdir of a training run."
        )
    return found


def best_step(directory: Path | str) -> int:
    """The step whose evaluation in training gave the best figure, of equal ones the last.

    Raises:
      UserError: none of the checkpoints was evaluated in training, or there is none.
    """
    scores = {step: stored_score(directory, step) for step in require_steps(directory)}
    measured = [step for step, score in scores.items() if score is not None]
    if not measured:
        raise UserError(
            f"{directory}: training evaluated none of its checkpoints (config.train.eval_every), "
            "so none is the best; give --step=all, newest or a number."
        )
    return max(measured, key=lambda step: (scores[step], step))


def is_finished(directory: Path | str) -> bool:
    """Is the newest checkpoint that of the run's last step? Not known of older ones: no."""
    known = steps(directory)
    if not known:
        return False
    with _reading(directory) as manager:
        return _meta(manager, known[-1]).get("total_steps") == known[-1]


def load_model(directory: Path | str, step: int | None = None) -> LoadedModel:
    """The model of a run's newest checkpoint, or of `step`; each process reads it for itself.

    `directory` is the run's workdir or its `checkpoints/`.

    Raises:
      UserError: if there is no checkpoint, not that step, or it does not fit its own config.
    """
    known = require_steps(directory)
    if step is not None and step not in known:
        raise UserError(
            f"{_root(directory)} has no checkpoint of step {step}: it has "
            f"{', '.join(map(str, known))}."
        )
    step = known[-1] if step is None else step
    with _reading(directory) as manager:
        meta = _meta(manager, step)
        run = meta["config"]
        model = DetCLIPConfig.from_dict(config_dict.with_current_names(DetCLIPConfig, run["model"]))
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
        graphdef,
        params,
        model,
        detect_config(run["eval"]),
        step,
        meta["names"],
        meta.get("definitions", {}),  # older checkpoints have none
        run.get("data", {}).get("template", TEMPLATE),
        meta.get("total_steps"),
        run,
    )


def detect_config(section: Mapping[str, Any]) -> DetectConfig:
    """Return what the section `eval` of a run's config says, stored by this or an older version."""
    values = config_dict.with_current_names(DetectConfig, section)
    return config_dict.from_dict(
        DetectConfig, config_dict.known_fields(DetectConfig, values), "config.eval"
    )


def _root(directory: Path | str) -> Path:
    root = Path(directory).absolute()
    return root / SUBDIRECTORY if (root / SUBDIRECTORY).is_dir() else root


def _reading(directory: Path | str) -> ocp.CheckpointManager:
    """For this process alone: no other one is waited for."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(
        _root(directory), item_handlers=item_handlers(alone), options=options
    )


def _meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def stored_score(directory: Path | str, step: int) -> float | None:
    """Return the figure that training measured at `step`; None if it measured none."""
    with _reading(directory) as manager:
        return _meta(manager, step).get("score")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def item_handlers(processes: ocp.options.MultiprocessingOptions | None = None) -> dict[str, Any]:
    """Return Orbax's handler of each item of a checkpoint."""
    options = {"multiprocessing_options": processes or ocp.options.MultiprocessingOptions()}
    standard = ocp.StandardCheckpointHandler
    return {
        "model": standard(**options),
        "state": standard(**options),
        "meta": ocp.JsonCheckpointHandler(**options),
    }


def check_shapes(manager: ocp.CheckpointManager, step: int, target: PyTree, where: Any) -> None:
    """One sentence instead of a traceback when a checkpoint holds another model."""
    found = _shapes(manager.item_metadata(step).model)
    wanted = _shapes(target)
    for name in sorted(found.keys() | wanted.keys()):
        there, here = (tree.get(name, "absent") for tree in (found, wanted))
        if there != here:
            raise UserError(
                f"the checkpoint {where} is of another model: {name} is {there} there, {here} in "
                "this config; use the config it was made with, or another --workdir."
            )


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(v.shape) for p, v in leaves}
