"""The attention branch of a text block as one TPU kernel: x + proj(causal_attention(norm(x))).

XLA's version writes and reads queries, keys, values and float32 scores, heads of 64 channels and
sequences of 16 tokens padded to 128 lanes each. Here the tokens are read once and written once
forward; backward they and the gradient are read once, the gradient is written once, and everything
between is computed again in fast memory.

A step of the grid takes some tokens, and of these a unit of 128 at a time: several short sequences,
whose scores are one tile of the matrix unit. What must not see each other is masked.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import multihead, pieces, place
from detclipv2_jax.ops.kernels.pieces import dot

UNIT = 128  # tokens whose scores are one tile
_TOKENS = 512  # of a step, at most
_MASKED = -1e9  # finite, as in models/text.py


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch, as the kernel wants them."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]
    qkv: Float[Array, "3 C C"]
    qkv_bias: Float[Array, "3 1 C"]
    proj: Float[Array, "C C"]
    proj_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

    tokens: int
    length: int  # of a sequence
    channels: int
    heads: int
    dtype: Any

    @property
    def cores(self) -> int:
        """Parts that a chip's cores may share."""
        return place.cores(self.tokens // UNIT)

    @property
    def units(self) -> int:
        """Of a step: as many as divide a core's and stay within `_TOKENS`."""
        units = self.tokens // UNIT // self.cores
        return max(n for n in range(1, _TOKENS // UNIT + 1) if units % n == 0)

    @property
    def rows(self) -> int:
        """Of a step."""
        return self.units * UNIT

    @property
    def steps(self) -> int:
        return self.tokens // self.rows // self.cores


def supports(channels: int, heads: int, length: int) -> bool:
    """Can the kernel do it, if there is room?"""
    return UNIT % length == 0 and multihead.supports(channels, heads)


def fast_memory(channels: int) -> int:
    """Bytes that the backward pass of bfloat16 tokens wants of fast memory, about."""
    size = pieces.size
    dense = size(2, 2, 4, channels, channels) + size(4, 4, channels, channels)
    maps = size(2, 6, _TOKENS, channels)  # two that come and one that goes, with two buffers
    return dense + maps + size(2, 9, _TOKENS, channels) + size(4, 4, _TOKENS, channels)


def attention_branch(
    x: Float[Array, "M L C"], weights: Weights, *, heads: int
) -> Float[Array, "M L C"]:
    """x + proj(attention(norm(x))) within each of M sequences, each position of those before it.

    Args:
      x: any M; sequences of zeros fill the last unit.
      weights: float32; their products take x's dtype, their gradients sum in float32.
      heads: how many; the channels are split evenly.
    """
    sequences, length, channels = x.shape
    padded = jnp.pad(x, ((0, -sequences % (UNIT // length)), (0, 0), (0, 0)))
    plan = _Plan(len(padded) * length, length, channels, heads, x.dtype)
    out = _branch(plan, padded.reshape(plan.tokens, channels), None, weights)
    return out.reshape(padded.shape)[:sequences]


def _mask(length: int) -> Float[np.ndarray, "T T"]:
    """What is added to the scores of a unit."""
    sequence, position = np.divmod(np.arange(UNIT), length)
    same = sequence[:, None] == sequence
    return np.where(same & (position[:, None] >= position), 0, _MASKED).astype(np.float32)


def _operands(plan: _Plan, weights: Weights) -> list[Array]:
    """The weights in the dtype they are used in, and the mask."""
    dense = {name: getattr(weights, name).astype(plan.dtype) for name in ("qkv", "proj")}
    weights = dataclasses.replace(weights, **dense)
    return [*jax.tree.leaves(weights), jnp.asarray(_mask(plan.length))]


def _rows(plan: _Plan) -> pl.BlockSpec:
    shape = (plan.rows, plan.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * plan.steps + step, 0))


def _scratch(plan: _Plan, operands: int) -> list[Any]:
    return [pltpu.VMEM((plan.rows, plan.channels), plan.dtype)] * operands


def _cost(plan: _Plan, operands: list[Array], products: int, maps: int) -> pl.CostEstimate:
    """With padded lanes, as the compiler counts."""
    item = jnp.dtype(plan.dtype).itemsize
    dense, scores = plan.channels**2, UNIT * plan.channels
    sums = sum(math.prod(o.shape) * 4 for o in operands[:-1]) if products > 1 else 0
    moved = maps * pieces.size(item, plan.tokens, plan.channels)
    return pl.CostEstimate(
        flops=2 * plan.tokens * (4 * dense + 2 * scores) * products,
        bytes_accessed=moved + sum(o.nbytes for o in operands) + plan.cores * sums,
        transcendentals=plan.tokens * UNIT * plan.heads,
    )


def _call_forward(plan: _Plan, x: Array, _: None, weights: Weights) -> Array:
    operands = _operands(plan, weights)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="causal_attention_forward",
        grid=(plan.cores, plan.steps),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[_rows(plan), *[pieces.whole(operand) for operand in operands]],
        out_specs=_rows(plan),
        scratch_shapes=_scratch(plan, 5),
        cost_estimate=_cost(plan, operands, 1, 2),
        compiler_params=pieces.parameters(2),
    )(x, *operands)


def _call_backward(
    plan: _Plan, x: Array, _: None, weights: Weights, gradient: Array
) -> list[Array]:
    operands = _operands(plan, weights)
    shapes, specs = pieces.sums(plan.cores, weights)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="causal_attention_backward",
        grid=(plan.cores, plan.steps),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        in_specs=[_rows(plan), _rows(plan), *[pieces.whole(operand) for operand in operands]],
        out_specs=[_rows(plan), *specs],
        scratch_shapes=_scratch(plan, 9),
        cost_estimate=_cost(plan, operands, 3, 3),
        compiler_params=pieces.parameters(2),
    )(x, gradient, *operands)


_branch = pieces.branch(_call_forward, _call_backward)


def _forward_kernel(plan: _Plan, x: Any, *refs: Any) -> None:
    scale, offset, qkv, qkv_bias, proj, proj_bias, mask = refs[:7]
    out, tokens, query, key, value, attended = refs[7:]
    normal, _ = pieces.standardize(x[...])
    tokens[...] = (normal * scale[...] + offset[...]).astype(plan.dtype)
    operands = (query, key, value)
    multihead.project(plan.heads, tokens, qkv, qkv_bias, operands)
    scores = lambda _, products: products + mask[...]

    def attend(unit: Any, _: None) -> None:
        multihead.attend(plan.heads, _unit(unit), scores, operands, attended)

    lax.fori_loop(0, plan.units, attend, None)
    branch = dot(attended[...], proj[...]) + proj_bias[...]
    out[...] = (x[...].astype(jnp.float32) + branch).astype(plan.dtype)


def _backward_kernel(plan: _Plan, x: Any, gradient: Any, *refs: Any) -> None:
    scale, offset, qkv, qkv_bias, proj, _, mask = refs[:7]
    out, *sums = refs[7:14]
    by_scale, by_offset, by_qkv, by_qkv_bias, by_proj, by_proj_bias = sums
    tokens, query, key, value, attended, by_attended, *by_parts = refs[14:]

    @pl.when(pl.program_id(1) == 0)
    def _():
        pieces.clear(sums)

    normal, inverse = pieces.standardize(x[...])
    tokens[...] = (normal * scale[...] + offset[...]).astype(plan.dtype)
    operands = (query, key, value)
    multihead.project(plan.heads, tokens, qkv, qkv_bias, operands)
    by_attended[...] = dot(gradient[...], proj[...], right=1).astype(plan.dtype)
    scores = lambda _, products: products + mask[...]

    def attend(unit: Any, _: None) -> None:
        multihead.attend_backward(
            plan.heads, _unit(unit), scores, operands, by_attended, attended, by_parts,
            lambda head, by_score: None,
        )  # fmt: skip

    lax.fori_loop(0, plan.units, attend, None)
    by_proj[0] += dot(attended[...], gradient[...], left=0)
    by_proj_bias[0] += pieces.total(gradient[...])
    by_normal = jnp.zeros(x.shape, jnp.float32)
    for number, part in enumerate(by_parts):
        by_qkv[0, number] += dot(tokens[...], part[...], left=0)
        by_qkv_bias[0, number] += pieces.total(part[...])
        by_normal += dot(part[...], qkv[number], right=1)
    by_scale[0] += pieces.total(by_normal * normal)
    by_offset[0] += pieces.total(by_normal)
    branch = pieces.standardize_backward(normal, inverse, by_normal * scale[...])
    out[...] = (gradient[...].astype(jnp.float32) + branch).astype(plan.dtype)


def _unit(unit: Any) -> Any:
    return pl.ds(pl.multiple_of(unit * UNIT, UNIT), UNIT)
