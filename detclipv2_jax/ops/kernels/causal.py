"""The attention branch of a text block as one TPU kernel.

    y = x + proj(causal_attention(norm(x)))

XLA's version writes and reads queries, keys, values and float32 scores; heads of 64 channels and
sequences of 16 tokens are padded to 128 lanes each. Here the tokens are read once and written once
forward. Backward, they and the gradient are read once and the gradient of the tokens is written
once; everything in between is computed again in VMEM.

A step of the grid takes several units of 128 tokens. A unit is several short sequences, whose
scores fill one tile of the matrix unit; a mask separates the sequences.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import common, multihead, place
from detclipv2_jax.ops.kernels.common import Ref, dot

UNIT = 128  # tokens whose scores fill one tile
_TOKENS = 512  # most tokens per step
_MASKED = -1e9  # finite, as in models/text.py


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch in the shapes that the kernel needs."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]  # of the norm
    qkv: Float[Array, "3 C C"]
    qkv_bias: Float[Array, "3 1 C"]
    proj: Float[Array, "C C"]
    proj_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    tokens: int  # of all sequences, in whole units
    length: int  # of a sequence
    channels: int
    heads: int
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.tokens // UNIT)

    @property
    def units(self) -> int:
        """Units per step: the most that divide a core's units and stay within `_TOKENS`."""
        units = self.tokens // UNIT // self.cores
        return max(n for n in range(1, _TOKENS // UNIT + 1) if units % n == 0)

    @property
    def rows(self) -> int:
        """Tokens per step."""
        return self.units * UNIT

    @property
    def steps(self) -> int:
        """Steps per core."""
        return self.tokens // self.rows // self.cores


def supports(channels: int, heads: int, length: int) -> bool:
    """Whether the kernel can handle these sizes, if VMEM is large enough."""
    return UNIT % length == 0 and multihead.supports(channels, heads)


def vmem_bytes(channels: int) -> int:
    """Return about how many bytes of VMEM the backward pass of bfloat16 tokens needs."""
    size = common.padded_bytes
    dense = size(2, 2, 4, channels, channels) + size(4, 4, channels, channels)
    maps = size(2, 6, _TOKENS, channels)  # x, its gradient, the output's; two buffers each
    return dense + maps + size(2, 9, _TOKENS, channels) + size(4, 4, _TOKENS, channels)


def attention_branch(
    x: Float[Array, "M L C"], weights: Weights, *, heads: int
) -> Float[Array, "M L C"]:
    """Return x + proj(attention(norm(x))), causal within each of M sequences.

    Args:
      x: any number of sequences; sequences of zeros fill the last unit.
      weights: float32. Products are computed in x's dtype, gradients are summed in float32.
      heads: number of heads; the channels are split evenly.
    """
    sequences, length, channels = x.shape
    padded = jnp.pad(x, ((0, -sequences % (UNIT // length)), (0, 0), (0, 0)))
    tiling = _Tiling(len(padded) * length, length, channels, heads, x.dtype)
    out = _branch(tiling, padded.reshape(tiling.tokens, channels), None, weights)
    return out.reshape(padded.shape)[:sequences]


def _mask(length: int) -> Float[np.ndarray, "T T"]:
    """Return what is added to the scores of a unit: 0 where query may see key, else `_MASKED`."""
    sequence, position = np.divmod(np.arange(UNIT), length)
    same = sequence[:, None] == sequence
    return np.where(same & (position[:, None] >= position), 0, _MASKED).astype(np.float32)


def _cast(tiling: _Tiling, weights: Weights) -> Weights:
    """Cast the matrices to the dtype in which they are multiplied."""
    matrices = {name: getattr(weights, name).astype(tiling.dtype) for name in ("qkv", "proj")}
    return dataclasses.replace(weights, **matrices)


def _rows(tiling: _Tiling) -> pl.BlockSpec:
    shape = (tiling.rows, tiling.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * tiling.steps + step, 0))


def _cost(tiling: _Tiling, weights: Weights, products: int, maps: int) -> pl.CostEstimate:
    """Cost of `products` times the forward products, and of reading or writing `maps` maps."""
    item = jnp.dtype(tiling.dtype).itemsize
    dense, scores = tiling.channels**2, UNIT * tiling.channels
    leaves = jax.tree.leaves(weights)
    sums = sum(math.prod(leaf.shape) * 4 for leaf in leaves) if products > 1 else 0
    # In padded bytes, as the compiler counts.
    moved = maps * common.padded_bytes(item, tiling.tokens, tiling.channels)
    mask = 4 * UNIT * UNIT
    return pl.CostEstimate(
        flops=2 * tiling.tokens * (4 * dense + 2 * scores) * products,
        bytes_accessed=moved + sum(leaf.nbytes for leaf in leaves) + mask + tiling.cores * sums,
        transcendentals=tiling.tokens * UNIT * tiling.heads,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees; R: `_Tiling.rows`."""

    x: Ref  # (R, C)
    weights: Weights
    mask: Ref  # (UNIT, UNIT): added to the scores
    out: Ref  # (R, C)
    tokens: Ref  # (R, C): norm(x)
    qkv: multihead.QKV  # of (R, C)
    attended: Ref  # (R, C)


def _call_forward(tiling: _Tiling, x: Array, _: None, weights: Weights) -> Array:
    weights = _cast(tiling, weights)
    rows = pltpu.VMEM((tiling.rows, tiling.channels), tiling.dtype)
    refs = _Forward(
        x=common.Input(x, _rows(tiling)),
        weights=common.whole(weights),
        mask=common.whole(jnp.asarray(_mask(tiling.length))),
        out=common.Output(x.shape, x.dtype, _rows(tiling)),
        tokens=rows,
        qkv=multihead.QKV(rows, rows, rows),
        attended=rows,
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="causal_attention_forward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 1, 2),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute y = x + proj(softmax(q · kᵀ + mask) · v) with q, k, v = qkv(norm(x))."""
    weights = refs.weights
    normal, _ = common.standardize(refs.x[...])
    tokens = normal * weights.scale[...] + weights.offset[...]
    refs.tokens[...] = tokens.astype(tiling.dtype)
    multihead.project(tiling.heads, refs.tokens, weights.qkv, weights.qkv_bias, refs.qkv)
    scores = lambda _, products: products + refs.mask[...]

    def attend(unit: Any, _: None) -> None:
        multihead.attend(tiling.heads, _unit(unit), scores, refs.qkv, refs.attended)

    lax.fori_loop(0, tiling.units, attend, None)
    branch = dot(refs.attended[...], weights.proj[...]) + weights.proj_bias[...]
    refs.out[...] = (refs.x[...].astype(jnp.float32) + branch).astype(tiling.dtype)


class _Backward(NamedTuple):
    """What the backward kernel sees; R: `_Tiling.rows`."""

    x: Ref  # (R, C)
    grad_out: Ref  # (R, C)
    weights: Weights
    mask: Ref  # (UNIT, UNIT): added to the scores
    grad_x: Ref  # (R, C)
    grad_weights: Weights  # sums
    tokens: Ref  # (R, C): norm(x)
    qkv: multihead.QKV  # of (R, C)
    attended: Ref  # (R, C)
    grad_attended: Ref  # (R, C)
    grad_qkv: multihead.QKV  # of (R, C)


def _call_backward(
    tiling: _Tiling, x: Array, _: None, weights: Weights, grad_out: Array
) -> tuple[Array, Weights]:
    weights = _cast(tiling, weights)
    rows = pltpu.VMEM((tiling.rows, tiling.channels), tiling.dtype)
    refs = _Backward(
        x=common.Input(x, _rows(tiling)),
        grad_out=common.Input(grad_out, _rows(tiling)),
        weights=common.whole(weights),
        mask=common.whole(jnp.asarray(_mask(tiling.length))),
        grad_x=common.Output(x.shape, x.dtype, _rows(tiling)),
        grad_weights=common.sums(tiling.cores, weights),
        tokens=rows,
        qkv=multihead.QKV(rows, rows, rows),
        attended=rows,
        grad_attended=rows,
        grad_qkv=multihead.QKV(rows, rows, rows),
    )
    done = common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="causal_attention_backward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 3, 3),
    )
    return done.grad_x, done.grad_weights


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one step's tokens.

    With t = norm(x), A the attended values, and g = grad_out:

      grad A = g · projᵀ                 grad q, k, v: `multihead.attend_backward`
      proj: + Aᵀ · g                     proj_bias: + Σ g
      qkv:  + tᵀ · grad q, k, v          qkv_bias:  + Σ grad q, k, v
      grad t = Σ over q, k, v of grad · qkvᵀ
      x: g + `standardize_backward` of grad t · scale
    """
    weights, grad_weights = refs.weights, refs.grad_weights

    @pl.when(pl.program_id(1) == 0)
    def _():
        common.clear(grad_weights)

    normal, inverse = common.standardize(refs.x[...])
    tokens = normal * weights.scale[...] + weights.offset[...]
    refs.tokens[...] = tokens.astype(tiling.dtype)
    multihead.project(tiling.heads, refs.tokens, weights.qkv, weights.qkv_bias, refs.qkv)
    grad_attended = dot(refs.grad_out[...], weights.proj[...], right=1)
    refs.grad_attended[...] = grad_attended.astype(tiling.dtype)
    scores = lambda _, products: products + refs.mask[...]

    def attend(unit: Any, _: None) -> None:
        multihead.attend_backward(
            tiling.heads, _unit(unit), scores, refs.qkv, refs.grad_attended,
            refs.attended, refs.grad_qkv,
        )  # fmt: skip

    lax.fori_loop(0, tiling.units, attend, None)
    grad_weights.proj[0] += dot(refs.attended[...], refs.grad_out[...], left=0)
    grad_weights.proj_bias[0] += common.sum_rows(refs.grad_out[...])
    grad_tokens = jnp.zeros(refs.x.shape, jnp.float32)
    for number, grad in enumerate(refs.grad_qkv):
        grad_weights.qkv[0, number] += dot(refs.tokens[...], grad[...], left=0)
        grad_weights.qkv_bias[0, number] += common.sum_rows(grad[...])
        grad_tokens += dot(grad[...], weights.qkv[number], right=1)
    grad_weights.scale[0] += common.sum_rows(grad_tokens * normal)
    grad_weights.offset[0] += common.sum_rows(grad_tokens)
    branch = common.standardize_backward(normal, inverse, grad_tokens * weights.scale[...])
    refs.grad_x[...] = (refs.grad_out[...].astype(jnp.float32) + branch).astype(tiling.dtype)


_branch = common.differentiable(_call_forward, _call_backward)


def _unit(unit: Any) -> Any:
    """Tokens of a unit."""
    return pl.ds(pl.multiple_of(unit * UNIT, UNIT), UNIT)
