"""Layer and group normalisation with float32, two-pass statistics and a closed-form gradient.

The gradient is written out because what autodiff makes of it is several times as many loops: a third of
all the kernels of a train step, each of which takes memory traffic to run and time to compile.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.models.initialise import Draws

EPS = 1e-5


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def standardise(x: Float[Array, "*shape"], axes: tuple[int, ...]) -> Float[Array, "*shape"]:
    """Zero mean and unit variance over `axes`; computed in float32, returned in x's dtype."""
    return _standardise(x, axes)[0]


def _standardise(x, axes):
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + EPS)
    return (centred * inverse).astype(x.dtype), inverse


def _forward(x, axes):
    y, inverse = _standardise(x, axes)
    return y, (y, inverse)


def _backward(axes, saved, gradient):
    y, inverse = saved
    wide, y = gradient.astype(jnp.float32), y.astype(jnp.float32)
    mean = jnp.mean(wide, axes, keepdims=True)
    along = jnp.mean(wide * y, axes, keepdims=True)
    return (((wide - mean - y * along) * inverse).astype(gradient.dtype),)


standardise.defvjp(_forward, _backward)


class LayerNorm(nnx.Module):
    """Normalisation of each position's channels, then a learned scale and bias."""

    def __init__(self, width: int, *, rngs: Draws):
        del rngs  # constant at the start
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Same shape and dtype."""
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardise(x, (-1,)) * scale + bias


class GroupNorm(nnx.Module):
    """Normalisation of groups of channels over a whole map (Wu & He 2018), then scale and bias."""

    def __init__(self, width: int, groups: int, *, rngs: Draws):
        del rngs  # constant at the start
        self.groups = groups
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Same shape and dtype."""
        batch, height, width, channels = x.shape
        grouped = x.reshape(batch, height * width, self.groups, channels // self.groups)
        scale, bias = self.scale[...].astype(x.dtype), self.bias[...].astype(x.dtype)
        return standardise(grouped, (1, 3)).reshape(x.shape) * scale + bias
