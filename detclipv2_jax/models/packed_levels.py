"""All levels of a feature pyramid packed into one map, so that a shared head runs only once.

A 3×3 convolution of the packed map equals the convolution of every level: levels are separated by
one-pixel gaps, and the zeros in these gaps act as each level's own padding. Each layer must set the
gaps back to zero (`PackedLevels.mask`). For an 800×1344 image the packed map has 13 % more pixels
than its levels. The head of the smallest model compiles in half the time.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class PackedLevels:
    """Position of every level on the packed map (static; holds no activations).

    Each level is placed alternately to the right of and below the level before it.

    Attributes:
        sizes: (height, width) of each level, fine to coarse.
    """

    sizes: tuple[tuple[int, int], ...]

    @functools.cached_property
    def corners(self) -> tuple[tuple[int, int], ...]:
        """(top, left) of each level."""
        corners = [(0, 0)]
        for level, (height, width) in enumerate(self.sizes[:-1]):
            top, left = corners[-1]
            corners.append((top + height + 1, left) if level % 2 else (top, left + width + 1))
        return tuple(corners)

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the packed map."""
        ends = np.asarray(self.corners) + np.asarray(self.sizes)
        return tuple(ends.max(axis=0).tolist())

    @property
    def rectangles(self) -> tuple[tuple[int, int, int, int], ...]:
        """(top, left, height, width) of each level."""
        return tuple((*corner, *size) for corner, size in zip(self.corners, self.sizes))

    def level_mask(self, level: int) -> Bool[np.ndarray, "H W 1"]:
        """Return True for the pixels of the packed map that belong to one level."""
        mask = np.zeros((*self.shape, 1), bool)
        mask[self._slices[level]] = True
        return mask

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "H W 1"]:
        """True for the pixels of the packed map that belong to any level, False in the gaps."""
        return np.any([self.level_mask(level) for level in range(len(self.sizes))], axis=0)

    def inside(self, extents: Int[Array, "B levels 2"]) -> Bool[Array, "B H W 1"]:
        """Return True for the pixels of the packed map that an image covers, per image.

        Args:
            extents: rows and columns of each level that an image covers (`level_extents`).
        """
        rows, columns = (np.arange(size) for size in self.shape)
        covered = []
        for level, (top, left) in enumerate(self.corners):
            height, width = extents[:, level, 0, None, None], extents[:, level, 1, None, None]
            in_rows = (rows[:, None] >= top) & (rows[:, None] < top + height)  # (B, H, 1)
            in_columns = (columns >= left) & (columns < left + width)  # (B, 1, W)
            covered.append(in_rows & in_columns)
        return functools.reduce(jnp.logical_or, covered)[..., None]

    @property
    def _slices(self) -> list[tuple[slice, slice]]:
        return [
            (slice(top, top + height), slice(left, left + width))
            for (top, left), (height, width) in zip(self.corners, self.sizes)
        ]

    def pack(self, levels: Sequence[Float[Array, "B H W C"]]) -> Float[Array, "B H2 W2 C"]:
        """Return the packed map of the levels, with zeros in the gaps."""
        batch, _, _, channels = levels[0].shape
        packed = jnp.zeros((batch, *self.shape, channels), levels[0].dtype)
        for level, (rows, columns) in zip(levels, self._slices, strict=True):
            packed = packed.at[:, rows, columns].set(level)
        return packed

    def unpack(self, packed: Float[Array, "B H W C"]) -> list[Float[Array, "B H2 W2 C"]]:
        """Return the levels of a packed map, fine to coarse: the inverse of `pack`."""
        return [packed[:, rows, columns] for rows, columns in self._slices]

    def flatten(self, packed: Float[Array, "B H W C"]) -> Float[Array, "B K C"]:
        """Return the K pixels of all levels in anchor order: fine to coarse, row by row."""
        batch, _, _, channels = packed.shape
        levels = [level.reshape(batch, -1, channels) for level in self.unpack(packed)]
        return jnp.concatenate(levels, axis=1)

    def unflatten(self, pixels: Float[Array, "B K C"]) -> Float[Array, "B H W C"]:
        """Return the packed map of pixels in anchor order: the inverse of `flatten`."""
        ends = np.cumsum([height * width for height, width in self.sizes])[:-1]
        levels = jnp.split(pixels, ends, axis=1)
        return self.pack(
            [level.reshape(level.shape[0], *size, -1) for level, size in zip(levels, self.sizes)]
        )
