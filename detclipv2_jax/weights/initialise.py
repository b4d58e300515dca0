"""Puts files of weights into a model's parameters and says what became of every tensor."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from detclipv2_jax.errors import UserError
from detclipv2_jax.models.detclip import parameter_paths
from detclipv2_jax.optimizer import path_name
from detclipv2_jax.weights import clip, files, swin
from detclipv2_jax.weights.layouts import Layout, as_is

# Our own names, as `export --format=safetensors` writes them.
OURS = Layout(
    "detclipv2_jax",
    "backbone.patch_embed.proj.kernel",
    renames=((r"/", "."),),
    splits=None,
    convert=((r".*", as_is),),
)
_SECTIONS = collections.defaultdict(lambda: "model", backbone="model.swin", text="model.text")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Files that parameters start from, read before the first step; "" leaves them as drawn."""

    model: str = ""  # all of a model: a run's workdir, or what `export --format=safetensors` wrote
    backbone: str = ""  # Swin: the official code's, timm's, Hugging Face's or MMDetection's
    text: str = ""  # CLIP's text tower: OpenAI's, open_clip's or Hugging Face's


@dataclasses.dataclass(frozen=True)
class Report:
    """What one file gave to one part of the model."""

    part: str
    path: str
    publisher: str
    loaded: tuple[str, ...]  # our parameters
    resized: tuple[str, ...]  # of these, the ones that the file has in another size
    left: tuple[str, ...]  # our parameters that stay as initialised
    skipped: tuple[str, ...]  # the file's tensors that no parameter is made of


def initialise(params: PyTree, config: InitConfig) -> tuple[PyTree, list[Report]]:
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
    from detclipv2_jax.checkpoint import load_model  # orbax, which no other file needs

    params = parameter_paths(load_model(workdir).params)
    return {name.replace("/", "."): np.asarray(value) for name, value in params.items()}


def table(reports: Sequence[Report]) -> str:
    """Lines for people: what was loaded, resized, left as initialised and not used."""
    lines = []
    for r in reports:
        lines.append(f"{r.part or 'model'} from {r.path} ({r.publisher})")
        for what, names in (
            ("loaded", r.loaded),
            ("  of these resized", r.resized),
            ("left as initialised", r.left),
            ("in the file, not used", r.skipped),
        ):
            if names or what == "loaded":
                shown = "" if what == "loaded" else "  " + _briefly(names)
                lines.append(f"  {what:<22}{len(names):>5}{shown}")
    return "\n".join(lines)


def _briefly(names: Sequence[str]) -> str:
    """'layers.*.attn_mask (12), head.bias': names that differ only in their numbers are counted."""
    counts = collections.Counter(_unnumbered(name) for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


def _unnumbered(name: str) -> str:
    return re.sub(r"(?<=[./])\d+(?=[./])", "*", name)


def _replaced(params: PyTree, found: Mapping[str, np.ndarray]) -> PyTree:
    def replace(path, value):
        array = found.get(path_name(path))
        return value if array is None else jnp.asarray(array, value.dtype)

    return jax.tree_util.tree_map_with_path(replace, params)


def convert(
    tensors: Mapping[str, np.ndarray],
    layouts: Sequence[Layout],
    wanted: Mapping[str, tuple[int, ...]],
    part: str,
    path: str,
) -> tuple[dict[str, np.ndarray], Report]:
    """Arrays for the parameters of a part of the model from a publisher's tensors.

    Args:
        tensors: by the publisher's names.
        layouts: the ones to recognise them by.
        wanted: shapes of our parameters by path, 'backbone/…' for the part 'backbone'.
        part: '' is the whole model.
        path: of the file, for errors and the report.

    Raises:
        UserError: as `initialise`.
    """
    layout, prefix = _recognise(path, part, tensors, layouts)
    found, resized, left, used = {}, [], [], set()
    for name, shape in wanted.items():
        local = name.removeprefix(part + "/")
        sources = [
            prefix + n if prefix + n in tensors or n not in tensors else n
            for n in layout.names(local)
        ]
        array = _parameter(path, tensors, layout, sources, name, local, shape)
        if array is None:
            left.append(name)
            continue
        found[name] = array
        used.update(sources)
        if local.endswith("relative_position_bias_table") and len(tensors[sources[0]]) != shape[0]:
            resized.append(name)
    skipped = [name for name in tensors if name not in used]
    _refuse_deeper(path, part, used, skipped)
    report = Report(part, path, layout.publisher, *map(tuple, (found, resized, left, skipped)))
    return found, report


def _recognise(
    path: str, part: str, names: Iterable[str], layouts: Sequence[Layout]
) -> tuple[Layout, str]:
    for layout in layouts:
        prefix = layout.prefix(names)
        if prefix is not None:
            return layout, prefix
    publishers = ", ".join(layout.publisher for layout in layouts)
    some = ", ".join(sorted(names)[:3])
    raise UserError(
        f"{path}: its tensors ({some}, …) are named as in none of the layouts that are known for "
        f"--config.init.{part or 'model'}: {publishers}"
    )


def _parameter(
    path: str,
    tensors: Mapping[str, np.ndarray],
    layout: Layout,
    sources: Sequence[str],
    name: str,
    local: str,
    shape: tuple[int, ...],
) -> np.ndarray | None:
    """One parameter from its tensors; None if it is one that may be left as initialised."""
    section = f"config.{_SECTIONS[name.split('/')[0]]}"
    for source in sources:
        if source not in tensors:
            if layout.is_optional(local):
                return None
            raise UserError(
                f"{path}: {source} is missing, of which {name} {shape} is to be made; choose "
                f"{section} as the file's model, or a whole file"
            )
    arrays = [files.as_float32(tensors[source], source, path) for source in sources]
    try:
        array = layout.converter(local)(arrays, shape)
    except ValueError:  # axes that cannot be joined or rearranged
        array = None
    if array is None or array.shape != shape:
        if layout.is_optional(local):
            return None
        raise UserError(
            f"{path}: {sources[0]} has shape {arrays[0].shape}, which does not make {name} "
            f"{shape}; choose {section} as the file's model"
        )
    return array


def _refuse_deeper(path: str, part: str, used: Iterable[str], skipped: Iterable[str]) -> None:
    """A block that is left over is of a deeper model: its first blocks alone would be wrong."""
    patterns = {_unnumbered(name) for name in used}
    for name in skipped:
        if _unnumbered(name) in patterns:
            raise UserError(
                f"{path}: {name} has no place in the config's model, which has fewer layers; "
                f"choose config.{_SECTIONS[part]} as the file's model"
            )
