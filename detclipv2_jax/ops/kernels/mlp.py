"""The MLP branch of a transformer block as one TPU kernel.

    y = x + factors · fc2(act(fc1(norm(x))))

The map is read once and written once forward. Backward, the map and the gradient are read once and
the gradient of the map is written once; the hidden layer, four times as wide, is computed again in
VMEM.

A step of the grid takes a band: several rows of the map. Their tokens are multiplied a piece at a
time. In VMEM a row starts every `pitch` tokens, so that it starts with a tile; the gap between two
rows holds zeros.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import common, place
from detclipv2_jax.ops.kernels.common import TILE, Ref, dot

_TOKENS = 1024  # most tokens per step
_PIECE = 128  # tokens per matrix product
Activation = Literal["gelu", "quick_gelu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch in the shapes that the kernel needs; F: hidden channels."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]  # of the norm
    fc1: Float[Array, "C F"]
    fc1_bias: Float[Array, "1 F"]
    fc2: Float[Array, "F C"]
    fc2_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    images: int
    rows: int  # per image
    width: int
    channels: int
    dtype: Any
    activation: Activation = "gelu"

    @property
    def cores(self) -> int:
        return place.cores(self.images * self.rows)

    @property
    def band(self) -> int:
        """Rows per step: the most that divide a core's rows and stay within `_TOKENS`."""
        rows = self.images * self.rows // self.cores
        most = max(_TOKENS // self.pitch, 1)
        return max(n for n in range(1, min(most, rows) + 1) if rows % n == 0)

    @property
    def pitch(self) -> int:
        """Tokens from the start of a row to the start of the next."""
        return -(-self.width // TILE) * TILE

    @property
    def steps(self) -> int:
        """Steps per core."""
        return self.images * self.rows // self.cores // self.band

    @property
    def tokens(self) -> int:
        """Tokens per step in VMEM, gaps included, in whole pieces."""
        return -(-self.band * self.pitch // _PIECE) * _PIECE


def vmem_bytes(shape: tuple[int, ...], hidden: int) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, channels = shape
    tiling = _Tiling(batch, height, width, channels, jnp.bfloat16)
    size = common.padded_bytes
    dense = size(2, 2, channels, hidden) + size(4, 2, channels, hidden)  # weights and sums
    maps = size(2, 6, tiling.band, width, channels)  # three maps, two buffers each
    return dense + maps + size(4, 2, tiling.tokens, channels) + size(4, 3, _PIECE, hidden)


def mlp_branch(
    x: Float[Array, "B H W C"],
    factors: Float[Array, " B"],
    weights: Weights,
    activation: Activation = "gelu",
) -> Float[Array, "B H W C"]:
    """Return x + factors · fc2(act(fc1(norm(x)))), position by position.

    Args:
      x: a map of any size.
      factors: drop path factor of each image's branch; it has no gradient.
      weights: float32. Products are computed in x's dtype, gradients are summed in float32.
      activation: "gelu" is the exact GELU, "quick_gelu" the approximation of CLIP.
    """
    batch, height, width, channels = x.shape
    tiling = _Tiling(batch, height, width, channels, x.dtype, activation)
    factors = jnp.repeat(factors.astype(jnp.float32), height, total_repeat_length=batch * height)
    rows = x.reshape(batch * height, width, channels)
    return _branch(tiling, rows, factors, weights).reshape(x.shape)


def _cast(tiling: _Tiling, weights: Weights) -> Weights:
    """Cast the matrices to the dtype in which they are multiplied."""
    matrices = {name: getattr(weights, name).astype(tiling.dtype) for name in ("fc1", "fc2")}
    return dataclasses.replace(weights, **matrices)


def _band(tiling: _Tiling) -> pl.BlockSpec:
    shape = (tiling.band, tiling.width, tiling.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * tiling.steps + step, 0, 0))


def _cost(tiling: _Tiling, weights: Weights, products: int, maps: int) -> pl.CostEstimate:
    """Cost of `products` products of the size of fc1 and of reading or writing `maps` maps."""
    tokens = tiling.images * tiling.rows * tiling.width
    hidden = weights.fc1.shape[1]
    item = jnp.dtype(tiling.dtype).itemsize
    # In padded bytes, as the compiler counts.
    map_bytes = common.padded_bytes(item, tiling.images, tiling.rows, tiling.width, tiling.channels)
    leaves = jax.tree.leaves(weights)
    sums = sum(math.prod(leaf.shape) * 4 for leaf in leaves) if products > 2 else 0
    return pl.CostEstimate(
        flops=2 * tokens * tiling.channels * hidden * products,
        bytes_accessed=maps * map_bytes + sum(leaf.nbytes for leaf in leaves) + tiling.cores * sums,
        transcendentals=tokens * hidden,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees; T: `_Tiling.tokens`."""

    factors: Ref  # (rows of the batch,), scalars
    x: Ref  # (band, W, C)
    weights: Weights
    out: Ref  # (band, W, C)
    tokens: Ref  # (T, C): norm(x)
    branch: Ref  # (T, C), float32: the output of fc2


def _call_forward(tiling: _Tiling, x: Array, factors: Array, weights: Weights) -> Array:
    weights, shape = _cast(tiling, weights), (tiling.tokens, tiling.channels)
    refs = _Forward(
        factors=common.scalars(factors),
        x=common.Input(x, _band(tiling)),
        weights=common.whole(weights),
        out=common.Output(x.shape, x.dtype, _band(tiling)),
        tokens=pltpu.VMEM(shape, tiling.dtype),
        branch=pltpu.VMEM(shape, jnp.float32),
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="mlp_forward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 2, 2),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute y = x + factors · fc2(act(fc1(norm(x)))) of one band."""
    act, weights = _ACTIVATIONS[tiling.activation], refs.weights
    _write_normalized(tiling, refs.x, weights, refs.tokens)

    def piece(number: Any, _: None) -> None:
        here = _piece(number)
        hidden = act(dot(refs.tokens[here], weights.fc1[...]) + weights.fc1_bias[...])[0]
        refs.branch[here] = (
            dot(hidden.astype(tiling.dtype), weights.fc2[...]) + weights.fc2_bias[...]
        )

    lax.fori_loop(0, tiling.tokens // _PIECE, piece, None)
    for r in range(tiling.band):
        branch = refs.branch[_row(tiling, r)] * refs.factors[_row_of_batch(tiling, r)]
        refs.out[r] = (refs.x[r].astype(jnp.float32) + branch).astype(tiling.dtype)


class _Backward(NamedTuple):
    """What the backward kernel sees; T: `_Tiling.tokens`."""

    factors: Ref  # (rows of the batch,), scalars
    x: Ref  # (band, W, C)
    grad_out: Ref  # (band, W, C)
    weights: Weights
    grad_x: Ref  # (band, W, C)
    grad_weights: Weights  # sums
    tokens: Ref  # (T, C): norm(x)
    grad_branch: Ref  # (T, C): factors · grad_out
    grad_tokens: Ref  # (T, C), float32


def _call_backward(
    tiling: _Tiling, x: Array, factors: Array, weights: Weights, grad_out: Array
) -> tuple[Array, Weights]:
    weights, shape = _cast(tiling, weights), (tiling.tokens, tiling.channels)
    refs = _Backward(
        factors=common.scalars(factors),
        x=common.Input(x, _band(tiling)),
        grad_out=common.Input(grad_out, _band(tiling)),
        weights=common.whole(weights),
        grad_x=common.Output(x.shape, x.dtype, _band(tiling)),
        grad_weights=common.sums(tiling.cores, weights),
        tokens=pltpu.VMEM(shape, tiling.dtype),
        grad_branch=pltpu.VMEM(shape, tiling.dtype),
        grad_tokens=pltpu.VMEM(shape, jnp.float32),
    )
    done = common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="mlp_backward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 5, 3),
    )
    return done.grad_x, done.grad_weights


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one band.

    With t = norm(x), h = act(a), a = t · fc1 + fc1_bias, and g = factors · grad_out:

      grad a  = (g · fc2ᵀ) ⊙ act'(a)       grad t = grad a · fc1ᵀ
      fc1: + tᵀ · grad a                   fc1_bias: + Σ grad a
      fc2: + hᵀ · g                        fc2_bias: + Σ g

    `_add_norm_gradients` then goes from t to x. Each product's operands have x's dtype.
    """
    act, weights, grad_weights = _ACTIVATIONS[tiling.activation], refs.weights, refs.grad_weights

    @pl.when(pl.program_id(1) == 0)
    def _():
        common.clear(grad_weights)

    _write_normalized(tiling, refs.x, weights, refs.tokens)
    _clear_gaps(tiling, refs.grad_branch)
    for r in range(tiling.band):
        row = refs.grad_out[r].astype(jnp.float32) * refs.factors[_row_of_batch(tiling, r)]
        refs.grad_branch[_row(tiling, r)] = row.astype(tiling.dtype)

    def piece(number: Any, _: None) -> None:
        here = _piece(number)
        tokens, grad = refs.tokens[here], refs.grad_branch[here]
        hidden, derivative = act(dot(tokens, weights.fc1[...]) + weights.fc1_bias[...])
        grad_hidden = dot(grad, weights.fc2[...], right=1) * derivative
        grad_weights.fc1_bias[0] += common.sum_rows(grad_hidden)
        grad_weights.fc2_bias[0] += common.sum_rows(grad)
        grad_hidden = grad_hidden.astype(tiling.dtype)
        grad_weights.fc1[0] += dot(tokens, grad_hidden, left=0)
        grad_weights.fc2[0] += dot(hidden.astype(tiling.dtype), grad, left=0)
        refs.grad_tokens[here] = dot(grad_hidden, weights.fc1[...], right=1)

    lax.fori_loop(0, tiling.tokens // _PIECE, piece, None)
    _add_norm_gradients(tiling, refs)


def _add_norm_gradients(tiling: _Tiling, refs: _Backward) -> None:
    """Turn the gradient of norm(x) into those of x and of the norm's scale and offset.

    x: grad_out + `standardize_backward` of grad t · scale.
    """
    grad_weights = refs.grad_weights
    for r in range(tiling.band):
        grad = refs.grad_tokens[_row(tiling, r)]
        normal, inverse = common.standardize(refs.x[r])
        grad_weights.scale[0] += common.sum_rows(grad * normal)
        grad_weights.offset[0] += common.sum_rows(grad)
        branch = common.standardize_backward(normal, inverse, grad * refs.weights.scale[...])
        refs.grad_x[r] = (refs.grad_out[r].astype(jnp.float32) + branch).astype(tiling.dtype)


_branch = common.differentiable(_call_forward, _call_backward)


def _row_of_batch(tiling: _Tiling, r: int) -> Any:
    """Index of the band's r-th row among all rows of the batch."""
    return (pl.program_id(0) * tiling.steps + pl.program_id(1)) * tiling.band + r


def _row(tiling: _Tiling, r: int) -> slice:
    """Tokens of the band's r-th row."""
    return slice(r * tiling.pitch, r * tiling.pitch + tiling.width)


def _piece(number: Any) -> Any:
    """Tokens of a piece."""
    return pl.ds(pl.multiple_of(number * _PIECE, _PIECE), _PIECE)


def _write_normalized(tiling: _Tiling, x: Ref, weights: Weights, tokens: Ref) -> None:
    """Write norm(x) of the band into `tokens`."""
    _clear_gaps(tiling, tokens)
    for r in range(tiling.band):
        normal, _ = common.standardize(x[r])
        normal = normal * weights.scale[...] + weights.offset[...]
        tokens[_row(tiling, r)] = normal.astype(tiling.dtype)


def _clear_gaps(tiling: _Tiling, tokens: Ref) -> None:
    """Set the gaps between rows to zeros: they take part in the sums over tokens."""
    if tiling.tokens > tiling.band * tiling.width:
        tokens[...] = jnp.zeros_like(tokens)


def _gelu(x: Array) -> tuple[Array, Array]:
    """Return the exact GELU x Φ(x) and its derivative Φ(x) + x φ(x) (Hendrycks & Gimpel 2016)."""
    below = 0.5 * (1.0 + lax.erf(x * 0.5**0.5))
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * jnp.pi) ** -0.5
    return x * below, below + x * density


def _quick_gelu(x: Array) -> tuple[Array, Array]:
    """Return x σ(1.702 x) and its derivative σ + 1.702 x σ (1 - σ) (CLIP's approximation)."""
    share = 1.0 / (1.0 + jnp.exp(-1.702 * x))
    return x * share, share + 1.702 * x * share * (1.0 - share)


# Functions that return the value and the derivative, in float32.
_ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}
