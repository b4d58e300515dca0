"""Modulated deformable 3×3 convolution as a TPU kernel that gathers by matrix products.

A gather in slow memory moves four neighbors for each of nine taps: 36 times the map, and back as
a scatter. Here an image's map stays in fast memory. Pixels are taken in blocks of 8×16 with their
nine taps; for each window of 8×32 of the map that these touch, a matrix with the bilinear weights
of all samples multiplies the window's pixels. Transposed, it brings the gradient back.

So the arithmetic grows with how many windows a block's samples touch: two, one below the other,
while offsets are within two pixels, the whole map if they are wild. The result is the same.

Samples lie along the lanes: a matrix of weights is one product of what each sample has of a row
and of a column, and no product but that of the window has to turn anything round.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from detclipv2_jax.ops.kernels import pieces, place
from detclipv2_jax.ops.kernels.pieces import TILE, dot

TAPS = 9
_BLOCK = (8, 16)  # rows and columns of pixels of a step
_PIXELS = _BLOCK[0] * _BLOCK[1]
_SAMPLES = TAPS * _PIXELS
_WINDOW = (8, 32)  # rows and columns of the map that are taken at a time
_LEFT = 8  # columns of zeros before the map: a block's samples are in the middle of a window
_NEAR = 2  # windows that a block is taken to touch in what the compiler is told of the arithmetic


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    batch: int
    height: int
    width: int
    channels: int
    outputs: int
    dtype: Any

    @property
    def cores(self) -> int:
        """Parts of the batch that a chip's cores may share."""
        return place.cores(self.batch)

    @property
    def rows(self) -> int:
        """Of the map in fast memory: a window or more."""
        return max(self.height, _WINDOW[0])

    @property
    def columns(self) -> int:
        """Of the map in fast memory, in whole tiles: a window or more."""
        return max(-(-(_LEFT + self.width) // TILE) * TILE, _WINDOW[1])

    @property
    def blocks(self) -> tuple[int, int]:
        """From top to bottom and from left to right; the last may go beyond the map."""
        return blocks(self.height, self.width)


def fast_memory(shape: tuple[int, ...], outputs: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan, size = _Plan(batch, height, width, channels, outputs, jnp.bfloat16), pieces.size
    window = _WINDOW[0] * _WINDOW[1]
    maps = size(6, plan.rows, plan.columns, channels)
    dense = size(2, 2, TAPS, channels, outputs) + size(4, TAPS, channels, outputs)
    samples = size(4, channels, _SAMPLES) + size(2, channels, _SAMPLES)
    weights = size(4, window, _SAMPLES) + size(2, window, _SAMPLES)
    moved = size(4, 4, 8, _SAMPLES) + size(2, 4, _PIXELS, outputs)
    return maps + dense + samples + weights + moved


def blocks(height: int, width: int) -> tuple[int, int]:
    """In how many blocks of pixels a map is cut."""
    return -(-height // _BLOCK[0]), -(-width // _BLOCK[1])


def in_blocks(x: Float[Array, "B H W C"]) -> Float[Array, "B T C 128"]:
    """The pixels of each of T blocks, row by row, along the lanes; beyond the map zeros."""
    batch, height, width, channels = x.shape
    down, across = blocks(height, width)
    behind = (0, down * _BLOCK[0] - height), (0, across * _BLOCK[1] - width)
    x = jnp.pad(x, ((0, 0), *behind, (0, 0)))
    x = x.reshape(batch, down, _BLOCK[0], across, _BLOCK[1], channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, down * across, channels, _PIXELS)


def deform_conv(
    x: Float[Array, "B H W C"],
    corners: Int[Array, "B T 2 S"],
    factors: Float[Array, "B T 3 S"],
    kernel: Float[Array, "9 C O"],
) -> Float[Array, "B H W O"]:
    """Project nine bilinear samples of every pixel.

    The S samples of a block are the first tap of its 128 pixels, then the second, and so on.

    Args:
      x: the map that is sampled; zero outside its borders.
      corners: row and column of the upper left neighbor of each sample, -1 and more. Below -1
        there is no sample; its weight must be 0.
      factors: how far below and how far to the right of it the sample lies, 0 to 1, and its weight.
      kernel: float32; products take x's dtype, its gradient sums in float32.
    """
    plan = _Plan(*x.shape, kernel.shape[-1], x.dtype)
    behind = plan.rows - plan.height, plan.columns - _LEFT - plan.width
    x = jnp.pad(x, ((0, 0), (0, behind[0]), (_LEFT, behind[1]), (0, 0)))
    return _convolve(plan, x, corners, factors, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: _Plan, x: Array, corners: Array, factors: Array, kernel: Array) -> Array:
    return _call_forward(plan, x, corners, factors, kernel)


def _keep(plan, *arrays):
    return _call_forward(plan, *arrays), arrays


def _pull(plan, saved, gradient):
    by_x, by_factors, by_kernel = _call_backward(plan, *saved, gradient)
    return by_x.astype(plan.dtype), None, by_factors, by_kernel.sum(0)


_convolve.defvjp(_keep, _pull)


def _reach(plan: _Plan, corners: Array) -> Int[Array, "B 1 R"]:
    """Which windows each block touches, block by block: top, left, how many down and across.

    On the map as it is in fast memory, where windows start at a tile.
    """
    real = corners[:, :, :1] >= -1
    limits = jnp.asarray([plan.height, plan.width])
    low = jnp.min(jnp.where(real, corners, limits[:, None]), axis=-1)
    high = jnp.max(jnp.where(real, corners, -2), axis=-1) + 1
    # Of a block without samples the last row is above the first.
    low, high = jnp.maximum(low, 0), jnp.minimum(high, limits - 1)
    shift, tile = jnp.asarray([0, _LEFT]), jnp.asarray([1, TILE])
    start = (low + shift) // tile * tile
    count = (high + shift - start) // jnp.asarray(_WINDOW) + 1
    return jnp.concatenate([start, count], axis=-1).reshape(plan.batch, 1, -1)


def _of_image(plan: _Plan, *shape: int, **options: Any) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, *_: (core * images + image, *(0 for _ in shape))
    return pl.BlockSpec((1, *shape), index, **options)


def _of_block(plan: _Plan, numbers: int) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, row, column: (
        core * images + image, row * plan.blocks[1] + column, 0, 0,
    )  # fmt: skip
    return pl.BlockSpec((1, 1, numbers, _SAMPLES), index)


def _pixels(plan: _Plan) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, row, column: (core * images + image, row, column, 0)
    return pl.BlockSpec((1, *_BLOCK, plan.outputs), index)


def _whole_map(plan: _Plan) -> pl.BlockSpec:
    # One buffer: it is needed for long, and the next one is there in no time.
    shape = (plan.rows, plan.columns, plan.channels)
    return _of_image(plan, *shape, pipeline_mode=pl.Buffered(1))


def _inputs(plan: _Plan) -> list[pl.BlockSpec]:
    return [
        _of_image(plan, 1, 4 * plan.blocks[0] * plan.blocks[1], memory_space=pltpu.SMEM),
        _of_block(plan, 2),
        _of_block(plan, 3),
        _whole_map(plan),
    ]


def _grid(plan: _Plan) -> tuple[int, ...]:
    return (plan.cores, plan.batch // plan.cores, *plan.blocks)


def _cost(plan: _Plan, passes: int, maps: int) -> pl.CostEstimate:
    """Of `passes` products of samples and windows; `maps`: bytes of a channel of a pixel."""
    size, dense = pieces.size, TAPS * plan.channels * plan.outputs
    count = plan.batch * plan.blocks[0] * plan.blocks[1]
    reached = _NEAR * _WINDOW[0] * _WINDOW[1] * plan.channels
    moved = maps * size(1, plan.batch, plan.rows, plan.columns, plan.channels)
    moved += (1 + passes // 2) * size(4, count, 8, _SAMPLES)
    moved += size(2, plan.batch, plan.height, plan.width, plan.outputs)
    sums = 4 * plan.cores * dense if passes > 1 else 0
    return pl.CostEstimate(
        flops=2 * passes * count * _SAMPLES * (reached + plan.channels * plan.outputs),
        bytes_accessed=moved + 2 * dense + sums,
        transcendentals=0,
    )


def _call_forward(plan: _Plan, x: Array, corners: Array, factors: Array, kernel: Array) -> Array:
    taps, item = kernel.swapaxes(1, 2).astype(plan.dtype), jnp.dtype(plan.dtype).itemsize
    shape = (plan.batch, plan.height, plan.width, plan.outputs)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="deform_conv_forward",
        grid=_grid(plan),
        out_shape=jax.ShapeDtypeStruct(shape, plan.dtype),
        in_specs=[*_inputs(plan), pieces.whole(taps)],
        out_specs=_pixels(plan),
        scratch_shapes=[
            pltpu.VMEM((_WINDOW[0] * _WINDOW[1], _SAMPLES), plan.dtype),
            pltpu.VMEM((plan.channels, _SAMPLES), jnp.float32),
        ],
        cost_estimate=_cost(plan, 1, item),
        compiler_params=pieces.parameters(4),
    )(_reach(plan, corners), corners, factors, x, taps)


def _call_backward(
    plan: _Plan, x: Array, corners: Array, factors: Array, kernel: Array, gradient: Array
) -> list[Array]:
    taps, item = kernel.astype(plan.dtype), jnp.dtype(plan.dtype).itemsize
    shapes, specs = pieces.sums(plan.cores, kernel)
    samples = (plan.channels, _SAMPLES)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="deform_conv_backward",
        grid=_grid(plan),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, jnp.float32),
            jax.ShapeDtypeStruct(factors.shape, jnp.float32),
            *shapes,
        ],
        in_specs=[*_inputs(plan), pieces.whole(taps), _pixels(plan)],
        out_specs=[_whole_map(plan), _of_block(plan, 3), *specs],
        scratch_shapes=[
            pltpu.VMEM((_WINDOW[0] * _WINDOW[1], _SAMPLES), plan.dtype),
            pltpu.VMEM(samples, jnp.float32),
            pltpu.VMEM(samples, plan.dtype),
        ],
        cost_estimate=_cost(plan, 3, item + 4),
        compiler_params=pieces.parameters(4),
    )(_reach(plan, corners), corners, factors, x, taps, gradient)


def _forward_kernel(
    plan: _Plan, reach: Any, corners: Any, factors: Any, x: Any, taps: Any, out: Any,
    weights: Any, samples: Any,
) -> None:  # fmt: skip
    samples[...] = jnp.zeros_like(samples)

    def visit(window: _Window) -> None:
        _weigh(window, corners, factors, weights)
        samples[...] += dot(window.of(x), weights[...], left=0)

    _for_each_window(plan, reach, visit)
    total = jnp.zeros((plan.outputs, _PIXELS), jnp.float32)
    for tap in range(TAPS):
        total += dot(taps[tap], samples[:, _lanes(tap)].astype(plan.dtype))
    out[0] = total.T.astype(plan.dtype).reshape(*_BLOCK, plan.outputs)


def _backward_kernel(
    plan: _Plan, reach: Any, corners: Any, factors: Any, x: Any, taps: Any, gradient: Any,
    by_x: Any, by_factors: Any, by_kernel: Any,
    weights: Any, samples: Any, by_samples: Any,
) -> None:  # fmt: skip
    first_block = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)

    @pl.when(first_block)
    def _():
        pieces.clear([by_x])

    @pl.when(first_block & (pl.program_id(1) == 0))
    def _():
        pieces.clear([by_kernel])

    pieces.clear([samples, by_factors])
    slope = _on_the_map(plan, gradient[0].reshape(_PIXELS, plan.outputs))
    for tap in range(TAPS):
        by_samples[:, _lanes(tap)] = dot(taps[tap], slope, right=1).astype(plan.dtype)

    def visit(window: _Window) -> None:
        here = window.of(x)
        by_weights = dot(here, by_samples[...])
        shares = _weigh(window, corners, factors, weights)
        by_factors[0, 0] += _pull_factors(shares, factors, by_weights)
        samples[...] += dot(here, weights[...], left=0)
        window.add(by_x, dot(weights[...], by_samples[...], right=1))

    _for_each_window(plan, reach, visit)
    for tap in range(TAPS):
        by_kernel[0, tap] += dot(samples[:, _lanes(tap)].astype(plan.dtype), slope)


def _on_the_map(plan: _Plan, pixels: Array) -> Array:
    """A block's pixels, zeros instead of those beyond the map."""
    number = lax.broadcasted_iota(jnp.int32, (_PIXELS, 1), 0)
    row = pl.program_id(2) * _BLOCK[0] + lax.div(number, _BLOCK[1])
    column = pl.program_id(3) * _BLOCK[1] + lax.rem(number, _BLOCK[1])
    return jnp.where((row < plan.height) & (column < plan.width), pixels, jnp.zeros_like(pixels))


@dataclasses.dataclass(frozen=True)
class _Window:
    """Where a window lies on the map in fast memory, and what of it was not in one before."""

    row: Any
    column: Any
    first_row: Any
    first_column: Any

    @property
    def _place(self) -> tuple[Any, ...]:
        column = pl.multiple_of(self.column, TILE)
        return 0, pl.ds(self.row, _WINDOW[0]), pl.ds(column, _WINDOW[1])

    def of(self, ref: Any) -> Float[Array, "256 C"]:
        """Its pixels, row by row."""
        return ref[self._place].reshape(_WINDOW[0] * _WINDOW[1], -1)

    def add(self, ref: Any, pixels: Float[Array, "256 C"]) -> None:
        """Add to its pixels."""
        ref[self._place] += pixels.reshape(*_WINDOW, -1)


def _for_each_window(plan: _Plan, reach: Any, visit: Any) -> None:
    """`visit` the windows that the step's block touches; none goes beyond the map."""
    first = 4 * (pl.program_id(2) * plan.blocks[1] + pl.program_id(3))
    top, left, down, across = (reach[0, 0, first + n] for n in range(4))

    def row(i: Any, _: None) -> None:
        def column(j: Any, _: None) -> None:
            start = top + i * _WINDOW[0], left + j * _WINDOW[1]
            last = plan.rows - _WINDOW[0], plan.columns - _WINDOW[1]
            visit(_Window(*map(jnp.minimum, start, last), *start))

        lax.fori_loop(0, across, column, None)

    lax.fori_loop(0, down, row, None)


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What each of S samples has of a window's rows and columns, and the derivatives."""

    of_row: Float[Array, "8 S"]
    of_column: Float[Array, "32 S"]
    row_slope: Float[Array, "8 S"]  # by how far below its corner the sample lies
    column_slope: Float[Array, "32 S"]


def _weigh(window: _Window, corners: Any, factors: Any, weights: Any) -> _Shares:
    """Write what each sample has of each of the window's pixels."""
    rows, columns = _WINDOW
    top, left = (corners[0, 0, n : n + 1] for n in range(2))
    down, right, strength = (factors[0, 0, n : n + 1] for n in range(3))
    of_row, row_slope = _share(top, down, window.row, window.first_row, rows)
    left = left + _LEFT
    of_column, column_slope = _share(left, right, window.column, window.first_column, columns)
    strong = strength * of_column
    for r in range(rows):
        here = slice(r * columns, (r + 1) * columns)
        weights[here] = (of_row[r : r + 1] * strong).astype(weights.dtype)
    return _Shares(of_row, of_column, row_slope, column_slope)


def _share(corner: Array, beyond: Array, start: Any, first: Any, count: int) -> tuple[Array, Array]:
    """What so many rows or columns have of a sample, and the derivative by `beyond`."""
    place = start + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    near = (corner == place) & (place >= first)
    far = (corner == place - 1) & (place >= first)
    share = jnp.where(near, 1.0 - beyond, jnp.where(far, beyond, 0.0))
    return share, jnp.where(near, -1.0, jnp.where(far, 1.0, 0.0))


def _pull_factors(
    shares: _Shares, factors: Any, by_weights: Float[Array, "256 S"]
) -> Float[Array, "3 S"]:
    """From the gradient by the weights to that by the three factors."""
    rows, columns = _WINDOW
    strength = factors[0, 0, 2:3]
    across = jnp.zeros_like(shares.of_column)
    by_row = []
    for r in range(rows):
        here = by_weights[r * columns : (r + 1) * columns]
        across += shares.of_row[r : r + 1] * here
        by_row.append(jnp.sum(shares.of_column * here, axis=0, keepdims=True))
    along = jnp.concatenate(by_row, axis=0)
    total = lambda x: jnp.sum(x, axis=0, keepdims=True)
    down = strength * total(shares.row_slope * along)
    right = strength * total(shares.column_slope * across)
    return jnp.concatenate([down, right, total(shares.of_row * along)], axis=0)


def _lanes(tap: int) -> slice:
    return slice(tap * _PIXELS, (tap + 1) * _PIXELS)
