"""Modulated deformable convolution in PyTorch, for values and gradients."""

import itertools

import torch
from torch.nn import functional


def their_deform_conv(x, offsets, mask, kernel):
    """Compute DCNv2 (Zhu et al. 2019, eq. 1) as nine bilinear samples of the whole map."""
    batch, height, width, _ = x.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = 0
    for tap, (u, v) in enumerate(itertools.product(range(3), range(3))):
        y = rows + (u - 1) + offsets[..., 2 * tap]
        z = columns + (v - 1) + offsets[..., 2 * tap + 1]
        # grid_sample's -1 … 1 spans from the first pixel's left edge to the last one's right edge.
        grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        sampled = functional.grid_sample(
            x.permute(0, 3, 1, 2), grid, padding_mode="zeros", align_corners=False
        ).permute(0, 2, 3, 1)
        out = out + (mask[..., tap, None] * sampled) @ kernel[u, v]
    return out
