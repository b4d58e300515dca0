"""Layer and group normalisation with float32, two-pass statistics and a closed-form gradient.

The gradient is written out because what autodiff makes of it is several times as many loops, each
of which takes memory traffic to run and time to compile.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.models.canvas import Canvas

EPS = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def standardise(
    x: Float[Array, "*shape"], average: Callable, spread: Callable
) -> Float[Array, "*shape"]:
    """Zero mean and unit variance of each set of entries, in float32, returned in x's dtype.

    Args:
        x: what to normalise.
        average: the mean of each set.
        spread: brings these back to the entries of their sets, or to what broadcasts to them.
    """
    return _forward(x, average, spread)[0]


def _forward(x, average, spread):
    wide = x.astype(jnp.float32)
    centred = wide - spread(average(wide))
    inverse = jax.lax.rsqrt(average(jnp.square(centred)) + EPS)
    y = (centred * spread(inverse)).astype(x.dtype)
    return y, (y, inverse)


def _backward(average, spread, saved, gradient):
    y, inverse = saved
    wide, y = gradient.astype(jnp.float32), y.astype(jnp.float32)
    wide = wide - spread(average(wide)) - y * spread(average(wide * y))
    return ((wide * spread(inverse)).astype(gradient.dtype),)


standardise.defvjp(_forward, _backward)


class LayerNorm(nnx.Module):
    """Normalisation of each position's channels, then a learned scale and bias."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Same shape and dtype."""
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardise(x, _channel_average, _identity) * scale + bias


class GroupNorm(nnx.Module):
    """Normalisation of groups of channels over each level of a canvas, then a scale and a bias.

    Wu & He 2018. The levels share scale and bias, not statistics.
    """

    def __init__(self, width: int, groups: int):
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"], canvas: Canvas) -> Float[Array, "B H W C"]:
        """Same shape and dtype; what stands in the gaps afterwards is undefined."""
        average = functools.partial(_level_average, self.groups, canvas)
        spread = functools.partial(_level_spread, x.shape[-1] // self.groups, canvas)
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardise(x, average, spread) * scale + bias


def _channel_average(x: Float[Array, "... C"]) -> Float[Array, "... 1"]:
    return jnp.mean(x, axis=-1, keepdims=True)


def _identity(x: Float[Array, "... 1"]) -> Float[Array, "... 1"]:
    return x


def _level_average(
    groups: int, canvas: Canvas, x: Float[Array, "B H W C"]
) -> Float[Array, "B L G"]:
    levels = [
        level.reshape(x.shape[0], -1, groups, x.shape[-1] // groups) for level in canvas.cut(x)
    ]
    return jnp.stack([jnp.mean(level, axis=(1, 3)) for level in levels], axis=1)


def _level_spread(
    size: int, canvas: Canvas, means: Float[Array, "B L G"]
) -> Float[Array, "B H W C"]:
    """Selects instead of a gather: they melt into whatever reads the result."""
    means = jnp.repeat(means, size, axis=-1)[:, :, None, None]
    return functools.reduce(
        lambda rest, level: jnp.where(canvas.member(level), means[:, level], rest),
        range(len(canvas.sizes)),
        jnp.zeros((), means.dtype),
    )
