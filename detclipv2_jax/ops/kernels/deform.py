"""Modulated deformable 3×3 convolution as a TPU kernel that gathers by matrix products.

A gather in slow memory moves four neighbours for each of nine taps: 36 times the map, and back as
a scatter. Here an image's map stays in fast memory. Pixels are taken 128 at a time with their nine
taps; for each row of the map that these touch, a matrix with the bilinear weights of every sample
multiplies the row's pixels. Transposed, the same matrix brings the gradient back.

So the arithmetic grows with how many rows a block of samples touches: six or so while offsets are
within a pixel or two, the whole map if they are wild. The result is the same.
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

from detclipv2_jax.ops.kernels import pieces
from detclipv2_jax.ops.kernels.pieces import LANES, TILE, dot

TAPS = 9
_BLOCK = 128  # pixels of a step
_NEAR = 7  # rows that a block is taken to touch in what the compiler is told of the arithmetic


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    batch: int
    height: int
    width: int
    pixels: int  # that are asked for
    channels: int
    outputs: int
    dtype: Any

    @property
    def cores(self) -> int:
        """Parts of the batch that a chip's cores may share."""
        return 1 if self.batch % 2 else 2

    @property
    def tile(self) -> int:
        """Columns that are taken at a time."""
        tiles = -(-self.width // LANES)
        return -(-self.width // (tiles * TILE)) * TILE

    @property
    def columns(self) -> int:
        """The width padded to whole tiles."""
        return -(-self.width // self.tile) * self.tile

    @property
    def blocks(self) -> int:
        """Of an image; the last may go beyond its pixels."""
        return -(-self.pixels // _BLOCK)


def fast_memory(shape: tuple[int, ...], outputs: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan, size = _Plan(batch, height, width, 0, channels, outputs, jnp.bfloat16), pieces.size
    maps = size(2, height, plan.columns, channels) + size(4, height, plan.columns, channels)
    dense = size(2, 2, TAPS, channels, outputs) + size(4, TAPS, channels, outputs)
    samples = size(4, 3, TAPS, _BLOCK, channels) + size(4, 4, TAPS, _BLOCK, LANES)
    return maps + dense + samples + size(4, 3 * TAPS + 8, _BLOCK, LANES)


def deform_conv(
    x: Float[Array, "B H W C"],
    corners: Int[Array, "B K 18"],
    factors: Float[Array, "B K 27"],
    kernel: Float[Array, "9 C O"],
) -> Float[Array, "B K O"]:
    """Project nine bilinear samples of each of K pixels.

    Args:
      x: the map that is sampled; zero outside its borders.
      corners: (row, column) of the upper left neighbour of each tap's point, -1 and more.
      factors: of each tap, how far below and how far to the right of it the point lies, 0 to 1, and
        the sample's weight.
      kernel: float32; products take x's dtype, its gradient sums in float32.
    """
    batch, height, width, channels = x.shape
    plan = _Plan(batch, height, width, corners.shape[1], channels, kernel.shape[-1], x.dtype)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, plan.columns - width), (0, 0)))
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
    """First and last row and tile of columns of the map that each block touches, block by block."""
    behind = (0, plan.blocks * _BLOCK - plan.pixels)
    padded = jnp.pad(corners, ((0, 0), behind, (0, 0)), mode="edge")
    padded = padded.reshape(plan.batch, plan.blocks, _BLOCK * TAPS, 2)
    low, high = jnp.min(padded, axis=2), jnp.max(padded, axis=2) + 1
    limits = jnp.asarray([plan.height - 1, plan.columns - 1])
    low, high = (jnp.clip(bound, 0, limits) // jnp.asarray([1, plan.tile]) for bound in (low, high))
    return jnp.concatenate([low, high], axis=-1).reshape(plan.batch, 1, -1)


def _of_image(plan: _Plan, *shape: int, **options: Any) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, _: (core * images + image, *(0 for _ in shape))
    return pl.BlockSpec((1, *shape), index, **options)


def _of_block(plan: _Plan, width: int) -> pl.BlockSpec:
    images = plan.batch // plan.cores
    index = lambda core, image, block: (core * images + image, block, 0)
    return pl.BlockSpec((1, _BLOCK, width), index)


def _whole_map(plan: _Plan) -> pl.BlockSpec:
    # One buffer: it is needed for long, and the next one is there in no time.
    shape = (plan.height, plan.columns, plan.channels)
    return _of_image(plan, *shape, pipeline_mode=pl.Buffered(1))


def _inputs(plan: _Plan) -> list[pl.BlockSpec]:
    return [
        _of_image(plan, 1, 4 * plan.blocks, memory_space=pltpu.SMEM),
        _of_block(plan, 2 * TAPS),
        _of_block(plan, 3 * TAPS),
        _whole_map(plan),
    ]


def _cost(plan: _Plan, passes: int, maps: int) -> pl.CostEstimate:
    """Of `passes` products of samples and rows; `maps`: bytes of a channel of a pixel."""
    size, dense = pieces.size, TAPS * plan.channels * plan.outputs
    samples = plan.batch * plan.blocks * _BLOCK * TAPS
    reached = _NEAR * min(plan.columns, 2 * plan.tile) * plan.channels
    moved = maps * size(1, plan.batch, plan.height, plan.columns, plan.channels)
    moved += passes * size(4, plan.batch, plan.pixels, 3 * TAPS)
    moved += size(2, plan.batch, plan.pixels, plan.outputs)
    sums = 4 * plan.cores * dense if passes > 1 else 0
    return pl.CostEstimate(
        flops=2 * passes * samples * (reached + plan.channels * plan.outputs),
        bytes_accessed=moved + 2 * dense + sums,
        transcendentals=0,
    )


def _call_forward(plan: _Plan, x: Array, corners: Array, factors: Array, kernel: Array) -> Array:
    taps, item = kernel.astype(plan.dtype), jnp.dtype(plan.dtype).itemsize
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="deform_conv_forward",
        grid=(plan.cores, plan.batch // plan.cores, plan.blocks),
        out_shape=jax.ShapeDtypeStruct((plan.batch, plan.pixels, plan.outputs), plan.dtype),
        in_specs=[*_inputs(plan), pieces.whole(taps)],
        out_specs=_of_block(plan, plan.outputs),
        scratch_shapes=[
            pltpu.VMEM((TAPS * _BLOCK, plan.tile), plan.dtype),
            pltpu.VMEM((TAPS * _BLOCK, plan.channels), jnp.float32),
        ],
        cost_estimate=_cost(plan, 1, item),
        compiler_params=pieces.parameters(3),
    )(_reach(plan, corners), corners, factors, x, taps)


def _call_backward(
    plan: _Plan, x: Array, corners: Array, factors: Array, kernel: Array, gradient: Array
) -> list[Array]:
    taps, item = kernel.astype(plan.dtype), jnp.dtype(plan.dtype).itemsize
    shapes, specs = pieces.sums(plan.cores, kernel)
    samples = (TAPS * _BLOCK, plan.channels)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="deform_conv_backward",
        grid=(plan.cores, plan.batch // plan.cores, plan.blocks),
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, jnp.float32),
            jax.ShapeDtypeStruct(factors.shape, jnp.float32),
            *shapes,
        ],
        in_specs=[*_inputs(plan), pieces.whole(taps), _of_block(plan, plan.outputs)],
        out_specs=[_whole_map(plan), _of_block(plan, 3 * TAPS), *specs],
        scratch_shapes=[
            pltpu.VMEM((TAPS * _BLOCK, plan.tile), plan.dtype),
            pltpu.VMEM(samples, jnp.float32),
            pltpu.VMEM(samples, plan.dtype),
            pltpu.VMEM((3 * TAPS, _BLOCK, 1), jnp.float32),
        ],
        cost_estimate=_cost(plan, 3, item + 4),
        compiler_params=pieces.parameters(3),
    )(_reach(plan, corners), corners, factors, x, taps, gradient)


def _forward_kernel(
    plan: _Plan, reach: Any, corners: Any, factors: Any, x: Any, taps: Any, out: Any,
    weights: Any, samples: Any,
) -> None:  # fmt: skip
    samples[...] = jnp.zeros_like(samples)

    def visit(row: Any, tile: Any) -> None:
        for tap in range(TAPS):
            point = _point(plan, corners, factors, tap, row, tile)
            weights[_rows(tap)] = point.weight.astype(plan.dtype)
        samples[...] += dot(weights[...], x[0, row, _columns(plan, tile)])

    _for_what_is_touched(reach, visit)
    total = jnp.zeros((_BLOCK, plan.outputs), jnp.float32)
    for tap in range(TAPS):
        total += dot(samples[_rows(tap)].astype(plan.dtype), taps[tap])
    out[0] = total.astype(plan.dtype)


def _backward_kernel(
    plan: _Plan, reach: Any, corners: Any, factors: Any, x: Any, taps: Any, gradient: Any,
    by_x: Any, by_factors: Any, by_kernel: Any,
    weights: Any, samples: Any, by_samples: Any, sums: Any,
) -> None:  # fmt: skip
    image, block = pl.program_id(1), pl.program_id(2)

    @pl.when(block == 0)
    def _():
        pieces.clear([by_x])

    @pl.when((image == 0) & (block == 0))
    def _():
        pieces.clear([by_kernel])

    pieces.clear([samples, sums])
    pixel = block * _BLOCK + lax.broadcasted_iota(jnp.int32, (_BLOCK, 1), 0)
    real = pixel < plan.pixels
    slope = jnp.where(real, gradient[0], jnp.zeros_like(gradient[0]))
    for tap in range(TAPS):
        by_samples[_rows(tap)] = dot(slope, taps[tap], right=1).astype(plan.dtype)

    def visit(row: Any, tile: Any) -> None:
        here = x[0, row, _columns(plan, tile)]
        by_weights = dot(by_samples[...], here, right=1)
        for tap in range(TAPS):
            point = _point(plan, corners, factors, tap, row, tile)
            weight = jnp.where(real, point.weight, 0.0)
            weights[_rows(tap)] = weight.astype(plan.dtype)
            for n, value in enumerate(point.pull(by_weights[_rows(tap)])):
                sums[3 * tap + n] += value
        samples[...] += dot(weights[...], here)
        by_x[0, row, _columns(plan, tile)] += dot(weights[...], by_samples[...], left=0)

    _for_what_is_touched(reach, visit)
    column = lax.broadcasted_iota(jnp.int32, (1, 3 * TAPS), 1)
    by_all = jnp.zeros((_BLOCK, 3 * TAPS), jnp.float32)
    for tap in range(TAPS):
        by_kernel[0, tap] += dot(samples[_rows(tap)].astype(plan.dtype), slope, left=0)
        for n in range(3 * tap, 3 * tap + 3):
            by_all = jnp.where(column == n, sums[n], by_all)
    by_factors[0] = by_all


def _for_what_is_touched(reach: Any, visit: Any) -> None:
    """`visit` each row and tile of columns that the step's block touches."""
    first = 4 * pl.program_id(2)
    top, left, bottom, right = (reach[0, 0, first + n] for n in range(4))

    def row(number: Any, _: None) -> None:
        lax.fori_loop(left, right + 1, lambda tile, _: visit(number, tile), None)

    lax.fori_loop(top, bottom + 1, row, None)


@dataclasses.dataclass(frozen=True)
class _Point:
    """A tap of a block's pixels, beside one row and T columns of the map."""

    by_row: Float[Array, "N 1"]  # how much of the row is in the sample
    by_column: Float[Array, "N T"]
    row_slope: Float[Array, "N 1"]  # by how far below the corner the point lies
    column_slope: Float[Array, "N T"]
    strength: Float[Array, "N 1"]  # of the sample

    @property
    def weight(self) -> Float[Array, "N T"]:
        return self.strength * self.by_row * self.by_column

    def pull(self, gradient: Float[Array, "N T"]) -> tuple[Array, Array, Array]:
        """From the gradient by the weights to that by the three factors."""
        along = jnp.sum(gradient * self.by_column, axis=1, keepdims=True)
        across = jnp.sum(gradient * self.column_slope, axis=1, keepdims=True)
        strength = self.strength
        return (
            strength * self.row_slope * along,
            strength * self.by_row * across,
            self.by_row * along,
        )


def _point(plan: _Plan, corners: Any, factors: Any, tap: int, row: Any, tile: Any) -> _Point:
    lane = lambda refs, number: refs[0, :, number : number + 1]
    top, left = (lane(corners, 2 * tap + n) for n in range(2))
    down, right, strength = (lane(factors, 3 * tap + n) for n in range(3))
    columns = tile * plan.tile + lax.broadcasted_iota(jnp.int32, (1, plan.tile), 1)
    by_row, row_slope = _share(top, down, row)
    by_column, column_slope = _share(left, right, columns)
    return _Point(by_row, by_column, row_slope, column_slope, strength)


def _share(corner: Array, beyond: Array, place: Any) -> tuple[Array, Array]:
    """What a row or column has of a point so far beyond its corner, and the derivative by that."""
    near, far = corner == place, corner == place - 1
    share = jnp.where(near, 1.0 - beyond, jnp.where(far, beyond, 0.0))
    return share, jnp.where(near, -1.0, jnp.where(far, 1.0, 0.0))


def _rows(tap: int) -> slice:
    return slice(tap * _BLOCK, (tap + 1) * _BLOCK)


def _columns(plan: _Plan, tile: Any) -> Any:
    return pl.ds(pl.multiple_of(tile * plan.tile, TILE), plan.tile)
