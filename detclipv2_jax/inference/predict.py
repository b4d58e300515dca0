"""From the model's outputs to detections, as one pure function: `predict`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import Detections
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
