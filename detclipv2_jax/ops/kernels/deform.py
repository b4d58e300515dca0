"""Modulated deformable 3×3 convolution as a TPU kernel that gathers by matrix products.

Each output pixel is a projection of nine bilinear samples of the map, one per tap:

    y[p] = Σ over taps of weight[p, tap] · sample(x, position[p, tap]) · kernel[tap]

(Zhu et al., CVPR 2019, eq. 1.) A gather in main memory moves four neighbors for each of the nine
taps: 36 times the map, and as much again for the scatter of the backward pass. Here one image's
map stays in VMEM. A step of the grid takes a block of 8×16 pixels with their nine taps. For each
window of 8×32 pixels of the map that these samples touch, a matrix with the bilinear weights of
all samples is multiplied by the window's pixels. The transposed product carries the gradient back.

The arithmetic therefore grows with the number of windows that a block's samples touch: two, one
below the other, while offsets stay within two pixels; the whole map if offsets are arbitrary. The
result is the same.

Samples lie along the lanes: the weights of a window are then an outer product of what each sample
takes of the rows and of the columns, and only the product with the window needs a transpose.
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

TAPS = 9
_BLOCK = (8, 16)  # rows and columns of output pixels per step
_PIXELS = _BLOCK[0] * _BLOCK[1]
_SAMPLES = TAPS * _PIXELS
_WINDOW = (8, 32)  # rows and columns of the map that are multiplied at a time
_WINDOW_PIXELS = _WINDOW[0] * _WINDOW[1]
_LEFT = 8  # columns of zeros left of the map: they bring a block's samples to a window's middle
_NEAR = 2  # windows per block that the cost estimate assumes


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    batch: int
    height: int
    width: int
    channels: int
    outputs: int  # channels of the result
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.batch)

    @property
    def rows(self) -> int:
        """Rows of the map in VMEM: at least a window."""
        return max(self.height, _WINDOW[0])

    @property
    def columns(self) -> int:
        """Columns of the map in VMEM, in whole tiles: at least a window."""
        return max(-(-(_LEFT + self.width) // TILE) * TILE, _WINDOW[1])

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks from top to bottom and from left to right; the last may extend beyond the map."""
        return blocks(self.height, self.width)

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.cores, self.batch // self.cores, *self.blocks)


def vmem_bytes(shape: tuple[int, ...], outputs: int) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, channels = shape
    tiling = _Tiling(batch, height, width, channels, outputs, jnp.bfloat16)
    size = common.padded_bytes
    maps = size(6, tiling.rows, tiling.columns, channels)
    dense = size(2, 2, TAPS, channels, outputs) + size(4, TAPS, channels, outputs)
    samples = size(4, channels, _SAMPLES) + size(2, channels, _SAMPLES)
    weights = size(4, _WINDOW_PIXELS, _SAMPLES) + size(2, _WINDOW_PIXELS, _SAMPLES)
    moved = size(4, 4, 8, _SAMPLES) + size(2, 4, _PIXELS, outputs)
    return maps + dense + samples + weights + moved


def blocks(height: int, width: int) -> tuple[int, int]:
    """Return how many blocks of pixels a map has, from top to bottom and from left to right."""
    return -(-height // _BLOCK[0]), -(-width // _BLOCK[1])


def in_blocks(x: Float[Array, "B H W C"]) -> Float[Array, "B T C 128"]:
    """Return the pixels of each of T blocks, row by row, along the lanes; zeros off the map."""
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
    """Return a deformable convolution: nine bilinear samples of every pixel, projected.

    A block (see `in_blocks`) has S = 9 · 128 samples: the first tap of its 128 pixels, then the
    second, and so on.

    Args:
      x: the map that is sampled; it counts as zero outside its borders.
      corners: row and column, in pixels, of the upper left neighbor of each sample, -1 or more.
        A value below -1 means that there is no sample; its weight must be 0.
      factors: how far below and how far to the right of that neighbor the sample lies, in [0, 1],
        and the sample's weight.
      kernel: float32. Products are computed in x's dtype, its gradient is summed in float32.
    """
    tiling = _Tiling(*x.shape, kernel.shape[-1], x.dtype)
    behind = tiling.rows - tiling.height, tiling.columns - _LEFT - tiling.width
    x = jnp.pad(x, ((0, 0), (0, behind[0]), (_LEFT, behind[1]), (0, 0)))
    return _convolve(tiling, x, corners, factors, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(tiling: _Tiling, x: Array, corners: Array, factors: Array, kernel: Array) -> Array:
    return _call_forward(tiling, x, corners, factors, kernel)


def _convolve_and_save(tiling, *arrays):
    return _call_forward(tiling, *arrays), arrays


def _convolve_backward(tiling, saved, grad_out):
    done = _call_backward(tiling, *saved, grad_out)
    return done.grad_x.astype(tiling.dtype), None, done.grad_factors, done.grad_kernel.sum(0)


_convolve.defvjp(_convolve_and_save, _convolve_backward)


def _reach(tiling: _Tiling, corners: Array) -> Int[Array, "B 1 R"]:
    """Return which windows each block touches: top, left, and how many down and across.

    R = 4 · T, block by block. Positions are those of the map in VMEM, where windows start at a
    tile.
    """
    real = corners[:, :, :1] >= -1
    limits = jnp.asarray([tiling.height, tiling.width])
    low = jnp.min(jnp.where(real, corners, limits[:, None]), axis=-1)
    high = jnp.max(jnp.where(real, corners, -2), axis=-1) + 1
    # Of a block without samples the last row is above the first.
    low, high = jnp.maximum(low, 0), jnp.minimum(high, limits - 1)
    shift, tile = jnp.asarray([0, _LEFT]), jnp.asarray([1, TILE])
    start = (low + shift) // tile * tile
    count = (high + shift - start) // jnp.asarray(_WINDOW) + 1
    return jnp.concatenate([start, count], axis=-1).reshape(tiling.batch, 1, -1)


def _image_block(tiling: _Tiling, *shape: int, **options: Any) -> pl.BlockSpec:
    """All of an array (B, *shape) that belongs to the step's image."""
    images = tiling.batch // tiling.cores
    index = lambda core, image, *_: (core * images + image, *(0 for _ in shape))
    return pl.BlockSpec((1, *shape), index, **options)


def _samples_block(tiling: _Tiling, numbers: int) -> pl.BlockSpec:
    """The numbers of each sample of the step's block, of an array (B, T, numbers, S)."""
    images = tiling.batch // tiling.cores
    index = lambda core, image, row, column: (
        core * images + image,
        row * tiling.blocks[1] + column,
        0,
        0,
    )
    return pl.BlockSpec((1, 1, numbers, _SAMPLES), index)


def _pixels_block(tiling: _Tiling) -> pl.BlockSpec:
    """The pixels of the step's block, of an array (B, H, W, O)."""
    images = tiling.batch // tiling.cores
    index = lambda core, image, row, column: (core * images + image, row, column, 0)
    return pl.BlockSpec((1, *_BLOCK, tiling.outputs), index)


def _map_block(tiling: _Tiling) -> pl.BlockSpec:
    """The step's image. One buffer: an image takes many steps, and the next one loads quickly."""
    shape = (tiling.rows, tiling.columns, tiling.channels)
    return _image_block(tiling, *shape, pipeline_mode=pl.Buffered(1))


class _Inputs(NamedTuple):
    """What both kernels read."""

    reach: Ref  # (1, 1, R), scalars: see `_reach`
    corners: Ref  # (1, 1, 2, S)
    factors: Ref  # (1, 1, 3, S)
    x: Ref  # (1, rows, columns, C)
    taps: Ref  # (9, O, C) forward, (9, C, O) backward: the kernel


def _inputs(tiling: _Tiling, x: Array, corners: Array, factors: Array, taps: Array) -> _Inputs:
    reach_block = _image_block(
        tiling, 1, 4 * tiling.blocks[0] * tiling.blocks[1], memory_space=pltpu.SMEM
    )
    return _Inputs(
        reach=common.Input(_reach(tiling, corners), reach_block),
        corners=common.Input(corners, _samples_block(tiling, 2)),
        factors=common.Input(factors, _samples_block(tiling, 3)),
        x=common.Input(x, _map_block(tiling)),
        taps=common.whole(taps),
    )


def _cost(tiling: _Tiling, passes: int, map_bytes: int) -> pl.CostEstimate:
    """Cost of `passes` products of samples and windows.

    map_bytes: bytes per pixel and channel of the maps that are read or written.
    """
    size, dense = common.padded_bytes, TAPS * tiling.channels * tiling.outputs
    count = tiling.batch * tiling.blocks[0] * tiling.blocks[1]
    reached = _NEAR * _WINDOW_PIXELS * tiling.channels
    moved = map_bytes * size(1, tiling.batch, tiling.rows, tiling.columns, tiling.channels)
    moved += (1 + passes // 2) * size(4, count, 8, _SAMPLES)
    moved += size(2, tiling.batch, tiling.height, tiling.width, tiling.outputs)
    sums = 4 * tiling.cores * dense if passes > 1 else 0
    return pl.CostEstimate(
        flops=2 * passes * count * _SAMPLES * (reached + tiling.channels * tiling.outputs),
        bytes_accessed=moved + 2 * dense + sums,
        transcendentals=0,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees."""

    inputs: _Inputs
    out: Ref  # (1, 8, 16, O)
    weights: Ref  # (256, S): what each sample takes of each pixel of a window
    samples: Ref  # (C, S), float32


def _call_forward(
    tiling: _Tiling, x: Array, corners: Array, factors: Array, kernel: Array
) -> Array:
    taps, item = kernel.swapaxes(1, 2).astype(tiling.dtype), jnp.dtype(tiling.dtype).itemsize
    shape = (tiling.batch, tiling.height, tiling.width, tiling.outputs)
    refs = _Forward(
        inputs=_inputs(tiling, x, corners, factors, taps),
        out=common.Output(shape, tiling.dtype, _pixels_block(tiling)),
        weights=pltpu.VMEM((_WINDOW_PIXELS, _SAMPLES), tiling.dtype),
        samples=pltpu.VMEM((tiling.channels, _SAMPLES), jnp.float32),
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="deform_conv_forward",
        grid=tiling.grid,
        cost=_cost(tiling, 1, item),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute one block of y.

    samples = Σ over windows of pixelsᵀ · weights, and yᵀ = Σ over taps of kernel[tap]ᵀ · samples.
    """
    inputs = refs.inputs
    refs.samples[...] = jnp.zeros_like(refs.samples)

    def visit(window: _Window) -> None:
        _write_weights(window, inputs, refs.weights)
        refs.samples[...] += dot(window.of(inputs.x), refs.weights[...], left=0)

    _for_each_window(tiling, inputs.reach, visit)
    total = jnp.zeros((tiling.outputs, _PIXELS), jnp.float32)
    for tap in range(TAPS):
        total += dot(inputs.taps[tap], refs.samples[:, _lanes(tap)].astype(tiling.dtype))
    refs.out[0] = total.T.astype(tiling.dtype).reshape(*_BLOCK, tiling.outputs)


class _Backward(NamedTuple):
    """What the backward kernel sees."""

    inputs: _Inputs
    grad_out: Ref  # (1, 8, 16, O)
    grad_x: Ref  # (1, rows, columns, C), float32
    grad_factors: Ref  # (1, 1, 3, S), float32
    grad_kernel: Ref  # sum, (1, 9, C, O)
    weights: Ref  # (256, S): what each sample takes of each pixel of a window
    samples: Ref  # (C, S), float32
    grad_samples: Ref  # (C, S)


def _call_backward(
    tiling: _Tiling, x: Array, corners: Array, factors: Array, kernel: Array, grad_out: Array
) -> _Backward:
    taps, item = kernel.astype(tiling.dtype), jnp.dtype(tiling.dtype).itemsize
    refs = _Backward(
        inputs=_inputs(tiling, x, corners, factors, taps),
        grad_out=common.Input(grad_out, _pixels_block(tiling)),
        grad_x=common.Output(x.shape, jnp.float32, _map_block(tiling)),
        grad_factors=common.Output(factors.shape, jnp.float32, _samples_block(tiling, 3)),
        grad_kernel=common.sums(tiling.cores, kernel),
        weights=pltpu.VMEM((_WINDOW_PIXELS, _SAMPLES), tiling.dtype),
        samples=pltpu.VMEM((tiling.channels, _SAMPLES), jnp.float32),
        grad_samples=pltpu.VMEM((tiling.channels, _SAMPLES), tiling.dtype),
    )
    return common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="deform_conv_backward",
        grid=tiling.grid,
        cost=_cost(tiling, 3, item + 4),
    )


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one block, with g = grad_out.

      grad samples = kernel[tap] · gᵀ, tap by tap    kernel[tap]: + samples · g

    and for each window with pixels P and weights W (samples = Pᵀ · W):

      x: + W · grad samplesᵀ
      factors: `_factor_gradients` of grad W = P · grad samples
    """
    inputs = refs.inputs
    first_block = (pl.program_id(2) == 0) & (pl.program_id(3) == 0)

    @pl.when(first_block)
    def _():
        common.clear(refs.grad_x)

    @pl.when(first_block & (pl.program_id(1) == 0))
    def _():
        common.clear(refs.grad_kernel)

    common.clear([refs.samples, refs.grad_factors])
    grad = _on_map(tiling, refs.grad_out[0].reshape(_PIXELS, tiling.outputs))
    for tap in range(TAPS):
        grad_samples = dot(inputs.taps[tap], grad, right=1)
        refs.grad_samples[:, _lanes(tap)] = grad_samples.astype(tiling.dtype)

    def visit(window: _Window) -> None:
        pixels = window.of(inputs.x)
        grad_weights = dot(pixels, refs.grad_samples[...])
        shares = _write_weights(window, inputs, refs.weights)
        refs.grad_factors[0, 0] += _factor_gradients(shares, inputs.factors, grad_weights)
        refs.samples[...] += dot(pixels, refs.weights[...], left=0)
        window.add(refs.grad_x, dot(refs.weights[...], refs.grad_samples[...], right=1))

    _for_each_window(tiling, inputs.reach, visit)
    for tap in range(TAPS):
        samples = refs.samples[:, _lanes(tap)].astype(tiling.dtype)
        refs.grad_kernel[0, tap] += dot(samples, grad)


def _on_map(tiling: _Tiling, pixels: Array) -> Array:
    """Set the pixels of a block that are off the map to zero."""
    number = lax.broadcasted_iota(jnp.int32, (_PIXELS, 1), 0)
    row = pl.program_id(2) * _BLOCK[0] + lax.div(number, _BLOCK[1])
    column = pl.program_id(3) * _BLOCK[1] + lax.rem(number, _BLOCK[1])
    inside = (row < tiling.height) & (column < tiling.width)
    return jnp.where(inside, pixels, jnp.zeros_like(pixels))


@dataclasses.dataclass(frozen=True)
class _Window:
    """A window of the map in VMEM.

    It is moved back where it would extend beyond the map; `first_row` and `first_column` tell
    where its own pixels start: those before were in an earlier window.
    """

    row: Any
    column: Any
    first_row: Any
    first_column: Any

    @property
    def _place(self) -> tuple[Any, ...]:
        column = pl.multiple_of(self.column, TILE)
        return 0, pl.ds(self.row, _WINDOW[0]), pl.ds(column, _WINDOW[1])

    def of(self, ref: Ref) -> Float[Array, "256 C"]:
        """Return the window's pixels, row by row."""
        return ref[self._place].reshape(_WINDOW_PIXELS, -1)

    def add(self, ref: Ref, pixels: Float[Array, "256 C"]) -> None:
        """Add to the window's pixels."""
        ref[self._place] += pixels.reshape(*_WINDOW, -1)


def _for_each_window(tiling: _Tiling, reach: Ref, visit: Callable[[_Window], None]) -> None:
    """Call `visit` with each window that the step's block touches."""
    first = 4 * (pl.program_id(2) * tiling.blocks[1] + pl.program_id(3))
    top, left, down, across = (reach[0, 0, first + n] for n in range(4))

    def row(i: Any, _: None) -> None:
        def column(j: Any, _: None) -> None:
            start = top + i * _WINDOW[0], left + j * _WINDOW[1]
            last = tiling.rows - _WINDOW[0], tiling.columns - _WINDOW[1]
            visit(_Window(*map(jnp.minimum, start, last), *start))

        lax.fori_loop(0, across, column, None)

    lax.fori_loop(0, down, row, None)


@dataclasses.dataclass(frozen=True)
class _Shares:
    """Weight of each of a window's rows and columns in each of S samples, and derivatives."""

    of_row: Float[Array, "8 S"]
    of_column: Float[Array, "32 S"]
    row_slope: Float[Array, "8 S"]  # d of_row / d (how far below its corner the sample lies)
    column_slope: Float[Array, "32 S"]  # d of_column / d (how far to the right)


def _write_weights(window: _Window, inputs: _Inputs, weights: Ref) -> _Shares:
    """Write the bilinear weight of each sample at each of the window's pixels.

    weight[(r, c), s] = of_row[r, s] · of_column[c, s] · (the sample's own weight)
    """
    corners, factors = inputs.corners, inputs.factors
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
    """Return the weight of `count` rows or columns in each sample, and its derivative by `beyond`.

    Row `corner` has the weight 1 - beyond, the row after it the weight `beyond`, others 0.

    Args:
      corner, beyond: (1, S): where each sample's neighbor is, and how far beyond it the sample is.
      start: the first of the rows.
      first: rows before this one belong to an earlier window; their weight is 0.
      count: how many rows.
    """
    place = start + lax.broadcasted_iota(jnp.int32, (count, 1), 0)
    near = (corner == place) & (place >= first)
    far = (corner == place - 1) & (place >= first)
    share = jnp.where(near, 1.0 - beyond, jnp.where(far, beyond, 0.0))
    return share, jnp.where(near, -1.0, jnp.where(far, 1.0, 0.0))


def _factor_gradients(
    shares: _Shares, factors: Ref, grad_weights: Float[Array, "256 S"]
) -> Float[Array, "3 S"]:
    """Return the gradients of the three factors, given those of a window's weights.

    With w the sample's weight and G[r, c] the gradient of its weight at row r and column c:

      down:   w · Σ row_slope[r] · of_column[c] · G[r, c]
      right:  w · Σ of_row[r] · column_slope[c] · G[r, c]
      weight: Σ of_row[r] · of_column[c] · G[r, c]
    """
    rows, columns = _WINDOW
    strength = factors[0, 0, 2:3]
    across = jnp.zeros_like(shares.of_column)
    by_row = []
    for r in range(rows):
        here = grad_weights[r * columns : (r + 1) * columns]
        across += shares.of_row[r : r + 1] * here
        by_row.append(jnp.sum(shares.of_column * here, axis=0, keepdims=True))
    along = jnp.concatenate(by_row, axis=0)
    total = lambda x: jnp.sum(x, axis=0, keepdims=True)
    down = strength * total(shares.row_slope * along)
    right = strength * total(shares.column_slope * across)
    return jnp.concatenate([down, right, total(shares.of_row * along)], axis=0)


def _lanes(tap: int) -> slice:
    """Samples of a tap."""
    return slice(tap * _PIXELS, (tap + 1) * _PIXELS)
