"""ATSS head that embeds regions instead of classifying them (DetCLIPv2 §3.3; Zhang et al. 2020)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.errors import UserError
from detclipv2_jax.models.deform_conv import deform_conv_levels
from detclipv2_jax.models.fpn import conv3x3
from detclipv2_jax.models.initialise import Draws, normal
from detclipv2_jax.models.norms import GroupNorm

_CONV_INIT = normal(0.01)  # ATSS's, all convolutions of the head


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Sizes of the head. `convs` counts the convolutions of each branch, `groups` GroupNorm's."""

    channels: int = 256
    convs: int = 4
    groups: int = 32
    embed_dim: int = 256
    deformable: bool = True

    def __post_init__(self):
        if self.channels % self.groups:
            raise UserError(f"head.groups {self.groups} must divide head.channels {self.channels}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegionOutputs:
    """What the head says of each of the K anchors, in the order of `anchor_grid`, in float32."""

    embeddings: Float[Array, "B K D"]
    deltas: Float[Array, "B K 4"]  # normalised by the coder's stds; see ops/boxes.py
    centerness: Float[Array, "B K"]  # logits


class ConvNormRelu(nnx.Module):
    """3×3 convolution, GroupNorm, ReLU."""

    def __init__(self, width: int, cfg: HeadConfig, *, dtype, rngs: Draws):
        self.conv = conv3x3(
            width, cfg.channels, dtype, rngs, use_bias=False, kernel_init=_CONV_INIT
        )
        self.norm = GroupNorm(cfg.channels, cfg.groups, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        """Same height and width."""
        return jax.nn.relu(self.norm(self.conv(x)))


class DeformConv(nnx.Module):
    """The deformable convolution at the start of the classification branch.

    It samples the FPN's feature at places that the regression branch's feature chooses, which is how
    the contrastive gradient of box-free pairs reaches that branch. Offsets start at zero and the
    modulation at a half: their convolution starts as zeros, as DCNv2's does.
    """

    def __init__(self, width: int, cfg: HeadConfig, *, dtype, rngs: Draws):
        self.offset = conv3x3(
            cfg.channels, 27, dtype, rngs, kernel_init=nnx.initializers.zeros_init()
        )
        self.kernel = nnx.Param(_CONV_INIT(rngs, (3, 3, width, cfg.channels)))

    def __call__(
        self,
        levels: Sequence[Float[Array, "B H W C"]],
        regression: Sequence[Float[Array, "B H W D"]],
    ) -> list[Float[Array, "B H W D"]]:
        """Convolve each level where its regression feature says."""
        outputs = [self.offset(x).astype(jnp.float32) for x in regression]
        offsets = [x[..., :18] for x in outputs]
        masks = [jax.nn.sigmoid(x[..., 18:]) for x in outputs]
        return deform_conv_levels(levels, offsets, masks, self.kernel[...])


class ATSSHead(nnx.Module):
    """Two branches shared by all levels: a region embedding, a box and a centerness an anchor.

    Args:
        width: channels of the incoming levels.
        levels: how many there are; each has its own learned factor on the box deltas.
        cfg: its sizes.
        dtype: of the activations; parameters and norms' statistics are float32.
        remat: recompute the deformable convolution's samples in the backward pass: they are nine times
            the size of the map they come from.
        rngs: initialises the parameters.
    """

    def __init__(
        self,
        width: int,
        levels: int,
        cfg: HeadConfig,
        *,
        dtype=jnp.float32,
        remat: bool = False,
        rngs: Draws,
    ):
        self.remat = remat
        self.dcn = DeformConv(width, cfg, dtype=dtype, rngs=rngs) if cfg.deformable else None
        widths = [cfg.channels if cfg.deformable else width] + [cfg.channels] * (cfg.convs - 1)
        self.cls_convs = nnx.List(ConvNormRelu(w, cfg, dtype=dtype, rngs=rngs) for w in widths)
        widths = [width] + [cfg.channels] * (cfg.convs - 1)
        self.reg_convs = nnx.List(ConvNormRelu(w, cfg, dtype=dtype, rngs=rngs) for w in widths)
        outputs = {"embed": cfg.embed_dim, "box": 4, "centerness": 1}
        for name, out in outputs.items():
            conv = conv3x3(cfg.channels, out, dtype, rngs, kernel_init=_CONV_INIT)
            setattr(self, name, conv)
        self.scales = nnx.Param(jnp.ones((levels,), jnp.float32))

    def __call__(self, levels: Sequence[Float[Array, "B H W C"]]) -> RegionOutputs:
        """Outputs of all anchors of all levels, fine to coarse, each level row by row."""
        regression = [_apply(self.reg_convs, x) for x in levels]
        region = levels
        if self.dcn is not None:
            run = nnx.remat(DeformConv.__call__) if self.remat else DeformConv.__call__
            region = run(self.dcn, levels, regression)
        region = [_apply(self.cls_convs, x) for x in region]
        scales = self.scales[...]
        return RegionOutputs(
            embeddings=_flatten([self.embed(x) for x in region]),
            deltas=_flatten([self.box(x).astype(jnp.float32) * scales[i] for i, x in enumerate(regression)]),
            centerness=_flatten([self.centerness(x) for x in regression])[..., 0],
        )


def _apply(convs: Sequence[ConvNormRelu], x: Array) -> Array:
    for conv in convs:
        x = conv(x)
    return x


def _flatten(maps: list[Float[Array, "B H W C"]]) -> Float[Array, "B K C"]:
    flat = [x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1]) for x in maps]
    return jnp.concatenate(flat, axis=1)
