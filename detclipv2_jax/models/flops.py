"""What a step's arithmetic comes to, counted from the sizes: the yardstick of every utilization.

A multiplication with its addition counts as two. Only matrix products, convolutions and bilinear
samples are counted, each once and on real pixels: padding to windows, gaps of the head's canvas and
recomputation are the program's affair, and a compiler's own count would reward them. So is the
second forward pass of image-text data in parts: a step has the same FLOPs in any number of parts.
"""

import math

from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.models.text import TextConfig

BACKWARD = 2.0  # a product's gradient is two products of its size


def backbone(cfg: SwinConfig, height: int, width: int) -> float:
    """Forward of one image."""
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
    """Forward of neck, head and the deformable convolution, of one image."""
    pixels = [_up(height, s) * _up(width, s) for s in cfg.anchors.strides]
    inside, out = cfg.neck_channels, cfg.head.channels
    taps = 9 * inside
    neck = sum(2 * p * c * inside for p, c in zip(pixels, cfg.swin.widths[1:]))
    neck += sum(2 * p * taps * inside for p in pixels)  # three outputs and two extra levels
    k = sum(pixels)
    branch = 9 * out * out * (cfg.head.convs - 1)
    first = 9 * (out if cfg.head.deformable else inside) * out
    outputs = 9 * out * (cfg.head.embed_dim + 5)
    parts = {"neck": neck, "head": 2.0 * k * (taps * out + first + 2 * branch + outputs)}
    if cfg.head.deformable:
        samples = 4 * taps  # four neighbors of nine points
        parts["deformable"] = 2.0 * k * (9 * out * 27 + samples + taps * out)
    return parts


def text(cfg: TextConfig) -> float:
    """Forward of one concept."""
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
    """FLOPs by part of one training step, forward and backward, for the whole global batch.

    Args:
        cfg: the model.
        kind: of the step; image_text has the contrastive loss and its choice of regions.
        shape: of the canvas, pixels.
        images: of the global batch.
        concepts: rows of the step's table.
        proposals: regions an image in the contrastive loss.
        group: images whose concepts score a region together.
    """
    height, width = shape
    per_image = {"backbone": backbone(cfg.swin, height, width), **dense_parts(cfg, height, width)}
    parts = {name: (1 + BACKWARD) * images * value for name, value in per_image.items()}
    parts["text"] = (1 + BACKWARD) * concepts * text(cfg.text)
    anchors = sum(_up(height, s) * _up(width, s) for s in cfg.anchors.strides)
    dimensions = cfg.head.embed_dim
    if kind == "image_text":
        shared = min(concepts, math.ceil(concepts * group / images))
        parts["choice of regions"] = 2.0 * images * anchors * shared * dimensions
        compared = 2.0 * images * proposals * concepts * dimensions
        parts["contrastive loss"] = (1 + BACKWARD) * compared
    else:
        compared = 2.0 * images * anchors * concepts * dimensions
        parts["alignment loss"] = (1 + BACKWARD) * compared
    return parts


def _up(size: int, divisor: int) -> int:
    return -(-size // divisor)
