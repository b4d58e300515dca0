"""The dense half of a deformable convolution as one TPU kernel: blend neighbours, then project.

A gather reads, for each of the nine taps of a pixel, the four neighbours of the sampled point side
by side in one row. That is the largest array of a training step, and XLA moves it ten times: as
four neighbours on an axis of their own, as products, as samples. Here it is read once forward;
backward it is read once and its gradient is written once.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import pieces
from detclipv2_jax.ops.kernels.pieces import dot

TAPS = 9
NEIGHBOURS = 4
_BLOCK = 128  # pixels of a step


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    images: int
    pixels: int
    channels: int
    outputs: int
    dtype: Any

    @property
    def blocks(self) -> int:
        """Of an image; the last may go beyond its pixels."""
        return -(-self.pixels // _BLOCK)

    @property
    def cores(self) -> int:
        """Parts that a chip's cores may share."""
        return 1 if self.images * self.blocks % 2 else 2

    @property
    def steps(self) -> int:
        return self.images * self.blocks // self.cores


def fast_memory(channels: int, outputs: int) -> int:
    """Bytes that the backward pass of bfloat16 rows wants of fast memory, about."""
    size, row = pieces.size, NEIGHBOURS * channels
    maps = size(2, 4, TAPS, _BLOCK, row) + size(2, 2, _BLOCK, outputs)
    dense = size(2, 2, TAPS, channels, outputs) + size(4, TAPS, channels, outputs)
    return maps + dense + size(4, 4, _BLOCK, TAPS * NEIGHBOURS) + size(4, 8, _BLOCK, channels)


def project(
    rows: Float[Array, "B 9 K R"],
    weights: Float[Array, "B K 36"],
    kernel: Float[Array, "9 C O"],
) -> Float[Array, "B K O"]:
    """Sum over taps of (weighted sum of a row's four neighbours) · kernel.

    Args:
      rows: of each tap of each pixel, four neighbours of C channels side by side.
      weights: of each tap's neighbours, float32.
      kernel: float32; products take the rows' dtype and sum in float32.
    """
    plan = _plan(rows, kernel)
    taps = kernel.astype(plan.dtype)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="deform_project_forward",
        grid=(plan.cores, plan.steps),
        out_shape=jax.ShapeDtypeStruct((plan.images, plan.pixels, plan.outputs), plan.dtype),
        in_specs=[
            _rows(plan), _pixels(plan, weights.shape[-1]), pieces.whole(taps)
        ],
        out_specs=_pixels(plan, plan.outputs),
        cost_estimate=_cost(plan, 1),
        compiler_params=pieces.parameters(2),
    )(rows, weights, taps)  # fmt: skip


def project_backward(
    rows: Float[Array, "B 9 K R"],
    weights: Float[Array, "B K 36"],
    kernel: Float[Array, "9 C O"],
    gradient: Float[Array, "B K O"],
) -> tuple[Float[Array, "B 9 K R"], Float[Array, "B K 36"], Float[Array, "9 C O"]]:
    """The gradients of `project` by rows, weights and kernel; the kernel's sums in float32."""
    plan = _plan(rows, kernel)
    taps = kernel.astype(plan.dtype)
    shapes, specs = pieces.sums(plan.cores, kernel)
    by_rows, by_weights, by_kernel = pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="deform_project_backward",
        grid=(plan.cores, plan.steps),
        out_shape=[
            jax.ShapeDtypeStruct(rows.shape, plan.dtype),
            jax.ShapeDtypeStruct(weights.shape, jnp.float32),
            *shapes,
        ],
        in_specs=[
            _rows(plan), _pixels(plan, weights.shape[-1]), pieces.whole(taps),
            _pixels(plan, plan.outputs),
        ],
        out_specs=[_rows(plan), _pixels(plan, weights.shape[-1]), *specs],
        cost_estimate=_cost(plan, 2),
        compiler_params=pieces.parameters(2),
    )(rows, weights, taps, gradient)  # fmt: skip
    return by_rows, by_weights, by_kernel.sum(0)


def _plan(rows: Array, kernel: Array) -> _Plan:
    images, _, pixels, _ = rows.shape
    return _Plan(images, pixels, *kernel.shape[1:], rows.dtype)


def _place(plan: _Plan, core: Any, step: Any) -> tuple[Any, Any]:
    """Image and block of a step."""
    number = core * plan.steps + step
    return lax.div(number, plan.blocks), lax.rem(number, plan.blocks)


def _rows(plan: _Plan) -> pl.BlockSpec:
    def index(core: Any, step: Any) -> tuple[Any, ...]:
        image, block = _place(plan, core, step)
        return image, 0, block, 0

    return pl.BlockSpec((1, TAPS, _BLOCK, NEIGHBOURS * plan.channels), index)


def _pixels(plan: _Plan, width: int) -> pl.BlockSpec:
    def index(core: Any, step: Any) -> tuple[Any, ...]:
        return *_place(plan, core, step), 0

    return pl.BlockSpec((1, _BLOCK, width), index)


def _cost(plan: _Plan, passes: int) -> pl.CostEstimate:
    """Forward, or `passes` = 2: backward, which writes as much as it reads."""
    item, size = jnp.dtype(plan.dtype).itemsize, pieces.size
    pixels, dense = plan.images * plan.pixels, TAPS * plan.channels * plan.outputs
    rows = passes * size(item, TAPS, pixels, NEIGHBOURS * plan.channels)
    weights = passes * size(4, pixels, TAPS * NEIGHBOURS)
    sums = 4 * plan.cores * dense if passes > 1 else 0
    moved = rows + weights + size(item, pixels, plan.outputs) + item * dense + sums
    return pl.CostEstimate(
        flops=2 * passes * pixels * dense, bytes_accessed=moved, transcendentals=0
    )


def _forward_kernel(plan: _Plan, rows: Any, weights: Any, taps: Any, out: Any) -> None:
    total = jnp.zeros((_BLOCK, plan.outputs), jnp.float32)
    for tap in range(TAPS):
        sample = _blend(plan, rows, weights, tap)
        total += dot(sample.astype(plan.dtype), taps[tap])
    out[0] = total.astype(plan.dtype)


def _backward_kernel(plan: _Plan, rows: Any, weights: Any, taps: Any, *refs: Any) -> None:
    gradient, by_rows, by_weights, by_kernel = refs
    step = pl.program_id(1)

    @pl.when(step == 0)
    def _():
        pieces.clear([by_kernel])

    _, block = _place(plan, pl.program_id(0), step)
    pixel = block * _BLOCK + lax.broadcasted_iota(jnp.int32, (_BLOCK, 1), 0)
    real = pixel < plan.pixels
    slope = jnp.where(real, gradient[0], jnp.zeros_like(gradient[0]))
    column = lax.broadcasted_iota(jnp.int32, (1, TAPS * NEIGHBOURS), 1)
    by_all = jnp.zeros((_BLOCK, TAPS * NEIGHBOURS), jnp.float32)
    for tap in range(TAPS):
        by_sample = dot(slope, taps[tap], right=1)
        for n in range(NEIGHBOURS):
            lanes, number = _lanes(plan, n), NEIGHBOURS * tap + n
            row = rows[0, tap, :, lanes].astype(jnp.float32)
            by_weight = jnp.sum(by_sample * row, axis=1, keepdims=True)
            by_all = jnp.where(column == number, by_weight, by_all)
            weighted = by_sample * weights[0, :, number : number + 1]
            by_rows[0, tap, :, lanes] = weighted.astype(plan.dtype)
        sample = jnp.where(real, _blend(plan, rows, weights, tap), 0.0)
        by_kernel[0, tap] += dot(sample.astype(plan.dtype), slope, left=0)
    by_weights[0] = by_all


def _lanes(plan: _Plan, neighbour: int) -> slice:
    return slice(neighbour * plan.channels, (neighbour + 1) * plan.channels)


def _blend(plan: _Plan, rows: Any, weights: Any, tap: int) -> Float[Array, "N C"]:
    """The samples of a tap."""
    total = jnp.zeros((_BLOCK, plan.channels), jnp.float32)
    for n in range(NEIGHBOURS):
        number = NEIGHBOURS * tap + n
        row = rows[0, tap, :, _lanes(plan, n)].astype(jnp.float32)
        total += row * weights[0, :, number : number + 1]
    return total
