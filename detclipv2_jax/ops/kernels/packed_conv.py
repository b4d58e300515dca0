"""3×3 convolution of a packed map as one TPU kernel, with the norm and activation of its input.

    y = conv3x3(relu(x · factor + offset))   and   the mean and variance of y

A packed map holds all levels of a pyramid side by side (`models/packed_levels.py`); zeros surround
each level. A head repeats convolution, GroupNorm and ReLU. XLA moves the map a dozen times per
layer: it cuts it into eight parts for its convolution, and goes through memory for statistics,
norm and activation each. Here a layer reads what the convolution before it wrote, normalizes and
activates it in VMEM, convolves it, writes the result and takes its statistics. Backward, it reads
the gradient and both maps once, and writes one gradient.

The norm comes as a factor and an offset per channel and level. The caller derives them from the
statistics; they are a few numbers per image.

A step of the grid takes a band: several rows of the map, with the row above and the row below. In
VMEM a row starts every `pitch` tokens, with at least one token of zeros after it: moving tokens by
one then brings in zeros, not pixels of the neighboring row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from detclipv2_jax.ops.kernels import common, place
from detclipv2_jax.ops.kernels.common import TILE, Ref, dot

_TOKENS = 2560  # most tokens per step
_PIECE = 256  # about how many tokens are multiplied at a time
# (top, left, height, width) of each level on the packed map.
Levels = tuple[tuple[int, int, int, int], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """Factors and offsets of a norm: the input of the ReLU is x · factor + offset."""

    factor: Float[Array, "B levels C"]
    offset: Float[Array, "B levels C"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and variance over the pixels of each level, per image and channel."""

    mean: Float[Array, "B levels C"]
    variance: Float[Array, "B levels C"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    batch: int
    height: int
    width: int
    inputs: int  # channels
    outputs: int  # channels
    levels: Levels
    dtype: Any
    out_dtype: Any  # of y

    @property
    def cores(self) -> int:
        return place.cores(self.batch)

    @property
    def pitch(self) -> int:
        """Tokens from the start of a row to the start of the next; more than the width."""
        return (self.width // TILE + 1) * TILE

    @property
    def bands(self) -> int:
        rows = max(_TOKENS // self.pitch, 1)
        return -(-self.height // rows)

    @property
    def rows(self) -> int:
        """Rows per band; the last band may extend beyond the map."""
        return -(-self.height // self.bands)

    @property
    def piece(self) -> int:
        """Rows per matrix product."""
        most = max(_PIECE // self.pitch, 1)
        return max(n for n in range(1, min(most, self.rows) + 1) if self.rows % n == 0)

    def of_image(self, extents: Ref | None) -> "_Tiling":
        """Return the tiling with the levels' parts that the step's image covers; in a kernel."""
        if extents is None:
            return self
        image = pl.program_id(0) * (self.batch // self.cores) + pl.program_id(1)
        first = image * (2 * len(self.levels))
        levels = tuple(
            (top, left, extents[first + 2 * level], extents[first + 2 * level + 1])
            for level, (top, left, _, _) in enumerate(self.levels)
        )
        return dataclasses.replace(self, levels=levels)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.cores, self.batch // self.cores, self.bands)


def vmem_bytes(shape: tuple[int, ...], outputs: int, out_dtype: Any = jnp.bfloat16) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, inputs = shape
    tiling = _Tiling(batch, height, width, inputs, outputs, (), jnp.bfloat16, out_dtype)
    size, rows, edges = common.padded_bytes, tiling.rows, tiling.rows + 2
    item = jnp.dtype(out_dtype).itemsize
    maps = size(item, 4, edges, width, outputs) + size(2, 4, rows, width, inputs)
    dense = size(2, 18, inputs, outputs) + size(4, 9, inputs, outputs)
    scratch = size(2, edges, tiling.pitch, outputs) + size(2, 3, rows, tiling.pitch, inputs)
    return maps + dense + scratch + size(4, 4, max(tiling.pitch, _PIECE), max(inputs, outputs))


def packed_conv(
    x: Float[Array, "B H W C"],
    norm: Norm | None,
    kernel: Float[Array, "3 3 C O"],
    levels: Levels,
    extents: Int[Array, "B levels 2"] | None = None,
    out_dtype: Any = None,
) -> tuple[Float[Array, "B H W O"], Statistics]:
    """Convolve relu(x · factor + offset), or x itself, with zeros around each level.

    Args:
      x: a packed map of any size; what it holds in the gaps between the levels counts as zeros.
      norm: factors and offsets; None: x is convolved as it is, without a ReLU.
      kernel: float32. Products are computed in x's dtype, its gradient is summed in float32.
      levels: rectangles of the levels, at least one pixel apart.
      extents: rows and columns of each level that count, per image; the rest of a level is then a
        gap. None: all.
      out_dtype: of the convolved map; None: x's dtype.

    Returns:
      The convolved map, undefined in the gaps, and the statistics of its levels.
    """
    tiling = _Tiling(*x.shape, kernel.shape[-1], levels, x.dtype, out_dtype or x.dtype)
    y, mean, squares = _convolve(tiling, x, norm, kernel, extents)
    return y, Statistics(mean, squares / _pixels(tiling, extents))


def _pixels(tiling: _Tiling, extents: Array | None) -> Float[Array, "... levels 1"]:
    """Return the pixels per level, or per image and level; at least 1."""
    if extents is None:
        extents = jnp.asarray([level[2:] for level in tiling.levels])
    return jnp.maximum(jnp.prod(extents, axis=-1, keepdims=True), 1).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(
    tiling: _Tiling, x: Array, norm: Norm | None, kernel: Array, extents: Array | None
) -> tuple[Array, Array, Array]:
    """Return the convolved map and, of each level, the mean and the sum of squared deviations."""
    done = _call_forward(tiling, x, norm, kernel, extents)
    return done.y, done.mean, done.squares


def _convolve_and_save(tiling, x, norm, kernel, extents):
    done = _call_forward(tiling, x, norm, kernel, extents)
    return (done.y, done.mean, done.squares), (x, norm, kernel, extents, done.y, done.mean)


def _convolve_backward(tiling, saved, gradients):
    x, norm, kernel, extents, y, mean = saved
    grad_y, grad_mean, grad_squares = gradients
    # A pixel also acts through its level's statistics: its gradient is grad_y + slope · y +
    # constant, since d mean / dy = 1 / pixels and d squares / dy = 2 (y - mean).
    slope = 2.0 * grad_squares
    constant = grad_mean / _pixels(tiling, extents) - slope * mean
    through = _Through(y, grad_y, slope, constant)
    done = _call_backward(tiling, x, norm, kernel, extents, through)
    return done.grad_x, done.grad_norm, done.grad_kernel.sum(0), None


_convolve.defvjp(_convolve_and_save, _convolve_backward)


class _Through(NamedTuple):
    """Terms of the gradient of a pixel of y: grad_y + slope · y + constant."""

    y: Array  # (B, H, W, O)
    grad_y: Array  # (B, H, W, O)
    slope: Array  # (B, levels, O)
    constant: Array  # (B, levels, O)


class _Band(NamedTuple):
    """The rows of a band and its neighbors; off the map, the neighbor is any row."""

    rows: Ref  # (1, rows, W, channels)
    above: Ref  # (1, 1, W, channels)
    below: Ref  # (1, 1, W, channels)


def _band_block(tiling: _Tiling, channels: int) -> pl.BlockSpec:
    """The rows of the step's band, of an array (B, H, W, channels)."""
    images = tiling.batch // tiling.cores
    index = lambda core, image, band: (core * images + image, band, 0, 0)
    return pl.BlockSpec((1, tiling.rows, tiling.width, channels), index)


def _band_with_neighbors(tiling: _Tiling, x: Array) -> _Band:
    """Return the inputs for a band of `x` and its neighbors."""
    images, channels = tiling.batch // tiling.cores, x.shape[-1]

    def row(offset: int) -> common.Input:
        def index(core: Any, image: Any, band: Any) -> tuple[Any, ...]:
            number = jnp.clip(band * tiling.rows + offset, 0, tiling.height - 1)
            return core * images + image, number, 0, 0

        return common.Input(x, pl.BlockSpec((1, 1, tiling.width, channels), index))

    rows = common.Input(x, _band_block(tiling, channels))
    return _Band(rows, above=row(-1), below=row(tiling.rows))


def _levels_block(tiling: _Tiling, channels: int) -> pl.BlockSpec:
    """The levels of the step's image, of an array (B, levels, channels)."""
    images = tiling.batch // tiling.cores
    index = lambda core, image, band: (core * images + image, 0, 0)
    return pl.BlockSpec((1, len(tiling.levels), channels), index)


def _norm_inputs(tiling: _Tiling, norm: Norm | None) -> Norm | None:
    block = _levels_block(tiling, tiling.inputs)
    return jax.tree.map(lambda array: common.Input(array, block), norm)


def _cost(tiling: _Tiling, products: int, inputs: float, outputs: float) -> pl.CostEstimate:
    """Cost of `products` convolutions and of moving so many maps of input and output channels."""
    item = jnp.dtype(tiling.dtype).itemsize
    pixels = (tiling.batch, tiling.height, tiling.width)
    # In padded bytes, as the compiler counts.
    moved = inputs * common.padded_bytes(item, *pixels, tiling.inputs)
    moved += outputs * common.padded_bytes(item, *pixels, tiling.outputs)
    taps = 9 * tiling.inputs * tiling.outputs
    sums = 4 * tiling.cores * taps if products > 1 else 0
    computed = tiling.batch * tiling.bands * tiling.rows * tiling.pitch
    return pl.CostEstimate(
        flops=2 * products * computed * taps,
        bytes_accessed=int(moved) + item * taps + sums,
        transcendentals=0,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees."""

    extents: Ref | None  # (B · levels · 2), of all images
    x: _Band
    norm: Norm | None  # of (1, levels, C)
    taps: Ref  # (9, C, O): the kernel
    y: Ref  # (1, rows, W, O)
    mean: Ref  # (1, levels, O), float32: of the bands so far
    squares: Ref  # (1, levels, O), float32: sums of squared deviations from that mean
    active: Ref  # (rows + 2, pitch, C): what is convolved
    band_sum: Ref  # (levels, O), float32
    band_squares: Ref  # (levels, O), float32


def _extents_input(extents: Array | None) -> common.Input | None:
    return None if extents is None else common.scalars(extents.astype(jnp.int32).reshape(-1))


def _call_forward(
    tiling: _Tiling, x: Array, norm: Norm | None, kernel: Array, extents: Array | None
) -> _Forward:
    taps = kernel.reshape(9, tiling.inputs, tiling.outputs).astype(tiling.dtype)
    per_level = (len(tiling.levels), tiling.outputs)
    statistics = common.Output(
        (tiling.batch, *per_level), jnp.float32, _levels_block(tiling, tiling.outputs)
    )
    refs = _Forward(
        extents=_extents_input(extents),
        x=_band_with_neighbors(tiling, x),
        norm=_norm_inputs(tiling, norm),
        taps=common.whole(taps),
        y=common.Output(
            (*x.shape[:3], tiling.outputs), tiling.out_dtype, _band_block(tiling, tiling.outputs)
        ),
        mean=statistics,
        squares=statistics,
        active=pltpu.VMEM((tiling.rows + 2, tiling.pitch, tiling.inputs), tiling.dtype),
        band_sum=pltpu.VMEM(per_level, jnp.float32),
        band_squares=pltpu.VMEM(per_level, jnp.float32),
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="packed_conv_forward",
        grid=tiling.grid,
        cost=_cost(tiling, 1, 1 + 2 / tiling.rows, 1),
    )


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute one band of y = conv3x3(relu(x · factor + offset)) and update the statistics."""
    tiling = tiling.of_image(refs.extents)

    def activated(r: Any, value: Array) -> Array:
        row = _row(tiling, r)
        inside = _inside(tiling, row)
        return jnp.where(inside, _activate(tiling, refs.norm, row, value).value, 0.0)

    _write_rows(tiling, [refs.x], refs.active, activated)

    def convolve(number: Any, _: None) -> None:
        values = _products(tiling, refs.active, refs.taps, number * tiling.piece)
        for r in range(tiling.piece):
            row = values[r * tiling.pitch : r * tiling.pitch + tiling.width]
            refs.y[0, number * tiling.piece + r] = row.astype(tiling.out_dtype)

    lax.fori_loop(0, tiling.rows // tiling.piece, convolve, None)
    _update_statistics(tiling, refs)


def _update_statistics(tiling: _Tiling, refs: _Forward) -> None:
    """Join the statistics of the band to those of the bands before (Chan et al. 1979).

    Squared deviations are first taken from the band's own mean, which loses no digits. With n
    pixels and mean m in the band, N pixels up to its end, and M the mean before it:

      mean += (m - M) · n / N
      squares += band's squares + (m - M)² · (N - n) · n / N
    """
    band = pl.program_id(2)

    @pl.when(band == 0)
    def _():
        common.clear([refs.mean, refs.squares])

    for level, (top, _, height, width) in enumerate(tiling.levels):
        start = band * tiling.rows - top
        before = jnp.clip(start, 0, height) * width
        after = jnp.clip(start + tiling.rows, 0, height) * width

        @pl.when(after > before)
        def _(level=level, before=before, after=after):
            here = slice(level, level + 1)
            count = (after - before).astype(jnp.float32)
            value = lambda r: refs.y[0, r].astype(jnp.float32)
            _sum_level(tiling, level, refs.band_sum, value)
            mean = refs.band_sum[here] / count
            squared = lambda r: jnp.square(value(r) - mean)
            _sum_level(tiling, level, refs.band_squares, squared)
            share = count / after.astype(jnp.float32)
            apart = mean - refs.mean[0, here]
            refs.mean[0, here] += apart * share
            joined = jnp.square(apart) * (before.astype(jnp.float32) * share)
            refs.squares[0, here] += refs.band_squares[here] + joined


def _sum_level(tiling: _Tiling, level: int, sums: Ref, values: Callable[[Any], Array]) -> None:
    """Write the sum of `values(r)` over the level's pixels in the band into `sums[level]`."""
    here = slice(level, level + 1)
    sums[here] = jnp.zeros((1, sums.shape[1]), jnp.float32)

    def add(r: Any, _: None) -> None:
        inside = _inside_level(tiling, level, _row(tiling, r))
        sums[here] += common.sum_rows(jnp.where(inside, values(r), 0.0))

    lax.fori_loop(0, tiling.rows, add, None)


class _Backward(NamedTuple):
    """What the backward kernel sees."""

    extents: Ref | None  # (B · levels · 2), of all images
    grad_y: _Band
    y: _Band
    slope: Ref  # (1, levels, O), see `_Through`
    constant: Ref  # (1, levels, O)
    x: Ref  # (1, rows, W, C)
    norm: Norm | None  # of (1, levels, C)
    taps: Ref  # (9, O, C): the kernel, turned by 180 degrees
    grad_x: Ref  # (1, rows, W, C)
    grad_norm: Norm | None  # of (1, levels, C), float32
    grad_kernel: Ref  # sum, (1, 3, 3, C, O)
    grad_conv: Ref  # (rows + 2, pitch, O): the gradient of the convolution's output
    shifted: Ref  # (3, rows, pitch, C): what was convolved, see `_write_shifted`


def _call_backward(
    tiling: _Tiling,
    x: Array,
    norm: Norm | None,
    kernel: Array,
    extents: Array | None,
    through: _Through,
) -> _Backward:
    # The gradient of the input is a convolution too, with the kernel turned by 180 degrees.
    taps = kernel[::-1, ::-1].swapaxes(2, 3).reshape(9, tiling.outputs, tiling.inputs)
    taps = taps.astype(tiling.dtype)
    per_level = _levels_block(tiling, tiling.outputs)
    norm_block = _levels_block(tiling, tiling.inputs)
    refs = _Backward(
        extents=_extents_input(extents),
        grad_y=_band_with_neighbors(tiling, through.grad_y),
        y=_band_with_neighbors(tiling, through.y),
        slope=common.Input(through.slope, per_level),
        constant=common.Input(through.constant, per_level),
        x=common.Input(x, _band_block(tiling, tiling.inputs)),
        norm=_norm_inputs(tiling, norm),
        taps=common.whole(taps),
        grad_x=common.Output(x.shape, tiling.dtype, _band_block(tiling, tiling.inputs)),
        grad_norm=jax.tree.map(
            lambda array: common.Output(array.shape, jnp.float32, norm_block), norm
        ),
        grad_kernel=common.sums(tiling.cores, kernel),
        grad_conv=pltpu.VMEM((tiling.rows + 2, tiling.pitch, tiling.outputs), tiling.dtype),
        shifted=pltpu.VMEM((3, tiling.rows, tiling.pitch, tiling.inputs), tiling.dtype),
    )
    return common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="packed_conv_backward",
        grid=tiling.grid,
        cost=_cost(tiling, 2, 2, 2 * (1 + 2 / tiling.rows)),
    )


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one band, with a = relu(x · factor + offset).

    g = grad_y + slope · y + constant, zeros off the levels
    grad a = conv3x3(g, kernel turned by 180 degrees)
    kernel[i, j]: + Σ over pixels of a[row + i - 1, column + j - 1]ᵀ · g[row, column]
    x, factor, offset: `_write_grad_x` of each row of grad a
    """
    tiling = tiling.of_image(refs.extents)
    first_band = pl.program_id(2) == 0

    @pl.when(first_band & (pl.program_id(1) == 0))
    def _():
        common.clear(refs.grad_kernel)

    @pl.when(first_band)
    def _():
        common.clear(refs.grad_norm)

    def grad_conv(r: Any, grad_y: Array, y: Array) -> Array:
        row = _row(tiling, r)
        slope = _of_levels(tiling, row, refs.slope)
        constant = _of_levels(tiling, row, refs.constant)
        return jnp.where(_inside(tiling, row), grad_y + slope * y + constant, 0.0)

    _write_rows(tiling, [refs.grad_y, refs.y], refs.grad_conv, grad_conv)
    _write_shifted(tiling, refs)

    def piece(number: Any, _: None) -> None:
        start = number * tiling.piece
        values = _products(tiling, refs.grad_conv, refs.taps, start)
        for r in range(tiling.piece):
            row = values[r * tiling.pitch : r * tiling.pitch + tiling.width]
            _write_grad_x(tiling, start + r, row, refs)
        for i in range(3):
            there = refs.grad_conv[pl.ds(start + 2 - i, tiling.piece)].reshape(-1, tiling.outputs)
            for j in range(3):
                here = refs.shifted[j, pl.ds(start, tiling.piece)].reshape(-1, tiling.inputs)
                refs.grad_kernel[0, i, j] += dot(here, there, left=0)

    lax.fori_loop(0, tiling.rows // tiling.piece, piece, None)


def _write_grad_x(tiling: _Tiling, r: Any, grad: Array, refs: _Backward) -> None:
    """Turn the gradient of the band's r-th row of a into those of x, factor and offset.

    With d = grad a where a > 0, else 0: x: d · factor; factor: + Σ d · x; offset: + Σ d.
    """
    row = _row(tiling, r)
    if refs.norm is None:
        refs.grad_x[0, r] = grad.astype(tiling.dtype)
        return
    value = refs.x[0, r].astype(jnp.float32)
    active = _activate(tiling, refs.norm, row, value)
    grad = jnp.where(_inside(tiling, row) & (active.value > 0), grad, 0.0)
    refs.grad_x[0, r] = (grad * active.factor).astype(tiling.dtype)
    for level, (top, _, height, _) in enumerate(tiling.levels):

        @pl.when((row >= top) & (row < top + height))
        def _(level=level):
            here, inside = slice(level, level + 1), _inside_level(tiling, level, row)
            refs.grad_norm.offset[0, here] += common.sum_rows(jnp.where(inside, grad, 0.0))
            refs.grad_norm.factor[0, here] += common.sum_rows(jnp.where(inside, grad * value, 0.0))


def _row(tiling: _Tiling, r: Any) -> Any:
    """Row of the map that is the r-th of the band."""
    return pl.program_id(2) * tiling.rows + r


def _inside_level(tiling: _Tiling, level: int, row: Any) -> Array:
    """Which pixels of a row of the map belong to a level, (W, 1)."""
    top, left, height, width = tiling.levels[level]
    columns = lax.broadcasted_iota(jnp.int32, (tiling.width, 1), 0)
    return (row >= top) & (row < top + height) & (columns >= left) & (columns < left + width)


def _inside(tiling: _Tiling, row: Any) -> Array:
    """Which pixels of a row of the map belong to any level, (W, 1)."""
    levels = range(len(tiling.levels))
    return functools.reduce(jnp.logical_or, [_inside_level(tiling, n, row) for n in levels])


def _of_levels(tiling: _Tiling, row: Any, values: Ref) -> Array:
    """Return the value of each pixel's level, for a row of the map; undefined in the gaps."""
    spread = values[0, 0:1]
    for level in range(1, len(tiling.levels)):
        own = values[0, level : level + 1]
        spread = jnp.where(_inside_level(tiling, level, row), own, spread)
    return spread


class _Activated(NamedTuple):
    """A row after norm and ReLU; undefined in the gaps."""

    value: Array  # relu(x · factor + offset)
    factor: Array  # of each pixel's level


def _activate(tiling: _Tiling, norm: Norm | None, row: Any, value: Array) -> _Activated:
    """Apply norm and ReLU to a row of the map, or nothing where there is no norm."""
    if norm is None:
        return _Activated(value, jnp.ones_like(value))
    factor = _of_levels(tiling, row, norm.factor)
    offset = _of_levels(tiling, row, norm.offset)
    return _Activated(jnp.maximum(value * factor + offset, 0.0), factor)


def _write_rows(
    tiling: _Tiling, bands: list[_Band], out: Ref, function: Callable[..., Array]
) -> None:
    """Write `function(r, *rows)` of each row of the bands and their neighbors into `out`.

    Row r of the band goes to `out[r + 1]`; zeros fill `out` from the width to the pitch.
    """

    def write(place: Any, r: Any, *values: Array) -> None:
        row = function(r, *[value.astype(jnp.float32) for value in values])
        out[place] = jnp.zeros((tiling.pitch, row.shape[1]), tiling.dtype)
        out[place, : tiling.width] = row.astype(tiling.dtype)

    def middle(r: Any, _: None) -> None:
        write(r + 1, r, *[band.rows[0, r] for band in bands])

    write(0, -1, *[band.above[0, 0] for band in bands])
    lax.fori_loop(0, tiling.rows, middle, None)
    write(tiling.rows + 1, tiling.rows, *[band.below[0, 0] for band in bands])


def _write_shifted(tiling: _Tiling, refs: _Backward) -> None:
    """Write what was convolved, moved by one pixel to the right, not moved, and to the left."""

    def write(r: Any, _: None) -> None:
        row = _row(tiling, r)
        value = _activate(tiling, refs.norm, row, refs.x[0, r].astype(jnp.float32)).value
        value = jnp.where(_inside(tiling, row), value, 0.0)
        behind = jnp.zeros((tiling.pitch - tiling.width, tiling.inputs), jnp.float32)
        value = jnp.concatenate([value, behind], axis=0)
        for j, by in enumerate((1, 0, tiling.pitch - 1)):
            moved = pltpu.roll(value, by, axis=0) if by else value
            refs.shifted[j, r] = moved.astype(tiling.dtype)

    lax.fori_loop(0, tiling.rows, write, None)


def _products(tiling: _Tiling, rows: Ref, taps: Ref, start: Any) -> Float[Array, "T O"]:
    """Return the convolution of a piece of `rows`, from the `start`-th on, in float32.

    The three taps of a column are summed first; only their sum is moved by a pixel.
    """
    columns = []
    for j in range(3):
        total = None
        for i in range(3):
            here = rows[pl.ds(start + i, tiling.piece)].reshape(tiling.piece * tiling.pitch, -1)
            product = dot(here, taps[3 * i + j])
            total = product if total is None else total + product
        columns.append(total)
    left, middle, right = columns
    last = tiling.piece * tiling.pitch - 1
    return middle + pltpu.roll(left, 1, axis=0) + pltpu.roll(right, last, axis=0)
