"""Modulated deformable convolution (DCNv2, Zhu et al. 2019), 3×3, stride 1, padding 1.

All levels of a pyramid share the kernel, so they are sampled by one gather and projected by one
matmul. A gather reads the four bilinear neighbours of a point as a single wide row, because gathers are
what accelerators are worst at.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    return deform_conv_levels([x], [offsets], [mask], kernel)[0]


def deform_conv_levels(
    levels: Sequence[Float[Array, "B H W C"]],
    offsets: Sequence[Float[Array, "B H W 18"]],
    masks: Sequence[Float[Array, "B H W 9"]],
    kernel: Float[Array, "3 3 C O"],
) -> list[Float[Array, "B H W O"]]:
    """`deform_conv2d` of each level with one kernel."""
    batch, _, _, channels = levels[0].shape
    sizes = [x.shape[1:3] for x in levels]
    table, stride = pack_neighbours(levels)
    index, weights = sampling_points(_flatten(offsets), sizes, stride)
    weights = weights * _flatten(masks).reshape(batch, -1, 1).astype(jnp.float32)
    rows = jnp.take_along_axis(table, index[..., None], axis=1, mode="clip")
    rows = rows.reshape(batch, -1, 4, channels)
    samples = jnp.einsum("bpn,bpnc->bpc", weights.astype(rows.dtype), rows)
    out = jnp.matmul(
        samples.reshape(batch, -1, 9 * channels),
        kernel.astype(rows.dtype).reshape(9 * channels, -1),
        preferred_element_type=jnp.float32,
    ).astype(rows.dtype)
    ends = np.cumsum([height * width for height, width in sizes])[:-1]
    parts = jnp.split(out, ends, axis=1)
    return [part.reshape(batch, *size, -1) for part, size in zip(parts, sizes)]


def pack_neighbours(
    levels: Sequence[Float[Array, "B H W C"]],
) -> tuple[Float[Array, "B Q C4"], int]:
    """Beside every pixel its right, lower and lower-right neighbours: what a bilinear sample needs.

    The levels stand below each other on one canvas, each in a frame of zeros one pixel thick. Row
    (i, j) of level l, counted from (-1, -1), is entry (first row of l + i + 1) · stride + j + 1.

    Returns:
        The entries of the canvas row by row, and its stride (the widest level and its frame).
    """
    stride = max(x.shape[2] for x in levels) + 2
    framed = [jnp.pad(x, ((0, 0), (1, 1), (1, stride - 1 - x.shape[2]), (0, 0))) for x in levels]
    canvas = jnp.concatenate(framed, axis=1)
    batch, height, _, channels = canvas.shape
    flat = canvas.reshape(batch, height * stride, channels)
    flat = jnp.pad(flat, ((0, 0), (0, stride + 1), (0, 0)))  # below the last row: never sampled
    entries = height * stride
    shifts = [flat[:, shift : shift + entries] for shift in (0, 1, stride, stride + 1)]
    return jnp.concatenate(shifts, axis=-1), stride


def sampling_points(
    offsets: Float[Array, "B K 18"], sizes: Sequence[tuple[int, int]], stride: int
) -> tuple[Int[Array, "B P"], Float[Array, "B P 4"]]:
    """Which entry each of the P = 9K taps of K pixels reads, and the weights of the four pixels there.

    Coordinates are float32 whatever the activations are: bfloat16 cannot tell pixels apart past 256.

    Args:
        offsets: (dy, dx) of each tap of each pixel of each level.
        sizes: (height, width) of the levels.
        stride: of `pack_neighbours`.
    """
    grids = [np.moveaxis(np.indices(size), 0, -1).reshape(-1, 1, 2) for size in sizes]
    taps = np.concatenate(grids).astype(np.float32) + TAPS.astype(np.float32)  # (K, 9, 2)
    pixels = [height * width for height, width in sizes]
    size = np.repeat(np.asarray(sizes, np.float32), pixels, axis=0)[:, None]  # (K, 1, 2)
    frames = [height + 2 for height, _ in sizes]
    first = np.repeat(np.cumsum([0, *frames[:-1]]), pixels).astype(np.int32)[:, None]  # (K, 1)

    batch = offsets.shape[0]
    point = taps + offsets.astype(jnp.float32).reshape(batch, -1, 9, 2)
    # Beyond one pixel outside nothing is left to sample: stopping there keeps every index valid.
    point = jnp.clip(point, -1.0, size)
    corner = jnp.clip(jnp.floor(point), -1.0, size - 1.0)
    high = point - corner  # 0..1; 1 only at the far border, where the sample is zero
    low = 1.0 - high
    pairs = [(low, low), (low, high), (high, low), (high, high)]
    weights = jnp.stack([down[..., 0] * right[..., 1] for down, right in pairs], axis=-1)
    place = corner.astype(jnp.int32) + 1
    index = (first + place[..., 0]) * stride + place[..., 1]
    return index.reshape(batch, -1), weights.reshape(batch, -1, 4)


def _flatten(maps: Sequence[Float[Array, "B H W C"]]) -> Float[Array, "B K C"]:
    return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)
