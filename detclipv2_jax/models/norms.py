"""Layer and group normalization with float32 two-pass statistics and a closed-form gradient.

The gradient is written out because automatic differentiation produces several times as many loops.
Each loop costs memory traffic at run time, and compile time.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from detclipv2_jax.models.packed_levels import PackedLevels

EPS = 1e-5
BATCH_NORM_EPS = 1e-3  # YOLO-World


@jax.custom_vjp
def standardize(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Scale the channels of each position to mean 0 and variance 1.

    Computed in float32; the result has x's dtype.
    """
    return _forward(_channel_average, x)[0]


@jax.custom_vjp
def standardize_patches(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Scale the channels of each 2×2 patch together to mean 0 and variance 1.

    Equals `standardize` of the 4C channels of each patch, but moves no pixels in float32. Both
    sides of the map must be even.
    """
    return _forward(_patch_average, x)[0]


def _forward(average, x):
    wide = x.astype(jnp.float32)
    centered = wide - average(wide)
    inverse = jax.lax.rsqrt(average(jnp.square(centered)) + EPS)
    y = (centered * inverse).astype(x.dtype)
    return y, (y, inverse)


def _backward(average, saved, gradient):
    y, inverse = saved
    wide, y = gradient.astype(jnp.float32), y.astype(jnp.float32)
    wide = wide - average(wide) - y * average(wide * y)
    return ((wide * inverse).astype(gradient.dtype),)


def _patches_backward(saved, gradient):
    # Without the barrier XLA converts the gradient to float32 before it rearranges the patches.
    return _backward(_patch_average, saved, jax.lax.optimization_barrier(gradient))


def _channel_average(x: Float[Array, "... C"]) -> Float[Array, "... 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)


def _patch_average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
    """Return for each pixel the mean over the 2×2 patch that contains it."""
    batch, height, width, _ = x.shape
    means = jnp.mean(x, axis=-1).reshape(batch, height // 2, 2, width // 2, 2)
    means = jnp.broadcast_to(jnp.mean(means, axis=(2, 4), keepdims=True), means.shape)
    return means.reshape(batch, height, width, 1)


standardize.defvjp(
    functools.partial(_forward, _channel_average), functools.partial(_backward, _channel_average)
)
standardize_patches.defvjp(functools.partial(_forward, _patch_average), _patches_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardize_levels(
    x: Float[Array, "B H W C"],
    groups: int,
    packed: PackedLevels,
    inside: Bool[Array, "B H W 1"] | None = None,
) -> Float[Array, "B H W C"]:
    """Scale each group of channels of each level of a packed map to mean 0 and variance 1.

    Each level is cut out before its conversion to float32, so no whole map is stored in float32.
    Values in the gaps are undefined. With `inside`, only these pixels count and have a gradient,
    and the others are undefined too.
    """
    return _levels_forward(x, groups, packed, inside)[0]


def _levels_forward(x, groups, packed, inside):
    means, inverses = [], []
    for level, part in zip(packed.unpack(x), _unpack(packed, inside)):
        means.append(_average(level.astype(jnp.float32), groups, part))
        centered = level.astype(jnp.float32) - means[-1]
        inverses.append(jax.lax.rsqrt(_average(jnp.square(centered), groups, part) + EPS))
    centered = x.astype(jnp.float32) - _spread(means, packed)
    y = (centered * _spread(inverses, packed)).astype(x.dtype)
    return y, (y, inverses, inside)


def _levels_backward(groups, packed, saved, gradient):
    y, inverses, inside = saved
    gradient_means, product_means = [], []
    for level, slope, part in zip(
        packed.unpack(y), packed.unpack(gradient), _unpack(packed, inside)
    ):
        slope = slope.astype(jnp.float32)
        gradient_means.append(_average(slope, groups, part))
        product_means.append(_average(slope * level.astype(jnp.float32), groups, part))
    wide = gradient.astype(jnp.float32) - _spread(gradient_means, packed)
    wide = wide - y.astype(jnp.float32) * _spread(product_means, packed)
    wide = wide * _spread(inverses, packed)
    if inside is not None:
        wide = jnp.where(inside, wide, 0.0)
    return wide.astype(gradient.dtype), None


def _unpack(packed: PackedLevels, inside: Array | None) -> list[Array | None]:
    return [None] * len(packed.sizes) if inside is None else packed.unpack(inside)


standardize_levels.defvjp(_levels_forward, _levels_backward)


def _average(
    level: Float[Array, "B H W C"], groups: int, inside: Bool[Array, "B H W 1"] | None
) -> Float[Array, "B 1 1 C"]:
    """Return for each channel the mean over its group and all pixels, or those `inside`.

    Pixels are averaged first: a reshape to groups of 8 channels would be padded to 128 on TPUs.
    """
    if inside is None:
        means = jnp.mean(level, axis=(1, 2))
    else:
        count = jnp.maximum(jnp.sum(inside, axis=(1, 2)), 1)  # an empty slot covers no pixel
        means = jnp.sum(jnp.where(inside, level, 0.0), axis=(1, 2)) / count
    return _group_average(means, groups)[:, None, None]


def _group_average(values: Float[Array, "... C"], groups: int) -> Float[Array, "... C"]:
    """Return for each channel the mean over its group."""
    *rest, channels = values.shape  # the batch may be a symbol, in an exported program
    grouped = values.reshape(*rest, groups, channels // groups)
    grouped = jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape)
    return grouped.reshape(values.shape)


def _spread(values: list[Float[Array, "B 1 1 C"]], packed: PackedLevels) -> Float[Array, "B H W C"]:
    """Return a packed map on which every pixel has its level's value.

    Selects instead of a gather, because XLA fuses them into the operation that reads the result.
    """
    return functools.reduce(
        lambda rest, entry: jnp.where(packed.level_mask(entry[0]), entry[1], rest),
        enumerate(values),
        jnp.zeros((), values[0].dtype),
    )


class LayerNorm(nnx.Module):
    """Normalization of each position's channels, with a learned scale and bias."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Return the normalized x, in the same dtype."""
        return self.scale_and_shift(standardize(x))

    def scale_and_shift(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Apply the learned scale and bias to values that are already standardized."""
        return x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalization of groups of channels over each level of a packed map (Wu & He 2018).

    The levels share the learned scale and bias, but not the statistics.
    """

    def __init__(self, width: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        packed: PackedLevels,
        inside: Bool[Array, "B H W 1"] | None = None,
    ) -> Float[Array, "B H W C"]:
        """Return the normalized packed map, in the same dtype; values in the gaps are undefined.

        With `inside`, only these pixels count in the statistics; the others are undefined too.
        """
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardize_levels(x, self.groups, packed, inside) * scale + bias

    def scale_and_offset(
        self,
        mean: Float[Array, "B levels C"],
        variance: Float[Array, "B levels C"],
    ) -> tuple[Float[Array, "B levels C"], Float[Array, "B levels C"]]:
        """Return the (scale, offset) that normalize a map with these statistics per channel.

        The normalized map is `x * scale + offset`.
        """
        middle = _group_average(mean, self.groups)
        variance = _group_average(variance + jnp.square(mean - middle), self.groups)
        scale = self.scale[...] * jax.lax.rsqrt(variance + EPS)
        return scale, self.bias[...] - middle * scale


class BatchNorm(nnx.Module):
    """Normalization of each channel over a batch, and by running statistics at inference.

    `mean` and `variance` are parameters without a gradient, so that checkpoints, averages and
    exports carry them; the training step moves them (`training/step.py`).
    """

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.mean = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((width,), jnp.float32))

    def statistics(
        self, x: Float[Array, "B K C"], counted: Bool[Array, "B K"]
    ) -> tuple[Float[Array, " C"], Float[Array, " C"]]:
        """Return mean and variance over the rows that count."""
        weights = counted[..., None] / jnp.maximum(jnp.sum(counted), 1)
        mean = jnp.sum(x * weights, axis=(0, 1))
        return mean, jnp.sum(jnp.square(x - mean) * weights, axis=(0, 1))

    def __call__(
        self,
        x: Float[Array, "B K C"],
        statistics: tuple[Float[Array, " C"], Float[Array, " C"]] | None = None,
    ) -> Float[Array, "B K C"]:
        """Return x normalized by the given mean and variance, or by the running ones."""
        fixed = jax.lax.stop_gradient((self.mean[...], self.variance[...]))
        mean, variance = statistics or fixed
        factor = self.scale[...] * jax.lax.rsqrt(variance + BATCH_NORM_EPS)
        return (x - mean) * factor + self.bias[...]
