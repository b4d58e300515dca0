"""The losses of dense prediction, computed in float32 whatever the dtype of the inputs.

The focal loss of the alignment between regions and concepts, the GIoU loss of boxes, and the binary
cross-entropy of centerness. None of them is normalized here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from detclipv2_jax.ops.boxes import giou

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., ICCV 2017, §5.1), as in ATSS
_BLOCK_LOGITS = 1 << 20  # logits per image that are in memory at a time: 4 MB of float32


def sigmoid_focal(
    logits: Float[Array, "*n"],
    targets: Num[Array, "*n"] | Bool[Array, "*n"],
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Float[Array, "*n"]:
    """Return the focal loss of each logit, in nats: -alpha_t (1 - p_t)^gamma log(p_t).

    Lin et al., ICCV 2017, eq. 5. The loss and its gradient are finite for every finite logit.

    Args:
      logits: before the sigmoid.
      targets: 0 or 1, or booleans.
      alpha: weight of targets that are 1; the others have the weight 1 - alpha.
      gamma: exponent that reduces the weight of well-classified logits.
    """
    positive = targets.astype(bool)
    # p_t = sigmoid(z) is the probability of the right answer.
    z = jnp.where(positive, logits, -logits).astype(jnp.float32)
    return jnp.where(positive, alpha, 1 - alpha) * _focal(z, gamma)


def alignment_loss(
    regions: Float[Array, "B K D"],
    texts: Float[Array, "M D"],
    bias: Float[Array, ""],
    matched_labels: Int[Array, "B K L"],
    anchor_mask: Bool[Array, "B K"],
    concept_mask: Bool[Array, " M"],
    scored: Bool[Array, "B M"],
    block: int = 0,
) -> Float[Array, ""]:
    """Return L_align before normalization: the focal loss summed over anchors and concepts.

    The logits are regions · textsᵀ + bias (Yao et al. 2023, §3). The target of an anchor is 1 for
    each of its own concepts and 0 for the others. A pair (anchor of image b, concept m) counts if
    `anchor_mask`, `concept_mask`, and either `scored[b, m]` or m is one of the anchor's own
    concepts. The gradient of a pair that does not count is exactly zero. The K × M logits of an
    image are never in memory at once: they are computed for `block` anchors at a time. Since
    the loss is a single sum, its gradient is taken from the same logits, with three matrix products
    in all, as many as without blocks. What is saved for the backward pass has the sizes of the
    inputs.

    Args:
      regions: features of the anchors.
      texts: features of the concepts, already multiplied by the similarity's scale.
      bias: added to all logits.
      matched_labels: the concepts (rows of `texts`) that each anchor should align with, up to L.
        -1 pads; an anchor with -1 only is a negative of all concepts.
      anchor_mask: anchors that count.
      concept_mask: concepts that count; others may hold anything, even NaN.
      scored: the concepts that each image may be a negative of. The paper scores every image on
        every concept; which images are not scored is ours (`data.batch.Batch.scored`).
      block: anchors per block; 0: about a million logits per image.
    """
    if not block:
        block = max(_BLOCK_LOGITS // max(len(texts), 1), 128)
    block = min(block, regions.shape[1])
    texts = jnp.where(concept_mask[:, None], texts, 0.0)  # a masked NaN must not spread
    bias = jnp.asarray(bias, jnp.float32)
    pairs = _Pairs(matched_labels, anchor_mask, scored & concept_mask, concept_mask)
    return _alignment(regions, texts, bias, pairs, block)


class _Pairs(NamedTuple):
    """Which pairs of an anchor and a concept count, and which of them are positive."""

    labels: Int[Array, "B K L"]
    anchor_mask: Bool[Array, "B K"]
    scored: Bool[Array, "B M"]
    concept_mask: Bool[Array, " M"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _alignment(regions, texts, bias, pairs, block):
    def add_block(total, first):
        taken = _take_block(first, block, regions, pairs)
        losses = sigmoid_focal(_logits(taken.regions, texts, bias), taken.positive)
        return total + jnp.sum(jnp.where(taken.valid, losses, 0.0)), None

    firsts = jnp.arange(0, regions.shape[1], max(block, 1))
    return jax.lax.scan(add_block, jnp.zeros((), jnp.float32), firsts)[0]


class _Gradients(NamedTuple):
    """Gradients of the alignment loss."""

    regions: Float[Array, "B K D"]
    texts: Float[Array, "M D"]
    bias: Float[Array, ""]


def _alignment_forward(regions, texts, bias, pairs, block):
    """Return the loss and, from the same logits, its `_Gradients`."""

    def add_block(carry, first):
        total, grads = carry
        taken = _take_block(first, block, regions, pairs)
        logits = _logits(taken.regions, texts, bias)
        losses, slope = _focal_and_slope(jnp.where(taken.positive, logits, -logits), GAMMA)
        weight = jnp.where(taken.valid, jnp.where(taken.positive, ALPHA, 1 - ALPHA), 0.0)
        grad_logits = weight * jnp.where(taken.positive, slope, -slope)
        # Add, since the last block may start within the one before it; its gradient is zero for
        # the anchors that they share.
        here = jax.lax.dynamic_slice_in_dim(grads.regions, taken.start, block, axis=1)
        here += jnp.einsum("bkm,md->bkd", grad_logits, texts).astype(here.dtype)
        grad_regions = jax.lax.dynamic_update_slice_in_dim(grads.regions, here, taken.start, axis=1)
        grad_texts = grads.texts + jnp.einsum(
            "bkm,bkd->md", grad_logits, taken.regions.astype(jnp.float32)
        )
        total += jnp.sum(weight * losses)
        grad_bias = grads.bias + jnp.sum(grad_logits)
        return (total, _Gradients(grad_regions, grad_texts, grad_bias)), None

    zero = jnp.zeros((), jnp.float32)
    zeros = _Gradients(jnp.zeros_like(regions), jnp.zeros(texts.shape, jnp.float32), zero)
    firsts = jnp.arange(0, regions.shape[1], max(block, 1))
    (total, grads), _ = jax.lax.scan(add_block, (zero, zeros), firsts)
    return total, grads._replace(texts=grads.texts.astype(texts.dtype))


def _alignment_backward(block, gradients, cotangent):
    scaled = (gradient * cotangent.astype(gradient.dtype) for gradient in gradients)
    return *scaled, None


_alignment.defvjp(_alignment_forward, _alignment_backward)


class _Block(NamedTuple):
    """Some consecutive anchors of each image."""

    start: Int[Array, ""]  # index of the first of them
    regions: Float[Array, "B block D"]
    positive: Bool[Array, "B block M"]  # whether the target of a logit is 1
    valid: Bool[Array, "B block M"]  # whether a logit counts


def _take_block(first, block, regions, pairs) -> _Block:
    """Return `block` anchors from `first` on.

    Where fewer are left, the block starts earlier; logits of anchors before `first` do not count
    again.
    """
    start = jnp.minimum(first, regions.shape[1] - block)
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, block, axis=1)
    new = cut(pairs.anchor_mask) & (start + jnp.arange(block) >= first)
    taken = jnp.where(new[..., None], cut(regions), 0.0)
    columns = jnp.arange(len(pairs.concept_mask), dtype=pairs.labels.dtype)
    # One comparison per label, which XLA fuses; a (B, block, L, M) array would be stored.
    own = jnp.moveaxis(cut(pairs.labels), -1, 0)
    positive = functools.reduce(jnp.logical_or, [label[..., None] == columns for label in own])
    counts = pairs.scored[:, None] | (positive & pairs.concept_mask)
    return _Block(start, taken, positive, new[..., None] & counts)


def _logits(regions, texts, bias):
    products = jnp.einsum("bkd,md->bkm", regions, texts, preferred_element_type=jnp.float32)
    return products + bias


def giou_loss(
    predictions: Float[Array, "*n 4"], targets: Float[Array, "*n 4"]
) -> Float[Array, "*n"]:
    """Return 1 - GIoU of corresponding boxes, in [0, 2) (Rezatofighi et al., CVPR 2019).

    Boxes are (x_min, y_min, x_max, y_max) in any unit.
    """
    return 1.0 - giou(predictions.astype(jnp.float32), targets.astype(jnp.float32))


def binary_cross_entropy(
    logits: Float[Array, "*n"], targets: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Return the cross-entropy of each logit with its target in [0, 1], in nats.

    -t log(sigmoid(z)) - (1 - t) log(1 - sigmoid(z)), computed without overflow.
    """
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * targets


# The derivative is written out. On the largest array of a step it costs half of what automatic
# differentiation of the formula costs, and it never raises (1 - p) = 0 to a negative power.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _focal(z: Float[Array, "*n"], gamma: float) -> Float[Array, "*n"]:
    """Return -(1 - p)^gamma log(p) with p = sigmoid(z)."""
    sigmoid = _sigmoid_parts(z)
    return sigmoid.q**gamma * sigmoid.cost


@_focal.defjvp
def _focal_jvp(gamma, primals, tangents):
    value, slope = _focal_and_slope(*primals, gamma)
    return value, slope * tangents[0]


def _focal_and_slope(
    z: Float[Array, "*n"], gamma: float
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Return `_focal` and its derivative by z."""
    p, q, cost = _sigmoid_parts(z)
    weight = q**gamma
    return weight * cost, -weight * (gamma * p * cost + q)


class _Sigmoid(NamedTuple):
    """The sigmoid of z and what derives from it, each to full precision."""

    p: Float[Array, "*n"]  # sigmoid(z)
    q: Float[Array, "*n"]  # 1 - p
    cost: Float[Array, "*n"]  # -log(p)


def _sigmoid_parts(z: Float[Array, "*n"]) -> _Sigmoid:
    """Return `_Sigmoid` of z, computed from a single exponential."""
    small = jnp.exp(-jnp.abs(z))
    above = z > 0
    share = 1.0 / (1.0 + small)
    p = jnp.where(above, 1.0, small) * share
    q = jnp.where(above, small, 1.0) * share
    return _Sigmoid(p, q, jnp.maximum(-z, 0.0) + jnp.log1p(small))
