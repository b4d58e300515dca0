"""Swin's patch merging as one TPU kernel: 2×2 neighbors side by side, normalized and projected.

XLA moves the map a dozen times for it, most of them to lay the neighbors side by side. Here a
step of the grid takes pairs of rows, reads every other pixel of them from fast memory, and never
lays anything side by side: the norm sums over the four neighbors, the projection is the sum of
four products. The map is read once and the smaller one written once forward; backward both are
read and the map's gradient is written.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import pieces, place
from detclipv2_jax.ops.kernels.pieces import EPS, LANES, TILE, dot

_TOKENS = 1024  # of a step, at most
# (row, column) of a patch's pixels in the official order: columns outermost.
_PIXELS = ((0, 0), (1, 0), (0, 1), (1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the merging, as the kernel wants them."""

    scale: Float[Array, "4 1 C"]  # of the norm
    offset: Float[Array, "4 1 C"]
    reduction: Float[Array, "4 C D"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    pairs: int  # of rows, of all images
    width: int  # of the smaller map
    channels: int
    outputs: int
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.pairs)

    @property
    def pitch(self) -> int:
        """From row to row, in tokens."""
        return -(-self.width // TILE) * TILE

    @property
    def band(self) -> int:
        """Pairs of a step: as many as divide a core's and stay within `_TOKENS`."""
        pairs = self.pairs // self.cores
        most = max(_TOKENS // self.pitch, 1)
        return max(n for n in range(1, min(most, pairs) + 1) if pairs % n == 0)

    @property
    def steps(self) -> int:
        return self.pairs // self.cores // self.band

    @property
    def tokens(self) -> int:
        return self.band * self.pitch


def fast_memory(shape: tuple[int, ...], outputs: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan = _Plan(batch * height // 2, width // 2, channels, outputs, jnp.bfloat16)
    size = pieces.size
    dense = size(2, 2, 4, channels, outputs) + size(4, 4, channels, outputs)
    maps = size(2, 4, 2 * plan.band, width, channels) + size(2, 2, plan.band, width // 2, outputs)
    tokens = size(6, 4, plan.tokens, channels) + size(6, plan.tokens, outputs)
    return dense + maps + tokens + size(4, 2, width, channels)


def patch_merging(x: Float[Array, "B H W C"], weights: Weights) -> Float[Array, "B H2 W2 D"]:
    """The norm and the projection of each 2×2 patch.

    Args:
      x: its sides are even.
      weights: float32; their products take x's dtype, their gradients sum in float32.
    """
    batch, height, width, channels = x.shape
    outputs = weights.reduction.shape[-1]
    plan = _Plan(batch * height // 2, width // 2, channels, outputs, x.dtype)
    rows = x.reshape(plan.pairs, 2, width, channels)
    return _merge(plan, rows, None, weights).reshape(batch, height // 2, width // 2, outputs)


def _operands(plan: _Plan, weights: Weights) -> list[Array]:
    dense = weights.reduction.astype(plan.dtype)
    return jax.tree.leaves(dataclasses.replace(weights, reduction=dense))


def _specs(plan: _Plan) -> tuple[pl.BlockSpec, pl.BlockSpec]:
    """Of a band of the map and of the smaller one."""
    here = lambda core, step: core * plan.steps + step
    map_shape = (plan.band, 2, 2 * plan.width, plan.channels)
    return (
        pl.BlockSpec(map_shape, lambda *at: (here(*at), 0, 0, 0)),
        pl.BlockSpec((plan.band, plan.width, plan.outputs), lambda *at: (here(*at), 0, 0)),
    )


def _cost(plan: _Plan, operands: list[Array], products: int, maps: int) -> pl.CostEstimate:
    """What the compiler cannot see; with padded lanes, as it counts."""
    item = jnp.dtype(plan.dtype).itemsize
    moved = maps * pieces.size(item, plan.pairs, 2, 2 * plan.width, plan.channels)
    moved += pieces.size(item, plan.pairs, plan.width, plan.outputs)
    sums = sum(math.prod(operand.shape) * 4 for operand in operands) if products > 1 else 0
    return pl.CostEstimate(
        flops=8 * products * plan.pairs * plan.width * plan.channels * plan.outputs,
        bytes_accessed=moved + sum(o.nbytes for o in operands) + plan.cores * sums,
        transcendentals=0,
    )


def _call_forward(plan: _Plan, x: Array, _: None, weights: Weights) -> Array:
    operands, (large, small) = _operands(plan, weights), _specs(plan)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="patch_merging_forward",
        grid=(plan.cores, plan.steps),
        out_shape=jax.ShapeDtypeStruct((plan.pairs, plan.width, plan.outputs), plan.dtype),
        in_specs=[large, *[pieces.whole(operand) for operand in operands]],
        out_specs=small,
        scratch_shapes=[
            pltpu.VMEM((4, plan.tokens, plan.channels), plan.dtype),
            pltpu.VMEM((plan.tokens, plan.outputs), jnp.float32),
            _pair(plan),
        ],
        cost_estimate=_cost(plan, operands, 1, 1),
        compiler_params=pieces.parameters(2),
    )(x, *operands)


def _call_backward(
    plan: _Plan, x: Array, _: None, weights: Weights, gradient: Array
) -> list[Array]:
    operands, (large, small) = _operands(plan, weights), _specs(plan)
    shapes, specs = pieces.sums(plan.cores, weights)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="patch_merging_backward",
        grid=(plan.cores, plan.steps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        in_specs=[large, small, *[pieces.whole(operand) for operand in operands]],
        out_specs=[large, *specs],
        scratch_shapes=[
            pltpu.VMEM((4, plan.tokens, plan.channels), plan.dtype),
            pltpu.VMEM((plan.tokens, plan.outputs), plan.dtype),
            pltpu.VMEM((4, plan.tokens, plan.channels), jnp.float32),
            _pair(plan),
        ],
        cost_estimate=_cost(plan, operands, 2, 2),
        compiler_params=pieces.parameters(2),
    )(x, gradient, *operands)


_merge = pieces.branch(_call_forward, _call_backward)


def _forward_kernel(
    plan: _Plan, x: Any, scale: Any, offset: Any, reduction: Any, out: Any,
    tokens: Any, result: Any, pair: Any,
) -> None:  # fmt: skip
    _lay_normal(plan, x, scale, offset, tokens, pair)
    result[...] = dot(tokens[0], reduction[0])
    for n in range(1, 4):
        result[...] += dot(tokens[n], reduction[n])

    def write(r: Any, _: None) -> None:
        out[r] = result[_row(plan, r)].astype(plan.dtype)

    lax.fori_loop(0, plan.band, write, None)


def _backward_kernel(
    plan: _Plan, x: Any, gradient: Any, scale: Any, offset: Any, reduction: Any,
    by_x: Any, by_scale: Any, by_offset: Any, by_reduction: Any,
    tokens: Any, slope: Any, by_tokens: Any, pair: Any,
) -> None:  # fmt: skip
    @pl.when(pl.program_id(1) == 0)
    def _():
        pieces.clear([by_scale, by_offset, by_reduction])

    _lay_normal(plan, x, scale, offset, tokens, pair)
    pieces.clear([slope])

    def read(r: Any, _: None) -> None:
        slope[_row(plan, r)] = gradient[r]

    lax.fori_loop(0, plan.band, read, None)
    for n in range(4):
        by_reduction[0, n] += dot(tokens[n], slope[...], left=0)
        by_tokens[n] = dot(slope[...], reduction[n], right=1)

    def pull(r: Any, _: None) -> None:
        normals, inverse = _standardize(_apart(plan, x, r, pair))
        gradients = [by_tokens[n, _row(plan, r)] for n in range(4)]
        for n, (normal, by_normal) in enumerate(zip(normals, gradients)):
            by_scale[0, n] += pieces.total(by_normal * normal)
            by_offset[0, n] += pieces.total(by_normal)
        gradients = [by_normal * scale[n] for n, by_normal in enumerate(gradients)]
        middle = _mean(gradients)
        along = _mean([a * b for a, b in zip(gradients, normals)])
        for (i, j), by_normal, normal in zip(_PIXELS, gradients, normals):
            by_pixel = (by_normal - middle - normal * along) * inverse
            for group, lanes in enumerate(_groups(plan)):
                there = pl.ds(j, plan.width, stride=2), slice(lanes.stop - lanes.start)
                pair[i, group, *there] = by_pixel[:, lanes]
        for i in range(2):
            for group, lanes in enumerate(_groups(plan)):
                by_x[r, i, :, lanes] = pair[i, group, :, : lanes.stop - lanes.start].astype(
                    plan.dtype
                )

    lax.fori_loop(0, plan.band, pull, None)


def _lay_normal(plan: _Plan, x: Any, scale: Any, offset: Any, tokens: Any, pair: Any) -> None:
    if plan.pitch > plan.width:  # what lies between the rows takes part in sums over tokens
        tokens[...] = jnp.zeros_like(tokens)

    def lay(r: Any, _: None) -> None:
        normals, _inverse = _standardize(_apart(plan, x, r, pair))
        for n, normal in enumerate(normals):
            tokens[n, _row(plan, r)] = (normal * scale[n] + offset[n]).astype(plan.dtype)

    lax.fori_loop(0, plan.band, lay, None)


def _groups(plan: _Plan) -> list[slice]:
    """Channels that are a tile wide: only such are read by every other row, and only float32."""
    starts = range(0, plan.channels, LANES)
    return [slice(start, min(start + LANES, plan.channels)) for start in starts]


def _pair(plan: _Plan) -> Any:
    """Room for a pair of rows, group by group."""
    lanes = min(plan.channels, LANES)
    return pltpu.VMEM((2, len(_groups(plan)), 2 * plan.width, lanes), jnp.float32)


def _apart(plan: _Plan, x: Any, r: Any, pair: Any) -> list[Float[Array, "W C"]]:
    """The four pixels of each patch of a pair of rows."""
    groups = _groups(plan)
    for i in range(2):
        for group, lanes in enumerate(groups):
            value = x[r, i, :, lanes].astype(jnp.float32)
            pair[i, group, :, : value.shape[1]] = value
    parts = lambda i, j: [
        pair[i, group, pl.ds(j, plan.width, stride=2), : lanes.stop - lanes.start]
        for group, lanes in enumerate(groups)
    ]
    return [jnp.concatenate(parts(i, j), axis=1) for i, j in _PIXELS]


def _standardize(
    values: list[Float[Array, "W C"]],
) -> tuple[list[Float[Array, "W C"]], Float[Array, "W 1"]]:
    """Zero mean and unit variance of the four together, and what they were multiplied by."""
    middle = _mean(values)
    centered = [value - middle for value in values]
    inverse = lax.rsqrt(_mean([jnp.square(value) for value in centered]) + EPS)
    return [value * inverse for value in centered], inverse


def _mean(values: list[Float[Array, "W C"]]) -> Float[Array, "W 1"]:
    total = functools.reduce(jnp.add, values)
    return jnp.mean(total, axis=1, keepdims=True) / len(values)


def _row(plan: _Plan, r: Any) -> Any:
    return pl.ds(pl.multiple_of(r * plan.pitch, TILE), plan.width)
