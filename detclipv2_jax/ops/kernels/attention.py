"""The attention branch of a Swin block as one TPU kernel: x + factors · proj(attention(norm(x))).

XLA's version of it writes and reads windows, queries, keys, values and float32 scores, a head's 32
channels padded to 128 lanes and a window's 49 tokens to 56. Here the map is read once and written
once forward; backward it and the gradient are read once, the gradient is written once, and
everything between is computed again in fast memory.

A step of the grid takes a band: the rows of one row of windows, over the map's whole width. As many
neighboring windows as 16 columns hold make a unit of `window` rows of 16 columns, of which the
last may be no tokens. Two windows of 7: 112 rows for 98 tokens, and one tile of the matrix unit for
the scores of both. What must not see each other in a unit is masked by the bias.
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
from detclipv2_jax.ops.kernels.pieces import LANES, TILE, dot

_MASKED = -1e9  # finite, so that a row of masked scores is no NaN
_COLUMNS = TILE  # of a unit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters of the branch, as the kernel wants them."""

    scale: Float[Array, "1 C"]  # of the norm
    offset: Float[Array, "1 C"]
    qkv: Float[Array, "3 C C"]
    qkv_bias: Float[Array, "3 1 C"]
    bias: Float[Array, "heads T T"]  # of a unit; see `unit_bias`
    proj: Float[Array, "C C"]
    proj_bias: Float[Array, "1 C"]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The geometry of one call."""

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
        """The width padded to windows."""
        return -(-self.width // self.window) * self.window

    @property
    def span(self) -> int:
        """Columns of a unit that are tokens."""
        return _COLUMNS // self.window * self.window

    @property
    def units(self) -> int:
        """In a band; the last may have fewer windows than the others."""
        return -(-self.columns // self.span)

    @property
    def tokens(self) -> int:
        """Rows of a unit."""
        return self.window * _COLUMNS

    @property
    def field(self) -> int:
        """Columns of the field that units are cut from: with what the roll brings round."""
        return self.span * (self.units - 1) + self.shift + _COLUMNS + 8

    @property
    def cores(self) -> int:
        """Parts of the batch that a chip's cores may share."""
        return place.cores(self.batch)

    def row(self, band: Any, r: int) -> Any:
        """Of the map: the r-th of a band of the rolled map. At or past `height`: padding."""
        return lax.rem(band * self.window + r + self.shift, self.bands * self.window)


def supports(channels: int, heads: int, window: int) -> bool:
    """Can the kernel do it, if there is room?"""
    return window <= _COLUMNS and multihead.supports(channels, heads)


def fast_memory(shape: tuple[int, ...], heads: int, window: int) -> int:
    """Bytes that the backward pass of a bfloat16 map wants of fast memory, about."""
    batch, height, width, channels = shape
    plan = _Plan(batch, height, width, channels, heads, window, 0, jnp.bfloat16)
    rows, size = plan.units * plan.tokens, pieces.size
    weights = size(2, 4, channels, channels) + size(4, heads, plan.tokens, plan.tokens)
    sums = size(4, 4, channels, channels) + size(4, heads, plan.tokens, plan.tokens)
    maps = size(2, 5, window, width, channels)  # two that come, with two buffers; one that goes
    field = size(4, window, plan.field, channels)
    return weights + sums + maps + field + size(2, 10, rows, channels) + size(4, 3, rows, channels)


def unit_bias(bias: Float[Array, "heads N N"], window: int) -> Float[Array, "heads T T"]:
    """The bias of a window's N = window² tokens as that of a unit: masked where none may see."""
    one = bias.reshape(-1, window, window, window, window)
    shape = (len(bias), window, _COLUMNS, window, _COLUMNS)
    unit = jnp.full(shape, _MASKED, jnp.float32)
    for start in range(0, _COLUMNS - window + 1, window):
        here = slice(start, start + window)
        unit = unit.at[:, :, here, :, here].set(one)
    return unit.reshape(len(bias), window * _COLUMNS, window * _COLUMNS)


@functools.cache
def _shift_masks(window: int, shift: int) -> Float[np.ndarray, "2 V T T"]:
    """What is added to the scores of a unit of the rolled map.

    By [is it in the last band, which of its windows is the last of its row], 0: none.
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
    """x + factors · proj(attention(norm(x))) in windows of a map rolled by `shift`.

    Args:
      x: any size; padded to windows by true zeros after the norm.
      factors: factor of each image's branch; has no gradient.
      weights: float32; their products take x's dtype, their gradients sum in float32.
      window: tokens a side.
      shift: by which the map is rolled first, up and to the left; 0: not.
    """
    batch, height, width, channels = x.shape
    plan = _Plan(batch, height, width, channels, len(weights.bias), window, shift, x.dtype)
    return _branch(plan, x, factors, weights)


def _rows(plan: _Plan) -> list[pl.BlockSpec]:
    """A band's rows, each by itself: those of the rolled map's last band come from both ends."""

    def spec(r: int) -> pl.BlockSpec:
        def index(core: Any, image: Any, band: Any) -> tuple[Any, ...]:
            row = jnp.minimum(plan.row(band, r), plan.height - 1)
            return core * (plan.batch // plan.cores) + image, row, 0, 0

        return pl.BlockSpec((1, 1, plan.width, plan.channels), index)

    return [spec(r) for r in range(plan.window)]


def _operands(plan: _Plan, weights: Weights) -> list[Array]:
    """The weights in the dtype they are used in, and the masks."""
    dense = {name: getattr(weights, name).astype(plan.dtype) for name in ("qkv", "proj")}
    weights = dataclasses.replace(weights, **dense)
    masks = _shift_masks(plan.window, plan.shift) if plan.shift else np.zeros((1, 1, 8, LANES))
    return [*jax.tree.leaves(weights), jnp.asarray(masks, jnp.float32)]


def _scratch(plan: _Plan, operands: int) -> list[Any]:
    """Fields in float32, whose rows can be read from anywhere; then what is multiplied."""
    rows = plan.units * plan.tokens
    return [
        pltpu.VMEM((plan.window, plan.field, plan.channels), jnp.float32),
        pltpu.VMEM((rows, plan.channels), jnp.float32),
        pltpu.VMEM((plan.window, plan.width, plan.channels), plan.dtype),
        pltpu.SemaphoreType.DMA(()),
        *[pltpu.VMEM((rows, plan.channels), plan.dtype)] * operands,
    ]


def _cost(plan: _Plan, operands: list[Array], products: int, maps: int) -> pl.CostEstimate:
    """What the compiler cannot see: a band's rows are an operand each, yet all are read once."""
    item = jnp.dtype(plan.dtype).itemsize  # with padded lanes, as the compiler counts
    map_bytes = pieces.size(item, plan.batch, plan.height, plan.width, plan.channels)
    rows = plan.batch * plan.bands * plan.units * plan.tokens
    dense = 2 * rows * plan.channels**2
    scores = 2 * rows * plan.tokens * plan.channels
    sums = sum(math.prod(o.shape) * 4 for o in operands[:-1]) if products > 1 else 0
    return pl.CostEstimate(
        flops=(4 * dense + 2 * scores) * products,
        bytes_accessed=maps * map_bytes + sum(o.nbytes for o in operands) + plan.cores * sums,
        transcendentals=rows * plan.tokens * plan.heads,
    )


def _call_forward(plan: _Plan, x: Array, factors: Array, weights: Weights) -> Array:
    operands = _operands(plan, weights)
    return pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        name="window_attention_forward",
        grid=(plan.cores, plan.batch // plan.cores, plan.bands),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *_rows(plan),
            *[pieces.whole(operand) for operand in operands],
        ],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        scratch_shapes=_scratch(plan, 5),
        cost_estimate=_cost(plan, operands, 1, 2),
        compiler_params=pieces.parameters(3),
    )(factors.astype(jnp.float32), *[x] * plan.window, *operands)


def _call_backward(
    plan: _Plan, x: Array, factors: Array, weights: Weights, gradient: Array
) -> list[Array]:
    operands = _operands(plan, weights)
    shapes, specs = pieces.sums(plan.cores, weights)
    return pl.pallas_call(
        functools.partial(_backward_kernel, plan),
        name="window_attention_backward",
        grid=(plan.cores, plan.batch // plan.cores, plan.bands),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes],
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *_rows(plan),
            *_rows(plan),
            *[pieces.whole(operand) for operand in operands],
        ],
        out_specs=[pl.BlockSpec(memory_space=pl.ANY), *specs],
        scratch_shapes=_scratch(plan, 10),
        cost_estimate=_cost(plan, operands, 3, 3),
        compiler_params=pieces.parameters(3),
    )(factors.astype(jnp.float32), *[x] * plan.window, *[gradient] * plan.window, *operands)


_branch = pieces.branch(_call_forward, _call_backward)


def _forward_kernel(plan: _Plan, factors: Any, *refs: Any) -> None:
    rows, refs = refs[: plan.window], refs[plan.window :]
    scale, offset, qkv, qkv_bias, bias, proj, proj_bias, masks = refs[:8]
    out, field, result, stage, sent, tokens, query, key, value, attended = refs[8:]
    _, image, band = _place(plan)
    for r, row in enumerate(rows):
        normal, _ = pieces.standardize(row[0, 0])
        _lay(plan, field, band, r, normal * scale[...] + offset[...])
    _cut(plan, field, tokens)
    multihead.project(plan.heads, tokens, qkv, qkv_bias, (query, key, value))

    def attend(unit: Any, _: None) -> None:
        scores = functools.partial(_scores, plan, bias, masks, band, unit)
        multihead.attend(plan.heads, _unit(plan, unit), scores, (query, key, value), attended)

    lax.fori_loop(0, plan.units, attend, None)
    result[...] = dot(attended[...], proj[...]) + proj_bias[...]
    _paste(plan, result, field)
    _await(plan, stage, out, sent)
    for r, row in enumerate(rows):
        branch = field[r, : plan.width] * factors[image]
        stage[r] = (row[0, 0].astype(jnp.float32) + branch).astype(plan.dtype)
    _send(plan, stage, out, sent)


def _backward_kernel(plan: _Plan, factors: Any, *refs: Any) -> None:
    rows, slopes = refs[: plan.window], refs[plan.window : 2 * plan.window]
    refs = refs[2 * plan.window :]
    scale, offset, qkv, qkv_bias, bias, proj, _, masks = refs[:8]
    out, *sums = refs[8:16]
    by_scale, by_offset, by_qkv, by_qkv_bias, by_bias, by_proj, by_proj_bias = sums
    field, result, stage, sent, *operands = refs[16:]
    tokens, slope, query, key, value, attended, by_attended, *by_parts = operands
    first, image, band = _place(plan)

    @pl.when(first)
    def _():
        pieces.clear(sums)

    for r, row in enumerate(rows):
        normal, _ = pieces.standardize(row[0, 0])
        _lay(plan, field, band, r, normal * scale[...] + offset[...])
    _cut(plan, field, tokens)
    for r, row in enumerate(slopes):
        _lay(plan, field, band, r, row[0, 0].astype(jnp.float32) * factors[image])
    _cut(plan, field, slope, padding=False)
    multihead.project(plan.heads, tokens, qkv, qkv_bias, (query, key, value))
    by_attended[...] = dot(slope[...], proj[...], right=1).astype(plan.dtype)

    def add_bias(head: int, by_score: Array) -> None:
        by_bias[0, head] += by_score

    def attend(unit: Any, _: None) -> None:
        multihead.attend_backward(
            plan.heads, _unit(plan, unit),
            functools.partial(_scores, plan, bias, masks, band, unit),
            (query, key, value), by_attended, attended, by_parts, add_bias,
        )  # fmt: skip

    lax.fori_loop(0, plan.units, attend, None)
    by_proj[0] += dot(attended[...], slope[...], left=0)
    by_proj_bias[0] += pieces.total(slope[...])
    result[...] = jnp.zeros_like(result)
    for number, part in enumerate(by_parts):
        by_qkv[0, number] += dot(tokens[...], part[...], left=0)
        by_qkv_bias[0, number] += pieces.total(part[...])
        result[...] += dot(part[...], qkv[number], right=1)
    _paste(plan, result, field)
    _await(plan, stage, out, sent)
    for r, (row, row_slope) in enumerate(zip(rows, slopes)):
        normal, inverse = pieces.standardize(row[0, 0])
        by_normal = jnp.where(plan.row(band, r) < plan.height, field[r, : plan.width], 0.0)
        by_scale[0] += pieces.total(by_normal * normal)
        by_offset[0] += pieces.total(by_normal)
        branch = pieces.standardize_backward(normal, inverse, by_normal * scale[...])
        stage[r] = (row_slope[0, 0].astype(jnp.float32) + branch).astype(plan.dtype)
    _send(plan, stage, out, sent)


def _place(plan: _Plan) -> tuple[Any, Any, Any]:
    """Is it this core's first step; the image; the band."""
    core, image, band = (pl.program_id(axis) for axis in range(3))
    return (image == 0) & (band == 0), core * (plan.batch // plan.cores) + image, band


def _lay(plan: _Plan, field: Any, band: Any, r: int, row: Array) -> None:
    """A row of the map into the field, zeros beyond the map, what the roll brings round behind."""
    row = jnp.where(plan.row(band, r) < plan.height, row, 0.0)
    field[r, : plan.width] = row
    field[r, plan.width :] = jnp.zeros((plan.field - plan.width, plan.channels), jnp.float32)
    if plan.shift:
        start = plan.columns
        field[r, start : start + plan.shift] = field[r, : plan.shift]


def _cut(plan: _Plan, field: Any, tokens: Any, *, padding: bool = True) -> None:
    """The field's units, row by row; if not `padding`, zeros where a unit has no tokens."""
    real = lax.broadcasted_iota(jnp.int32, (_COLUMNS, 1), 0) < plan.span
    for unit in range(plan.units):
        left = plan.span * unit + plan.shift
        for r in range(plan.window):
            piece = field[r, left : left + _COLUMNS]
            piece = piece if padding else jnp.where(real, piece, 0.0)
            top = (unit * plan.window + r) * _COLUMNS
            tokens[top : top + _COLUMNS] = piece.astype(plan.dtype)


def _paste(plan: _Plan, tokens: Any, field: Any) -> None:
    """The inverse of `_cut`, and what was brought round goes back."""
    for unit in range(plan.units):
        left = plan.span * unit + plan.shift
        for r in range(plan.window):
            top = (unit * plan.window + r) * _COLUMNS
            field[r, left : left + plan.span] = tokens[top : top + plan.span]
    if plan.shift:
        for r in range(plan.window):
            field[r, : plan.shift] = field[r, plan.columns : plan.columns + plan.shift]


def _unit(plan: _Plan, unit: Any) -> Any:
    return pl.ds(pl.multiple_of(unit * plan.tokens, _COLUMNS), plan.tokens)


def _scores(
    plan: _Plan, bias: Any, masks: Any, band: Any, unit: Any, head: int, products: Array
) -> Float[Array, "T T"]:
    """Of one head in one unit."""
    scores = products + bias[head]
    if plan.shift:
        windows = (plan.columns - plan.span * (plan.units - 1)) // plan.window  # of the last unit
        last = jnp.where(unit == plan.units - 1, windows, 0)
        scores += masks[jnp.where(band == plan.bands - 1, 1, 0), last]
    return scores


def _copies(plan: _Plan, stage: Any, out: Any, sent: Any, image: Any, band: Any, act: str) -> None:
    for r in range(plan.window):
        row = plan.row(band, r)

        @pl.when(row < plan.height)
        def _(r=r, row=row):
            getattr(pltpu.make_async_copy(stage.at[r], out.at[image, row], sent), act)()


def _send(plan: _Plan, stage: Any, out: Any, sent: Any) -> None:
    """Begin to write the band; the next one is computed meanwhile, but for a core's last."""
    core, part, band = (pl.program_id(axis) for axis in range(3))
    image = core * (plan.batch // plan.cores) + part
    _copies(plan, stage, out, sent, image, band, "start")

    @pl.when((part == plan.batch // plan.cores - 1) & (band == plan.bands - 1))
    def _():
        _copies(plan, stage, out, sent, image, band, "wait")


def _await(plan: _Plan, stage: Any, out: Any, sent: Any) -> None:
    """Until the band before is written."""
    first, image, band = _place(plan)

    @pl.when(jnp.logical_not(first))
    def _():
        before = jnp.where(band == 0, plan.bands, band) - 1
        _copies(plan, stage, out, sent, image, before, "wait")
