"""Similarity of images and texts from that of their regions and words (Yao et al. 2023, §3.2).

A text is made of concepts, its words: rows of the step's table. Nothing here stores the similarity
of every region with every word, which would take 60 GB for a batch of 6144 pairs.

Sizes: B images, P selected regions per image, M concepts, T texts, C concepts per text, D features.
"""

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError

Towards = Literal["text_to_image", "image_to_text"]
Softness = Literal["max", "soft"]
# Concepts compared at a time, so that no device has to store the comparison of a whole step. With
# 6144 images on 32 devices, 192 images of 100 regions take 10 MB per block (4 GB without blocks). A
# multiple of 128, the width of a TPU's matrix unit.
_REGION_BLOCK = 128
NEVER = -1e30  # acts as minus infinity, but stays finite under subtraction


@jax.named_scope("word_region_similarity")
def image_text_similarity(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    concepts: Float[Array, "M D"],
    text_ids: Int[Array, "T C"],
    scale: Float[Array, ""] | float = 1.0,
    direction: Towards = "text_to_image",
    matching: Softness = "max",
    soft_temperature: float = 1.0,
) -> Float[Array, "B T"]:
    """Return the similarity of every image with every text, float32.

    "text_to_image": s^T = (1/C) Σ_j max_k f_T[j]·f_P[k], the mean over the words of a text of their
    similarity to the best region (Yao et al. 2023, eq. 3-4). "image_to_text": s^I = (1/P) Σ_k
    max_j f_T[j]·f_P[k], the mean over the regions of an image of their similarity to the best word
    (§3.2; FILIP, Yao et al. 2022, §3.1). With "soft" matching, the mean weighted by the softmax
    takes the place of the maximum. The similarity is 0 for an image without regions and for a text
    without concepts.

    On a mesh, with the images sharded and the concepts replicated, only ids and vectors of length B
    are communicated forward, and the concepts' gradient backward.

    Args:
      regions, concepts: features; their dot product times `scale` is the similarity.
      region_mask: False for padding.
      text_ids: rows of `concepts` that each text is made of; -1 pads.
      scale: of the similarity.
      direction: which side is matched with its best of the other side.
      matching, soft_temperature: as in `contrastive.ContrastiveConfig`.
    """
    regions = regions.astype(jnp.float32) * scale
    concepts = concepts.astype(jnp.float32)
    softness = None if matching == "max" else soft_temperature
    if direction == "image_to_text":
        return _mean_over_regions(regions, region_mask, concepts, text_ids, softness)
    # (M, B): a text's concepts are then contiguous rows.
    if softness is None:
        by_concept = _best_matched(regions, region_mask, concepts)
    else:
        by_concept = _softly_matched(regions, region_mask, concepts, softness)

    owned = text_ids >= 0
    rows = jnp.where(owned[..., None], by_concept[jnp.maximum(text_ids, 0)], 0.0)
    return (rows.sum(axis=1) / jnp.maximum(owned.sum(axis=-1, keepdims=True), 1)).T


def _mean_over_regions(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    concepts: Float[Array, "M D"],
    text_ids: Int[Array, "T C"],
    softness: float | None,
) -> Float[Array, "B T"]:
    """Return s^I: the mean over an image's regions of their similarity to a text's best word.

    A few texts at a time are compared with all regions. The backward pass computes each block
    again, since even the number of the best word would take a byte per region and text.
    """
    owned = text_ids >= 0
    # Gathered before the loop, so that the gradients of all blocks reach the table in one sum.
    words = concepts[jnp.maximum(text_ids, 0)]

    def compare(block):
        words, owned = block
        products = jnp.einsum("bpd,tcd->bptc", regions, words, preferred_element_type=jnp.float32)
        products = jnp.where(owned, products, NEVER)
        if softness is None:
            best = products.max(axis=-1)
        else:
            weights = jax.nn.softmax(products / softness, axis=-1)
            best = jnp.sum(jnp.where(owned, weights * products, 0.0), axis=-1)
        counts = region_mask[..., None] & owned.any(axis=-1)
        return jnp.sum(jnp.where(counts, best, 0.0), axis=1).T

    texts = max(_REGION_BLOCK // max(text_ids.shape[1], 1), 1)
    sums = jax.lax.map(jax.checkpoint(compare), (in_blocks(words, texts), in_blocks(owned, texts)))
    sums = sums.reshape(-1, len(regions))[: len(text_ids)].T
    return sums / jnp.maximum(region_mask.sum(axis=-1, keepdims=True), 1)


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
        dots = jnp.where(region_mask[..., None], _dots(regions, block), NEVER)
        which = jnp.argmax(dots, axis=1)
        return dots.max(axis=1).T, which.astype(number).T

    best, which = (
        found.reshape(-1, len(regions))[: len(concepts)]
        for found in jax.lax.map(compare, in_blocks(concepts, _REGION_BLOCK))
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
    blocks = tuple(in_blocks(rows, _REGION_BLOCK) for rows in (concepts, which, slope))
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
        weights = jax.nn.softmax(jnp.where(mask, similarity / temperature, NEVER), axis=1)
        return jnp.sum(jnp.where(mask, weights * similarity, 0.0), axis=1).T

    results = jax.lax.map(jax.checkpoint(compare), in_blocks(concepts, _REGION_BLOCK))
    return results.reshape(-1, len(regions))[: len(concepts)]


def in_blocks(rows: Array, block: int) -> Array:
    """Return (M, ...) as (blocks, block, ...), with zeros at the end of the last block."""
    block = min(block, len(rows))
    padding = [(0, -len(rows) % block)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, block, *rows.shape[1:])


def check_choice(field: str, value: str, choices) -> None:
    """Raise `UserError` unless the value is one of those of a `Literal`."""
    if value not in get_args(choices):
        raise UserError(f"{field}: {value!r} is not one of {', '.join(get_args(choices))}.")
