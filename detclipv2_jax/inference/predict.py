"""From a model's outputs to detections: one pure function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import Detections
from detclipv2_jax.models.atss_head import RegionOutputs
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops.boxes import anchor_grid, anchors_inside, area, decode_deltas
from detclipv2_jax.ops.nms import class_nms

_NAMES_AT_ONCE = 128  # whose scores are in memory together


def predict(
    model: DetCLIP,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    texts: Float[Array, "C D"],
    text_mask: Bool[Array, " C"] | None = None,
    *,
    config: DecodeConfig,
    score_threshold: Float[Array, ""] | None = None,
) -> Detections:
    """Detections of each image among C ≥ 1 encoded names; a pure function, for `jit`.

    `score_threshold` may stand for the config's: one that changes without compiling.

    Pictures lie in the top-left corner of their canvas, `sizes` are their (height, width) in
    pixels; an empty slot has size (0, 0) and gets no detection. Names outside `text_mask` are never
    answered. Boxes are clipped to the picture. A score that is not finite is no detection. Beyond
    the model's own, memory is that of the scores of 128 names, however many are asked.
    """
    regions = model.encode_image(images)
    boxes, mask = clipped_boxes(model, regions, images.shape[1:3], sizes)
    score = lambda block: score_names(model, regions, *block, config)
    asked = jnp.ones(len(texts), bool) if text_mask is None else text_mask
    detections = class_nms(
        boxes,
        mask,
        score,
        (_blocks(texts), _blocks(asked)),
        iou_threshold=config.nms_iou,
        score_threshold=config.score_threshold if score_threshold is None else score_threshold,
        pre_nms_top_k=config.pre_nms_top_k,
        max_detections=config.max_detections,
    )
    return Detections(*detections)


def clipped_boxes(
    model: DetCLIP, regions: RegionOutputs, canvas: tuple[int, int], sizes: Int[Array, "B 2"]
) -> tuple[Float[Array, "B K 4"], Bool[Array, "B K"]]:
    """Every anchor's box, clipped to the picture, and whether it lies there and has an area."""
    anchors = jnp.asarray(anchor_grid(*canvas, model.cfg.anchors))
    limits = jnp.concatenate([sizes[:, ::-1]] * 2, axis=-1)[:, None].astype(jnp.float32)
    boxes = jnp.clip(decode_deltas(anchors, regions.deltas), 0.0, limits)
    return boxes, anchors_inside(anchors, sizes) & (area(boxes) > 0)


def score_names(
    model: DetCLIP,
    regions: RegionOutputs,
    texts: Float[Array, "C D"],
    asked: Bool[Array, " C"],
    config: DecodeConfig,
) -> Float[Array, "B C K"]:
    """Scores of every anchor for each name; -1 for a name not `asked`, or what is not finite."""
    scores = jax.nn.sigmoid(jnp.swapaxes(model.logits(regions.embeddings, texts), 1, 2))
    if config.score == "alignment*centerness":
        scores *= jax.nn.sigmoid(regions.centerness)[:, None]
    return jnp.where(jnp.isfinite(scores) & asked[:, None], scores, -1.0)


def _blocks(rows: Array) -> Array:
    """Rows (C, ...) of the names as (blocks, names of a block, ...), padded with zeros."""
    size = min(len(rows), _NAMES_AT_ONCE)
    padding = [(0, -len(rows) % size)] + [(0, 0)] * (rows.ndim - 1)
    return jnp.pad(rows, padding).reshape(-1, size, *rows.shape[1:])
