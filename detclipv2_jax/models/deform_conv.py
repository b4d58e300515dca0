"""Modulated deformable convolution (DCNv2, Zhu et al. 2019), 3×3, stride 1, padding 1.

A gather reads the four bilinear neighbors of a point as a single wide row, because gathers are
what accelerators are worst at; one gather and one matmul serve all levels of a pyramid. On TPUs
`ops/kernels/deform.py` does without a gather.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.ops.kernels import deform, place

# (dy, dx) of the nine taps, row by row.
TAPS = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(9, 2)


def deform_conv2d(
    x: Float[Array, "B H W C"],
    offsets: Float[Array, "B H W 18"],
    mask: Float[Array, "B H W 9"],
    kernel: Float[Array, "3 3 C O"],
) -> Float[Array, "B H W O"]:
    """Sample nine moved, weighted points around every pixel and project them.

    Args:
        x: the map that is sampled; zero outside its borders.
        offsets: (dy, dx) of each tap, taps row by row, in pixels of the map.
        mask: weight of each tap (already through its sigmoid).
        kernel: of the projection. Accumulates in float32, returns x's dtype.
    """
    batch, height, width, _ = x.shape
    canvas = PackedLevels(((height, width),))
    offsets, mask = offsets.reshape(batch, -1, 18), mask.reshape(batch, -1, 9)
    return deform_conv_levels(x, canvas, offsets, mask, kernel).reshape(batch, height, width, -1)


def deform_conv_levels(
    x: Float[Array, "B H W C"],
    canvas: PackedLevels,
    offsets: Float[Array, "B K 18"],
    mask: Float[Array, "B K 9"],
    kernel: Float[Array, "3 3 C O"],
    *,
    by_tap: bool = False,
) -> Float[Array, "B K O"]:
    """`deform_conv2d` of each of the levels that lie on `x`, for their K pixels in anchor order.

    `by_tap` reads the nine taps one after another, forward and backward: all they read together is
    the largest array of a training step, 36 times the size of `x`.
    """
    batch, _, _, channels = x.shape
    index, weights = sampling_points(offsets, canvas)
    weights = (weights * mask.reshape(batch, -1, 1).astype(jnp.float32)).astype(x.dtype)
    packed, kernel = pack_neighbors(x), kernel.astype(x.dtype).reshape(9, channels, -1)

    def sample(index: Int[Array, "B P"], weights: Float[Array, "B P 4"]) -> Float[Array, "B P C"]:
        rows = jnp.take_along_axis(packed, index[..., None], axis=1, mode="clip")
        return jnp.einsum("bpn,bpnc->bpc", weights, rows.reshape(*index.shape, 4, channels))

    if not by_tap:
        samples = sample(index, weights).reshape(batch, -1, 9 * channels)
        kernel = kernel.reshape(9 * channels, -1)
        out = jnp.matmul(samples, kernel, preferred_element_type=jnp.float32)
        return out.astype(x.dtype)

    @jax.checkpoint
    def add_tap(total, tap):
        index, weights, kernel = tap
        samples = sample(index, weights)
        return total + jnp.matmul(samples, kernel, preferred_element_type=jnp.float32), None

    index, weights = index.reshape(batch, -1, 9), weights.reshape(batch, -1, 9, 4)
    taps = (jnp.moveaxis(index, 2, 0), jnp.moveaxis(weights, 2, 0), kernel)
    total = jnp.zeros((*index.shape[:2], kernel.shape[-1]), jnp.float32)
    return jax.lax.scan(add_tap, total, taps)[0].astype(x.dtype)


def deform_conv_by_kernel(
    x: Float[Array, "B H W C"],
    canvas: PackedLevels,
    offsets: Float[Array, "B H W 18"],
    mask: Float[Array, "B H W 9"],
    kernel: Float[Array, "3 3 C O"],
) -> Float[Array, "B H W O"]:
    """`deform_conv_levels` of a whole canvas by a TPU's kernel, which keeps but its inputs.

    Zeros in the gaps, whose offsets and mask do not count, whatever they are.
    """
    batch = x.shape[0]
    outputs = jnp.concatenate([offsets, mask], axis=-1).astype(jnp.float32)
    pixel, size, start = jnp.split(deform.in_blocks(jnp.asarray(_grid(canvas)[None])), 3, axis=2)
    real = size[:, :, :1] > 0
    blocks = jnp.where(real, deform.in_blocks(outputs), 0.0)  # (B, blocks, 27, 128)
    offsets = blocks[:, :, :18].reshape(*blocks.shape[:2], 9, 2, -1)
    point = pixel[:, :, None] + TAPS.astype(np.float32)[..., None] + offsets
    corner, beyond = _corner(point, size[:, :, None])
    corner = jnp.where(real[:, :, None], corner + start[:, :, None], -2.0).astype(jnp.int32)
    factors = jnp.concatenate([beyond, blocks[:, :, 18:, None]], axis=3)
    by_sample = lambda x: jnp.swapaxes(x, 2, 3).reshape(batch, x.shape[1], x.shape[3], -1)
    kernel = kernel.reshape(9, x.shape[-1], -1)
    convolve = lambda images, kernel: deform.deform_conv(*images, kernel)
    return place.on_each_device(convolve, (x, by_sample(corner), by_sample(factors)), kernel)


def pack_neighbors(x: Float[Array, "B H W C"]) -> Float[Array, "B Q C4"]:
    """Beside every pixel its right, lower and lower-right neighbors: what a bilinear sample needs.

    From pixel (-1, -1) on, row by row, W + 1 a row; zeros outside the map.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    packed = [x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]]
    packed = jnp.concatenate(packed, axis=-1)
    return packed.reshape(x.shape[0], -1, packed.shape[-1])


def sampling_points(
    offsets: Float[Array, "B K 18"], canvas: PackedLevels
) -> tuple[Int[Array, "B P"], Float[Array, "B P 4"]]:
    """Which packed row each of the P = 9K taps reads, and the weights of the four pixels there."""
    batch = offsets.shape[0]
    corner, high = _corners(offsets, canvas)
    low = 1.0 - high
    pairs = [(low, low), (low, high), (high, low), (high, high)]
    weights = jnp.stack([down[..., 0] * right[..., 1] for down, right in pairs], axis=-1)
    place = corner + 1  # the packed map starts at pixel (-1, -1)
    index = place[..., 0] * (canvas.shape[1] + 1) + place[..., 1]
    return index.reshape(batch, -1), weights.reshape(batch, -1, 4)


def _corners(
    offsets: Float[Array, "B K 18"], canvas: PackedLevels
) -> tuple[Int[Array, "B K 9 2"], Float[Array, "B K 9 2"]]:
    """Each tap's upper left neighbor on the canvas, and how far beyond it the tap lies, 0 to 1.

    Coordinates are float32 whatever the activations are: bfloat16 has no odd pixels past 256.
    """
    levels = [level.reshape(-1, 1, 6) for level in canvas.cut(_grid(canvas)[None])]
    pixel, size, start = np.split(np.concatenate(levels), 3, axis=-1)  # (K, 1, 2)
    offsets = offsets.astype(jnp.float32).reshape(*offsets.shape[:2], 9, 2)
    corner, beyond = _corner(pixel + TAPS.astype(np.float32) + offsets, size)
    return (corner + start).astype(jnp.int32), beyond


def _grid(canvas: PackedLevels) -> Float[np.ndarray, "H W 6"]:
    """(row, column) of each pixel of the canvas in its level, that level's size and its place.

    In the gaps zeros.
    """
    grid = np.zeros((1, *canvas.shape, 6), np.float32)
    for level, start in zip(canvas.cut(grid), canvas.corners):
        size = level.shape[1:3]
        level[0, ..., :2] = np.moveaxis(np.indices(size), 0, -1)
        level[0, ..., 2:] = (*size, *start)
    return grid[0]


def _corner(
    point: Float[Array, "*P"], size: Float[Array, "*P"]
) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """A point's upper left neighbor on its level, and how far beyond that it lies, 0 to 1."""
    # A pixel outside its level nothing is left to sample: stopping there keeps every index valid.
    point = jnp.clip(point, -1.0, size)
    corner = jnp.clip(jnp.floor(point), -1.0, size - 1.0)
    # The rest is 1 only at the far border, where the sample is zero.
    return corner, point - corner
