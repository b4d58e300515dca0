"""The part of a feature map that an image covers; the rest of its canvas is padding."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def level_extents(sizes: Int[Array, "B 2"], strides: Sequence[int]) -> Int[Array, "B levels 2"]:
    """Return how many rows and columns of each level an image covers, in full or in part.

    They are what the level would have if the canvas were as large as the image.

    Args:
        sizes: height and width of each image on its canvas, pixels.
        strides: pixels per cell of each level.
    """
    strides = np.asarray(strides)[:, None]
    return -(-sizes[:, None] // strides)


def zero_padding(
    x: Float[Array, "B H W C"], extents: Int[Array, "B 2"] | None
) -> Float[Array, "B H W C"]:
    """Return a level with zeros in the padding; the level itself if `extents` is None."""
    if extents is None:
        return x
    rows = np.arange(x.shape[1])[:, None] < extents[:, 0, None, None]  # (B, H, 1)
    columns = np.arange(x.shape[2]) < extents[:, 1, None, None]  # (B, 1, W)
    return jnp.where((rows & columns)[..., None], x, jnp.zeros((), x.dtype))
