"""Multi-head attention within a unit of rows in fast memory, forward and backward.

Heads whose channels lie in the same 128 lanes are read together; a head is these lanes with all
others set to zero, which costs the matrix unit nothing where a tile is 128 wide.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels.pieces import LANES, dot

# Of a head and its products of queries and keys: what the softmax is taken of.
Scores = Callable[[int, Float[Array, "T T"]], Float[Array, "T T"]]


def supports(channels: int, heads: int) -> bool:
    """Is no head in two tiles?"""
    return LANES % (channels // heads) == 0


def attend(heads: int, here: Any, scores: Scores, operands: tuple[Any, Any, Any], out: Any) -> None:
    """The attention of the rows `here` of queries (scaled), keys and values, into those of `out`.

    Each is a reference to (rows, channels), all heads side by side.
    """
    for lanes, members in _groups(out.shape[1], heads):
        q, k, v = (operand[here, lanes] for operand in operands)
        total = jnp.zeros(q.shape, jnp.float32)
        for head, mine in members:
            weight = _weights(head, scores, q, k, mine)
            total += jnp.where(mine, dot(weight.astype(v.dtype), v), 0.0)
        out[here, lanes] = total.astype(out.dtype)


def attend_backward(
    heads: int,
    here: Any,
    scores: Scores,
    operands: tuple[Any, Any, Any],
    gradient: Any,
    out: Any,
    by_operands: tuple[Any, Any, Any],
    by_scores: Callable[[int, Float[Array, "T T"]], None],
) -> None:
    """`attend` again and, from the gradient by its output, that by each operand.

    `by_scores` is given that by each head's scores.
    """
    factor = (out.shape[1] // heads) ** -0.5
    for lanes, members in _groups(out.shape[1], heads):
        q, k, v = (operand[here, lanes] for operand in operands)
        g = gradient[here, lanes]
        total, by_q, by_k, by_v = (jnp.zeros(q.shape, jnp.float32) for _ in range(4))
        for head, mine in members:
            weight = _weights(head, scores, q, k, mine)
            by_weight = dot(_only(g, mine), v, right=1)
            by_score = weight * (by_weight - jnp.sum(weight * by_weight, axis=1, keepdims=True))
            by_scores(head, by_score)
            weight, by_score = weight.astype(v.dtype), by_score.astype(v.dtype)
            total += jnp.where(mine, dot(weight, v), 0.0)
            by_v += jnp.where(mine, dot(weight, g, left=0), 0.0)
            by_q += jnp.where(mine, dot(by_score, k), 0.0)
            by_k += jnp.where(mine, dot(by_score, q, left=0), 0.0)
        out[here, lanes] = total.astype(out.dtype)
        for by_operand, value in zip(by_operands, (by_q * factor, by_k, by_v)):
            by_operand[here, lanes] = value.astype(by_operand.dtype)


def project(heads: int, tokens: Any, qkv: Any, bias: Any, operands: tuple[Any, Any, Any]) -> None:
    """Scaled queries, keys and values of all tokens."""
    factors = ((tokens.shape[1] // heads) ** -0.5, 1.0, 1.0)
    for number, (operand, factor) in enumerate(zip(operands, factors)):
        value = (dot(tokens[...], qkv[number]) + bias[number]) * factor
        operand[...] = value.astype(operand.dtype)


def _groups(channels: int, heads: int) -> list[tuple[slice, list[tuple[int, Array]]]]:
    """Lanes that are read together, and in them each head and which lanes are its own."""
    size, groups = channels // heads, []
    for start in range(0, channels, LANES):
        stop = min(start + LANES, channels)
        owner = lax.div(lax.broadcasted_iota(jnp.int32, (1, stop - start), 1), size)
        members = [
            (head, owner == head - start // size) for head in range(start // size, stop // size)
        ]
        groups.append((slice(start, stop), members))
    return groups


def _weights(head: int, scores: Scores, q: Array, k: Array, mine: Array) -> Float[Array, "T T"]:
    value = scores(head, dot(_only(q, mine), k, right=1))
    value = jnp.exp(value - jnp.max(value, axis=1, keepdims=True))
    return value / jnp.sum(value, axis=1, keepdims=True)


def _only(x: Array, mine: Array) -> Array:
    return jnp.where(mine, x, jnp.zeros_like(x))
