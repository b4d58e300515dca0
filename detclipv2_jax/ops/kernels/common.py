"""Building blocks of the kernels: calls with named references, gradients of weights, norms.

VMEM is the vector memory of a TPU core: on the chip, and therefore fast. A kernel runs once per
step of a grid. Pallas copies the blocks that a step needs into VMEM before it and the blocks that
it wrote back after it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, PyTree

EPS = 1e-5  # epsilon of the layer norms, as in models/norms.py
TILE = 16  # rows of a tile of bfloat16 in VMEM
LANES = 128  # columns of a tile
_VMEM_LIMIT = 100 * 2**20  # bytes that a kernel may use, where the chip has them

Ref = Any  # a reference to an array in VMEM: `ref[...]` reads it, `ref[...] = x` writes it
Refs = TypeVar("Refs")  # a NamedTuple: one field per input, output and scratch array of a kernel


@dataclasses.dataclass(frozen=True)
class Input:
    """An array that a kernel reads, and the block of it that each step of the grid sees."""

    array: Array
    block: pl.BlockSpec


@dataclasses.dataclass(frozen=True)
class Output:
    """An array that a kernel writes, and the block of it that each step of the grid sees."""

    shape: tuple[int, ...]
    dtype: Any
    block: pl.BlockSpec


def call(
    kernel: Callable[[Refs], None],
    refs: Refs,
    *,
    name: str,
    grid: tuple[int, ...],
    cost: pl.CostEstimate,
) -> Refs:
    """Run a kernel that receives its references by name.

    Pallas passes references by position; this function pairs each name with its array and block
    in one place, so that they cannot drift apart.

    Args:
      kernel: receives `refs` with a reference in place of each leaf.
      refs: a NamedTuple. First the fields of `Input`s, then those of `Output`s, then those of
        scratch arrays (such as `pltpu.VMEM(shape, dtype)`). A field is one of these or a tree.
      name: of the kernel, in profiles and in the compiled program.
      grid: steps along each axis. The cores of a chip may share the first axis.
      cost: floating-point operations and bytes, for the compiler's scheduler.

    Returns:
      `refs` with the result in place of each `Output` and None in place of everything else.
    """
    leaves, tree = jax.tree.flatten(refs)
    inputs = [leaf for leaf in leaves if isinstance(leaf, Input)]
    outputs = [leaf for leaf in leaves if isinstance(leaf, Output)]
    scratch = [leaf for leaf in leaves if not isinstance(leaf, Input | Output)]
    ordered = [*map(id, inputs), *map(id, outputs), *map(id, scratch)]
    if ordered != [*map(id, leaves)]:
        raise TypeError(
            f"{name}: the fields of {type(refs).__name__} are out of order. "
            "Put inputs first, then outputs, then scratch arrays."
        )
    semantics = ("parallel",) + ("arbitrary",) * (len(grid) - 1)
    results = pl.pallas_call(
        lambda *positional: kernel(jax.tree.unflatten(tree, positional)),
        name=name,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs],
        in_specs=[input.block for input in inputs],
        out_specs=[output.block for output in outputs],
        scratch_shapes=scratch,
        cost_estimate=cost,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=_VMEM_LIMIT
        ),
    )(*[input.array for input in inputs])
    placed = [*[None] * len(inputs), *results, *[None] * len(scratch)]
    return jax.tree.unflatten(tree, placed)


def whole(arrays: PyTree) -> PyTree:
    """Return inputs of which every step sees the whole array; each is copied only once."""

    def whole_array(array: Array) -> Input:
        return Input(array, pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim))

    return jax.tree.map(whole_array, arrays)


def scalars(array: Array) -> Input:
    """Return an input of which every step can read single numbers, from scalar memory (SMEM)."""
    return Input(array, pl.BlockSpec(memory_space=pltpu.SMEM))


def sums(cores: int, weights: PyTree) -> PyTree:
    """Return outputs for the gradients with respect to the weights.

    Each is float32, has the shape (cores, *shape of the weight), and holds one sum per core. Every
    step of a core sees the same block (1, *shape of the weight), and adds to it.
    """

    def sum_per_core(weight: Array) -> Output:
        rest = (0,) * weight.ndim
        index = lambda core, *_: (core, *rest)
        # One buffer is enough: the block does not change until its core is done.
        block = pl.BlockSpec((1, *weight.shape), index, pipeline_mode=pl.Buffered(1))
        return Output((cores, *weight.shape), jnp.float32, block)

    return jax.tree.map(sum_per_core, weights)


def differentiable(
    forward: Callable[..., Array], backward: Callable[..., tuple[Array, PyTree]]
) -> Callable[..., Array]:
    """Return a function of (tiling, x, factors, weights) that has gradients.

    Only the inputs are saved for the backward pass. There is no gradient with respect to the
    factors (zeros).

    Args:
      forward: (tiling, x, factors, weights) -> output.
      backward: (tiling, x, factors, weights, gradient of the output) -> (gradient of x, gradients
        of the weights as `sums`).
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def run(tiling: Any, x: Array, factors: Array | None, weights: PyTree) -> Array:
        return forward(tiling, x, factors, weights)

    def run_and_save(tiling, x, factors, weights):
        return forward(tiling, x, factors, weights), (x, factors, weights)

    def pull_back(tiling, saved, grad_out):
        x, factors, weights = saved
        grad_x, grad_weights = backward(tiling, x, factors, weights, grad_out)
        grad_weights = jax.tree.map(lambda cores: cores.sum(0), grad_weights)
        return grad_x, jax.tree.map(jnp.zeros_like, factors), grad_weights

    run.defvjp(run_and_save, pull_back)
    return run


def padded_bytes(itemsize: int, *shape: int) -> int:
    """Return the bytes of an array in VMEM, where its last two axes are padded to whole tiles."""
    *rest, rows, columns = shape
    return itemsize * math.prod(rest) * (-(-rows // 8) * 8) * (-(-columns // LANES) * LANES)


def clear(refs: PyTree) -> None:
    """Set every reference of a tree to zeros."""
    for ref in jax.tree.leaves(refs):
        ref[...] = jnp.zeros_like(ref)


def dot(a: Array, b: Array, *, left: int = 1, right: int = 0) -> Float[Array, "M N"]:
    """Return the matrix product over axis `left` of `a` and axis `right` of `b`, in float32."""
    axes = (((left,), (right,)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def sum_rows(x: Float[Array, "M N"]) -> Float[Array, "1 N"]:
    """Return the sum over the rows, in float32."""
    return jnp.sum(x.astype(jnp.float32), axis=0, keepdims=True)


def standardize(x: Float[Array, "M C"]) -> tuple[Float[Array, "M C"], Float[Array, "M 1"]]:
    """Return (x - mean) / sqrt(variance + EPS) of each row, and 1 / sqrt(variance + EPS).

    Both are float32.
    """
    wide = x.astype(jnp.float32)
    centered = wide - jnp.mean(wide, axis=1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(jnp.square(centered), axis=1, keepdims=True) + EPS)
    return centered * inverse, inverse


def standardize_backward(
    normal: Float[Array, "M C"], inverse: Float[Array, "M 1"], grad_normal: Float[Array, "M C"]
) -> Float[Array, "M C"]:
    """Return the gradient with respect to the input of `standardize`.

    With g the gradient of the output n: (g - mean(g) - n · mean(g · n)) / sqrt(variance + EPS).

    Args:
      normal, inverse: what `standardize` returned.
      grad_normal: the gradient with respect to `normal`.
    """
    along = jnp.mean(grad_normal * normal, axis=1, keepdims=True)
    return (grad_normal - jnp.mean(grad_normal, axis=1, keepdims=True) - normal * along) * inverse
