"""Floating-point operations of a training step, computed from its sizes; the basis of MFU.

A multiply-add counts as two operations. Only matrix products, convolutions and bilinear samples are
counted, once each and for real pixels. Padding to windows, gaps of the head's packed map and
recomputation do not count, because they depend on the implementation; XLA's own count includes
them. The second forward pass over image-text data in micro-batches does not count either, so a step
has the same FLOPs for any number of micro-batches.
"""

import math

from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.models.text import TextConfig

BACKWARD = 2.0  # over forward: the gradient of a product is two products of the same size


def backbone(cfg: SwinConfig, height: int, width: int) -> float:
    """Return the FLOPs of the backbone's forward pass of one image."""
    total, rows, columns = 0.0, _up(height, cfg.patch_size), _up(width, cfg.patch_size)
    total += 2 * rows * columns * 3 * cfg.patch_size**2 * cfg.embed_dim
    for stage, (channels, depth) in enumerate(zip(cfg.widths, cfg.depths)):
        dense = 4 * channels**2 + 2 * channels * int(channels * cfg.mlp_ratio)
        attention = 2 * cfg.window**2 * channels
        total += depth * 2 * rows * columns * (dense + attention)
        if stage < len(cfg.depths) - 1:
            rows, columns = _up(rows, 2), _up(columns, 2)
            total += 2 * rows * columns * 4 * channels * 2 * channels
    return total


def dense_parts(cfg: DetCLIPConfig, height: int, width: int) -> dict[str, float]:
    """Return the FLOPs of the forward pass of one image after the backbone.

    Args:
        cfg: the model.
        height: of the canvas, in pixels.
        width: of the canvas, in pixels.

    Returns:
        FLOPs of "neck", "head" and, if the head has one, the "deformable" convolution.
    """
    pixels = [_up(height, s) * _up(width, s) for s in cfg.anchors.strides]
    inside, out = cfg.neck_channels, cfg.head.channels
    taps = 9 * inside
    neck = sum(2 * p * c * inside for p, c in zip(pixels, cfg.swin.widths[1:]))
    neck += sum(2 * p * taps * inside for p in pixels)  # three outputs and two extra levels
    k = sum(pixels)
    branch = 9 * out * out * (cfg.head.convs - 1)
    first = 9 * (out if cfg.head.deformable else inside) * out
    outputs = 9 * out * (cfg.head.embed_dim + 5 + len(cfg.head.proposal_scores))
    parts = {"neck": neck, "head": 2.0 * k * (taps * out + first + 2 * branch + outputs)}
    if cfg.head.deformable:
        samples = 4 * taps  # four neighbors of nine points
        parts["deformable"] = 2.0 * k * (9 * out * 27 + samples + taps * out)
    return parts


def text(cfg: TextConfig) -> float:
    """Return the FLOPs of the text tower's forward pass of one concept."""
    layer = 12 * cfg.width**2 + 2 * cfg.context * cfg.width
    return 2.0 * cfg.context * cfg.layers * layer + 2 * cfg.width * cfg.embed_dim


def step(
    cfg: DetCLIPConfig,
    kind: str,
    shape: tuple[int, int],
    images: int,
    concepts: int,
    *,
    proposals: int = 100,
    group: int = 192,
) -> dict[str, float]:
    """Return the FLOPs of each part of a training step, forward and backward.

    Args:
        cfg: the model.
        kind: of the step. "image_text" has the contrastive loss, "classification" that of class
            names, and both a choice of regions; the others have the alignment loss.
        shape: (height, width) of the canvas, in pixels.
        images: of the global batch.
        concepts: rows of the step's concept table.
        proposals: regions per image in the loss of a kind with texts.
        group: images whose concepts score a region together.

    Returns:
        FLOPs of the whole global batch by name of the part.
    """
    height, width = shape
    per_image = {"backbone": backbone(cfg.swin, height, width), **dense_parts(cfg, height, width)}
    parts = {name: (1 + BACKWARD) * images * value for name, value in per_image.items()}
    per_concept = 0.0 if cfg.classes else text(cfg.text)
    parts["text"] = (1 + BACKWARD) * concepts * per_concept
    anchors = sum(_up(height, s) * _up(width, s) for s in cfg.anchors.strides)
    dimensions = cfg.head.embed_dim
    if kind == "image_text":
        shared = min(concepts, math.ceil(concepts * group / images))
        parts["choice of regions"] = 2.0 * images * anchors * shared * dimensions
        compared = 2.0 * images * proposals * concepts * dimensions
        parts["contrastive loss"] = (1 + BACKWARD) * compared
    elif kind == "classification":
        shared = min(concepts, group)  # one name per image
        parts["choice of regions"] = 2.0 * images * anchors * shared * dimensions
        compared = 2.0 * images * proposals * concepts * dimensions
        parts["classification loss"] = (1 + BACKWARD) * compared
    else:
        compared = 2.0 * images * anchors * concepts * dimensions
        parts["alignment loss"] = (1 + BACKWARD) * compared
    return parts


def _up(size: int, divisor: int) -> int:
    return -(-size // divisor)
