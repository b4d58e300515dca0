"""The MLP branch of a transformer's block as one TPU kernel: x + factors · fc2(act(fc1(norm(x)))).

The map is read once and written once forward; backward it and the gradient are read once, the
gradient is written once, and the hidden layer, four times as wide, is computed again in fast
memory.

A step of the grid takes some rows of the map, and of these a piece at a time.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import pieces, place
from detclipv2_jax.ops.kernels.pieces import TILE, dot

_TOKENS = 1024  # of a step, at most
_PIECE = 128  # of these at a time
Activation = Literal["gelu", "quick_gelu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch, as the kernel wants them."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]
    fc1: Float[Array, "C F"]
    fc1_bias: Float[Array, "1 F"]
    fc2: Float[Array, "F C"]
    fc2_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    images: int
    rows: int  # of a map
    width: int
    channels: int
    dtype: Any
    activation: Activation = "gelu"

    @property
    def cores(self) -> int:
        return place.cores(self.images * self.rows)

    @property
    def band(self) -> int:
        """Rows of a step: as many as divide a core's and stay within `_TOKENS`."""
        rows = self.images * self.rows // self.cores
        most = max(_TOKENS // self.pitch, 1)
        return max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)

    @property
    def pitch(self) -> int:
        """From row to row, in tokens."""
        return -(-self.width // TILE) * TILE

    @property
    def steps(self) -> int:
        return self.images * self.rows // self.cores // self.band

    @property
    def tokens(self) -> int:
        return -(-self.band * self.pitch // _PIECE) * _PIECE


def fast_memory(shape: tuple[int, ...], hidden: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan = _Plan(batch, height, width, channels, jnp.bfloat16)
    size = pieces.size
    dense = size(2, 2, channels, hidden) + size(4, 2, channels, hidden)  # weights and sums
    maps = size(2, 6, plan.band, width, channels)  # three, with two buffers
    return dense + maps + size(4, 2, plan.tokens, channels) + size(4, 3, _PIECE, hidden)


def mlp_branch(
    x: Float[Array, "B H W C"],
    factors: Float[Array, " B"],
    weights: Weights,
    activation: Activation = "gelu",
) -> Float[Array, "B H W C"]:
    """x + factors · fc2(act(fc1(norm(x)))), position by position.

    Args:
      x: any size.
      factors: factor of each image's branch; has no gradient.
      weights: float32; their products take x's dtype, their gradients sum in float32.
      activation: the exact GELU or the approximation that CLIP has.
    """
    batch, height, width, channels = x.shape
    plan = _Plan(batch, height, width, channels, x.dtype, activation)
    factors = jnp.repeat(factors.astype(jnp.float32), height, total_repeat_length=batch * height)
    rows = x.reshape(batch * height, width, channels)
    return _branch(plan, rows, factors, weights).reshape(x.shape)


def _operands(plan: _Plan, weights: Weights) -> list[Array]:
    dense = {name: getattr(weights, name).astype(plan.dtype) for name in ("fc1", "fc2")}
    return jax.tree.leaves(dataclasses.replace(weights, **dense))


def _band(plan: _Plan) -> pl.BlockSpec:
    shape = (plan.band, plan.width, plan.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * plan.steps + step, 0, 0))


def _cost(plan: _Plan, operands: list[Array], products: int, maps: int) -> pl.CostEstimate:
    """What the compiler cannot see."""
    tokens = plan.images * plan.rows * plan.width
    hidden = operands[2].shape[1]
    item = jnp.dtype(plan.dtype).itemsize  # with padded lanes, as the compiler counts
    map_bytes = pieces.size(item, plan.images, plan.rows, plan.width, plan.channels)
    sums = sum(math.prod(o.shape) * 4 for o in operands) if products > 2 else 0
    return pl.CostEstimate(
        flops=2 * tokens * plan.channels * hidden * products,
        bytes_accessed=maps * map_bytes + sum(o.nbytes for o in operands) + plan.cores * sums,
        transcendentals=tokens * hidden,
    )


def _call_forward(plan: _Plan, x: Array, factors: Array, weights: Weights) -> Array:
    operands, shape = _operands(plan, weights), (plan.tokens, plan.channels)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="mlp_forward",
        grid=(plan.cores, plan.steps),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            _band(plan),
            *[pieces.whole(operand) for operand in operands],
        ],
        out_specs=_band(plan),
        scratch_shapes=[pltpu.VMEM(shape, plan.dtype), pltpu.VMEM(shape, jnp.float32)],
        cost_estimate=_cost(plan, operands, 2, 2),
        compiler_params=pieces.parameters(2),
    )(factors, x, *operands)


def _call_backward(
    plan: _Plan, x: Array, factors: Array, weights: Weights, gradient: Array
) -> list[Array]:
    operands, shape = _operands(plan, weights), (plan.tokens, plan.channels)
    shapes, specs = pieces.sums(plan.cores, weights)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="mlp_backward",
        grid=(plan.cores, plan.steps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            _band(plan),
            _band(plan),
            *[pieces.whole(operand) for operand in operands],
        ],
        out_specs=[_band(plan), *specs],
        scratch_shapes=[*[pltpu.VMEM(shape, plan.dtype)] * 2, pltpu.VMEM(shape, jnp.float32)],
        cost_estimate=_cost(plan, operands, 5, 3),
        compiler_params=pieces.parameters(2),
    )(factors, x, gradient, *operands)


_branch = pieces.branch(_call_forward, _call_backward)


def _forward_kernel(plan: _Plan, factors: Any, x: Any, *refs: Any) -> None:
    scale, offset, fc1, fc1_bias, fc2, fc2_bias, out, tokens, result = refs
    act = _ACTIVATIONS[plan.activation]
    _lay_normal(plan, x, scale, offset, tokens)

    def piece(number: Any, _: None) -> None:
        here = _piece(number)
        hidden = act(dot(tokens[here], fc1[...]) + fc1_bias[...])[0].astype(plan.dtype)
        result[here] = dot(hidden, fc2[...]) + fc2_bias[...]

    lax.fori_loop(0, plan.tokens // _PIECE, piece, None)
    for r in range(plan.band):
        branch = result[_row(plan, r)] * factors[_number(plan, r)]
        out[r] = (x[r].astype(jnp.float32) + branch).astype(plan.dtype)


def _backward_kernel(plan: _Plan, factors: Any, x: Any, gradient: Any, *refs: Any) -> None:
    scale, offset, fc1, fc1_bias, fc2, _ = refs[:6]
    out, *sums = refs[6:13]
    by_scale, by_offset, by_fc1, by_fc1_bias, by_fc2, by_fc2_bias = sums
    tokens, slope, result = refs[13:]
    act = _ACTIVATIONS[plan.activation]

    @pl.when(pl.program_id(1) == 0)
    def _():
        pieces.clear(sums)

    _lay_normal(plan, x, scale, offset, tokens)
    _clear_gaps(plan, slope)
    for r in range(plan.band):
        row = gradient[r].astype(jnp.float32) * factors[_number(plan, r)]
        slope[_row(plan, r)] = row.astype(plan.dtype)

    def piece(number: Any, _: None) -> None:
        here = _piece(number)
        value, by_value = tokens[here], slope[here]
        hidden, derivative = act(dot(value, fc1[...]) + fc1_bias[...])
        by_hidden = dot(by_value, fc2[...], right=1) * derivative
        by_fc1_bias[0] += pieces.total(by_hidden)
        by_fc2_bias[0] += pieces.total(by_value)
        by_hidden = by_hidden.astype(plan.dtype)
        by_fc1[0] += dot(value, by_hidden, left=0)
        by_fc2[0] += dot(hidden.astype(plan.dtype), by_value, left=0)
        result[here] = dot(by_hidden, fc1[...], right=1)

    lax.fori_loop(0, plan.tokens // _PIECE, piece, None)
    for r in range(plan.band):
        by_normal = result[_row(plan, r)]
        normal, inverse = pieces.standardize(x[r])
        by_scale[0] += pieces.total(by_normal * normal)
        by_offset[0] += pieces.total(by_normal)
        branch = pieces.standardize_backward(normal, inverse, by_normal * scale[...])
        out[r] = (gradient[r].astype(jnp.float32) + branch).astype(plan.dtype)


def _number(plan: _Plan, r: int) -> Any:
    """Of a row among all of the batch."""
    return (pl.program_id(0) * plan.steps + pl.program_id(1)) * plan.band + r


def _row(plan: _Plan, r: int) -> slice:
    return slice(r * plan.pitch, r * plan.pitch + plan.width)


def _piece(number: Any) -> Any:
    return pl.ds(pl.multiple_of(number * _PIECE, _PIECE), _PIECE)


def _lay_normal(plan: _Plan, x: Any, scale: Any, offset: Any, tokens: Any) -> None:
    _clear_gaps(plan, tokens)
    for r in range(plan.band):
        normal, _ = pieces.standardize(x[r])
        tokens[_row(plan, r)] = (normal * scale[...] + offset[...]).astype(plan.dtype)


def _clear_gaps(plan: _Plan, tokens: Any) -> None:
    """What lies between the rows takes part in sums over tokens."""
    if plan.tokens > plan.band * plan.width:
        tokens[...] = jnp.zeros_like(tokens)


def _gelu(x: Array) -> tuple[Array, Array]:
    """The exact GELU (Hendrycks & Gimpel 2016), x Φ(x), and its derivative Φ(x) + x φ(x)."""
    below = 0.5 * (1.0 + lax.erf(x * 0.5**0.5))
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return x * below, below + x * density


def _quick_gelu(x: Array) -> tuple[Array, Array]:
    """x σ(1.702 x), and its derivative σ + 1.702 x σ (1 - σ)."""
    share = 1.0 / (1.0 + jnp.exp(-1.702 * x))
    return x * share, share + 1.702 * x * share * (1.0 - share)


# The value and the derivative, in float32.
_ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}
