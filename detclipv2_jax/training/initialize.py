"""Initialization of a run from pretrained weights or from an earlier run."""

import collections
import dataclasses
import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.parameters import parameter_paths, path_name
from detclipv2_jax.training.recipes import SCRATCH
from detclipv2_jax.weights import clip, files, swin
from detclipv2_jax.weights.convert import OURS, Report, convert, unnumbered


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the initial parameters come from.

    With `model`, the other two are not read. Without it, both need a file or "scratch": no tower
    starts random by omission.
    """

    model: str = ""  # a whole model: a run's workdir, or a file of `export --format=safetensors`
    # Swin: a file of the official code, timm, Hugging Face or MMDetection; "scratch": random
    backbone: str = ""
    # CLIP's text tower: a file of OpenAI, open_clip or Hugging Face; "scratch": random
    text: str = ""


def initialize(params: PyTree, config: InitConfig) -> tuple[PyTree, list[Report]]:
    """Return the parameters with those that the config's files contain, and a report per file.

    Parts that are "scratch" or "" keep their values.

    Raises:
        UserError: a file cannot be read, is of another architecture, lacks a tensor, or has a
            tensor of an unexpected shape; the message names it.
    """
    reports, parts = [], [("", config.model, (OURS,))]
    if not config.model:
        parts = [("backbone", config.backbone, swin.LAYOUTS), ("text", config.text, clip.LAYOUTS)]
    for part, path, layouts in parts:
        if path and path != SCRATCH:
            paths = parameter_paths(params)
            wanted = {name: v.shape for name, v in paths.items() if name.startswith(part)}
            tensors = _of_run(path) if not part and Path(path).is_dir() else files.read(path)
            found, report = convert(tensors, layouts, wanted, part, path)
            params = _replaced(params, found)
            reports.append(report)
    return params, reports


def check_rates(params: PyTree, reports: Sequence[Report], factors: PyTree) -> None:
    """Refuse a low learning rate for parameters that a file should have had and that are random.

    Constant parameters, such as norms that start as the identity, are not random.

    Args:
        params: the initialized parameters.
        reports: of `initialize`.
        factors: on the learning rate, a tree like `params`.

    Raises:
        UserError: a parameter in a report's `not_loaded` is random, and its factor is below 1.
    """
    values, rates = parameter_paths(params), parameter_paths(factors)
    for report in reports:
        for name in report.not_loaded:
            if rates[name] >= 1 or np.ptp(np.asarray(values[name])) == 0:
                continue
            sizes = ""
            if name == "text/text_projection":
                sizes = (
                    ", or set config.model.text.embed_dim and config.model.head.embed_dim to the "
                    "size of the file's projection (512 for CLIP ViT-B)"
                )
            raise UserError(
                f"config.optimizer.lr_rules: {name} trains at {rates[name]:g} times the learning "
                f"rate, but it starts random, because {report.path} has no values of its shape "
                f"{values[name].shape}. Put ({name!r}, 1.0) before the other rules{sizes}."
            )


# Fields of a model's config that change what it computes, but not the shape of any parameter.
_SAME = (
    "similarity",
    "anchors.offset",
    "anchors.scale",
    "head.groups",
    "text.activation",
    "text.heads",
)


def check_same_function(config: DetCLIPConfig, path: str) -> None:
    """Check that the parameters of a whole model mean the same in a run's model.

    Args:
        config: the run's model.
        path: `InitConfig.model`; a file without our metadata is not checked.

    Raises:
        UserError: a field differs that no shape tells; the message names it.
    """
    if Path(path).is_dir():
        from detclipv2_jax.inference.checkpoint import stored_model  # imports orbax

        stored = stored_model(path)
    else:
        metadata = files.metadata(path)
        if "model" not in metadata:
            return
        stored = DetCLIPConfig.from_dict(
            config_dict.with_current_names(DetCLIPConfig, json.loads(metadata["model"]))
        )
    for field in _SAME:
        wanted, found = (operator.attrgetter(field)(c) for c in (config, stored))
        if wanted != found:
            raise UserError(
                f"config.model.{field} is {wanted!r}, but the model in config.init.model {path} "
                f"was trained with {found!r}. Set it to {found!r}."
            )


def _of_run(workdir: str) -> dict[str, np.ndarray]:
    """Return the averaged parameters of a run's newest checkpoint, under the names of `OURS`."""
    from detclipv2_jax.inference.checkpoint import load_model  # imports orbax

    params = parameter_paths(load_model(workdir).params)
    return {name.replace("/", "."): np.asarray(value) for name, value in params.items()}


def table(reports: Sequence[Report]) -> str:
    """Return a table of the tensors that were loaded, resized, left as initialized and unused."""
    lines = []
    for r in reports:
        lines.append(f"{r.part or 'model'} from {r.path} ({r.publisher})")
        for what, names in (
            ("loaded", r.loaded),
            ("  of these resized", r.resized),
            ("left as initialized", r.not_loaded),
            ("in the file, not used", r.unused),
        ):
            if names or what == "loaded":
                shown = "" if what == "loaded" else "  " + _briefly(names)
                lines.append(f"  {what:<22}{len(names):>5}{shown}")
    return "\n".join(lines)


def _briefly(names: Sequence[str]) -> str:
    """Return a short list such as 'layers.*.attn_mask (12), head.bias'."""
    counts = collections.Counter(unnumbered(name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


def _replaced(params: PyTree, found: Mapping[str, np.ndarray]) -> PyTree:
    def replace(path, value):
        array = found.get(path_name(path))
        return value if array is None else jnp.asarray(array, value.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)
