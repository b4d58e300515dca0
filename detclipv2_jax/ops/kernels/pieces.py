"""What the kernels have in common."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, PyTree

EPS = 1e-5  # of the norms, as models/norms.py
TILE = 16  # rows of a tile of bfloat16 in fast memory
LANES = 128  # columns of a tile
FAST_MEMORY = 100 * 2**20  # bytes that a kernel may take, if the chip has them


def size(itemsize: int, *shape: int) -> int:
    """Bytes of an array in fast memory, whose rows are padded to whole tiles."""
    *rest, rows, columns = shape
    return itemsize * math.prod(rest) * (-(-rows // 8) * 8) * (-(-columns // LANES) * LANES)


def branch(forward: Callable[..., Array], backward: Callable[..., list[Array]]) -> Callable:
    """A residual branch of (plan, x, factors, weights) with a gradient by x and by the weights.

    Args:
      forward: gives the branch of these.
      backward: of these and the gradient by the branch, gives that by x and, for each of the
        weights, its sums by core, as `sums` has them.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(plan: Any, x: Array, factors: Array | None, weights: PyTree) -> Array:
        return forward(plan, x, factors, weights)

    def keep_inputs(plan, x, factors, weights):
        return forward(plan, x, factors, weights), (x, factors, weights)

    def pull(plan, saved, gradient):
        x, factors, weights = saved
        by_x, *by_weights = backward(plan, x, factors, weights, gradient)
        by_weights = [cores.sum(0) for cores in by_weights]
        by_weights = jax.tree.unflatten(jax.tree.structure(weights), by_weights)
        return by_x, jax.tree.map(jnp.zeros_like, factors), by_weights

    run.defvjp(keep_inputs, pull)
    return run


def whole(array: Any) -> pl.BlockSpec:
    """All of an array at every step of the grid: it is fetched once."""
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def sums(cores: int, weights: PyTree) -> tuple[list[jax.ShapeDtypeStruct], list[pl.BlockSpec]]:
    """Where the gradient by each of the weights is summed in float32, by each core for itself."""
    shapes, specs = [], []
    for leaf in jax.tree.leaves(weights):
        shapes.append(jax.ShapeDtypeStruct((cores, *leaf.shape), jnp.float32))
        rest = (0,) * leaf.ndim
        index = lambda core, *_, rest=rest: (core, *rest)
        # One buffer: a sum stays where it is until its core is done.
        specs.append(pl.BlockSpec((1, *leaf.shape), index, pipeline_mode=pl.Buffered(1)))
    return shapes, specs


def clear(refs: list[Any]) -> None:
    """Zeros."""
    for ref in refs:
        ref[...] = jnp.zeros_like(ref)


def parameters(axes: int) -> pltpu.CompilerParams:
    """Of a call whose grid has so many axes: a chip's cores may share the first."""
    semantics = ("parallel",) + ("arbitrary",) * (axes - 1)
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=FAST_MEMORY)


def dot(a: Array, b: Array, *, left: int = 1, right: int = 0) -> Float[Array, "M N"]:
    """The product over a's axis `left` and b's axis `right`, summed in float32."""
    axes = (((left,), (right,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def total(x: Float[Array, "M N"]) -> Float[Array, "1 N"]:
    """The sum of the rows, in float32."""
    return jnp.sum(x.astype(jnp.float32), axis=0, keepdims=True)


def standardize(x: Float[Array, "M C"]) -> tuple[Float[Array, "M C"], Float[Array, "M 1"]]:
    """Zero mean and unit variance of each row, and what rows were multiplied by; float32."""
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(centered), axis=1, keepdims=True) + EPS)
    return centered * inverse, inverse


def standardize_backward(
    normal: Float[Array, "M C"], inverse: Float[Array, "M 1"], gradient: Float[Array, "M C"]
) -> Float[Array, "M C"]:
    """The gradient by what was standardized."""
    along = jnp.mean(gradient * normal, axis=1, keepdims=True)
    return (gradient - jnp.mean(gradient, axis=1, keepdims=True) - normal * along) * inverse
