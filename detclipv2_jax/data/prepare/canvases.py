"""Choose static shapes from the data: canvases that pad little, tables that rarely overflow.

An image of log aspect a (height over width) that is scaled to fit a canvas of log aspect c covers
exp(-|a - c|) of the canvas, whatever its area. So the canvas of the nearest aspect is the best one
for an image. The best set of K canvases is found exactly, by dynamic programming over
the possible canvases.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.plan import nearest_shape

Shape = tuple[int, int]  # (height, width) in pixels


@dataclasses.dataclass(frozen=True)
class Padding:
    """How well a set of canvases fits the images."""

    efficiency: float  # pixels of the images, scaled to fit / pixels of their canvases
    shares: tuple[float, ...]  # share of the images on each canvas
    efficiencies: tuple[float, ...]  # of each canvas; 0 for a canvas without an image


def padding(
    heights: Int[np.ndarray, " n"], widths: Int[np.ndarray, " n"], shapes: Sequence[Shape]
) -> Padding:
    """Return the padding of n >= 1 images (sizes in pixels), each on its nearest canvas."""
    canvas = nearest_shape(heights, widths, shapes)
    count = np.bincount(canvas, minlength=len(shapes))
    aspects = _log_aspects(heights, widths)
    targets = np.log([height / width for height, width in shapes])
    covered = np.bincount(canvas, np.exp(-np.abs(aspects - targets[canvas])), len(shapes))
    pixels = np.array([height * width for height, width in shapes])
    return Padding(
        efficiency=float((covered * pixels).sum() / (count * pixels).sum()),
        shares=tuple((count / count.sum()).tolist()),
        efficiencies=tuple((covered / np.maximum(count, 1)).tolist()),
    )


def choose(
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    count: int,
    area: int,
    *,
    multiple: int = 32,
    tolerance: float = 0.05,
) -> tuple[Shape, ...]:
    """Return the `count` canvases on which images cover the largest mean share of their canvas.

    Args:
        heights: of the n >= 1 images, in pixels.
        widths: of the images, in pixels.
        count: number of canvases.
        area: target area of a canvas in pixels.
        multiple: both sides of a canvas are multiples of this.
        tolerance: how far the area of a canvas may be from `area`, relative to it.

    Returns:
        (height, width) of each canvas in pixels, widest first.

    Raises:
        UserError: there are fewer than `count` canvases of this area.
    """
    shapes = possible_canvases(area, multiple, tolerance)
    if not 1 <= count <= len(shapes):
        raise UserError(
            f"cannot choose {count} canvases of about {area} pixels whose sides are multiples of "
            f"{multiple}: only {len(shapes)} exist. Choose 1 to {len(shapes)}."
        )
    aspects = np.sort(_log_aspects(heights, widths))
    targets = np.log([height / width for height, width in shapes])
    ends, between = _covered(aspects, targets)
    best = ends[0]  # best[j]: coverage of the aspects below target j if canvas j is the last one
    previous: list[np.ndarray] = []
    for _ in range(count - 1):
        reached = best[:, None] + between
        previous.append(reached.argmax(axis=0))
        best = reached.max(axis=0)
    chosen = [int((best + ends[1]).argmax())]
    for step in reversed(previous):
        chosen.append(int(step[chosen[-1]]))
    return tuple(shapes[index] for index in reversed(chosen))


def possible_canvases(area: int, multiple: int = 32, tolerance: float = 0.05) -> list[Shape]:
    """Return the canvases of about `area` pixels, widest first.

    Of several canvases with one aspect, the one nearest in area is kept. The longer side is at most
    eight times the shorter one.
    """
    sides = range(multiple, int(np.sqrt(8 * (1 + tolerance) * area)) + 1, multiple)
    off = lambda shape: abs(shape[0] * shape[1] / area - 1)
    shapes = [
        (height, width)
        for height in sides
        for width in sides
        if off((height, width)) <= tolerance and max(height, width) <= 8 * min(height, width)
    ]
    nearest: dict[float, Shape] = {}
    for shape in sorted(shapes, key=off):
        nearest.setdefault(shape[0] / shape[1], shape)
    return [nearest[aspect] for aspect in sorted(nearest)]


@dataclasses.dataclass(frozen=True)
class TableUse:
    """How often a concept table of a given size overflows, and how full it is otherwise."""

    rows: int  # size of the table
    overflowing: float  # share of the steps with more concepts than rows
    dropped: float  # concepts without a row, per step
    dropped_share: float  # concepts without a row / all concepts
    filled: float  # mean share of the rows that positives fill


def table_use(wanted: Int[np.ndarray, " steps"], rows: Iterable[int]) -> list[TableUse]:
    """Return how well concept tables of several sizes fit the steps.

    Args:
        wanted: number of distinct positives of each of n >= 1 steps.
        rows: sizes of the tables.
    """
    wanted = np.asarray(wanted, np.int64)
    uses = []
    for size in rows:
        dropped = np.maximum(wanted - size, 0)
        uses.append(
            TableUse(
                rows=size,
                overflowing=float((dropped > 0).mean()),
                dropped=float(dropped.mean()),
                dropped_share=float(dropped.sum() / max(wanted.sum(), 1)),
                filled=float((np.minimum(wanted, size) / size).mean()),
            )
        )
    return uses


def _log_aspects(
    heights: Int[np.ndarray, " n"], widths: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    return np.log(np.maximum(heights, 1) / np.maximum(widths, 1).astype(np.float64))


def _covered(
    aspects: Float[np.ndarray, " n"], targets: Float[np.ndarray, " m"]
) -> tuple[Float[np.ndarray, "2 m"], Float[np.ndarray, "m m"]]:
    """Return sums of the coverage exp(-|a - c|) over ranges of the ascending log aspects.

    Returns:
        Coverage by each target of the aspects below it, and of those at or above it. Coverage of
        the aspects from target i up to target j, each by the nearer of the two (-inf unless i < j).
    """
    rising = np.concatenate([[0], np.cumsum(np.exp(aspects))])
    falling = np.concatenate([[0], np.cumsum(np.exp(-aspects))])
    at = np.searchsorted(aspects, targets)
    below = rising[at] * np.exp(-targets)
    above = (falling[-1] - falling[at]) * np.exp(targets)
    middle = np.searchsorted(aspects, (targets[:, None] + targets) / 2)
    between = (falling[middle] - falling[at][:, None]) * np.exp(targets)[:, None]
    between += (rising[at] - rising[middle]) * np.exp(-targets)
    ordered = np.arange(len(targets))[:, None] < np.arange(len(targets))
    return np.stack([below, above]), np.where(ordered, between, -np.inf)
