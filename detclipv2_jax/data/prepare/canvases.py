"""Static shapes chosen from the data: canvases that waste few pixels, tables that rarely overflow.

A picture of log aspect a (height over width) that is scaled to fit a canvas of log aspect c covers
exp(-|a - c|) of it, whatever the canvas's area: so the nearest aspect is the best canvas, and the
best set of K canvases is found exactly, by dynamic programming over the aspects that are to be had.
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
    """How well a set of canvases fits the pictures."""

    efficiency: float  # pixels of pictures / pixels of their canvases, each scaled to fit
    shares: tuple[float, ...]  # of the pictures, on each canvas
    efficiencies: tuple[float, ...]  # of each canvas; 0 for one without a picture


def padding(
    heights: Int[np.ndarray, " n"], widths: Int[np.ndarray, " n"], shapes: Sequence[Shape]
) -> Padding:
    """The padding efficiency of canvases for n >= 1 pictures (pixels), each on its nearest."""
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
    """The `count` canvases on which the pictures cover the largest mean share of their canvas.

    Args:
        heights: of the n >= 1 pictures, in pixels.
        widths: likewise.
        count: how many canvases.
        area: pixels that a canvas should have; all within `tolerance` of it are considered.
        multiple: of which both sides are.
        tolerance: relative to `area`.

    Returns:
        (height, width) of each, widest first.

    Raises:
        UserError: there are not so many canvases of this area.
    """
    shapes = candidates(area, multiple, tolerance)
    if not 1 <= count <= len(shapes):
        raise UserError(
            f"{count} canvases of {area} pixels with sides of a multiple of {multiple} were asked "
            f"for, there are {len(shapes)}: ask for 1 to that"
        )
    aspects = np.sort(_log_aspects(heights, widths))
    targets = np.log([height / width for height, width in shapes])
    ends, between = _covered(aspects, targets)
    best = ends[0]  # best[j]: what is covered below target j by a set whose last canvas is j
    previous: list[np.ndarray] = []
    for _ in range(count - 1):
        reached = best[:, None] + between
        previous.append(reached.argmax(axis=0))
        best = reached.max(axis=0)
    chosen = [int((best + ends[1]).argmax())]
    for step in reversed(previous):
        chosen.append(int(step[chosen[-1]]))
    return tuple(shapes[index] for index in reversed(chosen))


def candidates(area: int, multiple: int = 32, tolerance: float = 0.05) -> list[Shape]:
    """Canvases of about `area` pixels, widest first; of those of one aspect the nearest in area.

    Sides are at most eight times as long as one another.
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
    """What a table of some rows costs over a number of steps."""

    rows: int
    overflowing: float  # share of the steps whose concepts do not all find a row
    dropped: float  # concepts without a row, a step
    dropped_share: float  # of all concepts of these steps
    filled: float  # mean share of the rows that positives take


def table_use(wanted: Int[np.ndarray, " steps"], rows: Iterable[int]) -> list[TableUse]:
    """Overflow of tables of several sizes, from the different positives of each of n >= 1 steps."""
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
    """Sums of exp(-|a - c|) over ascending aspects.

    First, of those below and of those from each target on; second, of those from target i to
    before target j with the nearer of the two (-inf unless i < j).
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
