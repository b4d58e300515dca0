"""Equal blocks one after another as a loop, which compiles as one of them does."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree


def run_blocks(
    run: Callable[[nnx.Module, Array, PyTree], Array],
    blocks: Sequence[nnx.Module],
    x: Array,
    options: PyTree,
    *,
    loop: bool,
    period: int = 1,
) -> Array:
    """x = run(block, x, option) for each block.

    Args:
      run: of a block, its input and its option, gives its output, of the input's shape.
      options: arrays with an entry a block on their first axis, or None for all.
      loop: whether to loop over the blocks' stacked parameters instead of writing each block out.
      period: every `period`-th block is alike but for its parameters; so many are a turn.
    """
    turns = len(blocks) // period
    if not loop or turns < 2 or len(blocks) % period:
        for number, block in enumerate(blocks):
            x = run(block, x, _entry(options, number))
        return x

    groups = [nnx.List(blocks[turn * period : (turn + 1) * period]) for turn in range(turns)]
    graphs, states = zip(*map(nnx.split, groups))

    def turn(x: Array, inputs: PyTree) -> tuple[Array, None]:
        state, options = inputs
        for number, block in enumerate(nnx.merge(graphs[0], state)):
            x = run(block, x, _entry(options, number))
        return x, None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    options = jax.tree.map(lambda o: o.reshape(turns, period, *o.shape[1:]), options)
    return jax.lax.scan(turn, x, (stacked, options))[0]


def _entry(options: PyTree, number: int) -> PyTree:
    return jax.tree.map(lambda option: option[number], options)
