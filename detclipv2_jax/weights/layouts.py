"""What a publisher calls the tensors that one of our parameters is made of."""

import dataclasses
import re
from collections.abc import Callable, Iterable

import numpy as np

# From a publisher's tensors, in the order of their names, to our parameter of a given shape.
Convert = Callable[[list[np.ndarray], tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One publisher's way to name and arrange a model's tensors.

    Attributes:
        publisher: for people.
        anchor: the end of the name of a tensor that only this layout has; what stands before it is
            the prefix of all names.
        renames: (pattern on our path, its replacement), applied one after the other.
        splits: a renamed path's pattern, and the names of the tensors that are joined to make it.
        convert: by a pattern on our path, how tensors become the parameter; the first that matches.
        optional: patterns on our paths that a file may lack or have in another shape; they are then
            left as initialized.
    """

    publisher: str
    anchor: str
    renames: tuple[tuple[str, str], ...]
    splits: tuple[str, tuple[str, ...]] | None
    convert: tuple[tuple[str, Convert], ...]
    optional: tuple[str, ...] = ()

    def prefix(self, names: Iterable[str]) -> str | None:
        """What the file puts before every name; None if it is not in this layout."""
        for name in names:
            if name == self.anchor or name.endswith("." + self.anchor):
                return name.removesuffix(self.anchor)
        return None

    def names(self, path: str) -> list[str]:
        """The publisher's names, without prefix, of the tensors behind our parameter `path`."""
        name = path
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        if self.splits and re.search(self.splits[0], name):
            return [re.sub(self.splits[0], part, name) for part in self.splits[1]]
        return [name]

    def is_optional(self, path: str) -> bool:
        """May `path` be left as initialized?"""
        return any(re.fullmatch(pattern, path) for pattern in self.optional)

    def converter(self, path: str) -> Convert:
        """How the tensors of `path` become our parameter."""
        return next(convert for pattern, convert in self.convert if re.fullmatch(pattern, path))


def as_is(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, or several end to end: norms, biases, embeddings."""
    return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)


def linear(tensors: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """PyTorch keeps (out, in), Flax (in, out); several kernels share their input."""
    return np.concatenate(tensors).T
