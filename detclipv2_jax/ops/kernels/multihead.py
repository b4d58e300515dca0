"""Multi-head attention within one unit of tokens in VMEM, forward and backward.

Heads whose channels lie in the same 128 lanes are read together. One head of such a group is
selected by setting all other lanes to zero; this costs the matrix unit nothing where a tile is 128
lanes wide.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from detclipv2_jax.ops.kernels.common import LANES, Ref, dot

# (head, its products q · kᵀ) -> the scores whose softmax is taken, T × T of a unit of T tokens.
Scores = Callable[[int, Float[Array, "T T"]], Float[Array, "T T"]]


class QKV(NamedTuple):
    """Queries (scaled), keys and values, or their gradients: (tokens, channels), heads in order."""

    query: Ref
    key: Ref
    value: Ref


class _Group(NamedTuple):
    """Heads that share the same lanes."""

    lanes: slice  # of the channels
    members: list[tuple[int, Array]]  # of each head: its number, and which of the lanes it owns


def supports(channels: int, heads: int) -> bool:
    """Whether every head lies within one tile of lanes."""
    return LANES % (channels // heads) == 0


def project(heads: int, tokens: Ref, weight: Ref, bias: Ref, qkv: QKV) -> None:
    """Write queries, keys and values of all tokens: tokens · weight + bias.

    Queries are scaled by 1 / sqrt(channels per head).

    Args:
      heads: number of heads.
      tokens: (tokens, C).
      weight, bias: (3, C, C) and (3, 1, C), for queries, keys and values.
      qkv: where the results go.
    """
    factors = ((tokens.shape[1] // heads) ** -0.5, 1.0, 1.0)
    for number, (ref, factor) in enumerate(zip(qkv, factors)):
        value = (dot(tokens[...], weight[number]) + bias[number]) * factor
        ref[...] = value.astype(ref.dtype)


def attend(heads: int, here: Any, scores: Scores, qkv: QKV, out: Ref) -> None:
    """Write the attention softmax(scores(q · kᵀ)) · v of one unit.

    Args:
      heads: number of heads.
      here: the unit's tokens, an index into the first axis of `qkv` and `out`.
      scores: what turns products into scores, by adding a bias or mask.
      qkv: what `project` wrote.
      out: where the result goes, (tokens, C).
    """
    for lanes, members in _groups(out.shape[1], heads):
        q, k, v = (ref[here, lanes] for ref in qkv)
        total = jnp.zeros(q.shape, jnp.float32)
        for head, own in members:
            weight = _weights(head, scores, q, k, own)
            total += jnp.where(own, dot(weight.astype(v.dtype), v), 0.0)
        out[here, lanes] = total.astype(out.dtype)


def attend_backward(
    heads: int,
    here: Any,
    scores: Scores,
    qkv: QKV,
    grad_out: Ref,
    out: Ref,
    grad_qkv: QKV,
    add_grad_scores: Callable[[int, Float[Array, "T T"]], None] = lambda head, grad: None,
) -> None:
    """Compute `attend` again, and the gradients of its inputs.

    With W = softmax(scores(q · kᵀ)) of one head and g the gradient of its output W · v:

      grad v = Wᵀ · g                    grad W = g · vᵀ
      grad S = W ⊙ (grad W - Σ W ⊙ grad W), the sum over keys
      grad q = grad S · k                grad k = grad Sᵀ · q

    The gradient of the queries is that before the scaling by 1 / sqrt(channels per head).

    Args:
      heads, here, scores, qkv, out: as in `attend`.
      grad_out: the gradient of `out`.
      grad_qkv: where the gradients go.
      add_grad_scores: receives each head and the gradient of its scores, grad S.
    """
    factor = (out.shape[1] // heads) ** -0.5
    for lanes, members in _groups(out.shape[1], heads):
        q, k, v = (ref[here, lanes] for ref in qkv)
        g = grad_out[here, lanes]
        total, grad_q, grad_k, grad_v = (jnp.zeros(q.shape, jnp.float32) for _ in range(4))
        for head, own in members:
            weight = _weights(head, scores, q, k, own)
            grad_weight = dot(_only(g, own), v, right=1)
            along = jnp.sum(weight * grad_weight, axis=1, keepdims=True)
            grad_score = weight * (grad_weight - along)
            add_grad_scores(head, grad_score)
            weight, grad_score = weight.astype(v.dtype), grad_score.astype(v.dtype)
            total += jnp.where(own, dot(weight, v), 0.0)
            grad_v += jnp.where(own, dot(weight, g, left=0), 0.0)
            grad_q += jnp.where(own, dot(grad_score, k), 0.0)
            grad_k += jnp.where(own, dot(grad_score, q, left=0), 0.0)
        out[here, lanes] = total.astype(out.dtype)
        for ref, value in zip(grad_qkv, (grad_q * factor, grad_k, grad_v)):
            ref[here, lanes] = value.astype(ref.dtype)


def _groups(channels: int, heads: int) -> list[_Group]:
    """Return the groups of heads whose channels lie in the same tile of lanes."""
    size, groups = channels // heads, []
    for start in range(0, channels, LANES):
        stop = min(start + LANES, channels)
        owner = lax.div(lax.broadcasted_iota(jnp.int32, (1, stop - start), 1), size)
        members = [
            (head, owner == head - start // size) for head in range(start // size, stop // size)
        ]
        groups.append(_Group(slice(start, stop), members))
    return groups


def _weights(head: int, scores: Scores, q: Array, k: Array, own: Array) -> Float[Array, "T T"]:
    """Return softmax(scores(q · kᵀ)) of one head; `own`: its lanes."""
    value = scores(head, dot(_only(q, own), k, right=1))
    value = jnp.exp(value - jnp.max(value, axis=1, keepdims=True))
    return value / jnp.sum(value, axis=1, keepdims=True)


def _only(x: Array, own: Array) -> Array:
    """Set the lanes of other heads to zero."""
    return jnp.where(own, x, jnp.zeros_like(x))
