"""Initial values: every parameter is constant or normal, and all normals come from one draw."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Draws:
    """What modules take as `rngs`: hands out consecutive pieces of one long normal draw.

    A random generator a parameter is what takes longest to compile in an initialization (half a
    minute for the smallest model here on two cores, a second this way). Flax layers ask
    `rngs.params()` for a key and hand it to their initializer; here that key is this object, which
    only the initializers made by `normal` understand.

    Args:
        values: the draw, at least as long as all that will be asked for; None gives zeros, where
            only shapes matter.
    """

    def __init__(self, values: Float[Array, " N"] | None = None):
        self._values = values
        self._taken = 0

    def params(self) -> "Draws":
        """Itself, where a key is expected."""
        return self

    def take(self, shape: tuple[int, ...]) -> Float[Array, "*shape"]:
        """The next values, as an array of `shape`."""
        start, self._taken = self._taken, self._taken + math.prod(shape)
        if self._values is None:
            return jnp.zeros(shape, jnp.float32)
        return jax.lax.slice(self._values, (start,), (self._taken,)).reshape(shape)


def normal(std: float):
    """An initializer of normal values with mean 0 and deviation `std`."""

    def initialize(draws: Draws, shape, dtype=jnp.float32, **_) -> Array:
        return (std * draws.take(shape)).astype(dtype)

    return initialize


def xavier(gain: float = 1.0):
    """An initializer of kernels (*window, in, out) with variance gain² · 2 / (inputs + outputs).

    Glorot & Bengio 2010.
    """

    def initialize(draws: Draws, shape, dtype=jnp.float32, **_) -> Array:
        fans = math.prod(shape[:-2]) * (shape[-2] + shape[-1])
        return normal(gain * math.sqrt(2 / fans))(draws, shape, dtype)

    return initialize
