"""Initializers of parameters; all normally distributed parameters come from one random draw."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Draws:
    """Hands out consecutive slices of one long normal draw; modules take it as `rngs`.

    One random generator per parameter dominates the compile time of an initialization: half a
    minute for the smallest model on two cores, against one second with a single draw. Flax layers
    ask `rngs.params()` for a key and pass it to their initializer. Here that key is this object,
    which only the initializers of this module understand.

    Args:
        values: the draw, at least as long as all parameters together. None yields zeros, for
            callers that need only shapes.
    """

    def __init__(self, values: Float[Array, " N"] | None = None):
        self._values = values
        self._taken = 0

    def params(self) -> "Draws":
        """Return this object where Flax expects a random key."""
        return self

    def take(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """Return the next values of the draw as an array of `shape`."""
        start, self._taken = self._taken, self._taken + math.prod(shape)
        if self._values is None:
            return jnp.zeros(shape, jnp.float32)
        return jax.lax.slice(self._values, (start,), (self._taken,)).reshape(shape)


def normal(std: float):
    """Return an initializer of normal values with mean 0 and standard deviation `std`."""

    def initialize(draws: Draws, shape, dtype=jnp.float32, **_) -> Array:
        return (std * draws.take(shape)).astype(dtype)

    return initialize


def xavier(gain: float = 1.0):
    """Return an initializer of kernels (*window, in, out) by Glorot & Bengio 2010.

    The variance is gain² · 2 / (fan_in + fan_out).
    """

    def initialize(draws: Draws, shape, dtype=jnp.float32, **_) -> Array:
        fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return normal(gain * math.sqrt(2 / fans))(draws, shape, dtype)

    return initialize
