"""Initialization of a run from pretrained weights or from an earlier run."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from detclipv2_jax.models.parameters import parameter_paths, path_name
from detclipv2_jax.weights import clip, files, swin
from detclipv2_jax.weights.convert import OURS, Report, convert, unnumbered


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Files with initial parameters; "" keeps the random initialization."""

    model: str = ""  # a whole model: a run's workdir, or a file of `export --format=safetensors`
    backbone: str = ""  # Swin: a file of the official code, timm, Hugging Face or MMDetection
    text: str = ""  # CLIP's text tower: a file of OpenAI, open_clip or Hugging Face


def initialize(params: PyTree, config: InitConfig) -> tuple[PyTree, list[Report]]:
    """Return the parameters with those that the config's files contain, and a report per file.

    Raises:
        UserError: a file cannot be read, is of another architecture, lacks a tensor, or has a
            tensor of an unexpected shape; the message names it.
    """
    reports = []
    for part, path, layouts in (
        ("", config.model, (OURS,)),
        ("backbone", config.backbone, swin.LAYOUTS),
        ("text", config.text, clip.LAYOUTS),
    ):
        if path:
            paths = parameter_paths(params)
            wanted = {name: v.shape for name, v in paths.items() if name.startswith(part)}
            tensors = _of_run(path) if not part and Path(path).is_dir() else files.read(path)
            found, report = convert(tensors, layouts, wanted, part, path)
            params = _replaced(params, found)
            reports.append(report)
    return params, reports


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
