"""Convert a file of weights to the model's parameters and report what became of every tensor."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import files
from detclipv2_jax.weights.layouts import Layout, as_is

# The names of this project, as `export --format=safetensors` writes them.
OURS = Layout(
    "detclipv2_jax",
    "backbone.patch_embed.proj.kernel",
    renames=((r"/", "."),),
    splits=None,
    convert=((r".*", as_is),),
)

# The config section with the sizes of each part of the model; any other part has `config.model`.
_CONFIG_SECTIONS = {"backbone": "config.model.swin", "text": "config.model.text"}


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the tensors of one file and of the parameters of one part of the model.

    Attributes:
        part: of the model, such as "backbone"; "" is the whole model.
        path: of the file.
        publisher: name of the file's layout.
        loaded: parameters that have their values from the file.
        resized: those of `loaded` that have another size in the file.
        not_loaded: parameters that keep their initial values.
        unused: tensors of the file that belong to no parameter.
    """

    part: str
    path: str
    publisher: str
    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    not_loaded: tuple[str, ...]
    unused: tuple[str, ...]


def convert(
    tensors: Mapping[str, np.ndarray],
    layouts: Sequence[Layout],
    wanted: Mapping[str, tuple[int, ...]],
    part: str,
    path: str,
) -> tuple[dict[str, np.ndarray], Report]:
    """Convert a publisher's tensors to the parameters of a part of the model.

    Args:
        tensors: the file's tensors by the publisher's names.
        layouts: known layouts; the file must have one of them.
        wanted: shapes of the parameters by path; paths of the part "backbone" start with
            "backbone/".
        part: of the model; "" is the whole model.
        path: of the file, for errors and the report.

    Returns:
        The parameters found, by path, and the report.

    Raises:
        UserError: the layout is unknown, a tensor is missing, has a wrong type or shape or
            non-finite values, or the file's model has more layers. The message names the tensor.
    """
    file = _recognize(tensors, layouts, part, path)
    found, resized, not_loaded, used = {}, [], [], set()
    for name, shape in wanted.items():
        local = name.removeprefix(part + "/")
        sources = file.sources(local)
        array = file.parameter(name, local, shape)
        if array is None:
            not_loaded.append(name)
            continue
        found[name] = array
        used.update(sources)
        if local.endswith("relative_position_bias_table") and len(tensors[sources[0]]) != shape[0]:
            resized.append(name)
    unused = [name for name in tensors if name not in used]
    _check_no_more_layers(path, part, used, unused)
    report = Report(
        part=part,
        path=path,
        publisher=file.layout.publisher,
        loaded=tuple(found),
        resized=tuple(resized),
        not_loaded=tuple(not_loaded),
        unused=tuple(unused),
    )
    return found, report


def unnumbered(name: str) -> str:
    """Return a parameter's name with `*` for its numbers, so that blocks share one name."""
    return re.sub(r"(?<=[./])\d+(?=[./])", "*", name)


@dataclasses.dataclass(frozen=True)
class _File:
    """A file whose layout is known.

    Attributes:
        path: of the file, for errors.
        tensors: by the publisher's names.
        layout: of the file.
        prefix: what the file puts before the layout's names.
    """

    path: str
    tensors: Mapping[str, np.ndarray]
    layout: Layout
    prefix: str

    def sources(self, local: str) -> list[str]:
        """Return the file's names of the tensors of a parameter, with the prefix or without.

        Args:
            local: path of the parameter within its part.
        """

        def in_file(name: str) -> str:
            has_no_prefix = name in self.tensors and self.prefix + name not in self.tensors
            return name if has_no_prefix else self.prefix + name

        return [in_file(name) for name in self.layout.names(local)]

    def parameter(self, name: str, local: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Return one parameter; None if the file does not fit and the parameter is optional.

        Args:
            name: path of the parameter.
            local: path within its part.
            shape: of the parameter.
        """
        section = _CONFIG_SECTIONS.get(name.split("/")[0], "config.model")
        sources = self.sources(local)
        for source in sources:
            if source not in self.tensors:
                if self.layout.is_optional(local):
                    return None
                raise UserError(
                    f"{self.path}: {source} is missing, which {name} {shape} needs. Set {section} "
                    "to the sizes of the file's model, or use a complete file."
                )
        arrays = [files.as_float32(self.tensors[s], s, self.path) for s in sources]
        try:
            array = self.layout.converter(local)(arrays, shape)
        except ValueError:  # axes that cannot be joined or rearranged
            array = None
        if array is not None and array.shape == shape:
            return array
        if self.layout.is_optional(local):
            return None
        raise UserError(
            f"{self.path}: {sources[0]} has shape {arrays[0].shape}, which does not fit {name} "
            f"{shape}. Set {section} to the sizes of the file's model."
        )


def _recognize(
    tensors: Mapping[str, np.ndarray], layouts: Sequence[Layout], part: str, path: str
) -> _File:
    for layout in layouts:
        prefixes = layout.prefixes(tensors)
        if len(prefixes) > 1:
            raise UserError(
                f"{path}: has the weights of {len(prefixes)} models, whose names begin with "
                f"{', '.join(map(repr, prefixes))}, as a student and its teacher. Which one is "
                "wanted is not known: save one of them in a file of its own."
            )
        if prefixes:
            return _File(path, tensors, layout, prefixes[0])
    publishers = ", ".join(layout.publisher for layout in layouts)
    some = ", ".join(sorted(tensors)[:3])
    raise UserError(
        f"{path}: the names of its tensors ({some}, …) match no known layout of "
        f"{part or 'model'} weights. Use a file in one of these layouts: {publishers}."
    )


def _check_no_more_layers(path: str, part: str, used: Iterable[str], unused: Iterable[str]) -> None:
    """Raise `UserError` if an unused tensor is a layer's: the file's model is deeper than ours.

    Its first layers alone would be wrong weights.
    """
    patterns = {unnumbered(name) for name in used}
    for name in unused:
        if unnumbered(name) in patterns:
            section = _CONFIG_SECTIONS.get(part, "config.model")
            raise UserError(
                f"{path}: {name} belongs to a layer that the config's model does not have. Set "
                f"{section} to the sizes of the file's model."
            )
