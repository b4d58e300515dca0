"""The loss of images with one class each: cross-entropy over the names of classes.

Yao et al. 2023 (arXiv 2304.04514, appendix C) replace the contrastive loss by it for ImageNet-1k.
It compares an image with names, not with other images, so images of one class are never negatives
of each other.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.ops.similarity import NEVER, image_text_similarity


def class_cross_entropy(
    regions: Float[Array, "B P D"],
    region_mask: Bool[Array, "B P"],
    names: Float[Array, "M D"],
    name_mask: Bool[Array, " M"],
    own: Int[Array, " B"],
    scale: Float[Array, ""] | float,
) -> Float[Array, " B"]:
    """Return the cross-entropy of each image with its own name among all names, in nats.

    The logit of a name is its similarity to the image's best region, as in detection; the paper
    does not name a temperature. 0 for an image without a region or a name.

    Args:
      regions: features of the image's regions.
      region_mask: False for padding.
      names: features of the names; the dot product times `scale` is the similarity.
      name_mask: False for padding.
      own: the row of each image's own name; -1: none.
      scale: of the similarity.
    """
    rows = jnp.arange(len(names))[:, None]
    similarity = image_text_similarity(regions, region_mask, names, rows, scale)
    log_p = jax.nn.log_softmax(jnp.where(name_mask, similarity, NEVER), axis=-1)
    found = jnp.take_along_axis(log_p, jnp.maximum(own, 0)[:, None], axis=-1)[:, 0]
    return jnp.where((own >= 0) & region_mask.any(axis=-1), -found, 0.0)
