"""Scores that select the regions of a captioned image for the contrastive loss.

The method of Yao et al. 2023 (arXiv 2304.04514, §3.3), and the alternatives of its §4.2.1.

Sizes: B images, K anchors per image, M concepts, G groups of images, N concepts per group, D
features.
"""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.ops.similarity import NEVER, check_choice, in_blocks

ProposalScore = Literal[
    "batch", "sample", "step", "centerness", "batch_centerness", "foreground", "iou"
]
HEAD_SCORES = ("centerness", "foreground", "iou")  # outputs of the head; they read no concept
# Concepts compared at a time, so that no device has to store the comparison of a whole step. With
# 6144 images on 32 devices, the 2134 anchors of 192 images at 320×320 pixels take 210 MB per block
# (2.5 GB without blocks). A multiple of 128, the width of a TPU's matrix unit.
_ANCHOR_BLOCK = 128


def concept_pools(
    text_ids: Int[Array, "B C"], score: ProposalScore, group: int
) -> Int[Array, "G N"]:
    """Return which concepts score the regions of each of G groups of images; -1 pads.

    "sample" pools the concepts of each image, "step" those of all images, the other scores that
    compare concepts those of `group` consecutive images. In the paper (Yao et al. 2023, §3.3) such
    a group is the batch of one device. Here its size is a number of the recipe, so that the
    selection does not depend on the machine. Scores of the head read no concepts.

    Args:
      text_ids: each image's concepts, -1 pads.
      score: as in `proposal_scores`.
      group: images per group.

    Raises:
      UserError: `group` does not divide B, or `score` is unknown.
    """
    check_choice("proposals.score", score, ProposalScore)
    images = len(text_ids)
    alone = {"sample": 1, "step": images} | dict.fromkeys(HEAD_SCORES, 1)
    group = alone.get(score, group)
    if images % group:
        raise UserError(
            f"proposals.group: {group} images per group do not divide the batch of {images}. "
            "Choose a divisor of the batch size."
        )
    return text_ids.reshape(images // group, -1)


def proposal_scores(
    regions: Float[Array, "B K D"],
    concepts: Float[Array, "M D"],
    pools: Int[Array, "G N"],
    head_logits: Mapping[str, Float[Array, "B K"]],
    *,
    score: ProposalScore,
    scale: Float[Array, ""] | float = 1.0,
    bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B K"]:
    """Return the scores that rank an image's regions for the contrastive loss; without gradient.

    Yao et al. 2023, §3.3 and §4.2.1: "batch" (their choice) is the highest similarity to any
    concept of the image's group, "sample" to any of the image's own concepts. "foreground", "iou"
    and "centerness" are the head's logits, unchanged. "batch_centerness" is
    sigmoid("batch") · sigmoid(centerness). "step" is ours: the highest similarity to any concept of
    the step. `concept_pools` makes the difference between the scores that compare concepts.

    Args:
      regions, concepts: features; scale · dot product + bias is the similarity, a detection logit.
        Scale and bias change the ranking of "batch_centerness" only.
      pools: what `concept_pools` returned. A region without any concept gets a very low score.
      head_logits: of the head, by the name of the score; read if `score` needs one of them.
      score: the kind of score.
      scale, bias: of the similarity.
    """
    regions, concepts, head_logits, scale, bias = jax.lax.stop_gradient(
        (regions, concepts, dict(head_logits), scale, bias)
    )
    if score in HEAD_SCORES:
        return head_logits[score].astype(jnp.float32)
    logits = scale * _best_in_pool(regions, concepts, pools) + bias
    if score == "batch_centerness":
        centerness = head_logits["centerness"].astype(jnp.float32)
        return jax.nn.sigmoid(logits) * jax.nn.sigmoid(centerness)
    return logits


def _best_in_pool(
    regions: Float[Array, "B K D"], concepts: Float[Array, "M D"], ids: Int[Array, "G N"]
) -> Float[Array, "B K"]:
    """Return the largest dot product of each region with a concept of its group, block by block."""
    images, anchors, features = regions.shape
    concepts = jnp.asarray(concepts)
    regions = regions.astype(jnp.float32).reshape(len(ids), -1, anchors, features)
    if ids.shape[1] >= len(concepts):
        # The table has fewer rows than the group has ids: score each row once. An id of -1 sets
        # the extra column, which is then cut off.
        owned = jax.vmap(lambda i: jnp.zeros(len(concepts) + 1, bool).at[i].set(True))(ids)[:, :-1]
        ids = jnp.broadcast_to(jnp.arange(len(concepts)), owned.shape)
    else:
        owned = ids >= 0

    def update(best, block):
        block_ids, block_owned = block[0].T, block[1].T  # (groups, block)
        rows = concepts[jnp.maximum(block_ids, 0)].astype(jnp.float32)
        dots = jnp.einsum("gbkd,gmd->gbkm", regions, rows, preferred_element_type=jnp.float32)
        dots = jnp.where(block_owned[:, None, None], dots, NEVER)
        return jnp.maximum(best, dots.max(axis=-1)), None

    best = jnp.full(regions.shape[:-1], NEVER)
    blocks = (in_blocks(ids.T, _ANCHOR_BLOCK), in_blocks(owned.T, _ANCHOR_BLOCK))
    best, _ = jax.lax.scan(update, best, blocks)
    return best.reshape(images, anchors)
