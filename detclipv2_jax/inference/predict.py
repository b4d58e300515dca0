"""From the model's outputs to detections, as one pure function: `predict`.

`best_regions` is the same for phrases of captions: one region each, the most similar one.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import BestRegions, Detections
from detclipv2_jax.models.atss_head import RegionOutputs
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops.boxes import anchor_grid, anchors_inside, area, decode_deltas
from detclipv2_jax.ops.nms import class_nms

_NAMES_AT_ONCE = 128  # names whose scores are in memory at the same time


def predict(
    model: DetCLIP,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    embeddings: Float[Array, "C D"],
    name_mask: Bool[Array, " C"] | None = None,
    *,
    config: DecodeConfig,
    score_threshold: Float[Array, ""] | None = None,
) -> Detections:
    """Return the detections of a batch of images among C encoded names. Pure; call it under `jit`.

    Besides the model's own memory, it needs that of the scores of 128 names, whatever C is.

    Args:
      images: RGB. Each image is in the top-left corner of its canvas.
      sizes: (height, width) in pixels of each image on its canvas; (0, 0) for an empty slot, which
        has no detections.
      embeddings: text embeddings of the names, C >= 1.
      name_mask: False for names that are never detected. None: all may be.
      config: score threshold, suppression and limits.
      score_threshold: replaces the config's; it may change without a new compilation.

    Returns:
      Boxes clipped to the image. A score that is not finite does not count as a detection.
    """
    regions = model.encode_image(images, sizes=sizes)
    canvas = (images.shape[1], images.shape[2])
    boxes, box_mask = clipped_boxes(model, regions, canvas, sizes)
    score_block = lambda regions, block: score_names(model, regions, block[0], block[1], config)
    if name_mask is None:
        name_mask = jnp.ones(len(embeddings), bool)
    detections = class_nms(
        boxes,
        box_mask,
        score_block,
        regions,
        (_in_blocks(embeddings), _in_blocks(name_mask)),
        iou_threshold=config.nms_iou,
        score_threshold=config.score_threshold if score_threshold is None else score_threshold,
        pre_nms_top_k=config.pre_nms_top_k,
        max_detections=config.max_detections,
    )
    return Detections(*detections)


def best_regions(
    model: DetCLIP,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    embeddings: Float[Array, "B P D"],
    phrase_mask: Bool[Array, "B P"],
) -> BestRegions:
    """Return the region of the highest similarity to each of P phrases of each image.

    This is the word-region alignment of figure 1 of Yao et al. 2023. Regions are compared by their
    logits: probabilities near 1 would be equal. Equally similar regions rank by anchor.

    Args:
      model: the model.
      images: RGB. Each image is in the top-left corner of its canvas.
      sizes: (height, width) in pixels of each image on its canvas; (0, 0) for an empty slot.
      embeddings: text embeddings of the phrases of each image.
      phrase_mask: False for rows that are padding.

    Returns:
      Boxes clipped to the image. A logit that is not finite does not count.
    """
    regions = model.encode_image(images, sizes=sizes)
    boxes, box_mask = clipped_boxes(model, regions, (images.shape[1], images.shape[2]), sizes)
    logits = jax.vmap(model.logits)(regions.embeddings, embeddings)
    logits = jnp.where(box_mask[..., None] & jnp.isfinite(logits), logits, -jnp.inf)
    anchors = jnp.argmax(logits, axis=1)
    best = jnp.max(logits, axis=1)
    exists = phrase_mask & (best > -jnp.inf)
    rows = lambda table: jnp.take_along_axis(table, anchors[..., None], axis=1)
    return BestRegions(
        boxes=jnp.where(exists[..., None], rows(boxes), 0.0),
        scores=jnp.where(exists, jax.nn.sigmoid(best), 0.0),
        similarities=jnp.where(exists, jnp.sum(rows(regions.embeddings) * embeddings, -1), 0.0),
        mask=exists,
    )


def clipped_boxes(
    model: DetCLIP, regions: RegionOutputs, canvas: tuple[int, int], sizes: Int[Array, "B 2"]
) -> tuple[Float[Array, "B K 4"], Bool[Array, "B K"]]:
    """Return the box of every anchor, and a mask of the boxes that may become detections.

    Boxes are clipped to the image. The mask is False where the anchor's center is outside the
    image or the box has no area.
    """
    anchors = jnp.asarray(anchor_grid(*canvas, model.cfg.anchors))
    limits = jnp.concatenate([sizes[:, ::-1]] * 2, axis=-1)[:, None].astype(jnp.float32)
    boxes = jnp.clip(decode_deltas(anchors, regions.deltas), 0.0, limits)
    return boxes, anchors_inside(anchors, sizes) & (area(boxes) > 0)


def score_names(
    model: DetCLIP,
    regions: RegionOutputs,
    embeddings: Float[Array, "C D"],
    name_mask: Bool[Array, " C"],
    config: DecodeConfig,
) -> Float[Array, "B C K"]:
    """Return the score of every anchor for each name; -1 where masked or not finite."""
    scores = jax.nn.sigmoid(jnp.swapaxes(model.logits(regions.embeddings, embeddings), 1, 2))
    if config.score == "alignment*centerness":
        scores *= jax.nn.sigmoid(regions.centerness)[:, None]
    return jnp.where(jnp.isfinite(scores) & name_mask[:, None], scores, -1.0)


def _in_blocks(rows: Array) -> Array:
    """Reshape (C, ...) to (blocks, names per block, ...), padded with zeros."""
    size = min(len(rows), _NAMES_AT_ONCE)
    padding = [(0, -len(rows) % size)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, size, *rows.shape[1:])
