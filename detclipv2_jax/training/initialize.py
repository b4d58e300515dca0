"""Pretrained weights and earlier runs as the start of a new run."""

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
    """Files that parameters start from, read before the first step; "" leaves them as drawn."""

    model: str = ""  # all of a model: a run's workdir, or what `export --format=safetensors` wrote
    backbone: str = ""  # Swin: the official code's, timm's, Hugging Face's or MMDetection's
    text: str = ""  # CLIP's text tower: OpenAI's, open_clip's or Hugging Face's


def initialize(params: PyTree, config: InitConfig) -> tuple[PyTree, list[Report]]:
    """Parameters with the config's files in their place; those without a file are left alone.

    Raises:
        UserError: a file cannot be read, is of another architecture, lacks a tensor or has one of
            an unexpected shape; names it.
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
    """The averaged parameters of a run's newest checkpoint, by the names of `OURS`."""
    from detclipv2_jax.inference.checkpoint import load_model  # orbax, which no other file needs

    params = parameter_paths(load_model(workdir).params)
    return {name.replace("/", "."): np.asarray(value) for name, value in params.items()}


def table(reports: Sequence[Report]) -> str:
    """Lines for people: what was loaded, resized, left as initialized and not used."""
    lines = []
    for r in reports:
        lines.append(f"{r.part or 'model'} from {r.path} ({r.publisher})")
        for what, names in (
            ("loaded", r.loaded),
            ("  of these resized", r.resized),
            ("left as initialized", r.left),
            ("in the file, not used", r.skipped),
        ):
            if names or what == "loaded":
                shown = "" if what == "loaded" else "  " + _briefly(names)
                lines.append(f"  {what:<22}{len(names):>5}{shown}")
    return "\n".join(lines)


def _briefly(names: Sequence[str]) -> str:
    """'layers.*.attn_mask (12), head.bias': names that differ only in their numbers are counted."""
    counts = collections.Counter(unnumbered(name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


def _replaced(params: PyTree, found: Mapping[str, np.ndarray]) -> PyTree:
    def replace(path, value):
        array = found.get(path_name(path))
        return value if array is None else jnp.asarray(array, value.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)
