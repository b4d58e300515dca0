"""Validates deformable convolution, contrastive loss and NMS against PyTorch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparing import compare
from deform_conv2d import deform_conv2d
from deformable import their_deform_conv
from torch.nn import functional

from detclipv2_jax.ops import nms
from detclipv2_jax.ops.contrastive import ContrastiveConfig, word_region_contrastive

GRID_SAMPLE = "torch grid_sample, autograd, float64"
AUTOGRAD = "torch log_softmax, autograd, float64"


@pytest.mark.parametrize(
    ("spread", "on"), [(1.5, "offsets of some pixels"), (30.0, "offsets far out of the image")]
)
@pytest.mark.parametrize("size", [(7, 10), (2, 33)])
def test_deformable_convolution(size, spread, on):
    rng = np.random.default_rng(0)
    arrays = [
        rng.normal(size=(2, *size, 5)),
        rng.normal(size=(2, *size, 18)) * spread,
        rng.uniform(size=(2, *size, 9)),
        rng.normal(size=(3, 3, 5, 4)),
    ]
    arrays = [a.astype(np.float32) for a in arrays]
    pull = rng.normal(size=(2, *size, 4))
    tensors = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in arrays]
    theirs = their_deform_conv(*tensors)
    (theirs * torch.from_numpy(pull)).sum().backward()

    def run(*a):
        loss = lambda *b: (deform_conv2d(*b) * jnp.float32(pull)).sum()
        return deform_conv2d(*a), jax.grad(loss, (0, 1, 2, 3))(*a)

    out, gradients = jax.jit(run)(*arrays)
    on = f"{size[0]}×{size[1]}, {on}: "
    part = "Deformable convolution"
    compare(part, GRID_SAMPLE, on + "values", out, theirs.detach().numpy(), 1e-5)
    for name, ours, tensor in zip(("input", "offsets", "mask", "kernel"), gradients, tensors):
        compare(part, GRID_SAMPLE, on + f"gradient of {name}", ours, tensor.grad.numpy(), 1e-4)


def their_similarity(regions, concepts, scale, own, cfg, direction):
    """Compute s^T or s^I of one image and one text from their regions and words."""
    s = scale * concepts[own] @ regions.T  # (words, regions)
    s = s if direction == "text_to_image" else s.T
    if cfg.matching == "soft":
        return (torch.softmax(s / cfg.soft_temperature, 1) * s).sum(dim=1).mean()
    return s.max(dim=1).values.mean()


def their_contrastive(regions, concepts, scale, mask, areas, ids, cfg):
    """Compute Yao et al. 2023, equations 3 to 5 and §3.2 (FILIP's two directions), pair by pair."""
    if cfg.matching == "max_size":  # the largest region and the caption
        largest = np.where(mask, areas, -1).argmax(axis=1)
        mask, ids = mask & (np.arange(mask.shape[1]) == largest[:, None]), ids[:, :1]
    own = [[int(j) for j in row if j >= 0] for row in ids]
    valid = [b for b in range(len(regions)) if mask[b].any() and own[b]]
    target = torch.arange(len(valid))
    found = {}
    for direction in ("text_to_image", "image_to_text"):
        rows = [
            torch.stack(
                [
                    their_similarity(
                        regions[b][torch.from_numpy(mask[b])],
                        concepts,
                        scale,
                        own[i],
                        cfg,
                        direction,
                    )
                    for b in valid
                ]
            )
            for i in valid
        ]
        logits = torch.stack(rows) / cfg.temperature  # (text, image)
        logits = logits if direction == "text_to_image" else logits.T
        found[direction] = functional.cross_entropy(
            logits, target, label_smoothing=cfg.label_smoothing
        )
    found["both"] = sum(found.values()) / 2
    return found[cfg.direction]


@pytest.mark.parametrize("matching", ["max", "soft", "max_size"])
@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text", "both"])
def test_contrastive_loss(direction, matching):
    rng = np.random.default_rng(1)
    images, count, concepts, dim = 12, 9, 30, 16
    regions = rng.normal(0, 0.5, (images, count, dim)).astype(np.float32)
    table = rng.normal(0, 0.5, (concepts, dim)).astype(np.float32)
    mask = rng.random((images, count)) < 0.7
    mask[3] = False  # an image without a region
    areas = rng.uniform(1, 100, (images, count)).astype(np.float32)
    ids = rng.integers(-1, concepts, (images, 5)).astype(np.int32)
    ids[:, 0] = rng.permutation(concepts)[:images]  # the captions differ
    ids[5] = -1  # and one without a text
    scale = np.float32(1.7)
    tensors = [
        torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (regions, table, scale)
    ]
    for smoothing, temperature in ((0.1, 0.5), (0.0, 0.05)):
        cfg = ContrastiveConfig(direction, matching, temperature, smoothing, 0.7)
        for tensor in tensors:
            tensor.grad = None
        theirs = their_contrastive(*tensors, mask, areas, ids, cfg)
        theirs.backward()
        loss = lambda r, c, s, cfg=cfg: word_region_contrastive(r, mask, areas, c, ids, s, cfg)
        ours = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(regions, table, scale)
        expected = [theirs.detach().numpy(), *(t.grad.numpy() for t in tensors)]
        on = f"{direction}, {matching}, τ {temperature}, smoothing {smoothing}: loss and gradients"
        compare("Contrastive loss", AUTOGRAD, on, ours, expected, 1e-4)


def their_nms(boxes, scores, threshold):
    """Compute greedy NMS by a stable sort and a loop."""
    boxes = boxes.double()
    order = torch.sort(scores, descending=True, stable=True).indices.tolist()
    area = lambda b: (b[2] - b[0]).clamp(min=0) * (b[3] - b[1]).clamp(min=0)
    kept = []
    for i in order:
        for j in kept:
            low = torch.maximum(boxes[i, :2], boxes[j, :2])
            high = torch.minimum(boxes[i, 2:], boxes[j, 2:])
            both = (high - low).clamp(min=0).prod()
            union = area(boxes[i]) + area(boxes[j]) - both
            if union > 0 and both > threshold * union:
                break
        else:
            kept.append(i)
    return np.isin(np.arange(len(boxes)), kept)


@pytest.mark.parametrize("threshold", [0.3, 0.6, 1.0])
def test_suppression(threshold):
    ours, theirs = [], []
    run = jax.jit(lambda b, s, m: nms.nms(b, s, m, threshold))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        start = rng.integers(0, 200, (80, 2)) / 4  # quarters: exact in float32
        sides = rng.integers(0, 80, (80, 2)) / 4  # with boxes without area
        boxes = np.concatenate([start, start + sides], axis=1).astype(np.float32)
        scores = (rng.integers(0, 12, 80) / 12).astype(np.float32)  # with ties
        ours.append(run(boxes, scores, np.ones(80, bool)))
        theirs.append(their_nms(torch.from_numpy(boxes), torch.from_numpy(scores), threshold))
    on = f"20 × 80 boxes with ties and without area, threshold {threshold}: the kept set"
    compare("Suppression", "torch sort and a plain loop, float64", on, ours, theirs, 0)
