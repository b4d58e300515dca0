"""The dense losses, elementwise and in float32, whatever comes in."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from detclipv2_jax.ops.boxes import giou


def sigmoid_focal(
    logits: Float[Array, "*n"],
    targets: Num[Array, "*n"] | Bool[Array, "*n"],
    alpha: float = 0.25,
    gamma: float = 2.0,
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
    logits: Float[Array, "B K M"],
    matched_labels: Int[Array, "B K"],
    anchor_mask: Bool[Array, "B K"],
    concept_mask: Bool[Array, " M"],
) -> Float[Array, ""]:
    """L_align before its normaliser: the focal loss summed over valid anchors and concepts.

    `matched_labels` is the concept (a row of the step's table) that an anchor should align with, -1
    for none: then it should align with no concept.
    """
    concepts = jnp.arange(logits.shape[-1], dtype=matched_labels.dtype)
    targets = matched_labels[..., None] == concepts
    valid = anchor_mask[..., None] & concept_mask
    losses = sigmoid_focal(jnp.where(valid, logits, 0.0), targets)
    return jnp.sum(jnp.where(valid, losses, 0.0))


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
    p, q, cost = _sigmoid_parts(*primals)
    weight = q**gamma
    return weight * cost, -weight * (gamma * p * cost + q) * tangents[0]


def _sigmoid_parts(z: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], ...]:
    """p = sigmoid(z), 1 - p and -log(p), each to full precision, from one exponential."""
    small = jnp.exp(-jnp.abs(z))
    above = z > 0
    share = 1.0 / (1.0 + small)
    p = jnp.where(above, 1.0, small) * share
    q = jnp.where(above, small, 1.0) * share
    return p, q, jnp.maximum(-z, 0.0) + jnp.log1p(small)
