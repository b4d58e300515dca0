"""Run blocks of equal shapes in sequence, unrolled or as a loop that compiles faster."""

import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree


def run_blocks(
    run: Callable[[nnx.Module, Array, PyTree], Array],
    blocks: Sequence[nnx.Module],
    x: Array,
    inputs: PyTree,
    *,
    loop: bool,
    period: int = 1,
) -> Array:
    """Return x after `x = run(block, x, input)` for each block.

    A loop needs at least two iterations of `period` blocks each; otherwise the blocks are written
    out. In profiles a block is named "block3" where it is written out. In a loop all iterations
    share one program, so a block is named by its place in the iteration: "loop/block1".

    Args:
        run: computes a block from its module, its activations and its input. The activations keep
            their shape.
        blocks: modules with equal parameters' shapes; block i and block i + period have the same
            static attributes.
        x: activations.
        inputs: arrays whose first axis has one entry per block, or None.
        loop: whether to loop over the blocks' stacked parameters. The values are the same, and the
            compiler sees one iteration instead of all blocks.
        period: blocks per iteration of the loop.

    Returns:
        The activations after the last block.
    """
    iterations = len(blocks) // period
    if not loop or iterations < 2 or len(blocks) % period:
        return _run_in_turn(run, blocks, x, inputs)

    groups = [nnx.List(blocks[i * period : (i + 1) * period]) for i in range(iterations)]
    graphs, states = zip(*map(nnx.split, groups))

    def iterate(x: Array, scanned: PyTree) -> tuple[Array, None]:
        state, inputs = scanned
        return _run_in_turn(run, nnx.merge(graphs[0], state), x, inputs), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    inputs = jax.tree.map(lambda a: a.reshape(iterations, period, *a.shape[1:]), inputs)
    with jax.named_scope("loop"):
        return jax.lax.scan(iterate, x, (stacked, inputs))[0]


def _run_in_turn(
    run: Callable[[nnx.Module, Array, PyTree], Array],
    blocks: Sequence[nnx.Module],
    x: Array,
    inputs: PyTree,
) -> Array:
    for number, block in enumerate(blocks):
        with jax.named_scope(f"block{number}"):
            x = run(block, x, jax.tree.map(operator.itemgetter(number), inputs))
    return x
