"""Word-region contrast: the loss of image-text pairs, and the scores that select its regions.

The method of Yao et al. 2023 (arXiv 2304.04514, §3.3). Concepts are the rows of the step's table,
each once for the whole global batch. The text of image b is made of the concepts `text_ids[b]`;
-1 fills rows with fewer concepts. Every image is compared with every concept once; the similarity
of a text is looked up from that of its concepts afterwards.

Sizes: B images, P selected regions or K anchors per image, M concepts, C concepts per text, D
features.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError

Direction = Literal["text_to_image", "image_to_text", "both"]
Matching = Literal["max", "soft", "max_size"]
ProposalScore = Literal["batch", "sample", "classification", "centerness", "batch_centerness"]
# Concepts compared at a time, so that no device has to store the comparison of a whole step. With
# 6144 images on 32 devices, 192 images of 100 regions take 10 MB per block (4 GB without blocks),
# and their 2134 anchors at 320×320 pixels 210 MB (2.5 GB). Multiples of 128, the width of a TPU's
# matrix unit.
_REGION_BLOCK = 128
_ANCHOR_BLOCK = 128
_NEVER = -1e30  # acts as minus infinity, but stays finite under subtraction


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """L_cts. The defaults are those of Yao et al. 2023, the other values their ablations.

    direction: "text_to_image" asks for each text which image it belongs to, "image_to_text" the
        reverse, "both" takes the mean of the two.
    matching: how the similarities of a concept to the regions of an image become one: "max" takes
        the best region's, "soft" the mean weighted by their softmax (one to many), "max_size" that
        of the largest region (as in Detic).
    temperature: divides the similarities of images and texts.
    label_smoothing: share of the target that is spread evenly over all choices.
    soft_temperature: of the softmax over regions, in units of similarity; read by "soft" only.
    """

    direction: Direction = "text_to_image"
    matching: Matching = "max"
    temperature: float = 0.5
    label_smoothing: float = 0.1
    soft_temperature: float = 1.0

    def __post_init__(self):
        _check_choice("direction", self.direction, Direction)
        _check_choice("matching", self.matching, Matching)


def word_region_contrastive(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    areas: Float[Array, "B P"],
    concepts: Float[Array, "M D"],
    text_ids: Int[Array, "B C"],
    scale: Float[Array, ""] | float,
    cfg: ContrastiveConfig,
) -> Float[Array, ""]:
    """Return L_cts in nats: the cross-entropy of finding each text's image (or the reverse).

    Yao et al. 2023, eq. 3-5. The mean over the images that have both a region and a text; other
    images are not choices either. With n such images, label smoothing gives each the share
    1 / n. The loss of no images is 0.

    Args:
      regions, concepts: features; their dot product times `scale` is the similarity.
      region_mask: False for padding.
      areas: of the regions' boxes, in any unit; read by "max_size" matching only.
      text_ids: rows of `concepts` that each image's text is made of; -1 pads.
      scale: of the similarity.
      cfg: the variant of the loss.
    """
    similarity = image_text_similarity(
        regions, region_mask, areas, concepts, text_ids, scale, cfg.matching, cfg.soft_temperature
    )
    valid = region_mask.any(axis=-1) & (text_ids >= 0).any(axis=-1)
    logits = similarity / cfg.temperature
    losses = []
    if cfg.direction in ("text_to_image", "both"):  # rows: texts, choices: images
        losses.append(_cross_entropy(logits.T, valid, cfg.label_smoothing))
    if cfg.direction in ("image_to_text", "both"):
        losses.append(_cross_entropy(logits, valid, cfg.label_smoothing))
    return sum(losses) / len(losses)


@jax.named_scope("word_region_similarity")
def image_text_similarity(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    areas: Float[Array, "B P"],
    concepts: Float[Array, "M D"],
    text_ids: Int[Array, "T C"],
    scale: Float[Array, ""] | float = 1.0,
    matching: Matching = "max",
    soft_temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Return the similarity of every image with every text, float32.

    It is the mean over the text's concepts of their similarity to the image, which `matching`
    derives from the regions (see `ContrastiveConfig`; Yao et al. 2023, eq. 3-4). It is 0 for an
    image without regions and for a text without concepts.

    On a mesh, with the images sharded and the concepts replicated, only ids and vectors of length B
    are communicated forward, and the concepts' gradient backward.

    Args:
      regions, region_mask, areas, concepts, scale: as in `word_region_contrastive`.
      text_ids: rows of `concepts` that each of T texts is made of; -1 pads.
      matching, soft_temperature: as in `ContrastiveConfig`.
    """
    regions = regions.astype(jnp.float32) * scale
    concepts = concepts.astype(jnp.float32)
    if matching == "max_size":
        largest = jnp.argmax(jnp.where(region_mask, areas, -1.0), axis=-1)
        regions = jnp.take_along_axis(regions, largest[:, None, None], axis=1)
        region_mask = region_mask.any(axis=-1, keepdims=True)
    # (M, B): a text's concepts are then contiguous rows.
    if matching == "soft":
        by_concept = _softly_matched(regions, region_mask, concepts, soft_temperature)
    else:
        by_concept = _best_matched(regions, region_mask, concepts)

    owned = text_ids >= 0
    rows = jnp.where(owned[..., None], by_concept[jnp.maximum(text_ids, 0)], 0.0)
    return (rows.sum(axis=1) / jnp.maximum(owned.sum(axis=-1, keepdims=True), 1)).T


def concept_pools(
    text_ids: Int[Array, "B C"], score: ProposalScore, group: int
) -> Int[Array, "G N"]:
    """Return which concepts score the regions of each of G groups of images; -1 pads.

    "sample" pools the concepts of each image, "classification" those of all images, every other
    score those of `group` consecutive images. In the paper (Yao et al. 2023, §3.3) such a group is
    the batch of one device. Here its size is a number of the recipe, so that the selection does not
    depend on the machine.

    Args:
      text_ids: each image's concepts, -1 pads.
      score: as in `proposal_scores`.
      group: images per group.

    Raises:
      UserError: `group` does not divide B, or `score` is unknown.
    """
    _check_choice("proposals.score", score, ProposalScore)
    images = len(text_ids)
    group = {"sample": 1, "centerness": 1, "classification": images}.get(score, group)
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
    centerness: Float[Array, "B K"],
    *,
    score: ProposalScore,
    scale: Float[Array, ""] | float = 1.0,
    bias: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B K"]:
    """Return the scores that rank an image's regions for the contrastive loss; without gradient.

    Yao et al. 2023, §3.3. "batch" (their choice) is the highest similarity to any concept of the
    image's group, "sample" to any of the image's own concepts, "classification" to any concept of
    the step; `concept_pools` makes the difference. "centerness" is the head's logit, unchanged.
    "batch_centerness" is sigmoid("batch") · sigmoid(centerness).

    Args:
      regions, concepts: features; scale · dot product + bias is the similarity, a detection logit.
        Scale and bias change the ranking of "batch_centerness" only.
      pools: what `concept_pools` returned. A region without any concept gets a very low score.
      centerness: logits of the head.
      score: the kind of score.
      scale, bias: of the similarity.
    """
    regions, concepts, centerness, scale, bias = jax.lax.stop_gradient(
        (regions, concepts, centerness, scale, bias)
    )
    if score == "centerness":
        return centerness.astype(jnp.float32)
    logits = scale * _best_in_pool(regions, concepts, pools) + bias
    if score == "batch_centerness":
        return jax.nn.sigmoid(logits) * jax.nn.sigmoid(centerness.astype(jnp.float32))
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
        dots = jnp.where(block_owned[:, None, None], dots, _NEVER)
        return jnp.maximum(best, dots.max(axis=-1)), None

    best = jnp.full(regions.shape[:-1], _NEVER)
    blocks = (_in_blocks(ids.T, _ANCHOR_BLOCK), _in_blocks(owned.T, _ANCHOR_BLOCK))
    best, _ = jax.lax.scan(update, best, blocks)
    return best.reshape(images, anchors)


def _dots(regions: Float[Array, "B P D"], concepts: Float[Array, "M D"]) -> Float[Array, "B P M"]:
    return jnp.einsum("bpd,md->bpm", regions, concepts, preferred_element_type=jnp.float32)


class _BestMatches(NamedTuple):
    """What the backward pass of `_best_matched` needs."""

    regions: Float[Array, "B P D"]
    present: Bool[Array, " B"]  # images that have a region
    concepts: Float[Array, "M D"]
    which: Int[Array, "M B"]  # number of the best region


@jax.custom_vjp
def _best_matched(
    regions: Float[Array, "B P D"], region_mask: Bool[Array, "B P"], concepts: Float[Array, "M D"]
) -> Float[Array, "M B"]:
    """Return the similarity of each concept to its best region of each image; 0 without a region.

    Of equal regions the first is the best. The backward pass needs the number of the best region,
    a byte per concept and image, but no similarity: it is two matrix products, in blocks again.
    """
    return _best_matched_forward(regions, region_mask, concepts)[0]


def _best_matched_forward(regions, region_mask, concepts):
    number = jnp.uint8 if regions.shape[1] <= 256 else jnp.int32

    def compare(block):
        dots = jnp.where(region_mask[..., None], _dots(regions, block), _NEVER)
        which = jnp.argmax(dots, axis=1)
        return dots.max(axis=1).T, which.astype(number).T

    best, which = (
        found.reshape(-1, len(regions))[: len(concepts)]
        for found in jax.lax.map(compare, _in_blocks(concepts, _REGION_BLOCK))
    )
    present = region_mask.any(axis=1)
    return jnp.where(present, best, 0.0), _BestMatches(regions, present, concepts, which)


def _best_matched_backward(saved, gradient):
    regions, present, concepts, which = saved
    places = jnp.arange(regions.shape[1], dtype=which.dtype)

    def add_block(grad_regions, block):
        rows, chosen, slope = block
        weights = jnp.where(chosen[..., None] == places, slope[..., None], 0.0)  # (block, B, P)
        grad_regions += jnp.einsum("mbp,md->bpd", weights, rows)
        return grad_regions, jnp.einsum("mbp,bpd->md", weights, regions)

    slope = jnp.where(present, gradient, 0.0)
    blocks = tuple(_in_blocks(rows, _REGION_BLOCK) for rows in (concepts, which, slope))
    grad_regions, grad_concepts = jax.lax.scan(add_block, jnp.zeros_like(regions), blocks)
    return grad_regions, None, grad_concepts.reshape(-1, concepts.shape[1])[: len(concepts)]


_best_matched.defvjp(_best_matched_forward, _best_matched_backward)


def _softly_matched(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    concepts: Float[Array, "M D"],
    temperature: float,
) -> Float[Array, "M B"]:
    """Return the mean similarity of each concept to an image's regions, weighted by their softmax.

    The backward pass computes each block again: one more matrix product instead of gigabytes.
    """

    def compare(block):
        similarity, mask = _dots(regions, block), region_mask[..., None]
        weights = jax.nn.softmax(jnp.where(mask, similarity / temperature, _NEVER), axis=1)
        return jnp.sum(jnp.where(mask, weights * similarity, 0.0), axis=1).T

    results = jax.lax.map(jax.checkpoint(compare), _in_blocks(concepts, _REGION_BLOCK))
    return results.reshape(-1, len(regions))[: len(concepts)]


def _in_blocks(rows: Array, block: int) -> Array:
    """Return (M, ...) as (blocks, block, ...), with zeros at the end of the last block."""
    block = min(block, len(rows))
    padding = [(0, -len(rows) % block)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, block, *rows.shape[1:])


def _cross_entropy(
    logits: Float[Array, "B B"], valid: Bool[Array, " B"], smoothing: float
) -> Float[Array, ""]:
    """Return the mean cross-entropy of valid rows with the diagonal, among the valid columns.

    The target of row b has 1 - smoothing at column b, and smoothing / n at each of n columns.
    """
    count = jnp.maximum(valid.sum(), 1)
    logits = jnp.where(valid, logits, _NEVER)
    log_p = jnp.where(valid, jax.nn.log_softmax(logits, axis=-1), 0.0)
    losses = -(1 - smoothing) * jnp.diagonal(log_p) - smoothing * log_p.sum(axis=-1) / count
    return jnp.where(valid, losses, 0.0).sum() / count


def _check_choice(field: str, value: str, choices) -> None:
    if value not in get_args(choices):
        raise UserError(f"{field}: {value!r} is not one of {', '.join(get_args(choices))}.")
