"""Fill: how much of the canvases' pixels the images of a kind cover, and how large they are.

The rest is padding, which costs as much as pixels of images do.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from detclipv2_jax.data import rungs as rungs_lib
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.plan import nearest_shape

_PLACED = 20_000  # images that an estimate places; its error is below half a percent


class Fill(NamedTuple):
    """What the augmentation of a kind makes of its images."""

    share: float  # pixels of images / pixels of canvases, 0 to 1
    canvas_pixels: float  # per image
    short_sides: tuple[float, float]  # of 5 and 95 % of the placed images, pixels


def expected(
    config: KindConfig,
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    epoch: float = 0.0,
) -> Fill:
    """Estimate the fill of n >= 1 images under a kind's `shapes`, `rungs`, `scales` and `crop`.

    Some of the images, evenly spaced, are placed as the pipeline places them.

    Args:
        config: of the kind.
        heights: of the stored images, in pixels.
        widths: of the stored images, in pixels.
        epoch: when in the run; the rungs' chances may depend on it.
    """
    chosen = np.linspace(0, len(heights) - 1, _PLACED).round().astype(np.int64)
    heights, widths = np.asarray(heights)[chosen], np.asarray(widths)[chosen]
    moments, kinds = np.full(_PLACED, epoch), np.zeros(_PLACED, np.int8)
    drawn = rungs_lib.draw([config], kinds, moments, np.random.default_rng(0))
    rooms = np.array(
        [[rungs_lib.canvas(shape, rung) for rung in config.rungs] for shape in config.shapes]
    )[nearest_shape(heights, widths, config.shapes), drawn]
    seeds = transforms_lib.seeds(0, 0, "", np.arange(_PLACED))
    placed = transforms_lib.place(config, rooms, heights, widths, seeds).size
    low, high = np.quantile(placed.min(axis=1), (0.05, 0.95))
    return Fill(
        share=float(placed.prod(axis=1).sum() / rooms.prod(axis=1).sum()),
        canvas_pixels=float(rooms.prod(axis=1).mean()),
        short_sides=(float(low), float(high)),
    )
