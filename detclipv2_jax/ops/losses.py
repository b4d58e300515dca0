"""The dense losses, elementwise and in float32, whatever comes in."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from detclipv2_jax.ops.boxes import giou

ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., ICCV 2017; ATSS's)
_BLOCK_LOGITS = 1 << 20  # logits an image that are held at a time: 4 MB of float32


def sigmoid_focal(
    logits: Float[Array, "*n"],
    targets: Num[Array, "*n"] | Bool[Array, "*n"],
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Float[Array, "*n"]:
    """Focal loss of each logit, in nats: -alpha_t (1 - p_t)^gamma log(p_t).

    Lin et al., ICCV 2017, eq. 5. `targets` are 0 or 1 (or booleans). Finite, with a finite
    gradient, for every finite logit.
    """
    positive = targets.astype(bool)
    # z is the logit towards the right answer, p_t its sigmoid.
    z = jnp.where(positive, logits, -logits).astype(jnp.float32)
    return jnp.where(positive, alpha, 1 - alpha) * _focal(z, gamma)


def alignment_loss(
    regions: Float[Array, "B K D"],
    texts: Float[Array, "M D"],
    bias: Float[Array, ""],
    matched_labels: Int[Array, "B K"],
    anchor_mask: Bool[Array, "B K"],
    concept_mask: Bool[Array, " M"],
    block: int = 0,
) -> Float[Array, ""]:
    """L_align before its normalizer: the focal loss summed over valid anchors and concepts.

    The logits are regions · textsᵀ + bias: the texts come multiplied by the similarity's scale.
    `matched_labels` is the concept (a row of the step's table) that an anchor should align with, -1
    for none: then it should align with no concept.

    The K × M logits of an image are never held. They are made for `block` anchors at a time (0
    chooses: about a million logits an image), and since the loss is one sum, its gradient is
    taken while they are there: three matrix products in all, as without blocks. What is kept for
    the backward pass has the sizes of the inputs.
    """
    if not block:
        block = max(_BLOCK_LOGITS // max(len(texts), 1), 128)
    block = min(block, regions.shape[1])
    texts = jnp.where(concept_mask[:, None], texts, 0.0)  # a masked NaN must not spread
    bias = jnp.asarray(bias, jnp.float32)
    return _alignment(regions, texts, bias, matched_labels, anchor_mask, concept_mask, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _alignment(regions, texts, bias, labels, anchor_mask, concept_mask, block):
    def one(total, first):
        _, part, positive, valid = _block(first, block, regions, labels, anchor_mask, concept_mask)
        losses = sigmoid_focal(_logits(part, texts, bias), positive)
        return total + jnp.sum(jnp.where(valid, losses, 0.0)), None

    firsts = jnp.arange(0, regions.shape[1], max(block, 1))
    return jax.lax.scan(one, jnp.zeros((), jnp.float32), firsts)[0]


def _alignment_forward(regions, texts, bias, labels, anchor_mask, concept_mask, block):
    """The loss and, from the same logits, its gradient by regions, texts and bias."""

    def one(carry, first):
        total, by_regions, by_texts, by_bias = carry
        start, part, positive, valid = _block(
            first, block, regions, labels, anchor_mask, concept_mask
        )
        logits = _logits(part, texts, bias)
        losses, slope = _focal_and_slope(jnp.where(positive, logits, -logits), GAMMA)
        weight = jnp.where(valid, jnp.where(positive, ALPHA, 1 - ALPHA), 0.0)
        by_logits = weight * jnp.where(positive, slope, -slope)
        # Adding, since the last block may begin within the one before it: zeros for those anchors.
        place = jax.lax.dynamic_slice_in_dim(by_regions, start, block, axis=1)
        place += jnp.einsum("bkm,md->bkd", by_logits, texts).astype(place.dtype)
        by_regions = jax.lax.dynamic_update_slice_in_dim(by_regions, place, start, axis=1)
        by_texts += jnp.einsum("bkm,bkd->md", by_logits, part.astype(jnp.float32))
        total += jnp.sum(weight * losses)
        return (total, by_regions, by_texts, by_bias + jnp.sum(by_logits)), None

    zero = jnp.zeros((), jnp.float32)
    begin = (zero, jnp.zeros_like(regions), jnp.zeros(texts.shape, jnp.float32), zero)
    firsts = jnp.arange(0, regions.shape[1], max(block, 1))
    (total, by_regions, by_texts, by_bias), _ = jax.lax.scan(one, begin, firsts)
    return total, (by_regions, by_texts.astype(texts.dtype), by_bias)


def _alignment_backward(block, gradients, cotangent):
    scaled = (gradient * cotangent.astype(gradient.dtype) for gradient in gradients)
    return *scaled, None, None, None


_alignment.defvjp(_alignment_forward, _alignment_backward)


def _block(first, block, regions, labels, anchor_mask, concept_mask):
    """`block` anchors from `first` on, moved back where fewer are left.

    Returns their start, their regions, which of their logits should be high, and which count: those
    of anchors before `first` did already.
    """
    start = jnp.minimum(first, regions.shape[1] - block)
    cut = lambda array: jax.lax.dynamic_slice_in_dim(array, start, block, axis=1)
    new = cut(anchor_mask) & (start + jnp.arange(block) >= first)
    part = jnp.where(new[..., None], cut(regions), 0.0)
    columns = jnp.arange(len(concept_mask), dtype=labels.dtype)
    return start, part, cut(labels)[..., None] == columns, new[..., None] & concept_mask


def _logits(regions, texts, bias):
    products = jnp.einsum("bkd,md->bkm", regions, texts, preferred_element_type=jnp.float32)
    return products + bias


def giou_loss(
    predictions: Float[Array, "*n 4"], targets: Float[Array, "*n 4"]
) -> Float[Array, "*n"]:
    """1 - GIoU of boxes pair by pair, in [0, 2)."""
    return 1.0 - giou(predictions.astype(jnp.float32), targets.astype(jnp.float32))


def binary_cross_entropy(
    logits: Float[Array, "*n"], targets: Float[Array, "*n"]
) -> Float[Array, "*n"]:
    """Cross-entropy of each logit with its target in [0, 1], in nats."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softplus(logits) - logits * targets


# The derivative is written out: it costs half of what differentiating the formula does, on the
# largest array of a step, and never raises (1 - p) = 0 to a negative power.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _focal(z: Float[Array, "*n"], gamma: float) -> Float[Array, "*n"]:
    p, q, cost = _sigmoid_parts(z)
    return q**gamma * cost


@_focal.defjvp
def _focal_jvp(gamma, primals, tangents):
    value, slope = _focal_and_slope(*primals, gamma)
    return value, slope * tangents[0]


def _focal_and_slope(z: Float[Array, "*n"], gamma: float) -> tuple[Float[Array, "*n"], ...]:
    p, q, cost = _sigmoid_parts(z)
    weight = q**gamma
    return weight * cost, -weight * (gamma * p * cost + q)


def _sigmoid_parts(z: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], ...]:
    """p = sigmoid(z), 1 - p and -log(p), each to full precision, from one exponential."""
    small = jnp.exp(-jnp.abs(z))
    above = z > 0
    share = 1.0 / (1.0 + small)
    p = jnp.where(above, 1.0, small) * share
    q = jnp.where(above, small, 1.0) * share
    return p, q, jnp.maximum(-z, 0.0) + jnp.log1p(small)
