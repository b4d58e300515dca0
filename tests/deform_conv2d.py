"""Deformable convolution of a single map, for tests that compare it with a reference."""

from detclipv2_jax.models.deform_conv import deform_conv_levels
from detclipv2_jax.models.packed_levels import PackedLevels


def deform_conv2d(x, offsets, mask, kernel):
    """`deform_conv_levels` for a pyramid of one level; offsets (B, H, W, 18), mask (B, H, W, 9)."""
    batch, height, width, _ = x.shape
    packed = PackedLevels(((height, width),))
    offsets, mask = offsets.reshape(batch, -1, 18), mask.reshape(batch, -1, 9)
    return deform_conv_levels(x, packed, offsets, mask, kernel).reshape(batch, height, width, -1)
