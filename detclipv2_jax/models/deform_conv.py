"""Modulated deformable convolution (DCNv2, Zhu et al. 2019), 3×3, stride 1, padding 1.

Each of the nine taps of a pixel samples the map at a learned offset from its regular place, and has
a learned weight (the mask). A sample is bilinear, and zero outside the map.

All levels of a pyramid share one gather and one matrix product. Accelerators are slow at gathers,
so the four bilinear neighbors of a sample are read as a single wide row. On TPUs the kernel in
`ops/kernels/deform.py` needs no gather.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.ops.kernels import deform, place

# (dy, dx) of the nine taps, row by row.
TAPS = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1], indexing="ij"), -1).reshape(9, 2)


def deform_conv_levels(
    x: Float[Array, "B H W C"],
    packed: PackedLevels,
    offsets: Float[Array, "B K 18"],
    mask: Float[Array, "B K 9"],
    kernel: Float[Array, "3 3 C O"],
    *,
    by_tap: bool = False,
) -> Float[Array, "B K O"]:
    """Convolve each level of a packed map; a sample never reads another level.

    Args:
        x: the packed map; zeros in its gaps.
        packed: where the levels are; they have K pixels together.
        offsets: (dy, dx) of each tap for each pixel in anchor order, taps row by row, in pixels of
            the level.
        mask: weight of each tap, after the sigmoid.
        kernel: projects the samples. Products accumulate in float32.
        by_tap: process the nine taps one after another, forward and backward, with far less
            memory: all samples together are the largest array of a training step, 36 times the
            size of `x`.

    Returns:
        The convolved pixels in anchor order, in x's dtype.
    """
    batch, _, _, channels = x.shape
    index, weights = _sampling_points(offsets, packed)
    weights = (weights * mask.reshape(batch, -1, 1).astype(jnp.float32)).astype(x.dtype)
    neighbors, kernel = _stack_neighbors(x), kernel.astype(x.dtype).reshape(9, channels, -1)

    def sample(index: Int[Array, "B P"], weights: Float[Array, "B P 4"]) -> Float[Array, "B P C"]:
        rows = jnp.take_along_axis(neighbors, index[..., None], axis=1, mode="clip")
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
    packed: PackedLevels,
    offsets: Float[Array, "B H W 18"],
    mask: Float[Array, "B H W 9"],
    kernel: Float[Array, "3 3 C O"],
) -> Float[Array, "B H W O"]:
    """Convolve a packed map as `deform_conv_levels` does, by a TPU kernel.

    The backward pass needs only the inputs. `offsets` and `mask` are packed maps too; their values
    in the gaps do not matter, and the result is zero there.
    """
    batch = x.shape[0]
    learned = jnp.concatenate([offsets, mask], axis=-1).astype(jnp.float32)
    # The kernel takes blocks of 128 pixels, which are the last axis from here on.
    pixel, size, start = jnp.split(
        deform.in_blocks(jnp.asarray(_pixel_table(packed)[None])), 3, axis=2
    )
    is_in_level = size[:, :, :1] > 0
    learned = jnp.where(is_in_level, deform.in_blocks(learned), 0.0)  # (B, blocks, 27, 128)
    offsets = learned[:, :, :18].reshape(*learned.shape[:2], 9, 2, -1)
    point = pixel[:, :, None] + TAPS.astype(np.float32)[..., None] + offsets
    corner, fraction = _upper_left(point, size[:, :, None])
    # Corners below -1 mark pixels without samples.
    corner = jnp.where(is_in_level[:, :, None], corner + start[:, :, None], -2.0).astype(jnp.int32)
    factors = jnp.concatenate([fraction, learned[:, :, 18:, None]], axis=3)

    def by_sample(values):  # (B, blocks, taps, N, pixels) -> (B, blocks, N, taps · pixels)
        return jnp.swapaxes(values, 2, 3).reshape(batch, values.shape[1], values.shape[3], -1)

    def convolve(images, kernel):
        return deform.deform_conv(*images, kernel)

    kernel = kernel.reshape(9, x.shape[-1], -1)
    return place.on_each_device(convolve, (x, by_sample(corner), by_sample(factors)), kernel)


def _stack_neighbors(x: Float[Array, "B H W C"]) -> Float[Array, "B Q C4"]:
    """Return each pixel with its right, lower and lower-right neighbors: what one sample reads.

    The first row is pixel (-1, -1); each row of pixels has W + 1 entries. Zeros outside the map.
    """
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbors = [x[:, :-1, :-1], x[:, :-1, 1:], x[:, 1:, :-1], x[:, 1:, 1:]]
    neighbors = jnp.concatenate(neighbors, axis=-1)
    return neighbors.reshape(x.shape[0], -1, neighbors.shape[-1])


def _sampling_points(
    offsets: Float[Array, "B K 18"], packed: PackedLevels
) -> tuple[Int[Array, "B P"], Float[Array, "B P 4"]]:
    """Return where each of the P = 9K taps samples the map.

    Returns:
        The row of `_stack_neighbors` that the tap reads, and the bilinear weights of the four
        pixels in it.
    """
    batch = offsets.shape[0]
    corner, high = _corners(offsets, packed)
    low = 1.0 - high
    pairs = [(low, low), (low, high), (high, low), (high, high)]
    weights = jnp.stack([down[..., 0] * right[..., 1] for down, right in pairs], axis=-1)
    pixel = corner + 1  # the neighbors' first row is pixel (-1, -1)
    index = pixel[..., 0] * (packed.shape[1] + 1) + pixel[..., 1]
    return index.reshape(batch, -1), weights.reshape(batch, -1, 4)


def _corners(
    offsets: Float[Array, "B K 18"], packed: PackedLevels
) -> tuple[Int[Array, "B K 9 2"], Float[Array, "B K 9 2"]]:
    """Return the pixel to the upper left of each sample, and the sample's distance from it.

    Pixels are (row, column) on the packed map; distances are 0 to 1. Coordinates are always
    float32: bfloat16 cannot represent odd numbers above 256.
    """
    table = packed.unpack(_pixel_table(packed)[None])
    levels = [level.reshape(-1, 1, 6) for level in table]
    pixel, size, start = np.split(np.concatenate(levels), 3, axis=-1)  # (K, 1, 2)
    offsets = offsets.astype(jnp.float32).reshape(*offsets.shape[:2], 9, 2)
    corner, fraction = _upper_left(pixel + TAPS.astype(np.float32) + offsets, size)
    return (corner + start).astype(jnp.int32), fraction


def _pixel_table(packed: PackedLevels) -> Float[np.ndarray, "H W 6"]:
    """Return each pixel's position in its level, and the level's size and position.

    The six values are (row, column) in the level, (height, width) of the level, and (top, left) of
    the level; zeros in the gaps.
    """
    table = np.zeros((1, *packed.shape, 6), np.float32)
    for level, start in zip(packed.unpack(table), packed.corners):
        size = level.shape[1:3]
        level[0, ..., :2] = np.moveaxis(np.indices(size), 0, -1)
        level[0, ..., 2:] = (*size, *start)
    return table[0]


def _upper_left(
    point: Float[Array, "*P"], size: Float[Array, "*P"]
) -> tuple[Float[Array, "*P"], Float[Array, "*P"]]:
    """Return the pixel to the upper left of each point, and the point's distance from it (0 to 1).

    Args:
        point: coordinates (row or column) on a level.
        size: size of the level along the same axis.
    """
    # More than one pixel outside the level every sample is zero. Clipping keeps indices valid.
    point = jnp.clip(point, -1.0, size)
    corner = jnp.clip(jnp.floor(point), -1.0, size - 1.0)
    # The distance is 1 only at the far border, where the sample is zero.
    return corner, point - corner
