"""How a publisher names and arranges the tensors of a model."""

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np

# Converts the publisher's tensors of one parameter, in the order of `Layout.names`, to our
# parameter of the given shape.
Convert = Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One publisher's names and arrangement of a model's tensors.

    Paths are those of our parameters within the part of the model, such as
    "layers/0/blocks/1/attn/qkv/kernel"; names are the publisher's.

    Attributes:
        publisher: for messages.
        anchor: name of a tensor that only this layout has. A file may put a prefix before all
            names; it is what precedes the anchor.
        renames: (regex, replacement) pairs, applied one after another, that turn a path into a
            name.
        splits: a regex on the name, and its replacements, for parameters that the publisher stores
            as several tensors; None if there are none.
        convert: (regex on the path, conversion) pairs; the first that matches applies.
        optional: regexes on paths of parameters that may keep their initial values if the file has
            no tensor for them, or one of another shape.
    """

    publisher: str
    anchor: str
    renames: tuple[tuple[str, str], ...]
    splits: tuple[str, tuple[str, ...]] | None
    convert: tuple[tuple[str, Convert], ...]
    optional: tuple[str, ...] = ()

    def prefixes(self, names: Iterable[str]) -> list[str]:
        """Return what a file puts before every name of each model of this layout in it."""
        has_anchor = lambda name: name == self.anchor or name.endswith("." + self.anchor)
        return [name.removesuffix(self.anchor) for name in names if has_anchor(name)]

    def prefix(self, names: Iterable[str]) -> str | None:
        """Return the first of `prefixes`; None if a file does not have this layout."""
        return next(iter(self.prefixes(names)), None)

    def names(self, path: str) -> list[str]:
        """Return the names, without prefix, of the tensors of our parameter `path`."""
        name = path
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        if self.splits and re.search(self.splits[0], name):
            return [re.sub(self.splits[0], part, name) for part in self.splits[1]]
        return [name]

    def is_optional(self, path: str) -> bool:
        """Return whether our parameter `path` may keep its initial values."""
        return any(re.fullmatch(pattern, path) for pattern in self.optional)

    def converter(self, path: str) -> Convert:
        """Return the conversion of tensors to our parameter `path`."""
        return next(convert for pattern, convert in self.convert if re.fullmatch(pattern, path))


def as_is(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return one tensor, or several concatenated: norms, biases, embeddings."""
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def linear(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Return one Flax kernel (in, out) of PyTorch's kernels (out, in), which share their input."""
    return np.concatenate(tensors).T
