"""Read the checkpoints of a run (training/checkpointer.py writes them).

A checkpoint is the whole run: parameters, their average, optimizer, step, config and names. On
disk, `workdir/checkpoints/STEP/` has three items: `model` (the averaged parameters, all that
evaluation and detection read), `state` (the rest of the training state) and `meta` (JSON), and the
list of the digests of its files (checkpoint_files.py). Training writes them.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint_files, threshold
from detclipv2_jax.inference.checkpoint_files import (
    SUBDIRECTORY,
    DamagedError,
    located,
    require_steps,
    steps,
)
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.models import detclip
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.text.tokenizer import TEMPLATE


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
      sources: kind of data -> source -> number of its records, of what the model trained on; None
        for an old checkpoint, which does not store it.
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
    sources: Mapping[str, Mapping[str, int]] | None = None


# In all functions `directory` is what checkpoint_files.py says.


def best_step(directory: str | os.PathLike) -> int:
    """Return the step with the best score in training's evaluations; of equal scores the last.

    A damaged checkpoint is passed over with a warning.

    Raises:
      UserError: there is no checkpoint, or training evaluated none of them.
    """
    require_steps(directory)
    root, _ = located(directory)
    scores = checkpoint_files.scores(directory)
    if not scores:
        raise UserError(
            f"{directory}: training evaluated none of its checkpoints (config.train.eval_every), "
            "so the best one is unknown. Give --step=all, --step=newest or a number."
        )

    def checked(step: int) -> int:
        checkpoint_files.check(root / str(step))
        return step

    ranked = sorted(scores, key=lambda step: (scores[step], step))
    return checkpoint_files.fall_back(root, ranked, checked)


def is_finished(directory: str | os.PathLike) -> bool:
    """Return whether the newest checkpoint is that of the run's last step.

    False for old checkpoints, which do not store the number of steps.
    """
    total = checkpoint_files.newest_meta(directory).get("total_steps")
    return total is not None and steps(directory)[-1] == total


def stored_model(directory: str | os.PathLike) -> DetCLIPConfig:
    """Return the config of the model in a run's newest checkpoint."""
    require_steps(directory)
    meta = checkpoint_files.newest_meta(directory)
    if not meta:
        raise UserError(
            f"{located(directory)[0]}: the file meta/metadata of each checkpoint is missing or "
            "damaged. Restore a checkpoint from a copy."
        )
    return _model_config(meta["config"])


def load_model(directory: str | os.PathLike, step: int | None = None) -> LoadedModel:
    """Load the model of one checkpoint onto the first local device of this process.

    Its files are checked first.

    Args:
      directory: the workdir of a run, its `checkpoints/`, or one checkpoint.
      step: which checkpoint. None: the preferred one (`checkpoint_files.by_preference`) that is
        intact; a warning names damaged ones.

    Raises:
      UserError: there is no such checkpoint, or its parameters do not fit its config.
      DamagedError: the checkpoint of `step` is damaged; the message names intact ones.
    """
    root, named = located(directory)
    known = require_steps(directory)
    if step is not None and step not in known:
        raise UserError(
            f"{root} has no checkpoint of step {step}: it has "
            f"{', '.join(map(str, known))}. Choose one of these."
        )
    step = named if step is None else step
    if step is None:
        order = checkpoint_files.by_preference(directory)
        loaded = checkpoint_files.fall_back(root, order, lambda s: _load_step(root, s))
        checkpoint_files.note_choice(directory, loaded.step)
        return loaded
    try:
        return _load_step(root, step)
    except DamagedError as error:
        raise checkpoint_files.refused(root, step, error) from None


def _load_step(root: Any, step: int) -> LoadedModel:
    """Load the model of one checkpoint; `DamagedError` with the reason if it must not be used."""
    path = root / str(step)
    is_checked = checkpoint_files.check(path)
    meta = checkpoint_files.read_meta(path)
    run = meta["config"]
    model = _model_config(run)
    graphdef, target = detclip.abstract(model)
    with reading(path, is_checked), _open(root) as manager:
        params = _restored(manager, step, target, path)
    if name := first_not_finite(params):
        raise DamagedError(f"{name} has values that are not finite")
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
        threshold=threshold.stored(workdir(root), step, meta),
        sources=meta.get("sources"),
    )


def _restored(manager: ocp.CheckpointManager, step: int, target: PyTree, path: Any) -> PyTree:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), target)
    check_shapes(manager, step, target, path)
    return manager.restore(step, args=ocp.args.Composite(model=ocp.args.StandardRestore(target)))[
        "model"
    ]


@contextlib.contextmanager
def reading(path: Any, is_checked: bool) -> Iterator[None]:
    """Turn an error that Orbax raises within the block into a `UserError`.

    Args:
      path: of the checkpoint.
      is_checked: its files are known to be intact, so the cause is another one.

    Raises:
      DamagedError: the files were not checked, so they are the likely cause.
      UserError: the files are intact, or the memory does not suffice.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # its type depends on what is damaged
        is_damage = not isinstance(error, MemoryError | jax.errors.JaxRuntimeError)
        if is_damage and not is_checked:
            raise DamagedError(f"it cannot be read: {first_line(error)}") from error
        raise UserError(
            f"{path}: the checkpoint cannot be loaded ({first_line(error)}), although its files "
            "were not found to be damaged. Check the free memory of the devices and of the host."
        ) from error


def first_not_finite(tree: PyTree) -> str:
    """Return the path of the first array with a NaN or infinite value; "" if all are finite.

    It reads this process's part of the arrays on the host: a program for the devices would take
    seconds to compile.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        if not all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards):
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return ""


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

    `where` names the checkpoint in the message. `DamagedError`: it has no list of its parameters.
    """
    stored = manager.item_metadata(step).model
    if not stored:
        raise DamagedError("model/_METADATA is missing or damaged")
    found, wanted = _shapes(stored), _shapes(target)
    for name in sorted(found.keys() | wanted.keys()):
        present, expected = (tree.get(name, "absent") for tree in (found, wanted))
        if present != expected:
            raise UserError(
                f"the checkpoint {where} is of another model: {name} is {present} in the "
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


def workdir(directory: str | os.PathLike) -> Any:
    """Return the workdir of a run, also if `directory` is its `checkpoints/` or one of them."""
    root, _ = located(directory)
    return root.parent if root.name == SUBDIRECTORY else root


def _open(root: Any) -> ocp.CheckpointManager:
    """Return a read-only manager that does not wait for other processes."""
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    options = ocp.CheckpointManagerOptions(read_only=True, multiprocessing_options=alone)
    return ocp.CheckpointManager(root, item_handlers=item_handlers(alone), options=options)
