"""Layer normalization of a map as one TPU kernel.

    y = n · scale + offset   with   n = (x - mean(x)) / sqrt(variance(x) + EPS)

per position, over the channels. Forward reads x and writes y once. Backward reads x and the
gradient and writes the gradient of x once.

A step of the grid takes a band: several whole rows of the map.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import common, place
from detclipv2_jax.ops.kernels.common import Ref

_TOKENS = 2048  # most positions per step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the norm, float32."""

    scale: Float[Array, "1 C"]
    offset: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    rows: int  # of all images
    width: int
    channels: int
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.rows)

    @property
    def band(self) -> int:
        """Rows per step: the most that divide a core's rows and stay within `_TOKENS`."""
        rows, most = self.rows // self.cores, max(_TOKENS // self.width, 1)
        return max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)

    @property
    def steps(self) -> int:
        """Steps per core."""
        return self.rows // self.cores // self.band


def vmem_bytes(shape: tuple[int, ...]) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, channels = shape
    tiling = _Tiling(batch * height, width, channels, jnp.bfloat16)
    maps = common.padded_bytes(2, 6, tiling.band, width, channels)  # three maps, two buffers each
    return maps + common.padded_bytes(4, 4, width, channels)


def layer_norm(x: Float[Array, "B H W C"], weights: Weights) -> Float[Array, "B H W C"]:
    """Normalize each position over its channels, then scale it and add an offset.

    Statistics are float32; the result has x's dtype.
    """
    batch, height, width, channels = x.shape
    tiling = _Tiling(batch * height, width, channels, x.dtype)
    rows = x.reshape(tiling.rows, width, channels)
    return _norm(tiling, rows, None, weights).reshape(x.shape)


def _band(tiling: _Tiling) -> pl.BlockSpec:
    shape = (tiling.band, tiling.width, tiling.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * tiling.steps + step, 0, 0))


def _cost(tiling: _Tiling, maps: int) -> pl.CostEstimate:
    """Cost of reading or writing `maps` maps, in the padded bytes that the compiler counts."""
    item = jnp.dtype(tiling.dtype).itemsize
    return pl.CostEstimate(
        flops=0,
        bytes_accessed=maps * common.padded_bytes(item, tiling.rows, tiling.width, tiling.channels),
        transcendentals=0,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees."""

    x: Ref  # (band, W, C)
    weights: Weights
    out: Ref  # (band, W, C)


def _call_forward(tiling: _Tiling, x: Array, _: None, weights: Weights) -> Array:
    refs = _Forward(
        x=common.Input(x, _band(tiling)),
        weights=common.whole(weights),
        out=common.Output(x.shape, x.dtype, _band(tiling)),
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="layer_norm_forward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, 2),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Normalize one band: y = n · scale + offset."""

    def row(r: Any, _: None) -> None:
        normal, _inverse = common.standardize(refs.x[r])
        out = normal * refs.weights.scale[...] + refs.weights.offset[...]
        refs.out[r] = out.astype(tiling.dtype)

    lax.fori_loop(0, tiling.band, row, None)


class _Backward(NamedTuple):
    """What the backward kernel sees."""

    x: Ref  # (band, W, C)
    grad_out: Ref  # (band, W, C)
    scale: Ref  # (1, C)
    grad_x: Ref  # (band, W, C)
    grad_weights: Weights  # sums


def _call_backward(
    tiling: _Tiling, x: Array, _: None, weights: Weights, grad_out: Array
) -> tuple[Array, Weights]:
    refs = _Backward(
        x=common.Input(x, _band(tiling)),
        grad_out=common.Input(grad_out, _band(tiling)),
        scale=common.whole(weights.scale),
        grad_x=common.Output(x.shape, x.dtype, _band(tiling)),
        grad_weights=common.sums(tiling.cores, weights),
    )
    done = common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="layer_norm_backward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, 3),
    )
    return done.grad_x, done.grad_weights


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one band, with g the gradient of y.

    scale: + Σ g · n;   offset: + Σ g;   x: `standardize_backward` of g · scale.
    """
    grad_weights = refs.grad_weights

    @pl.when(pl.program_id(1) == 0)
    def _():
        common.clear(grad_weights)

    def row(r: Any, _: None) -> None:
        normal, inverse = common.standardize(refs.x[r])
        grad = refs.grad_out[r].astype(jnp.float32)
        grad_weights.scale[0] += common.sum_rows(grad * normal)
        grad_weights.offset[0] += common.sum_rows(grad)
        grad = common.standardize_backward(normal, inverse, grad * refs.scale[...])
        refs.grad_x[r] = grad.astype(tiling.dtype)

    lax.fori_loop(0, tiling.band, row, None)


_norm = common.differentiable(_call_forward, _call_backward)
