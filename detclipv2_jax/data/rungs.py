"""Rungs: the sizes of canvas that a kind of data trains on, and when each is drawn.

The images of a step share one canvas. If each image drew its size alone, most of a canvas would be
padding. So the step draws a *rung* first, a factor of its canvas's sides, and the images then fill
that smaller canvas to a narrow range of sizes. Over many steps the sizes are as varied as if each
image had drawn its own from the whole range. Numpy only.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.data.config import KindConfig

# Sides of a rung's canvas are multiples of this: the stride of Swin's last stage. The coarser
# levels of the pyramid, strides 64 and 128, round up, as they do for 800 x 1344.
MULTIPLE = 32


def canvas(shape: tuple[int, int], rung: float) -> tuple[int, int]:
    """Return the canvas (height, width) of a rung, in pixels: `shape` itself for rung 1.

    Sides are rounded to the nearest multiple of 32, so they are up to 16 pixels off `rung * shape`.
    """
    if rung == 1:
        return shape
    height, width = (max(MULTIPLE, MULTIPLE * round(side * rung / MULTIPLE)) for side in shape)
    return height, width


def canvases(config: KindConfig) -> list[tuple[int, int]]:
    """Return the distinct canvases of a kind, all rungs of its first shape first."""
    every = [canvas(shape, rung) for shape in config.shapes for rung in config.rungs]
    return list(dict.fromkeys(every))


def phases(config: KindConfig) -> tuple[tuple[float, tuple[float, ...]], ...]:
    """Return (first epoch, weight of each rung) of each phase of a run, in order.

    Without `rung_phases` a rung's weight is its factor. On a rung of factor r, sizes are spread
    over a range of a width proportional to r. So ranges that touch each other make one even range.
    """
    return config.rung_phases or ((0.0, config.rungs),)


def chances(config: KindConfig, epochs: Float[np.ndarray, " n"]) -> Float[np.ndarray, "n rungs"]:
    """Return the probability of each rung at some moments of a run, counted in epochs."""
    begins, weights = zip(*phases(config))
    table = np.array(weights, np.float64)
    table /= table.sum(axis=1, keepdims=True)
    return table[np.searchsorted(begins, epochs, side="right") - 1]


def draw(
    configs: Sequence[KindConfig],
    kinds: Int[np.ndarray, " n"],
    epochs: Float[np.ndarray, " n"],
    generator: np.random.Generator,
) -> Int[np.ndarray, " n"]:
    """Draw the rung of each of n steps.

    Args:
        configs: of each kind.
        kinds: index of the kind of each step.
        epochs: when each step is, counted in epochs.
        generator: of random numbers; one is used for each step, whatever its kind.

    Returns:
        Index of each step's rung among its kind's `rungs`, int8.
    """
    moments = generator.random(len(kinds))
    rungs = np.zeros(len(kinds), np.int8)
    for number, config in enumerate(configs):
        mine = np.flatnonzero(kinds == number)
        ends = np.cumsum(chances(config, epochs[mine])[:, :-1], axis=1)  # the last one's end is 1
        rungs[mine] = (moments[mine, None] >= ends).sum(axis=1)
    return rungs
