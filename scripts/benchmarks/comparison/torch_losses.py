"""The losses of DetCLIPv2 in PyTorch, over all anchors at once, for comparison only.

The arithmetic of `detclipv2_jax.objective`; nothing of it but its config is used here.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.ops.boxes import DELTA_STDS, MAX_LOG_RATIO, anchor_grid, level_sizes
from detclipv2_jax.ops.losses import ALPHA, GAMMA
from detclipv2_jax.training.objective import LossConfig

Regions = tuple[Tensor, Tensor, Tensor]  # embeddings (B K D), deltas (B K 4), centerness (B K)


class Tensors:
    """`Batch` in PyTorch."""

    def __init__(self, batch: Batch, device: Any):
        tensor = lambda array: torch.from_numpy(np.array(array)).to(device)
        self.kind = batch.kind
        self.images, self.sizes, self.boxes = map(tensor, (batch.images, batch.sizes, batch.boxes))
        self.labels, self.texts, self.tokens = (
            tensor(array).long() for array in (batch.labels[..., 0], batch.texts, batch.tokens)
        )
        self.token_mask = tensor(batch.token_mask)


def overlaps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return IoU and union of each pair (shapes broadcast)."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clamp(min=0).prod(dim=-1)
    union = area(a) + area(b) - shared
    return torch.where(union > 0, shared / union.clamp(min=1e-9), 0.0), union


def area(boxes: Tensor) -> Tensor:
    """Return areas in square pixels."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalized IoU of each pair (Rezatofighi et al. 2019)."""
    found, union = overlaps(a, b)
    low, high = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).clamp(min=0).prod(dim=-1)
    return found - torch.where(hull > 0, (hull - union) / hull.clamp(min=1e-9), 0.0)


def decode(anchors: Tensor, deltas: Tensor, stds: Tensor) -> Tensor:
    """Return boxes in pixels."""
    centers, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    deltas = deltas * stds
    centers = centers + deltas[..., :2] * sides
    half = sides * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    return torch.cat([centers - half, centers + half], dim=-1)


def atss(
    anchors: Tensor, levels: Sequence[int], sizes: Tensor, boxes: Tensor, candidates: int
) -> tuple[Tensor, Tensor]:
    """(B, K) index of the box that each anchor learns, -1 for none, and which anchors count.

    Zhang et al. 2020, algorithm 1, for all images at once.
    """
    centers, middles = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[..., :2] + boxes[..., 2:]) / 2
    inside = (centers[None] < sizes.flip(-1)[:, None]).all(dim=-1)
    near, start = [], 0
    for size in levels:
        here = slice(start, start + size)
        distances = (middles[:, :, None] - centers[here]).square().sum(dim=-1)
        distances = distances.masked_fill(~inside[:, None, here], math.inf)
        nearest = distances.topk(min(candidates, size), largest=False).indices
        near.append(start + nearest)
        start += size
    near = torch.cat(near, dim=-1)  # (B, N, T)
    exists = torch.gather(inside, 1, near.flatten(1)).reshape(near.shape)
    found, _ = overlaps(anchors[near], boxes[:, :, None])
    count = exists.sum(dim=-1, keepdim=True)
    mean = (found * exists).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    spread = ((found - mean) * exists).square().sum(dim=-1, keepdim=True)
    threshold = mean + (spread / (count - 1).clamp(min=1)).sqrt()
    at = centers[near]
    depth = torch.minimum(at - boxes[:, :, None, :2], boxes[:, :, None, 2:] - at).amin(dim=-1)
    real = (boxes[..., 2] > boxes[..., 0])[..., None]
    claims = exists & real & (found >= threshold) & (depth > 0.01)
    # The largest overlap wins; of equal ones the first box.
    flat, overlap = near.flatten(1), torch.where(claims, found, -1.0).flatten(1)
    best = torch.full(inside.shape, -1.0, device=boxes.device)
    best = best.scatter_reduce(1, flat, overlap, "amax")
    wins = claims.flatten(1) & (overlap == best.gather(1, flat))
    number = boxes.shape[1]
    index = torch.arange(number, device=boxes.device)[None, :, None].expand(near.shape).flatten(1)
    winner = torch.full(inside.shape, number, device=boxes.device)
    winner = winner.scatter_reduce(1, flat, torch.where(wins, index, number), "amin")
    return torch.where(winner < number, winner, -1), inside


class Objective:
    """Losses of each kind on one canvas."""

    def __init__(self, cfg: DetCLIPConfig, loss: LossConfig, canvas: tuple[int, int], device: Any):
        self.cfg, self.loss = cfg, loss
        self.anchors = torch.from_numpy(anchor_grid(*canvas, cfg.anchors)).to(device)
        self.levels = level_sizes(*canvas, cfg.anchors)
        self.stds = torch.tensor(DELTA_STDS, device=device)

    def __call__(self, model: nn.Module, batch: Tensors) -> Tensor:
        """Return the loss of a batch."""
        regions = model.regions(model.neck(model.maps(batch.images)))
        concepts = model.concepts(batch.tokens)
        scale = model.logit_scale.exp()
        if batch.kind == "image_text":
            chosen = self.choose(regions, concepts, scale, model.logit_bias, batch)
            return self.contrast(regions[0], concepts, scale, chosen, batch)
        targets = self.assign(batch)
        return self.dense(regions, concepts, scale, model.logit_bias, targets, batch)

    def assign(self, batch: Tensors) -> tuple[Tensor, ...]:
        """Return positive, label, scored, box and centerness of every anchor."""
        matched, inside = atss(
            self.anchors, self.levels, batch.sizes, batch.boxes, self.loss.candidates
        )
        positive, index = matched >= 0, matched.clamp(min=0)
        box = batch.boxes.gather(1, index[..., None].expand(-1, -1, 4))
        label = torch.where(positive, batch.labels.gather(1, index), -1)
        middle = (self.anchors[:, :2] + self.anchors[:, 2:]) / 2
        before, after = middle - box[..., :2], box[..., 2:] - middle
        near, far = torch.minimum(before, after), torch.maximum(before, after)
        ratio = near.clamp(min=0) / far.clamp(min=1e-9)
        centerness = torch.where(positive, ratio.prod(dim=-1).sqrt(), 0.0)
        box = torch.where(positive[..., None], box, self.anchors)
        return positive, label, inside & ~(positive & (label < 0)), box, centerness

    def dense(
        self,
        regions: Regions,
        concepts: Tensor,
        scale: Tensor,
        bias: Tensor,
        targets: tuple[Tensor, ...],
        batch: Tensors,
    ) -> Tensor:
        """Return the losses of alignment (all anchors, all concepts), boxes and centerness."""
        embeddings, deltas, centerness = regions
        positive, label, scored, box, central = targets
        positives = positive.sum().clamp(min=1)
        logits = (embeddings @ (scale * concepts).T).float() + bias
        hot = label[..., None] == torch.arange(len(concepts), device=label.device)
        count = scored[..., None] & batch.token_mask
        towards = torch.where(hot, logits, -logits)
        cost = (1 - towards.sigmoid()) ** GAMMA * functional.softplus(-towards)
        cost = cost * torch.where(hot, ALPHA, 1 - ALPHA)
        align = torch.where(count, cost, 0.0).sum() / positives
        if batch.kind != "detection" and not self.loss.grounding_boxes:
            return align
        boxes = ((1 - giou(decode(self.anchors, deltas, self.stds), box)) * central).sum()
        boxes = boxes / central.sum().clamp(min=1e-6)
        bce = functional.binary_cross_entropy_with_logits(centerness, central, reduction="none")
        bce = torch.where(positive, bce, 0.0).sum() / positives
        return align + self.loss.box * boxes + self.loss.centerness * bce

    @torch.no_grad()
    def choose(
        self, regions: Regions, concepts: Tensor, scale: Tensor, bias: Tensor, batch: Tensors
    ) -> tuple[Tensor, Tensor]:
        """(B, P) anchors that take part in the contrast, and which of these there are.

        Scored by the concepts of all images of a group; NMS picks one at a time, all images at
        once: that needs no table of overlaps, and no value on the host.
        """
        if self.loss.proposals.score != "batch":
            raise ValueError("the comparison supports only the paper's choice of regions.")
        embeddings, deltas, _ = regions
        pools = batch.texts.reshape(len(batch.texts) // self.loss.proposals.group, -1)
        owned = torch.zeros(len(pools), len(concepts) + 1, dtype=torch.bool, device=pools.device)
        owned = owned.scatter(1, pools.remainder(len(concepts) + 1), True)[:, :-1]
        grouped = embeddings.reshape(len(pools), -1, *embeddings.shape[1:])
        dots = torch.einsum("gbkd,md->gbkm", grouped, concepts).float()
        score = dots.masked_fill(~owned[:, None, None], -1e30).amax(dim=-1)
        score = (scale * score + bias).reshape(embeddings.shape[:2])
        middle = (self.anchors[:, :2] + self.anchors[:, 2:]) / 2
        inside = (middle[None] < batch.sizes.flip(-1)[:, None]).all(dim=-1)
        score = score.masked_fill(~inside, -math.inf)
        entering, start = [], 0
        for size in self.levels:
            count = min(self.loss.proposals.pre_nms_top_k, size)
            entering.append(start + score[:, start : start + size].topk(count).indices)
            start += size
        entering = torch.cat(entering, dim=1)
        score = score.gather(1, entering)
        limits = batch.sizes.flip(-1).repeat(1, 2)[:, None].to(deltas.dtype)
        boxes = decode(self.anchors, deltas, self.stds).clamp(min=0).minimum(limits)
        boxes = boxes.gather(1, entering[..., None].expand(-1, -1, 4))
        picks, there = [], []
        for _ in range(self.loss.proposals.k):
            best, place = score.max(dim=1, keepdim=True)
            picks.append(place)
            there.append(best > -math.inf)
            picked = boxes.gather(1, place[..., None].expand(-1, -1, 4))
            overlap, _ = overlaps(picked, boxes)
            score = score.masked_fill(overlap > self.loss.proposals.nms_iou, -math.inf)
            score = score.scatter(1, place, -math.inf)
        return entering.gather(1, torch.cat(picks, dim=1)), torch.cat(there, dim=1)

    def contrast(
        self,
        embeddings: Tensor,
        concepts: Tensor,
        scale: Tensor,
        chosen: tuple[Tensor, Tensor],
        batch: Tensors,
    ) -> Tensor:
        """Return λ times the cross-entropy of each text's image (Yao et al. 2023, eq. 3 to 5)."""
        cfg, (index, there) = self.loss.word_region, chosen
        if (cfg.direction, cfg.matching) != ("text_to_image", "max"):
            raise ValueError("the comparison supports only the paper's contrastive loss.")
        width = embeddings.shape[-1]
        features = embeddings.gather(1, index[..., None].expand(-1, -1, width)) * scale
        dots = torch.einsum("bpd,md->bpm", features, concepts).float()
        best = dots.masked_fill(~there[..., None], -1e30).amax(dim=1)  # (B, M)
        owned = batch.texts >= 0
        rows = best.T[batch.texts.clamp(min=0)]  # (texts, concepts of it, B)
        rows = torch.where(owned[..., None], rows, 0.0).sum(dim=1)
        logits = rows / owned.sum(dim=1, keepdim=True).clamp(min=1) / cfg.temperature
        valid = there.any(dim=1) & owned.any(dim=1)
        logits = logits.masked_fill(~valid, -1e30)
        log_p = torch.where(valid, logits.log_softmax(dim=-1), 0.0)
        count = valid.sum().clamp(min=1)
        smoothing = cfg.label_smoothing
        losses = -(1 - smoothing) * log_p.diagonal() - smoothing * log_p.sum(dim=-1) / count
        return self.loss.contrastive * torch.where(valid, losses, 0.0).sum() / count
