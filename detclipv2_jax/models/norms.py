"""Layer and group normalization with float32, two-pass statistics and a closed-form gradient.

The gradient is written out because what autodiff makes of it is several times as many loops, each
of which takes memory traffic to run and time to compile.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.models.packed_levels import PackedLevels

EPS = 1e-5


@jax.custom_vjp
def standardize(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Zero mean and unit variance of each position's channels: in float32, given in x's dtype."""
    return _forward(_channel_average, x)[0]


@jax.custom_vjp
def standardize_patches(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """The same of the channels of each 2×2 patch together; the sides are even.

    As `standardize` of patches that are laid side by side, but nothing is moved in float32.
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
    # Else the compiler makes the gradient wide first and moves its patches apart then.
    return _backward(_patch_average, saved, jax.lax.optimization_barrier(gradient))


def _channel_average(x: Float[Array, "... C"]) -> Float[Array, "... 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)


def _patch_average(x: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
    """Each pixel's patch's mean."""
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
    x: Float[Array, "B H W C"], groups: int, canvas: PackedLevels
) -> Float[Array, "B H W C"]:
    """The same of each group of channels of each level of a canvas; the gaps are undefined.

    Statistics are taken of levels cut from x before it is made wide: so no map is held in float32.
    """
    return _levels_forward(x, groups, canvas)[0]


def _levels_forward(x, groups, canvas):
    means, inverses = [], []
    for level in canvas.cut(x):
        means.append(_average(level.astype(jnp.float32), groups))
        centered = level.astype(jnp.float32) - means[-1]
        inverses.append(jax.lax.rsqrt(_average(jnp.square(centered), groups) + EPS))
    centered = x.astype(jnp.float32) - _spread(means, canvas)
    y = (centered * _spread(inverses, canvas)).astype(x.dtype)
    return y, (y, inverses)


def _levels_backward(groups, canvas, saved, gradient):
    y, inverses = saved
    plain, along = [], []
    for level, slope in zip(canvas.cut(y), canvas.cut(gradient)):
        slope = slope.astype(jnp.float32)
        plain.append(_average(slope, groups))
        along.append(_average(slope * level.astype(jnp.float32), groups))
    wide = gradient.astype(jnp.float32) - _spread(plain, canvas)
    wide = wide - y.astype(jnp.float32) * _spread(along, canvas)
    return ((wide * _spread(inverses, canvas)).astype(gradient.dtype),)


standardize_levels.defvjp(_levels_forward, _levels_backward)


def _average(level: Float[Array, "B H W C"], groups: int) -> Float[Array, "B 1 1 C"]:
    """Each channel's group's mean. Pixels first: groups of 8 channels would be padded to 128."""
    return _group_average(jnp.mean(level, axis=(1, 2)), groups)[:, None, None]


def _group_average(values: Float[Array, "... C"], groups: int) -> Float[Array, "... C"]:
    """Each channel's group's mean."""
    *rest, channels = values.shape  # the batch may be a symbol, in an exported program
    grouped = values.reshape(*rest, groups, channels // groups)
    grouped = jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape)
    return grouped.reshape(values.shape)


def _spread(values: list[Float[Array, "B 1 1 C"]], canvas: PackedLevels) -> Float[Array, "B H W C"]:
    """Each pixel's level's. Selects instead of a gather: they melt into what reads the result."""
    return functools.reduce(
        lambda rest, entry: jnp.where(canvas.member(entry[0]), entry[1], rest),
        enumerate(values),
        jnp.zeros((), values[0].dtype),
    )


class LayerNorm(nnx.Module):
    """Normalization of each position's channels, then a learned scale and bias."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Same shape and dtype."""
        return self.finish(standardize(x))

    def finish(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Scale and bias of what is standardized already."""
        return x * self.scale[...].astype(x.dtype) + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalization of groups of channels over each level of a canvas, then a scale and a bias.

    Wu & He 2018. The levels share scale and bias, not statistics.
    """

    def __init__(self, width: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"], canvas: PackedLevels) -> Float[Array, "B H W C"]:
        """Same shape and dtype; what stands in the gaps afterwards is undefined."""
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardize_levels(x, self.groups, canvas) * scale + bias

    def factors(
        self,
        mean: Float[Array, "B levels C"],
        variance: Float[Array, "B levels C"],
    ) -> tuple[Float[Array, "B levels C"], Float[Array, "B levels C"]]:
        """What to multiply a map by and what to add then, from its channels' statistics."""
        middle = _group_average(mean, self.groups)
        variance = _group_average(variance + jnp.square(mean - middle), self.groups)
        factor = self.scale[...] * jax.lax.rsqrt(variance + EPS)
        return factor, self.bias[...] - middle * factor
