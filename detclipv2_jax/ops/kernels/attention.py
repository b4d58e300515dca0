"""The attention branch of a Swin block as one TPU kernel.

    y = x + factors · proj(attention(norm(x)))   within windows of a map that may be shifted

XLA's version writes and reads windows, queries, keys, values and float32 scores; the 32 channels
of a head are padded to 128 lanes and the 49 tokens of a window to 56. Here the map is read once
and written once forward. Backward, the map and the gradient are read once and the gradient of the
map is written once; everything in between is computed again in VMEM.

A step of the grid takes a band: one row of windows, over the whole width of the map. Neighboring
windows, as many as fit into 16 columns, form a unit of `window` rows × 16 columns; the last columns
may hold no tokens. For example, two windows of 7 take 112 rows for 98 tokens, and the scores of
both fill one tile of the matrix unit. The bias masks what must not see each other within a unit.

The shift is not applied to the map in memory. Row r of a band of the rolled map is read from where
it is; its columns are rolled when units are cut from the strip, the band's rows in float32,
extended to the right by the columns that the shift rolls around.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels import common, multihead, place
from detclipv2_jax.ops.kernels.common import LANES, TILE, Ref, dot

_MASKED = -1e9  # finite, so that a row of masked scores does not become NaN
_COLUMNS = TILE  # columns of a unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch in the shapes that the kernel needs; T: tokens of a unit."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]  # of the norm
    qkv: Float[Array, "3 C C"]
    qkv_bias: Float[Array, "3 1 C"]
    bias: Float[Array, "heads T T"]  # added to the scores of a unit; see `unit_bias`
    proj: Float[Array, "C C"]
    proj_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """How one call is cut into steps."""

    batch: int
    height: int
    width: int
    channels: int
    heads: int
    window: int
    shift: int
    dtype: Any

    @property
    def bands(self) -> int:
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        """The width padded to whole windows."""
        return -(-self.width // self.window) * self.window

    @property
    def span(self) -> int:
        """Columns of a unit that hold tokens."""
        return _COLUMNS // self.window * self.window

    @property
    def units(self) -> int:
        """Units per band; the last may have fewer windows than the others."""
        return -(-self.columns // self.span)

    @property
    def tokens(self) -> int:
        """Tokens per unit, unused columns included."""
        return self.window * _COLUMNS

    @property
    def rows(self) -> int:
        """Tokens per band."""
        return self.units * self.tokens

    @property
    def strip(self) -> int:
        """Columns of the strip: those of all units, and those that the shift rolls around."""
        return self.span * (self.units - 1) + self.shift + _COLUMNS + 8

    @property
    def cores(self) -> int:
        return place.cores(self.batch)

    def row(self, band: Any, r: int) -> Any:
        """Index in the map of row r of a band of the rolled map; padding if `height` or more."""
        return lax.rem(band * self.window + r + self.shift, self.bands * self.window)


def supports(channels: int, heads: int, window: int) -> bool:
    """Whether the kernel can handle these sizes, if VMEM is large enough."""
    return window <= _COLUMNS and multihead.supports(channels, heads)


def vmem_bytes(shape: tuple[int, ...], heads: int, window: int) -> int:
    """Return about how many bytes of VMEM the backward pass of a bfloat16 map needs."""
    batch, height, width, channels = shape
    tiling = _Tiling(batch, height, width, channels, heads, window, 0, jnp.bfloat16)
    rows, size = tiling.rows, common.padded_bytes
    weights = size(2, 4, channels, channels) + size(4, heads, tiling.tokens, tiling.tokens)
    sums = size(4, 4, channels, channels) + size(4, heads, tiling.tokens, tiling.tokens)
    maps = size(2, 5, window, width, channels)  # two inputs with two buffers each, one output
    strip = size(4, window, tiling.strip, channels)
    return weights + sums + maps + strip + size(2, 10, rows, channels) + size(4, 3, rows, channels)


def unit_bias(bias: Float[Array, "heads N N"], window: int) -> Float[Array, "heads T T"]:
    """Return the bias of a whole unit, given that of one window.

    Tokens of different windows are masked with -1e9, and so are the columns without tokens.

    Args:
      bias: added to the scores of a window's N = window² tokens.
      window: tokens per side.
    """
    one = bias.reshape(-1, window, window, window, window)
    shape = (len(bias), window, _COLUMNS, window, _COLUMNS)
    unit = jnp.full(shape, _MASKED, jnp.float32)
    for start in range(0, _COLUMNS - window + 1, window):
        here = slice(start, start + window)
        unit = unit.at[:, :, here, :, here].set(one)
    return unit.reshape(len(bias), window * _COLUMNS, window * _COLUMNS)


@functools.cache
def _shift_masks(window: int, shift: int) -> Float[np.ndarray, "2 V T T"]:
    """Return what is added to the scores of a unit of the rolled map.

    The first index is whether the unit lies in the last band, the second which of its windows is
    the last of its row of windows, counted from 1; 0: none.
    """
    row, column = np.divmod(np.arange(window * _COLUMNS), _COLUMNS)
    number, place = np.divmod(column, window)

    def mask(last_band: bool, last: int) -> Float[np.ndarray, "T T"]:
        region = np.where(last_band & (row >= window - shift), 2, 0)
        region += (number == last - 1) & (place >= window - shift)
        return np.where(region[:, None] == region, 0.0, _MASKED)

    variants = range(_COLUMNS // window + 1)
    return np.stack([[mask(band, last) for last in variants] for band in (False, True)])


def attention_branch(
    x: Float[Array, "B H W C"],
    factors: Float[Array, " B"],
    weights: Weights,
    *,
    window: int,
    shift: int,
) -> Float[Array, "B H W C"]:
    """Return x + factors · proj(attention(norm(x))) in windows of a map rolled by `shift`.

    Args:
      x: a map of any size; after the norm it is padded with zeros to whole windows.
      factors: drop path factor of each image's branch; it has no gradient.
      weights: float32. Products are computed in x's dtype, gradients are summed in float32.
      window: tokens per side of a window.
      shift: by how many tokens the map is rolled up and to the left first; 0: not at all.
    """
    batch, height, width, channels = x.shape
    tiling = _Tiling(batch, height, width, channels, len(weights.bias), window, shift, x.dtype)
    return _branch(tiling, x, factors, weights)


def _rows(tiling: _Tiling, x: Array) -> list[common.Input]:
    """Return a band's rows, one input each: the last band of a rolled map takes both ends."""

    def block(r: int) -> pl.BlockSpec:
        def index(core: Any, image: Any, band: Any) -> tuple[Any, ...]:
            row = jnp.minimum(tiling.row(band, r), tiling.height - 1)
            return core * (tiling.batch // tiling.cores) + image, row, 0, 0

        return pl.BlockSpec((1, 1, tiling.width, tiling.channels), index)

    return [common.Input(x, block(r)) for r in range(tiling.window)]


def _cast(tiling: _Tiling, weights: Weights) -> Weights:
    """Cast the matrices to the dtype in which they are multiplied."""
    matrices = {name: getattr(weights, name).astype(tiling.dtype) for name in ("qkv", "proj")}
    return dataclasses.replace(weights, **matrices)


def _masks(tiling: _Tiling) -> Float[Array, "_ V T T"]:
    """Return the shift masks; without a shift, an array that nothing reads."""
    if tiling.shift:
        return jnp.asarray(_shift_masks(tiling.window, tiling.shift), jnp.float32)
    return jnp.asarray(np.zeros((1, 1, 8, LANES)), jnp.float32)


def _cost(
    tiling: _Tiling, weights: Weights, masks: Array, products: int, maps: int
) -> pl.CostEstimate:
    """Cost of `products` times the forward products, and of reading or writing `maps` maps.

    The compiler would count the map once per row of a band, since each row is an input.
    """
    item = jnp.dtype(tiling.dtype).itemsize
    # In padded bytes, as the compiler counts.
    map_bytes = common.padded_bytes(
        item, tiling.batch, tiling.height, tiling.width, tiling.channels
    )
    rows = tiling.batch * tiling.bands * tiling.rows
    dense = 2 * rows * tiling.channels**2
    scores = 2 * rows * tiling.tokens * tiling.channels
    leaves = jax.tree.leaves(weights)
    sums = sum(math.prod(leaf.shape) * 4 for leaf in leaves) if products > 1 else 0
    inputs = sum(leaf.nbytes for leaf in leaves) + masks.nbytes
    return pl.CostEstimate(
        flops=(4 * dense + 2 * scores) * products,
        bytes_accessed=maps * map_bytes + inputs + tiling.cores * sums,
        transcendentals=rows * tiling.tokens * tiling.heads,
    )


class _Step(NamedTuple):
    """Which step of the grid runs."""

    first: Any  # whether it is the first step of its core
    image: Any
    band: Any


def _step(tiling: _Tiling) -> _Step:
    core, image, band = (pl.program_id(axis) for axis in range(3))
    first = (image == 0) & (band == 0)
    return _Step(first, core * (tiling.batch // tiling.cores) + image, band)


class _Scratch(NamedTuple):
    """Scratch arrays of both kernels; R: tokens per band."""

    strip: Ref  # (window, strip, C), float32: its rows can be read from any column on
    result: Ref  # (R, C), float32: what is cut back into the strip
    stage: Ref  # (window, W, C): rows on their way to the output
    semaphore: Ref  # counts the rows that have arrived
    tokens: Ref  # (R, C): norm(x)


def _scratch(tiling: _Tiling) -> _Scratch:
    return _Scratch(
        strip=pltpu.VMEM((tiling.window, tiling.strip, tiling.channels), jnp.float32),
        result=pltpu.VMEM((tiling.rows, tiling.channels), jnp.float32),
        stage=pltpu.VMEM((tiling.window, tiling.width, tiling.channels), tiling.dtype),
        semaphore=pltpu.SemaphoreType.DMA(()),
        tokens=pltpu.VMEM((tiling.rows, tiling.channels), tiling.dtype),
    )


class _Forward(NamedTuple):
    """What the forward kernel sees; R: tokens per band, T: per unit."""

    factors: Ref  # (B,), scalars
    rows: list[Ref]  # of each row of the band: (1, 1, W, C)
    weights: Weights
    masks: Ref  # (2, V, T, T)
    out: Ref  # (B, H, W, C), not in VMEM
    scratch: _Scratch
    qkv: multihead.QKV  # of (R, C)
    attended: Ref  # (R, C)


def _call_forward(tiling: _Tiling, x: Array, factors: Array, weights: Weights) -> Array:
    weights, masks = _cast(tiling, weights), _masks(tiling)
    tokens = pltpu.VMEM((tiling.rows, tiling.channels), tiling.dtype)
    refs = _Forward(
        factors=common.scalars(factors.astype(jnp.float32)),
        rows=_rows(tiling, x),
        weights=common.whole(weights),
        masks=common.whole(masks),
        out=common.Output(x.shape, x.dtype, pl.BlockSpec(memory_space=pl.ANY)),
        scratch=_scratch(tiling),
        qkv=multihead.QKV(tokens, tokens, tokens),
        attended=tokens,
    )
    return common.call(
        functools.partial(_forward_kernel, tiling),
        refs,
        name="window_attention_forward",
        grid=(tiling.cores, tiling.batch // tiling.cores, tiling.bands),
        cost=_cost(tiling, weights, masks, 1, 2),
    ).out


def _forward_kernel(tiling: _Tiling, refs: _Forward) -> None:
    """Compute one band of y = x + factors · proj(softmax(q · kᵀ + bias + mask) · v).

    q, k, v = qkv(norm(x)).
    """
    weights, scratch = refs.weights, refs.scratch
    step = _step(tiling)
    _normalize_band(tiling, step, refs)
    multihead.project(tiling.heads, scratch.tokens, weights.qkv, weights.qkv_bias, refs.qkv)

    def attend(unit: Any, _: None) -> None:
        scores = functools.partial(_scores, tiling, refs, step, unit)
        multihead.attend(tiling.heads, _unit(tiling, unit), scores, refs.qkv, refs.attended)

    lax.fori_loop(0, tiling.units, attend, None)
    scratch.result[...] = dot(refs.attended[...], weights.proj[...]) + weights.proj_bias[...]
    _join_units(tiling, scratch.result, scratch.strip)
    _wait_for_previous_band(tiling, scratch, refs.out)
    for r, row in enumerate(refs.rows):
        branch = scratch.strip[r, : tiling.width] * refs.factors[step.image]
        scratch.stage[r] = (row[0, 0].astype(jnp.float32) + branch).astype(tiling.dtype)
    _send_band(tiling, scratch, refs.out)


class _Backward(NamedTuple):
    """What the backward kernel sees; R: tokens per band, T: per unit."""

    factors: Ref  # (B,), scalars
    rows: list[Ref]  # of each row of the band: (1, 1, W, C)
    grad_out: list[Ref]  # likewise
    weights: Weights
    masks: Ref  # (2, V, T, T)
    grad_x: Ref  # (B, H, W, C), not in VMEM
    grad_weights: Weights  # sums
    scratch: _Scratch
    grad_branch: Ref  # (R, C): factors · grad_out
    qkv: multihead.QKV  # of (R, C)
    attended: Ref  # (R, C)
    grad_attended: Ref  # (R, C)
    grad_qkv: multihead.QKV  # of (R, C)


def _call_backward(
    tiling: _Tiling, x: Array, factors: Array, weights: Weights, grad_out: Array
) -> tuple[Array, Weights]:
    weights, masks = _cast(tiling, weights), _masks(tiling)
    tokens = pltpu.VMEM((tiling.rows, tiling.channels), tiling.dtype)
    refs = _Backward(
        factors=common.scalars(factors.astype(jnp.float32)),
        rows=_rows(tiling, x),
        grad_out=_rows(tiling, grad_out),
        weights=common.whole(weights),
        masks=common.whole(masks),
        grad_x=common.Output(x.shape, x.dtype, pl.BlockSpec(memory_space=pl.ANY)),
        grad_weights=common.sums(tiling.cores, weights),
        scratch=_scratch(tiling),
        grad_branch=tokens,
        qkv=multihead.QKV(tokens, tokens, tokens),
        attended=tokens,
        grad_attended=tokens,
        grad_qkv=multihead.QKV(tokens, tokens, tokens),
    )
    done = common.call(
        functools.partial(_backward_kernel, tiling),
        refs,
        name="window_attention_backward",
        grid=(tiling.cores, tiling.batch // tiling.cores, tiling.bands),
        cost=_cost(tiling, weights, masks, 3, 3),
    )
    return done.grad_x, done.grad_weights


def _backward_kernel(tiling: _Tiling, refs: _Backward) -> None:
    """Compute the gradients of one band.

    With t = norm(x), A the attended values, and g = factors · grad_out:

      grad A = g · projᵀ                 grad q, k, v, bias: `multihead.attend_backward`
      proj: + Aᵀ · g                     proj_bias: + Σ g
      qkv:  + tᵀ · grad q, k, v          qkv_bias:  + Σ grad q, k, v
      grad t = Σ over q, k, v of grad · qkvᵀ
      scale, offset, x: `_write_grad_x`
    """
    weights, grad_weights, scratch = refs.weights, refs.grad_weights, refs.scratch
    step = _step(tiling)

    @pl.when(step.first)
    def _():
        common.clear(grad_weights)

    _normalize_band(tiling, step, refs)
    for r, row in enumerate(refs.grad_out):
        grad = row[0, 0].astype(jnp.float32) * refs.factors[step.image]
        _write_row(tiling, scratch.strip, step.band, r, grad)
    _cut_units(tiling, scratch.strip, refs.grad_branch, clear_unused=True)
    multihead.project(tiling.heads, scratch.tokens, weights.qkv, weights.qkv_bias, refs.qkv)
    grad_attended = dot(refs.grad_branch[...], weights.proj[...], right=1)
    refs.grad_attended[...] = grad_attended.astype(tiling.dtype)

    def add_grad_bias(head: int, grad_score: Array) -> None:
        grad_weights.bias[0, head] += grad_score

    def attend(unit: Any, _: None) -> None:
        multihead.attend_backward(
            tiling.heads, _unit(tiling, unit),
            functools.partial(_scores, tiling, refs, step, unit),
            refs.qkv, refs.grad_attended, refs.attended, refs.grad_qkv, add_grad_bias,
        )  # fmt: skip

    lax.fori_loop(0, tiling.units, attend, None)
    grad_weights.proj[0] += dot(refs.attended[...], refs.grad_branch[...], left=0)
    grad_weights.proj_bias[0] += common.sum_rows(refs.grad_branch[...])
    scratch.result[...] = jnp.zeros_like(scratch.result)
    for number, grad in enumerate(refs.grad_qkv):
        grad_weights.qkv[0, number] += dot(scratch.tokens[...], grad[...], left=0)
        grad_weights.qkv_bias[0, number] += common.sum_rows(grad[...])
        scratch.result[...] += dot(grad[...], weights.qkv[number], right=1)
    _write_grad_x(tiling, step, refs)


def _write_grad_x(tiling: _Tiling, step: _Step, refs: _Backward) -> None:
    """Turn grad t, in `scratch.result`, into the gradients of x and of the norm's parameters.

    With n the standardized x: scale: + Σ grad t · n; offset: + Σ grad t; and x: grad_out +
    `standardize_backward` of grad t · scale. Rows of padding have no part in them.
    """
    grad_weights, scratch = refs.grad_weights, refs.scratch
    _join_units(tiling, scratch.result, scratch.strip)
    _wait_for_previous_band(tiling, scratch, refs.grad_x)
    for r, (row, grad_row) in enumerate(zip(refs.rows, refs.grad_out)):
        normal, inverse = common.standardize(row[0, 0])
        on_map = tiling.row(step.band, r) < tiling.height
        grad = jnp.where(on_map, scratch.strip[r, : tiling.width], 0.0)
        grad_weights.scale[0] += common.sum_rows(grad * normal)
        grad_weights.offset[0] += common.sum_rows(grad)
        branch = common.standardize_backward(normal, inverse, grad * refs.weights.scale[...])
        scratch.stage[r] = (grad_row[0, 0].astype(jnp.float32) + branch).astype(tiling.dtype)
    _send_band(tiling, scratch, refs.grad_x)


_branch = common.differentiable(_call_forward, _call_backward)


def _normalize_band(tiling: _Tiling, step: _Step, refs: _Forward | _Backward) -> None:
    """Write norm(x) of the band into `scratch.tokens`, unit by unit."""
    for r, row in enumerate(refs.rows):
        normal, _ = common.standardize(row[0, 0])
        normal = normal * refs.weights.scale[...] + refs.weights.offset[...]
        _write_row(tiling, refs.scratch.strip, step.band, r, normal)
    _cut_units(tiling, refs.scratch.strip, refs.scratch.tokens)


def _write_row(tiling: _Tiling, strip: Ref, band: Any, r: int, row: Array) -> None:
    """Write a row of the map into the strip: zeros off the map, rolled columns at the end."""
    row = jnp.where(tiling.row(band, r) < tiling.height, row, 0.0)
    strip[r, : tiling.width] = row
    strip[r, tiling.width :] = jnp.zeros(
        (tiling.strip - tiling.width, tiling.channels), jnp.float32
    )
    if tiling.shift:
        start = tiling.columns
        strip[r, start : start + tiling.shift] = strip[r, : tiling.shift]


def _cut_units(tiling: _Tiling, strip: Ref, tokens: Ref, *, clear_unused: bool = False) -> None:
    """Copy the strip's units into `tokens`, row by row.

    With `clear_unused`, columns of a unit without tokens become zeros; else they hold columns of
    the next unit.
    """
    used = lax.broadcasted_iota(jnp.int32, (_COLUMNS, 1), 0) < tiling.span
    for unit in range(tiling.units):
        left = tiling.span * unit + tiling.shift
        for r in range(tiling.window):
            piece = strip[r, left : left + _COLUMNS]
            piece = jnp.where(used, piece, 0.0) if clear_unused else piece
            top = (unit * tiling.window + r) * _COLUMNS
            tokens[top : top + _COLUMNS] = piece.astype(tiling.dtype)


def _join_units(tiling: _Tiling, tokens: Ref, strip: Ref) -> None:
    """Copy units back into the strip, the inverse of `_cut_units`, and roll their columns back."""
    for unit in range(tiling.units):
        left = tiling.span * unit + tiling.shift
        for r in range(tiling.window):
            top = (unit * tiling.window + r) * _COLUMNS
            strip[r, left : left + tiling.span] = tokens[top : top + tiling.span]
    if tiling.shift:
        for r in range(tiling.window):
            strip[r, : tiling.shift] = strip[r, tiling.columns : tiling.columns + tiling.shift]


def _unit(tiling: _Tiling, unit: Any) -> Any:
    """Tokens of a unit."""
    return pl.ds(pl.multiple_of(unit * tiling.tokens, _COLUMNS), tiling.tokens)


def _scores(
    tiling: _Tiling, refs: _Forward | _Backward, step: _Step, unit: Any, head: int, products: Array
) -> Float[Array, "T T"]:
    """Return the scores of one head in one unit: products + bias + mask of the shift."""
    scores = products + refs.weights.bias[head]
    if tiling.shift:
        # Windows in the last unit of a band.
        windows = (tiling.columns - tiling.span * (tiling.units - 1)) // tiling.window
        last = jnp.where(unit == tiling.units - 1, windows, 0)
        scores += refs.masks[jnp.where(step.band == tiling.bands - 1, 1, 0), last]
    return scores


def _for_each_copy(
    tiling: _Tiling, scratch: _Scratch, out: Ref, image: Any, band: Any,
    act: Callable[[Any], None],
) -> None:  # fmt: skip
    """Call `act` with the copy from `scratch.stage` to `out` of each row that is on the map."""
    for r in range(tiling.window):
        row = tiling.row(band, r)

        @pl.when(row < tiling.height)
        def _(r=r, row=row):
            to = out.at[image, row]
            act(pltpu.make_async_copy(scratch.stage.at[r], to, scratch.semaphore))


def _send_band(tiling: _Tiling, scratch: _Scratch, out: Ref) -> None:
    """Start to write the band; the next band is computed meanwhile.

    The last band of a core is written to the end.
    """
    core, turn, band = (pl.program_id(axis) for axis in range(3))
    image = core * (tiling.batch // tiling.cores) + turn
    _for_each_copy(tiling, scratch, out, image, band, lambda copy: copy.start())

    @pl.when((turn == tiling.batch // tiling.cores - 1) & (band == tiling.bands - 1))
    def _():
        _for_each_copy(tiling, scratch, out, image, band, lambda copy: copy.wait())


def _wait_for_previous_band(tiling: _Tiling, scratch: _Scratch, out: Ref) -> None:
    """Wait until the previous band is written, so that `scratch.stage` is free."""
    step = _step(tiling)

    @pl.when(jnp.logical_not(step.first))
    def _():
        # Which image it belonged to does not matter: a wait only counts the bytes of the copy.
        previous = jnp.where(step.band == 0, tiling.bands, step.band) - 1
        _for_each_copy(tiling, scratch, out, step.image, previous, lambda copy: copy.wait())
