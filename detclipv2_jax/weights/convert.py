"""Puts files of weights into a model's parameters and says what became of every tensor."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import files
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
class Report:
    """What one file gave to one part of the model."""

    part: str
    path: str
    publisher: str
    loaded: tuple[str, ...]  # our parameters
    resized: tuple[str, ...]  # of these, the ones that the file has in another size
    left: tuple[str, ...]  # our parameters that stay as initialized
    skipped: tuple[str, ...]  # the file's tensors that no parameter is made of


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
        layouts: the ones to recognize them by.
        wanted: shapes of our parameters by path, 'backbone/…' for the part 'backbone'.
        part: '' is the whole model.
        path: of the file, for errors and the report.

    Raises:
        UserError: as `initialize`.
    """
    layout, prefix = _recognize(path, part, tensors, layouts)
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


def _recognize(
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
    """One parameter from its tensors; None if it is one that may be left as initialized."""
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
    patterns = {unnumbered(name) for name in used}
    for name in skipped:
        if unnumbered(name) in patterns:
            raise UserError(
                f"{path}: {name} has no place in the config's model, which has fewer layers; "
                f"choose config.{_SECTIONS[part]} as the file's model"
            )


def unnumbered(name: str) -> str:
    """Return a parameter's name with `*` for its numbers, so that blocks share one name."""
    return re.sub(r"(?<=[./])\d+(?=[./])", "*", name)
