"""The least memory traffic of each part of a training step if every layer runs by itself.

A layer is a convolution with its norm, a branch of a block, or a loss. Forward, it reads its inputs
and parameters once and writes its outputs once. Backward, it reads inputs, parameters and the
gradient of its outputs once, and writes the gradients of inputs and parameters once. Activations
have the model's dtype; parameters and inputs of the losses are float32. A program that fuses
several layers may move less; one that splits them moves more.
"""

import math
from typing import Any

import jax
from jaxtyping import PyTree

from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.training.objective import LossConfig

F32 = 4  # bytes


def size_of(arrays: PyTree) -> int:
    """Return the bytes of all arrays, which may be abstract."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def layer(inputs: float, outputs: float, parameters: float = 0, by_inputs: float | None = None):
    """Return the bytes that a layer reads and writes, forward and backward.

    Args:
        inputs: bytes of its inputs, read forward and backward.
        outputs: bytes of its outputs, written forward; their gradient is read backward.
        parameters: number of its float32 parameters, read twice; their gradient is written.
        by_inputs: bytes of the gradient of the inputs; None: as many as the inputs have.
    """
    by_inputs = inputs if by_inputs is None else by_inputs
    return 2 * inputs + 2 * outputs + by_inputs + 3 * F32 * parameters


class Least:
    """The least bytes of each part of one step."""

    def __init__(
        self,
        model: DetCLIPConfig,
        loss: LossConfig,
        shape: tuple[int, int],
        images: int,
        concepts: int,
    ):
        self.model, self.loss, self.shape = model, loss, shape
        self.images, self.concepts = images, concepts
        self.item = {"float32": 4, "bfloat16": 2}[model.dtype]
        self.pixels = box_ops.level_sizes(*shape, model.anchors)  # of each level
        self.anchors = sum(self.pixels)

    def backbone(self) -> float:
        """Return the bytes of patch embedding, blocks, patch merging and three norms."""
        cfg, item = self.model.swin, self.images * self.item
        rows, columns = (_up(side, cfg.patch_size) for side in self.shape)
        pixels = self.images * self.shape[0] * self.shape[1] * 3  # uint8, no gradient by them
        patches = (3 * cfg.patch_size**2 + 3) * cfg.embed_dim
        total = layer(pixels, item * rows * columns * cfg.embed_dim, patches, by_inputs=0)
        for stage, (width, depth) in enumerate(zip(cfg.widths, cfg.depths)):
            here = item * rows * columns * width
            attention, mlp = block_parameters(cfg, stage)
            total += depth * (layer(here, here, attention) + layer(here, here, mlp))
            if stage:
                total += layer(here, here, 2 * width)
            if stage < len(cfg.depths) - 1:
                rows, columns = _up(rows, 2), _up(columns, 2)
                merged = item * rows * columns * 2 * width
                total += layer(here, merged, 8 * width**2 + 8 * width)
        return total

    def neck(self) -> float:
        """Return the bytes of the laterals, each with the level above, and of five convolutions."""
        width, item = self.model.neck_channels, self.images * self.item
        maps = [item * p * width for p in self.pixels]
        wide = self.model.swin.widths[1:]
        total = 0.0
        for level, channels in enumerate(wide):
            above = maps[level + 1] if level + 1 < len(wide) else 0
            inputs = item * self.pixels[level] * channels + above
            total += layer(inputs, maps[level], channels * width + width)
        for level in range(len(maps)):
            source = maps[level] if level < len(wide) else maps[level - 1]
            total += layer(source, maps[level], 9 * width * width + width)
        return total

    def head(self) -> float:
        """Return the bytes of the convolutions with norm and activation; outputs are float32."""
        cfg, here = self.model.head, self.images * self.anchors
        inside, out = self.model.neck_channels, cfg.channels
        total = 0.0
        for width in 2 * ([inside] + [out] * (cfg.convs - 1)):  # of both branches
            total += layer(
                here * width * self.item, here * out * self.item, 9 * width * out + 2 * out
            )
        for outputs in (cfg.embed_dim, 4, 1, *[1] * len(cfg.proposal_scores)):
            total += layer(
                here * out * self.item, here * outputs * F32, 9 * out * outputs + outputs
            )
        return total

    def deformable(self) -> float:
        """Return the bytes of the convolution with 27 outputs, and of sampling with its product."""
        here, inside, out = (
            self.images * self.anchors * self.item,
            self.model.neck_channels,
            self.model.head.channels,
        )
        chooses = layer(here * out, here * 27, 9 * out * 27 + 27)
        return chooses + layer(here * (inside + 27), here * out, 9 * inside * out)

    def text(self) -> float:
        """Return the bytes of the embedding, two branches per block, and the final projection.

        The gradient of the embedding is written for the whole vocabulary, because AdamW reads it.
        """
        cfg = self.model.text
        tokens = self.concepts * cfg.context * cfg.width
        here = tokens * self.item
        attention = 4 * cfg.width**2 + 4 * cfg.width + 2 * cfg.width
        mlp = 8 * cfg.width**2 + 5 * cfg.width + 2 * cfg.width
        embedding = tokens * F32 + 2 * here + (cfg.vocab + cfg.context) * cfg.width * F32
        blocks = cfg.layers * (layer(here, here, attention) + layer(here, here, mlp))
        read = self.concepts * cfg.width * self.item
        features = self.concepts * cfg.embed_dim * F32
        return embedding + blocks + layer(read, features, cfg.width * cfg.embed_dim + 2 * cfg.width)

    def dense_losses(self, with_boxes: bool) -> float:
        """Return the bytes of the alignment loss and, if `with_boxes`, of the box losses.

        Alignment is one layer with a scalar output, so its logits are not counted. It reads
        embeddings, a label and a mask per anchor, and a mask of the concepts per image. The box
        losses read deltas and centerness with their targets.
        """
        dimensions, here = self.model.head.embed_dim, self.images * self.anchors
        learned = (here + self.concepts) * dimensions * F32
        masks = (1 + self.images) * self.concepts
        total = layer(learned + here * (4 + 1) + masks, 0, by_inputs=learned)
        if with_boxes:
            learned = here * 5 * F32
            total += layer(learned + here * (5 * F32 + 1), 0, by_inputs=learned)
        return total

    def choice(self, chosen: Any) -> float:
        """Return the bytes of the choice of regions: scoring, then reading scores and deltas."""
        here = self.images * self.anchors * F32
        dimensions = self.model.head.embed_dim
        scored = here * dimensions + self.concepts * dimensions * F32 + here
        return scored + here * (1 + 4) + size_of(chosen)

    def contrastive(self, texts: int) -> float:
        """Return the bytes of gathering embeddings, matching concepts, texts and cross-entropy."""
        images, dimensions = self.images, self.model.head.embed_dim
        chosen = images * self.loss.proposals.k * dimensions * F32
        every = images * self.anchors * dimensions * F32
        gather = chosen + chosen + chosen + every  # read, write; gradient in, and out to all
        matched = self.concepts * images * F32
        match = layer(chosen + self.concepts * dimensions * F32, matched)
        pairs = images * images * F32
        return gather + match + layer(matched, pairs) + layer(pairs, 0)


def block_parameters(cfg: SwinConfig, stage: int) -> tuple[int, int]:
    """Return the parameters of the attention and MLP branch of a block, each with its norm."""
    width, hidden = cfg.widths[stage], int(cfg.widths[stage] * cfg.mlp_ratio)
    attention = 4 * width**2 + width + 3 * width * cfg.qkv_bias + 2 * width
    attention += (2 * cfg.window - 1) ** 2 * cfg.num_heads[stage]
    return attention, 2 * width * hidden + hidden + width + 2 * width


def _up(size: int, divisor: int) -> int:
    return -(-size // divisor)
