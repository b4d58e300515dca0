"""Patch merging of Swin as one TPU kernel: 2×2 neighbors concatenated, normalized and projected.

    y = norm([x00, x10, x01, x11]) · reduction

XLA moves the map a dozen times for it, mostly to bring the neighbors side by side. Here a step of
the grid takes several pairs of rows, reads every other pixel of them from VMEM, and never brings
anything side by side: the norm's sums run over the four neighbors, the projection is the sum of
four products. Forward, the map is read once and the smaller map is written once. Backward, the map
and the gradient are read and the gradient of the map is written.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import common, place
from detclipv2_jax.ops.kernels.common import EPS, LANES, TILE, Ref, dot

_TOKENS = 1024  # most pixels of the smaller map per step
# (row, column) of a patch's pixels in the order of the official weights: column by column.
_PIXELS = ((0, 0), (1, 0), (0, 1), (1, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the merging in the shapes that the kernel needs; the first axis: `_PIXELS`."""

    scale: Float[Array, "4 1 C"]  # of the norm
    offset: Float[Array, "4 1 C"]  # of the norm
    reduction: Float[Array, "4 C D"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    pairs: int  # of rows, of all images
    width: int  # of the smaller map
    channels: int
    outputs: int  # channels of the smaller map
    dtype: Any

    @property
    def cores(self) -> int:
        return place.cores(self.pairs)

    @property
    def pitch(self) -> int:
        """Tokens from the start of a row of the smaller map to the start of the next."""
        return -(-self.width // TILE) * TILE

    @property
    def band(self) -> int:
        """Pairs of rows per step: the most that divide a core's and stay within `_TOKENS`."""
        pairs = self.pairs // self.cores
        most = max(_TOKENS // self.pitch, 1)
        return max(n for n in range(1, min(most, pairs) + 1) if pairs % n == 0)

    @property
    def steps(self) -> int:
        """Steps per core."""
        return self.pairs // self.cores // self.band

    @property
    def tokens(self) -> int:
        """Tokens per step in VMEM, gaps between rows included."""
        return self.band * self.pitch


def vmem_bytes(shape: tuple[int, ...], outputs: int) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, channels = shape
    tiling = _Tiling(batch * height // 2, width // 2, channels, outputs, jnp.bfloat16)
    size = common.padded_bytes
    dense = size(2, 2, 4, channels, outputs) + size(4, 4, channels, outputs)
    maps = size(2, 4, 2 * tiling.band, width, channels)
    maps += size(2, 2, tiling.band, width // 2, outputs)
    tokens = size(6, 4, tiling.tokens, channels) + size(6, tiling.tokens, outputs)
    return dense + maps + tokens + size(4, 2, width, channels)


def patch_merging(x: Float[Array, "B H W C"], weights: Weights) -> Float[Array, "B H2 W2 D"]:
    """Normalize and project each 2×2 patch; H2 = H / 2, W2 = W / 2.

    Args:
      x: a map whose sides are even.
      weights: float32. Products are computed in x's dtype, gradients are summed in float32.
    """
    batch, height, width, channels = x.shape
    outputs = weights.reduction.shape[-1]
    tiling = _Tiling(batch * height // 2, width // 2, channels, outputs, x.dtype)
    rows = x.reshape(tiling.pairs, 2, width, channels)
    return _merge(tiling, rows, None, weights).reshape(batch, height // 2, width // 2, outputs)


def _cast(tiling: _Tiling, weights: Weights) -> Weights:
    """Cast the matrices to the dtype in which they are multiplied."""
    return dataclasses.replace(weights, reduction=weights.reduction.astype(tiling.dtype))


def _map_block(tiling: _Tiling) -> pl.BlockSpec:
    """A band of the map."""
    shape = (tiling.band, 2, 2 * tiling.width, tiling.channels)
    return pl.BlockSpec(shape, lambda core, step: (core * tiling.steps + step, 0, 0, 0))


def _smaller_block(tiling: _Tiling) -> pl.BlockSpec:
    """A band of the smaller map."""
    shape = (tiling.band, tiling.width, tiling.outputs)
    return pl.BlockSpec(shape, lambda core, step: (core * tiling.steps + step, 0, 0))


def _cost(tiling: _Tiling, weights: Weights, products: int, maps: int) -> pl.CostEstimate:
    """Cost of `products` times the forward products, and of reading or writing `maps` maps."""
    item = jnp.dtype(tiling.dtype).itemsize
    # In padded bytes, as the compiler counts.
    moved = maps * common.padded_bytes(item, tiling.pairs, 2, 2 * tiling.width, tiling.channels)
    moved += common.padded_bytes(item, tiling.pairs, tiling.width, tiling.outputs)
    leaves = jax.tree.leaves(weights)
    sums = sum(math.prod(leaf.shape) * 4 for leaf in leaves) if products > 1 else 0
    return pl.CostEstimate(
        flops=8 * products * tiling.pairs * tiling.width * tiling.channels * tiling.outputs,
        bytes_accessed=moved + sum(leaf.nbytes for leaf in leaves) + tiling.cores * sums,
        transcendentals=0,
    )


class _Forward(NamedTuple):
    """What the forward kernel sees; W: width of the smaller map, T: `_Tiling.tokens`."""

    x: Ref  # (band, 2, 2W, C)
    weights: Weights
    out: Ref  # (band, W, D)
    tokens: Ref  # (4, T, C): the normalized pixels of each patch
    result: Ref  # (T, D), float32
    pair: Ref  # see `_pair`


def _call_forward(tiling: _Tiling, x: Array, _: None, weights: Weights) -> Array:
    weights = _cast(tiling, weights)
    shape = (tiling.pairs, tiling.width, tiling.outputs)
    refs = _Forward(
        x=common.Input(x, _map_block(tiling)),
        weights=common.whole(weights),
        out=common.Output(shape, tiling.dtype, _smaller_block(tiling)),
        tokens=pltpu.VMEM((4, tiling.tokens, tiling.channels), tiling.dtype),
        result=pltpu.VMEM((tiling.tokens, tiling.outputs), jnp.float32),
        pair=_pair(tiling),
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="patch_merging_forward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 1, 1),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute one band of y = Σ over the four pixels of norm(pixels)[n] · reduction[n]."""
    reduction = refs.weights.reduction
    _write_normalized(tiling, refs)
    refs.result[...] = dot(refs.tokens[0], reduction[0])
    for n in range(1, 4):
        refs.result[...] += dot(refs.tokens[n], reduction[n])

    def write(r: Any, _: None) -> None:
        refs.out[r] = refs.result[_row(tiling, r)].astype(tiling.dtype)

    lax.fori_loop(0, tiling.band, write, None)


class _Backward(NamedTuple):
    """What the backward kernel sees; W: width of the smaller map, T: `_Tiling.tokens`."""

    x: Ref  # (band, 2, 2W, C)
    grad_out: Ref  # (band, W, D)
    weights: Weights
    grad_x: Ref  # (band, 2, 2W, C)
    grad_weights: Weights  # sums
    tokens: Ref  # (4, T, C): the normalized pixels of each patch
    grad_result: Ref  # (T, D): grad_out, zeros in the gaps between rows
    grad_tokens: Ref  # (4, T, C), float32
    pair: Ref  # see `_pair`


def _call_backward(
    tiling: _Tiling, x: Array, _: None, weights: Weights, grad_out: Array
) -> tuple[Array, Weights]:
    weights = _cast(tiling, weights)
    refs = _Backward(
        x=common.Input(x, _map_block(tiling)),
        grad_out=common.Input(grad_out, _smaller_block(tiling)),
        weights=common.whole(weights),
        grad_x=common.Output(x.shape, x.dtype, _map_block(tiling)),
        grad_weights=common.sums(tiling.cores, weights),
        tokens=pltpu.VMEM((4, tiling.tokens, tiling.channels), tiling.dtype),
        grad_result=pltpu.VMEM((tiling.tokens, tiling.outputs), tiling.dtype),
        grad_tokens=pltpu.VMEM((4, tiling.tokens, tiling.channels), jnp.float32),
        pair=_pair(tiling),
    )
    done = common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="patch_merging_backward",
        grid=(tiling.cores, tiling.steps),
        cost=_cost(tiling, weights, 2, 2),
    )
    return done.grad_x, done.grad_weights


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one band, with t[n] the n-th normalized pixels and g = grad_out.

    reduction[n]: + t[n]ᵀ · g          grad t[n] = g · reduction[n]ᵀ
    scale, offset, x: `_write_grad_x` of each pair of rows
    """
    grad_weights = refs.grad_weights

    @pl.when(pl.program_id(1) == 0)
    def _():
        common.clear(grad_weights)

    _write_normalized(tiling, refs)
    common.clear(refs.grad_result)

    def read(r: Any, _: None) -> None:
        refs.grad_result[_row(tiling, r)] = refs.grad_out[r]

    lax.fori_loop(0, tiling.band, read, None)
    for n in range(4):
        grad_weights.reduction[0, n] += dot(refs.tokens[n], refs.grad_result[...], left=0)
        refs.grad_tokens[n] = dot(refs.grad_result[...], refs.weights.reduction[n], right=1)

    lax.fori_loop(0, tiling.band, lambda r, _: _write_grad_x(tiling, r, refs), None)


def _write_grad_x(tiling: _Tiling, r: Any, refs: _Backward) -> None:
    """Turn the gradients of the normalized pixels into those of x and the norm's parameters.

    For the r-th pair of rows. With n the standardized pixels and d = grad t · scale, over the four
    pixels together: x: (d - mean(d) - n · mean(d · n)) / sqrt(variance + EPS).
    """
    normals, inverse = _standardize(_pixels(tiling, refs.x, r, refs.pair))
    grads = [refs.grad_tokens[n, _row(tiling, r)] for n in range(4)]
    for n, (normal, grad) in enumerate(zip(normals, grads)):
        refs.grad_weights.scale[0, n] += common.sum_rows(grad * normal)
        refs.grad_weights.offset[0, n] += common.sum_rows(grad)
    grads = [grad * refs.weights.scale[n] for n, grad in enumerate(grads)]
    mean = _mean(grads)
    along = _mean([a * b for a, b in zip(grads, normals)])
    for (i, j), grad, normal in zip(_PIXELS, grads, normals):
        grad_pixel = (grad - mean - normal * along) * inverse
        for group, lanes in enumerate(_groups(tiling)):
            there = pl.ds(j, tiling.width, stride=2), slice(lanes.stop - lanes.start)
            refs.pair[i, group, *there] = grad_pixel[:, lanes]
    for i in range(2):
        for group, lanes in enumerate(_groups(tiling)):
            grad_row = refs.pair[i, group, :, : lanes.stop - lanes.start]
            refs.grad_x[r, i, :, lanes] = grad_row.astype(tiling.dtype)


_merge = common.differentiable(_call_forward, _call_backward)


def _write_normalized(tiling: _Tiling, refs: _Forward | _Backward) -> None:
    """Write the normalized pixels of the band's patches into `tokens`."""
    if tiling.pitch > tiling.width:  # the gaps between rows take part in sums over tokens
        refs.tokens[...] = jnp.zeros_like(refs.tokens)

    def write(r: Any, _: None) -> None:
        normals, _inverse = _standardize(_pixels(tiling, refs.x, r, refs.pair))
        for n, normal in enumerate(normals):
            normal = normal * refs.weights.scale[n] + refs.weights.offset[n]
            refs.tokens[n, _row(tiling, r)] = normal.astype(tiling.dtype)

    lax.fori_loop(0, tiling.band, write, None)


def _groups(tiling: _Tiling) -> list[slice]:
    """Return the channels in groups of one tile's lanes, the only ones that can be strided."""
    starts = range(0, tiling.channels, LANES)
    return [slice(start, min(start + LANES, tiling.channels)) for start in starts]


def _pair(tiling: _Tiling) -> Any:
    """Return scratch memory for a pair of rows: (row, group of channels, column, channel).

    VMEM can read every other row only of float32 arrays that are one tile wide.
    """
    lanes = min(tiling.channels, LANES)
    return pltpu.VMEM((2, len(_groups(tiling)), 2 * tiling.width, lanes), jnp.float32)


def _pixels(tiling: _Tiling, x: Ref, r: Any, pair: Ref) -> list[Float[Array, "W C"]]:
    """Return the four pixels of each patch of the r-th pair of rows, in the order of `_PIXELS`."""
    groups = _groups(tiling)
    for i in range(2):
        for group, lanes in enumerate(groups):
            value = x[r, i, :, lanes].astype(jnp.float32)
            pair[i, group, :, : value.shape[1]] = value
    parts = lambda i, j: [
        pair[i, group, pl.ds(j, tiling.width, stride=2), : lanes.stop - lanes.start]
        for group, lanes in enumerate(groups)
    ]
    return [jnp.concatenate(parts(i, j), axis=1) for i, j in _PIXELS]


def _standardize(
    values: list[Float[Array, "W C"]],
) -> tuple[list[Float[Array, "W C"]], Float[Array, "W 1"]]:
    """`common.standardize` over the channels of all four arrays together."""
    mean = _mean(values)
    centered = [value - mean for value in values]
    inverse = lax.rsqrt(_mean([jnp.square(value) for value in centered]) + EPS)
    return [value * inverse for value in centered], inverse


def _mean(values: list[Float[Array, "W C"]]) -> Float[Array, "W 1"]:
    """Return the mean over the channels of all arrays."""
    total = functools.reduce(jnp.add, values)
    return jnp.mean(total, axis=1, keepdims=True) / len(values)


def _row(tiling: _Tiling, r: Any) -> Any:
    """Tokens of the band's r-th row of the smaller map."""
    return pl.ds(pl.multiple_of(r * tiling.pitch, TILE), tiling.width)
