"""3×3 convolution of a canvas as one TPU kernel, with the norm and activation of what it reads.

A head is convolution, GroupNorm and ReLU over and over. XLA moves the map a dozen times a layer:
it cuts it in eight for its convolution and goes through memory for statistics, norm and activation
each. Here a layer reads what the convolution before it gave, normalizes and activates that in fast
memory, convolves it, writes that and takes its statistics. Backward it reads the gradient and both
maps once, and writes one gradient.

The norm comes as a factor and an offset of each channel of each level: what makes them of the
statistics is a few numbers an image, and the caller's.

A step of the grid takes some rows of the map, with the row above and the row below them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import pieces, place
from detclipv2_jax.ops.kernels.pieces import TILE, dot

_TOKENS = 2560  # of a step, at most
_PIECE = 256  # of these at a time, about
# (top, left, height, width) of each level.
Levels = tuple[tuple[int, int, int, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """What a map is multiplied by and what is added then, before the ReLU."""

    factor: Float[Array, "B levels C"]
    offset: Float[Array, "B levels C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of each channel of each level of each image."""

    mean: Float[Array, "B levels C"]
    variance: Float[Array, "B levels C"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    batch: int
    height: int
    width: int
    inputs: int  # channels
    outputs: int
    levels: Levels
    dtype: Any

    @property
    def cores(self) -> int:
        """Parts of the batch that a chip's cores may share."""
        return place.cores(self.batch)

    @property
    def pitch(self) -> int:
        """From row to row, in tokens. The last is none: a shift by one brings zeros round."""
        return (self.width // TILE + 1) * TILE

    @property
    def bands(self) -> int:
        rows = max(_TOKENS // self.pitch, 1)
        return -(-self.height // rows)

    @property
    def rows(self) -> int:
        """Of a band; the last band may go beyond the map."""
        return -(-self.height // self.bands)

    @property
    def piece(self) -> int:
        """Rows of a piece."""
        most = max(_PIECE // self.pitch, 1)
        return max(n for n in range(1, min(most, self.rows) + 1) if self.rows % n == 0)

    @property
    def pixels(self) -> Float[Array, "levels 1"]:
        """How many each level has."""
        return jnp.asarray([[height * width] for _, _, height, width in self.levels], jnp.float32)


def fast_memory(shape: tuple[int, ...], outputs: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, inputs = shape
    plan = _Plan(batch, height, width, inputs, outputs, (), jnp.bfloat16)
    size, rows, edges = pieces.size, plan.rows, plan.rows + 2
    maps = size(2, 4, edges, width, outputs) + size(2, 4, rows, width, inputs)
    dense = size(2, 18, inputs, outputs) + size(4, 9, inputs, outputs)
    scratch = size(2, edges, plan.pitch, outputs) + size(2, 3, rows, plan.pitch, inputs)
    return maps + dense + scratch + size(4, 4, max(plan.pitch, _PIECE), max(inputs, outputs))


def packed_conv(
    x: Float[Array, "B H W C"],
    norm: Norm | None,
    kernel: Float[Array, "3 3 C O"],
    levels: Levels,
) -> tuple[Float[Array, "B H W O"], Statistics]:
    """Convolve relu(x · factor + offset), or x itself, each level within zeros of its own.

    Args:
      x: any size; what stands in the gaps between the levels counts as zeros.
      norm: None: x is convolved as it is.
      kernel: float32; products take x's dtype, its gradient sums in float32.
      levels: where they lie on the map, a pixel or more between them.

    Returns:
      The map in x's dtype, whose gaps are undefined, and the statistics of that map.
    """
    plan = _Plan(*x.shape, kernel.shape[-1], levels, x.dtype)
    y, mean, squares = _convolve(plan, x, norm, kernel)
    return y, Statistics(mean, squares / plan.pixels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: _Plan, x: Array, norm: Norm | None, kernel: Array) -> list[Array]:
    return _call_forward(plan, x, norm, kernel)


def _keep(plan, x, norm, kernel):
    y, mean, squares = _call_forward(plan, x, norm, kernel)
    return [y, mean, squares], (x, norm, kernel, y, mean)


def _pull(plan, saved, gradients):
    x, norm, kernel, y, mean = saved
    by_y, by_mean, by_squares = gradients
    # The gradient by a pixel is by_y + slope · y + constant, through its level's statistics.
    slope = 2.0 * by_squares
    constant = by_mean / plan.pixels - slope * mean
    by_x, *by_norm, by_kernel = _call_backward(plan, x, norm, kernel, y, by_y, slope, constant)
    by_norm = None if norm is None else Norm(*by_norm)
    return by_x, by_norm, by_kernel.sum(0)


_convolve.defvjp(_keep, _pull)


def _map(plan: _Plan, channels: int) -> pl.BlockSpec:
    """A band's rows."""
    images = plan.batch // plan.cores
    index = lambda core, image, band: (core * images + image, band, 0, 0)
    return pl.BlockSpec((1, plan.rows, plan.width, channels), index)


def _edged(plan: _Plan, channels: int) -> list[pl.BlockSpec]:
    """A band's rows, the row above and the row below them; beyond the map any row."""
    images = plan.batch // plan.cores

    def row(offset: int) -> pl.BlockSpec:
        def index(core: Any, image: Any, band: Any) -> tuple[Any, ...]:
            number = jnp.clip(band * plan.rows + offset, 0, plan.height - 1)
            return core * images + image, number, 0, 0

        return pl.BlockSpec((1, 1, plan.width, channels), index)

    return [_map(plan, channels), row(-1), row(plan.rows)]


def _of_levels(plan: _Plan, channels: int) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, band: (core * images + image, 0, 0)
    return pl.BlockSpec((1, len(plan.levels), channels), index)


def _cost(plan: _Plan, products: int, inputs: float, outputs: float) -> pl.CostEstimate:
    """Of so many maps that are moved; with padded lanes, as the compiler counts."""
    item, pixels = jnp.dtype(plan.dtype).itemsize, (plan.batch, plan.height, plan.width)
    moved = inputs * pieces.size(item, *pixels, plan.inputs)
    moved += outputs * pieces.size(item, *pixels, plan.outputs)
    taps = 9 * plan.inputs * plan.outputs
    sums = 4 * plan.cores * taps if products > 1 else 0
    computed = plan.batch * plan.bands * plan.rows * plan.pitch
    return pl.CostEstimate(
        flops=2 * products * computed * taps,
        bytes_accessed=int(moved) + item * taps + sums,
        transcendentals=0,
    )


def _call_forward(plan: _Plan, x: Array, norm: Norm | None, kernel: Array) -> list[Array]:
    taps = kernel.reshape(9, plan.inputs, plan.outputs).astype(plan.dtype)
    norms = [] if norm is None else [norm.factor, norm.offset]
    statistics = jax.ShapeDtypeStruct((plan.batch, len(plan.levels), plan.outputs), jnp.float32)
    edges = 1 + 2 / plan.rows
    inner = pltpu.VMEM((plan.rows + 2, plan.pitch, plan.inputs), plan.dtype)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan, norm is not None),
        name="canvas_conv_forward",
        grid=(plan.cores, plan.batch // plan.cores, plan.bands),
        out_shape=[
            jax.ShapeDtypeStruct((*x.shape[:3], plan.outputs), plan.dtype), *[statistics] * 2
        ],
        in_specs=[
            *_edged(plan, plan.inputs),
            *[_of_levels(plan, plan.inputs) for _ in norms],
            pieces.whole(taps),
        ],
        out_specs=[_map(plan, plan.outputs), *[_of_levels(plan, plan.outputs)] * 2],
        scratch_shapes=[inner, *[pltpu.VMEM((len(plan.levels), plan.outputs), jnp.float32)] * 2],
        cost_estimate=_cost(plan, 1, edges, 1),
        compiler_params=pieces.parameters(3),
    )(x, x, x, *norms, taps)  # fmt: skip


def _call_backward(
    plan: _Plan, x: Array, norm: Norm | None, kernel: Array, y: Array, by_y: Array,
    slope: Array, constant: Array,
) -> list[Array]:  # fmt: skip
    # What carries the gradient back is a convolution too, with the kernel turned round.
    taps = kernel[::-1, ::-1].swapaxes(2, 3).reshape(9, plan.outputs, plan.inputs)
    taps = taps.astype(plan.dtype)
    norms = [] if norm is None else [norm.factor, norm.offset]
    by_norms = [jax.ShapeDtypeStruct(array.shape, jnp.float32) for array in norms]
    shapes, specs = pieces.sums(plan.cores, kernel)
    edges = 1 + 2 / plan.rows
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan, norm is not None),
        name="canvas_conv_backward",
        grid=(plan.cores, plan.batch // plan.cores, plan.bands),
        out_shape=[jax.ShapeDtypeStruct(x.shape, plan.dtype), *by_norms, *shapes],
        in_specs=[
            *_edged(plan, plan.outputs),
            *_edged(plan, plan.outputs),
            *[_of_levels(plan, plan.outputs)] * 2,
            _map(plan, plan.inputs),
            *[_of_levels(plan, plan.inputs) for _ in norms],
            pieces.whole(taps),
        ],
        out_specs=[
            _map(plan, plan.inputs),
            *[_of_levels(plan, plan.inputs) for _ in norms],
            *specs,
        ],
        scratch_shapes=[
            pltpu.VMEM((plan.rows + 2, plan.pitch, plan.outputs), plan.dtype),
            pltpu.VMEM((3, plan.rows, plan.pitch, plan.inputs), plan.dtype),
        ],
        cost_estimate=_cost(plan, 2, 2, 2 * edges),
        compiler_params=pieces.parameters(3),
    )(by_y, by_y, by_y, y, y, y, slope, constant, x, *norms, taps)  # fmt: skip


def _forward_kernel(plan: _Plan, normed: bool, *refs: Any) -> None:
    x, refs = refs[:3], refs[3:]
    norm, refs = (refs[:2], refs[2:]) if normed else (None, refs)
    taps, out, mean, squares, inner, band_sum, band_squares = refs

    def activated(r: Any, value: Array) -> Array:
        inside = _inside(plan, _row(plan, r))
        return jnp.where(inside, _activate(plan, norm, _row(plan, r), value)[0], 0.0)

    _lay(plan, (x,), inner, activated)

    def convolve(number: Any, _: None) -> None:
        values = _products(plan, inner, taps, number * plan.piece)
        for r in range(plan.piece):
            row = values[r * plan.pitch : r * plan.pitch + plan.width]
            out[0, number * plan.piece + r] = row.astype(plan.dtype)

    lax.fori_loop(0, plan.rows // plan.piece, convolve, None)
    _take_statistics(plan, out, mean, squares, band_sum, band_squares)


def _take_statistics(
    plan: _Plan, out: Any, mean: Any, squares: Any, band_sum: Any, band_squares: Any
) -> None:
    """Of the band, about its own mean; then joined to those of the bands before (Chan 1979)."""
    band = pl.program_id(2)

    @pl.when(band == 0)
    def _():
        pieces.clear([mean, squares])

    for level, (top, _, height, width) in enumerate(plan.levels):
        start = band * plan.rows - top
        before = jnp.clip(start, 0, height) * width
        after = jnp.clip(start + plan.rows, 0, height) * width

        @pl.when(after > before)
        def _(level=level, before=before, after=after):
            here = slice(level, level + 1)
            count = (after - before).astype(jnp.float32)
            _sum_rows(plan, level, band_sum, lambda r: out[0, r].astype(jnp.float32))
            middle = band_sum[here] / count
            _sum_rows(
                plan, level, band_squares,
                lambda r: jnp.square(out[0, r].astype(jnp.float32) - middle),
            )  # fmt: skip
            share = count / after.astype(jnp.float32)
            apart = middle - mean[0, here]
            mean[0, here] += apart * share
            joined = jnp.square(apart) * (before.astype(jnp.float32) * share)
            squares[0, here] += band_squares[here] + joined


def _sum_rows(plan: _Plan, level: int, sums: Any, values: Callable[[Any], Array]) -> None:
    """The sum of a level's pixels of a band."""
    here = slice(level, level + 1)
    sums[here] = jnp.zeros((1, sums.shape[1]), jnp.float32)

    def add(r: Any, _: None) -> None:
        inside = _inside_level(plan, level, _row(plan, r))
        sums[here] += pieces.total(jnp.where(inside, values(r), 0.0))

    lax.fori_loop(0, plan.rows, add, None)


def _backward_kernel(plan: _Plan, normed: bool, *refs: Any) -> None:
    by_y, y, slope, constant, x = refs[:3], refs[3:6], refs[6], refs[7], refs[8]
    refs = refs[9:]
    norm, refs = (refs[:2], refs[2:]) if normed else (None, refs)
    taps, by_x, *by_norm, by_kernel, outer, shifted = refs
    first_band = pl.program_id(2) == 0

    @pl.when(first_band & (pl.program_id(1) == 0))
    def _():
        pieces.clear([by_kernel])

    @pl.when(first_band)
    def _():
        pieces.clear(by_norm)

    def through_statistics(r: Any, gradient: Array, value: Array) -> Array:
        row = _row(plan, r)
        slopes, constants = _spread(plan, row, slope), _spread(plan, row, constant)
        return jnp.where(_inside(plan, row), gradient + slopes * value + constants, 0.0)

    _lay(plan, (by_y, y), outer, through_statistics)
    _lay_shifted(plan, norm, x, shifted)

    def pull(number: Any, _: None) -> None:
        start = number * plan.piece
        values = _products(plan, outer, taps, start)
        for r in range(plan.piece):
            row = values[r * plan.pitch : r * plan.pitch + plan.width]
            _pull_activation(plan, norm, x, row, start + r, by_x, by_norm)
        for i in range(3):
            there = outer[pl.ds(start + 2 - i, plan.piece)].reshape(-1, plan.outputs)
            for j in range(3):
                here = shifted[j, pl.ds(start, plan.piece)].reshape(-1, plan.inputs)
                by_kernel[0, i, j] += dot(here, there, left=0)

    lax.fori_loop(0, plan.rows // plan.piece, pull, None)


def _pull_activation(
    plan: _Plan, norm: Any, x: Any, gradient: Array, r: Any, by_x: Any, by_norm: Any
) -> None:
    """From what was convolved back to what was read, one row."""
    row = _row(plan, r)
    if norm is None:
        by_x[0, r] = gradient.astype(plan.dtype)
        return
    value = x[0, r].astype(jnp.float32)
    active, factor = _activate(plan, norm, row, value)
    gradient = jnp.where(_inside(plan, row) & (active > 0), gradient, 0.0)
    by_x[0, r] = (gradient * factor).astype(plan.dtype)
    by_factor, by_offset = by_norm
    for level, (top, _, height, _) in enumerate(plan.levels):

        @pl.when((row >= top) & (row < top + height))
        def _(level=level):
            here, inside = slice(level, level + 1), _inside_level(plan, level, row)
            by_offset[0, here] += pieces.total(jnp.where(inside, gradient, 0.0))
            by_factor[0, here] += pieces.total(jnp.where(inside, gradient * value, 0.0))


def _row(plan: _Plan, r: Any) -> Any:
    """Of the map: the r-th of the band."""
    return pl.program_id(2) * plan.rows + r


def _inside_level(plan: _Plan, level: int, row: Any) -> Array:
    """Which of a row's pixels belong to a level."""
    top, left, height, width = plan.levels[level]
    columns = lax.broadcasted_iota(jnp.int32, (plan.width, 1), 0)
    return (row >= top) & (row < top + height) & (columns >= left) & (columns < left + width)


def _inside(plan: _Plan, row: Any) -> Array:
    """Which of a row's pixels belong to any level."""
    levels = range(len(plan.levels))
    return functools.reduce(jnp.logical_or, [_inside_level(plan, n, row) for n in levels])


def _spread(plan: _Plan, row: Any, values: Any) -> Array:
    """Each pixel's level's, of a row; anything in the gaps."""
    spread = values[0, 0:1]
    for level in range(1, len(plan.levels)):
        spread = jnp.where(_inside_level(plan, level, row), values[0, level : level + 1], spread)
    return spread


def _activate(plan: _Plan, norm: Any, row: Any, value: Array) -> tuple[Array, Array]:
    """relu(value · factor + offset), and the factors, of a row; undefined in the gaps."""
    if norm is None:
        return value, jnp.ones_like(value)
    factor, offset = (_spread(plan, row, values) for values in norm)
    return jnp.maximum(value * factor + offset, 0.0), factor


def _lay(plan: _Plan, maps: Any, rows: Any, function: Callable[..., Array]) -> None:
    """`function` of each row of a band and its neighbors into `rows`, zeros behind it."""

    def lay(place: Any, r: Any, *values: Array) -> None:
        row = function(r, *[value.astype(jnp.float32) for value in values])
        rows[place] = jnp.zeros((plan.pitch, row.shape[1]), plan.dtype)
        rows[place, : plan.width] = row.astype(plan.dtype)

    def middle(r: Any, _: None) -> None:
        lay(r + 1, r, *[main[0, r] for main, _, _ in maps])

    lay(0, -1, *[above[0, 0] for _, above, _ in maps])
    lax.fori_loop(0, plan.rows, middle, None)
    lay(plan.rows + 1, plan.rows, *[below[0, 0] for _, _, below in maps])


def _lay_shifted(plan: _Plan, norm: Any, x: Any, shifted: Any) -> None:
    """What was convolved, moved by a pixel to the right, not at all, and to the left."""

    def lay(r: Any, _: None) -> None:
        row = _row(plan, r)
        value = _activate(plan, norm, row, x[0, r].astype(jnp.float32))[0]
        value = jnp.where(_inside(plan, row), value, 0.0)
        behind = jnp.zeros((plan.pitch - plan.width, plan.inputs), jnp.float32)
        value = jnp.concatenate([value, behind], axis=0)
        for j, by in enumerate((1, 0, plan.pitch - 1)):
            moved = pltpu.roll(value, by, axis=0) if by else value
            shifted[j, r] = moved.astype(plan.dtype)

    lax.fori_loop(0, plan.rows, lay, None)


def _products(plan: _Plan, rows: Any, taps: Any, start: Any) -> Float[Array, "T O"]:
    """The convolution of a piece of `rows`, from its `start`-th on, in float32.

    A column of taps is summed where it stands and moved then.
    """
    columns = []
    for j in range(3):
        total = None
        for i in range(3):
            here = rows[pl.ds(start + i, plan.piece)].reshape(plan.piece * plan.pitch, -1)
            product = dot(here, taps[3 * i + j])
            total = product if total is None else total + product
        columns.append(total)
    left, middle, right = columns
    last = plan.piece * plan.pitch - 1
    return middle + pltpu.roll(left, 1, axis=0) + pltpu.roll(right, last, axis=0)
