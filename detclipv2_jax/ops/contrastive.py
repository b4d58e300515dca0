"""Word-region contrast: the loss of image-text pairs (Yao et al. 2023, arXiv 2304.04514, §3.2).

Concepts are the rows of the step's table, each once for the whole global batch. The text of image b
is made of the concepts `text_ids[b]`, the caption first; -1 fills rows with fewer concepts. Every
image is compared with every concept once (`similarity.py`).

Sizes: B images, P selected regions per image, M concepts, C concepts per text, D features.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.ops.similarity import NEVER, check_choice, image_text_similarity

Direction = Literal["text_to_image", "image_to_text", "both"]
Matching = Literal["max", "soft", "max_size"]


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """L_cts. The defaults are those of Yao et al. 2023, the other values their ablations.

    direction: "text_to_image" asks for each text which image it belongs to: each word finds its
        best region. "image_to_text" asks for each image which text it belongs to: each region finds
        its best word. "both" takes the mean of the two losses.
    matching: how a word is matched with the regions of an image, or a region with the words of a
        text: "max" takes the best, "soft" the mean weighted by their softmax (one to many).
        "max_size" compares the largest region with the caption alone (as in Detic).
    temperature: divides the similarities of images and texts.
    label_smoothing: share of the target that is spread evenly over all choices.
    soft_temperature: of the softmax over matches, in units of similarity; read by "soft" only.
    """

    direction: Direction = "text_to_image"
    matching: Matching = "max"
    temperature: float = 0.5
    label_smoothing: float = 0.1
    soft_temperature: float = 1.0

    def __post_init__(self):
        check_choice("direction", self.direction, Direction)
        check_choice("matching", self.matching, Matching)


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
    images are not choices either. Nor are other images with the same text (`same_text`, ours): a
    text cannot tell them apart. With n choices, label smoothing gives each the share 1 / n. The
    loss of no images is 0.

    Args:
      regions, concepts: features; their dot product times `scale` is the similarity.
      region_mask: False for padding.
      areas: of the regions' boxes, clipped to the image, in any unit; read by "max_size" matching
        only.
      text_ids: rows of `concepts` that each image's text is made of, the caption first (-1 if it
        has no row); -1 pads.
      scale: of the similarity.
      cfg: the variant of the loss.
    """
    matching = cfg.matching
    if matching == "max_size":
        largest = jnp.argmax(jnp.where(region_mask, areas, -1.0), axis=-1)
        regions = jnp.take_along_axis(regions, largest[:, None, None], axis=1)
        region_mask = region_mask.any(axis=-1, keepdims=True)
        matching, text_ids = "max", text_ids[:, :1]
    valid = region_mask.any(axis=-1) & (text_ids >= 0).any(axis=-1)
    others = ~jnp.eye(len(text_ids), dtype=bool)
    choices = valid & ~(same_text(text_ids) & others)

    def logits(direction) -> Float[Array, "B T"]:
        similarity = image_text_similarity(
            regions, region_mask, concepts, text_ids, scale, direction, matching,
            cfg.soft_temperature,
        )  # fmt: skip
        return similarity / cfg.temperature

    losses = []
    if cfg.direction in ("text_to_image", "both"):  # rows: texts, choices: images
        by_text = logits("text_to_image").T
        losses.append(_cross_entropy(by_text, valid, choices, cfg.label_smoothing))
    if cfg.direction in ("image_to_text", "both"):
        by_image = logits("image_to_text")
        losses.append(_cross_entropy(by_image, valid, choices, cfg.label_smoothing))
    return sum(losses) / len(losses)


@jax.named_scope("same_text")
def same_text(text_ids: Int[Array, "B C"]) -> Bool[Array, "B B"]:
    """Return which pairs of texts are the same: equal captions, or equal sets of concepts.

    The sets decide where the captions have no row in the table. A text without concepts is the same
    as no other.
    """
    caption, ordered = text_ids[:, 0], jnp.sort(text_ids, axis=1)
    same = caption[:, None] == caption
    same_set = jnp.ones_like(same)
    for column in ordered.T:  # (B, B, C) is never stored
        same_set &= column[:, None] == column
    exists = (text_ids >= 0).any(axis=1)
    return ((same & (caption >= 0)) | same_set) & exists


def _cross_entropy(
    logits: Float[Array, "B B"],
    valid: Bool[Array, " B"],
    choices: Bool[Array, "B B"],
    smoothing: float,
) -> Float[Array, ""]:
    """Return the mean cross-entropy of valid rows with the diagonal, among each row's choices.

    The target of row b has 1 - smoothing at column b, and smoothing / n at each of n choices.
    """
    number = jnp.maximum(choices.sum(axis=-1), 1)
    logits = jnp.where(choices, logits, NEVER)
    log_p = jnp.where(choices, jax.nn.log_softmax(logits, axis=-1), 0.0)
    losses = -(1 - smoothing) * jnp.diagonal(log_p) - smoothing * log_p.sum(axis=-1) / number
    return jnp.where(valid, losses, 0.0).sum() / jnp.maximum(valid.sum(), 1)
