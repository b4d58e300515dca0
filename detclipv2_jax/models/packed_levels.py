"""All levels of a pyramid on one map, so that a shared head runs once instead of five times.

A 3×3 convolution of the packed map is that of every level, because the one-pixel gaps between
levels are the zeros of each level's own padding, as long as they are set back to zero after each
layer (`PackedLevels.mask`). At 800×1344 the packed map is 13 % larger than its levels; the head of
the smallest model compiles in half the time.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class PackedLevels:
    """Where each level lies: alternately to the right of and below the one before it.

    `sizes` are the levels' (height, width), fine to coarse.
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
        """(height, width) of the canvas."""
        ends = np.asarray(self.corners) + np.asarray(self.sizes)
        return tuple(ends.max(axis=0).tolist())

    @property
    def rectangles(self) -> tuple[tuple[int, int, int, int], ...]:
        """(top, left, height, width) of each level."""
        return tuple((*corner, *size) for corner, size in zip(self.corners, self.sizes))

    def member(self, level: int) -> Bool[np.ndarray, "H W 1"]:
        """Which pixels of the canvas belong to a level."""
        member = np.zeros((*self.shape, 1), bool)
        member[self._slices[level]] = True
        return member

    @functools.cached_property
    def mask(self) -> Bool[np.ndarray, "H W 1"]:
        """Which pixels of the canvas belong to any level: False in the gaps."""
        return np.any([self.member(level) for level in range(len(self.sizes))], axis=0)

    @property
    def _slices(self):
        return [
            (slice(top, top + height), slice(left, left + width))
            for (top, left), (height, width) in zip(self.corners, self.sizes)
        ]

    def place(self, levels: Sequence[Float[Array, "B H W C"]]) -> Float[Array, "B H2 W2 C"]:
        """The canvas of the levels, zeros in the gaps."""
        batch, _, _, channels = levels[0].shape
        canvas = jnp.zeros((batch, *self.shape, channels), levels[0].dtype)
        for level, (rows, columns) in zip(levels, self._slices, strict=True):
            canvas = canvas.at[:, rows, columns].set(level)
        return canvas

    def cut(self, canvas: Float[Array, "B H W C"]) -> list[Float[Array, "B H2 W2 C"]]:
        """The inverse of `place`."""
        return [canvas[:, rows, columns] for rows, columns in self._slices]

    def flatten(self, canvas: Float[Array, "B H W C"]) -> Float[Array, "B K C"]:
        """The levels' pixels, fine to coarse, each level row by row: the order of the anchors."""
        batch, _, _, channels = canvas.shape
        levels = [level.reshape(batch, -1, channels) for level in self.cut(canvas)]
        return jnp.concatenate(levels, axis=1)

    def unflatten(self, pixels: Float[Array, "B K C"]) -> Float[Array, "B H W C"]:
        """The inverse of `flatten`, with zeros in the gaps."""
        ends = np.cumsum([height * width for height, width in self.sizes])[:-1]
        parts = jnp.split(pixels, ends, axis=1)
        return self.place(
            [part.reshape(part.shape[0], *size, -1) for part, size in zip(parts, self.sizes)]
        )
