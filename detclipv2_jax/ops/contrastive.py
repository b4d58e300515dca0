"""Word-region contrast: what image-text pairs teach, and which regions take part.

The method is DetCLIPv2's (arXiv 2304.04514, section 3). Concepts are the rows of the step's table,
each once for the whole global batch; an image owns the rows in its line of `text_ids`, -1 where it
has no more. Every image is compared with every concept once, and a text's similarity is gathered
from its concepts' afterwards.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError

Direction = Literal["text_to_image", "image_to_text", "both"]
Matching = Literal["max", "soft", "max_size"]
ProposalScore = Literal["batch", "sample", "classification", "centerness", "batch_centerness"]
# Concepts compared at a time, so that no device holds the whole comparison of a 6144-image step:
# against 192 images of 100 proposals a block takes 10 MB (all of it: 4 GB), and against their 2134
# anchors at 320 x 320 pixels 210 MB (2.5 GB). Multiples of 128, the width of a TPU's matrix unit.
_PROPOSAL_BLOCK = 128
_ANCHOR_BLOCK = 128
_NEVER = -1e30  # stands for minus infinity, and stays finite under subtraction


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """L_cts; the defaults are the paper's, the other values its ablations.

    direction: "text_to_image" asks of each text which image is its own, "image_to_text" the
        reverse, "both" takes the mean of the two.
    matching: a concept's similarity to an image is that of its best region ("max"), the mean of its
        similarities under their own softmax ("soft", 1-to-many), or that of the largest region
        ("max_size", as in Detic).
    temperature: divides the pooled similarities.
    label_smoothing: share of the target spread evenly over all candidates.
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
    """L_cts in nats: the cross-entropy of finding each text's image (or the reverse) in the batch.

    The mean over the images that have a region and a text; the others are candidates of nobody.
    With n such images, label smoothing gives each of the n its even share. 0 without any.

    regions, concepts: features whose dot product times `scale` is the similarity s.
    areas: of the regions' boxes, any unit; read by "max_size" matching only.
    """
    similarity = image_text_similarity(
        regions, region_mask, areas, concepts, text_ids, scale, cfg.matching, cfg.soft_temperature
    )
    valid = region_mask.any(axis=-1) & (text_ids >= 0).any(axis=-1)
    logits = similarity / cfg.temperature
    losses = []
    if cfg.direction in ("text_to_image", "both"):  # rows: texts, candidates: images
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
    """s(I, T): the mean, over a text's concepts, of their similarity to an image, float32.

    Row b is image b, column t the text made of the concepts `text_ids[t]`. 0 for an image without a
    region and for a text without a concept. On a mesh with the images sharded and the concepts
    replicated, only ids and (B,) vectors travel forward, and the concepts' gradient back.
    """
    regions = regions.astype(jnp.float32) * scale
    concepts = concepts.astype(jnp.float32)
    if matching == "max_size":
        largest = jnp.argmax(jnp.where(region_mask, areas, -1.0), axis=-1)
        regions = jnp.take_along_axis(regions, largest[:, None, None], axis=1)
        region_mask = region_mask.any(axis=-1, keepdims=True)
    # (M, B): a text's concepts are then rows to gather, whole lines of memory.
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
    """Which concepts score regions: row g holds those of the g-th B / G images; -1 pads.

    `group` consecutive images form a group, the paper's batch of one device: a number of the
    recipe, so that the choice does not depend on the machine. It must divide B. "sample" pools
    each image's concepts alone, "classification" those of the whole step.
    """
    _check_choice("proposal score", score, ProposalScore)
    images = len(text_ids)
    group = {"sample": 1, "centerness": 1, "classification": images}.get(score, group)
    if images % group:
        raise UserError(
            f"proposal group: {group} images a group do not divide the batch of {images}; "
            "choose a divisor of the batch size."
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
    """Objectness that ranks an image's regions for the contrastive loss; no gradient passes.

    "batch" (the paper's choice): the highest similarity to any concept that belongs to an image of
    the same group; "sample": of the image itself; "classification": of the whole step; all by
    `concept_pools`. "centerness": the head's logit, as it comes. "batch_centerness": the product of
    the sigmoids of "batch" and of centerness.

    Similarity is scale * dot + bias, the detection logit; the two matter to "batch_centerness"
    only. A region without any concept to be compared with gets a very low score.
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
    images, anchors, features = regions.shape
    concepts = jnp.asarray(concepts)
    regions = regions.astype(jnp.float32).reshape(len(ids), -1, anchors, features)
    if ids.shape[1] >= len(concepts):
        # Fewer rows in the whole table than names in the group: score each row once. A -1 lands in
        # the column too many.
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
    blocks = (_split(ids.T, _ANCHOR_BLOCK), _split(owned.T, _ANCHOR_BLOCK))
    best, _ = jax.lax.scan(update, best, blocks)
    return best.reshape(images, anchors)


def _dots(regions: Float[Array, "B P D"], concepts: Float[Array, "M D"]) -> Float[Array, "B P M"]:
    return jnp.einsum("bpd,md->bpm", regions, concepts, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _best_matched(
    regions: Float[Array, "B P D"], region_mask: Bool[Array, "B P"], concepts: Float[Array, "M D"]
) -> Float[Array, "M B"]:
    """The similarity of each concept to its best region of each image; 0 without a region.

    The first of equal regions is the best. The backward pass needs to know which it was, a small
    number a concept and image, and no similarity: two matrix products, blocks again.
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
        for found in jax.lax.map(compare, _split(concepts, _PROPOSAL_BLOCK))
    )
    present = region_mask.any(axis=1)
    return jnp.where(present, best, 0.0), (regions, present, concepts, which)


def _best_matched_backward(kept, gradient):
    regions, present, concepts, which = kept
    places = jnp.arange(regions.shape[1], dtype=which.dtype)

    def spread(by_regions, part):
        block, chosen, slope = part
        weights = jnp.where(chosen[..., None] == places, slope[..., None], 0.0)  # (block, B, P)
        by_regions += jnp.einsum("mbp,md->bpd", weights, block)
        return by_regions, jnp.einsum("mbp,bpd->md", weights, regions)

    slope = jnp.where(present, gradient, 0.0)
    parts = tuple(_split(rows, _PROPOSAL_BLOCK) for rows in (concepts, which, slope))
    by_regions, by_concepts = jax.lax.scan(spread, jnp.zeros_like(regions), parts)
    return by_regions, None, by_concepts.reshape(-1, concepts.shape[1])[: len(concepts)]


_best_matched.defvjp(_best_matched_forward, _best_matched_backward)


def _softly_matched(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    concepts: Float[Array, "M D"],
    temperature: float,
) -> Float[Array, "M B"]:
    """The mean similarity of each concept to an image's regions under their own softmax.

    Blocks are computed again in the backward pass: one more matrix product instead of gigabytes.
    """

    def compare(block):
        similarity, mask = _dots(regions, block), region_mask[..., None]
        weights = jax.nn.softmax(jnp.where(mask, similarity / temperature, _NEVER), axis=1)
        return jnp.sum(jnp.where(mask, weights * similarity, 0.0), axis=1).T

    results = jax.lax.map(jax.checkpoint(compare), _split(concepts, _PROPOSAL_BLOCK))
    return results.reshape(-1, len(regions))[: len(concepts)]


def _split(rows: Array, block: int) -> Array:
    """(M, ...) as (blocks, block, ...), the last one filled up with zeros."""
    block = min(block, len(rows))
    padding = [(0, -len(rows) % block)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, block, *rows.shape[1:])


def _cross_entropy(
    logits: Float[Array, "B B"], valid: Bool[Array, " B"], smoothing: float
) -> Float[Array, ""]:
    """Mean over valid rows of the smoothed cross-entropy with the diagonal, among valid columns."""
    count = jnp.maximum(valid.sum(), 1)
    logits = jnp.where(valid, logits, _NEVER)
    log_p = jnp.where(valid, jax.nn.log_softmax(logits, axis=-1), 0.0)
    losses = -(1 - smoothing) * jnp.diagonal(log_p) - smoothing * log_p.sum(axis=-1) / count
    return jnp.where(valid, losses, 0.0).sum() / count


def _check_choice(what: str, value: str, choices) -> None:
    if value not in get_args(choices):
        raise UserError(f"{what}: {value!r} is none of {', '.join(get_args(choices))}.")
