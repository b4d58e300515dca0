"""Layer normalization of a map as one TPU kernel: each pass reads and writes each map once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import pieces, place

_TOKENS = 2048  # of a step, at most


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the norm."""

    scale: Float[Array, "1 C"]
    offset: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    rows: int  # of all maps
    width: int
    channels: int
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.rows)

    @property
    def band(self) -> int:
        """Rows of a step: as many as divide a core's and stay within `_TOKENS`."""
        rows, most = self.rows // self.cores, max(_TOKENS // self.width, 1)
        return max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)

    @property
    def steps(self) -> int:
        return self.rows // self.cores // self.band


def fast_memory(shape: tuple[int, ...]) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan = _Plan(batch * height, width, channels, jnp.bfloat16)
    maps = pieces.size(2, 6, plan.band, width, channels)  # three, with two buffers
    return maps + pieces.size(4, 4, width, channels)


def layer_norm(x: Float[Array, "B H W C"], weights: Weights) -> Float[Array, "B H W C"]:
    """Zero mean and unit variance of each position, times a scale, plus an offset."""
    batch, height, width, channels = x.shape
    plan = _Plan(batch * height, width, channels, x.dtype)
    rows = x.reshape(plan.rows, width, channels)
    return _norm(plan, rows, None, weights).reshape(x.shape)


def _band(plan: _Plan) -> pl.BlockSpec:
    shape = (plan.band, plan.width, plan.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * plan.steps + step, 0, 0))


def _cost(plan: _Plan, maps: int) -> pl.CostEstimate:
    """What the compiler cannot see; with padded lanes, as it counts."""
    item = jnp.dtype(plan.dtype).itemsize
    return pl.CostEstimate(
        flops=0,
        bytes_accessed=maps * pieces.size(item, plan.rows, plan.width, plan.channels),
        transcendentals=0,
    )


def _call_forward(plan: _Plan, x: Array, _: None, weights: Weights) -> Array:
    operands = jax.tree.leaves(weights)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="layer_norm_forward",
        grid=(plan.cores, plan.steps),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[_band(plan), *[pieces.whole(operand) for operand in operands]],
        out_specs=_band(plan),
        cost_estimate=_cost(plan, 2),
        compiler_params=pieces.parameters(2),
    )(x, *operands)


def _call_backward(
    plan: _Plan, x: Array, _: None, weights: Weights, gradient: Array
) -> list[Array]:
    shapes, specs = pieces.sums(plan.cores, weights)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="layer_norm_backward",
        grid=(plan.cores, plan.steps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        in_specs=[_band(plan), _band(plan), pieces.whole(weights.scale)],
        out_specs=[_band(plan), *specs],
        cost_estimate=_cost(plan, 3),
        compiler_params=pieces.parameters(2),
    )(x, gradient, weights.scale)


_norm = pieces.branch(_call_forward, _call_backward)


def _forward_kernel(plan: _Plan, x: Any, scale: Any, offset: Any, out: Any) -> None:
    def row(r: Any, _: None) -> None:
        normal, _inverse = pieces.standardize(x[r])
        out[r] = (normal * scale[...] + offset[...]).astype(plan.dtype)

    lax.fori_loop(0, plan.band, row, None)


def _backward_kernel(
    plan: _Plan, x: Any, gradient: Any, scale: Any, by_x: Any, by_scale: Any, by_offset: Any
) -> None:
    @pl.when(pl.program_id(1) == 0)
    def _():
        pieces.clear([by_scale, by_offset])

    def row(r: Any, _: None) -> None:
        normal, inverse = pieces.standardize(x[r])
        slope = gradient[r].astype(jnp.float32)
        by_scale[0] += pieces.total(slope * normal)
        by_offset[0] += pieces.total(slope)
        slope = pieces.standardize_backward(normal, inverse, slope * scale[...])
        by_x[r] = slope.astype(plan.dtype)

    lax.fori_loop(0, plan.band, row, None)
