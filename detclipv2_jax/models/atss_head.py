"""ATSS head that embeds regions instead of classifying them (DetCLIPv2 §3.3; Zhang et al. 2020)."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.deform_conv import deform_conv_by_kernel, deform_conv_levels
from detclipv2_jax.models.fpn import conv3x3
from detclipv2_jax.models.initializers import Draws, normal
from detclipv2_jax.models.norms import GroupNorm
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.models.remat import Remat, rematerialize
from detclipv2_jax.ops import conv
from detclipv2_jax.ops.kernels import deform, packed_conv, place
from detclipv2_jax.ops.kernels.place import Kernels

_OUTPUT_STD = 0.01  # of the initial kernels that end the branches (ATSS)
_FOREGROUND_BIAS = -math.log(99)  # an untrained anchor is an object with probability 0.01 (ATSS)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Sizes of the head.

    Attributes:
        channels: of each branch.
        convs: convolutions per branch.
        groups: of each GroupNorm.
        embed_dim: size of a region embedding.
        proposal_scores: outputs after the regression branch that can rank the regions of captioned
            images (`loss.proposals.score`): "foreground", whether the anchor belongs to any object,
            and "iou", the IoU of its box with the object (DetCLIPv2 §4.2.1, ablation).
        deformable: whether a deformable convolution starts the classification branch.
        branch_std: standard deviation of the initial kernels inside the branches; ATSS uses 0.01.
            GroupNorm cancels their scale, so it only sets how fast their direction changes: by
            learning rate / branch_std per step.
    """

    channels: int = 256
    convs: int = 4
    groups: int = 32
    embed_dim: int = 512
    proposal_scores: tuple[Literal["foreground", "iou"], ...] = ()
    deformable: bool = True
    branch_std: float = 0.01

    def __post_init__(self):
        if sorted(set(self.proposal_scores) & {"foreground", "iou"}) != sorted(
            self.proposal_scores
        ):
            raise UserError(
                f"config.model.head.proposal_scores is {self.proposal_scores!r}. Choose from "
                '"foreground" and "iou", each at most once.'
            )
        if self.channels % self.groups:
            raise UserError(
                f"config.model.head: groups {self.groups} must divide channels {self.channels}. "
                "Change one of them."
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegionOutputs:
    """Outputs of the head for each of the K anchors in the order of `anchor_grid`, in float32."""

    embeddings: Float[Array, "B K D"]
    deltas: Float[Array, "B K 4"]  # normalized by the coder's stds; see ops/boxes.py
    centerness: Float[Array, "B K"]  # logits
    # Logits of `HeadConfig.proposal_scores`, by name.
    proposal_logits: dict[str, Float[Array, "B K"]] = dataclasses.field(default_factory=dict)
    # {"region_statistics": {"mean", "variance", "pieces": 1}} of this batch's embeddings, if they
    # are batch-normalized in training.
    statistics: dict[str, dict[str, Array]] = dataclasses.field(default_factory=dict)


class ConvNormRelu(nnx.Module):
    """3×3 convolution, GroupNorm and ReLU of a packed map."""

    def __init__(self, width: int, cfg: HeadConfig, *, dtype, rngs: Draws):
        self.conv = conv3x3(
            width, cfg.channels, dtype, rngs, use_bias=False, kernel_init=normal(cfg.branch_std)
        )
        self.norm = GroupNorm(cfg.channels, cfg.groups)

    def __call__(
        self,
        x: Float[Array, "B H W C"],
        packed: PackedLevels,
        inside: Bool[Array, "B H W 1"] | None = None,
    ) -> Float[Array, "B H W D"]:
        """Return the packed map of the layer's output, with zeros in the gaps.

        With `inside`, the pixels of the images: the others are zero too, and the statistics of the
        norm are those of the images.
        """
        x = jax.nn.relu(self.norm(self.conv(x), packed, inside))
        mask = packed.mask if inside is None else inside
        return jnp.where(mask, x, jnp.zeros((), x.dtype))  # jax2onnx reads 0 as float64


class DeformConv(nnx.Module):
    """Deformable convolution that starts the classification branch.

    It samples the FPN's features at places that the regression branch's features choose. This is
    how the contrastive loss of image-text pairs, which have no boxes, trains the regression branch.
    The kernel that predicts offsets and modulation starts at zero, as in DCNv2: offsets start at 0
    and the modulation at 0.5.

    `remat` and `kernels` are those of `ATSSHead`.
    """

    def __init__(
        self, width: int, cfg: HeadConfig, *, dtype, remat: Remat, kernels: Kernels, rngs: Draws
    ):
        self.remat = remat
        self.fused = kernels == "auto" and dtype == jnp.bfloat16
        self.offset = conv3x3(
            cfg.channels, 27, dtype, rngs, kernel_init=nnx.initializers.zeros_init()
        )
        self.kernel = nnx.Param(normal(cfg.branch_std)(rngs, (3, 3, width, cfg.channels)))

    @jax.named_scope("deformable_convolution")
    def __call__(
        self, x: Float[Array, "B H W C"], sampling: Float[Array, "B H W 27"], packed: PackedLevels
    ) -> Float[Array, "B H W D"]:
        """Return the convolution of a packed map, with zeros in the gaps.

        Args:
            x: packed map of the FPN's features.
            sampling: packed map of 18 offsets and 9 modulation logits per pixel: the convolution
                `offset` of the regression branch's features.
            packed: where the levels are.
        """
        if self.has_kernels(x.shape):  # their backward pass stores only their inputs
            offsets, mask = _offsets_and_mask(sampling)
            return deform_conv_by_kernel(x, packed, offsets, mask, self.kernel[...])
        run = lambda module, *arrays: module._by_levels(*arrays, packed)
        return rematerialize(run, self.remat)(self, x, sampling)

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether the TPU kernel handles a packed map of this shape on this device."""
        needed = deform.vmem_bytes(shape, self.kernel.shape[3])
        return self.fused and place.vmem_budget() >= needed

    def _by_levels(self, x, sampling, packed):
        offsets, mask = _offsets_and_mask(packed.flatten(sampling))
        by_tap = self.remat != "none"
        out = deform_conv_levels(x, packed, offsets, mask, self.kernel[...], by_tap=by_tap)
        return packed.unflatten(out)


def _offsets_and_mask(
    sampling: Float[Array, "... 27"],
) -> tuple[Float[Array, "... 18"], Float[Array, "... 9"]]:
    sampling = sampling.astype(jnp.float32)
    return sampling[..., :18], jax.nn.sigmoid(sampling[..., 18:])


class ATSSHead(nnx.Module):
    """Two branches, shared by all levels, that predict an embedding, box and centerness per anchor.

    Args:
        width: channels of the incoming levels.
        levels: number of levels; each has its own learned factor on the box deltas.
        cfg: sizes of the head.
        dtype: of the activations; parameters and statistics of the norms are float32.
        remat: any policy but "none" recomputes the inside of the deformable convolution and
            processes its nine taps one after another.
        kernels: "auto" uses TPU kernels where they apply, "xla" never does.
        rngs: initializes the parameters.
    """

    def __init__(
        self,
        width: int,
        levels: int,
        cfg: HeadConfig,
        *,
        dtype=jnp.float32,
        remat: Remat = "none",
        kernels: Kernels = "auto",
        rngs: Draws,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.fused = kernels == "auto" and dtype == jnp.bfloat16
        deform_conv = functools.partial(DeformConv, remat=remat, kernels=kernels)
        self.dcn = deform_conv(width, cfg, **options) if cfg.deformable else None
        widths = [cfg.channels if cfg.deformable else width] + [cfg.channels] * (cfg.convs - 1)
        self.cls_convs = nnx.List(ConvNormRelu(w, cfg, **options) for w in widths)
        widths = [width] + [cfg.channels] * (cfg.convs - 1)
        self.reg_convs = nnx.List(ConvNormRelu(w, cfg, **options) for w in widths)
        self.proposal_scores = cfg.proposal_scores
        outputs = {"embed": cfg.embed_dim, "box": 4, "centerness": 1}
        for name, out in (outputs | dict.fromkeys(cfg.proposal_scores, 1)).items():
            conv = conv3x3(cfg.channels, out, dtype, rngs, kernel_init=normal(_OUTPUT_STD))
            setattr(self, name, conv)
        if "foreground" in cfg.proposal_scores:
            self.foreground.bias = nnx.Param(jnp.full((1,), _FOREGROUND_BIAS, jnp.float32))
        self.scales = nnx.Param(jnp.ones((levels,), jnp.float32))

    @jax.named_scope("head")
    def __call__(
        self,
        levels: Sequence[Float[Array, "B H W C"]],
        extents: Int[Array, "B levels 2"] | None = None,
    ) -> RegionOutputs:
        """Return the outputs for all anchors: levels fine to coarse, each level row by row.

        Args:
            levels: the neck's levels, fine to coarse.
            extents: of each image on each level (`level_extents`). The levels must be zero beyond
                them. Then an image's outputs do not depend on its padding: convolutions read zeros
                there, as beyond the canvas, and the norms' statistics are those of the image. The
                outputs of anchors in the padding are undefined. None: padding counts like the
                image.
        """
        packed = PackedLevels(tuple(x.shape[1:3] for x in levels))
        x = packed.pack(levels)
        inside = None if extents is None else packed.inside(extents)
        branch = functools.partial(
            self._branch_by_kernels if self.has_kernels(x.shape) else self._branch,
            packed=packed,
            extents=extents,
            inside=inside,
        )
        scores = self.proposal_scores
        outputs = [self.box, self.centerness, *(getattr(self, name) for name in scores)]
        if self.dcn is not None:
            outputs.append(self.dcn.offset)
        with jax.named_scope("regression_branch"):
            # A box needs more digits than bfloat16 has: 0.4 % of a delta.
            box, centerness, *rest = branch(self.reg_convs, outputs, x, precise=True)
        scores, sampling = dict(zip(scores, rest)), rest[len(scores) :]
        region = x if self.dcn is None else self.dcn(x, *sampling, packed)
        if inside is not None:
            region = jnp.where(inside, region, jnp.zeros((), region.dtype))
        with jax.named_scope("classification_branch"):
            (embeddings,) = branch(self.cls_convs, [self.embed], region)
        with jax.named_scope("outputs"):
            return self._outputs(embeddings, box, {"centerness": centerness, **scores}, packed)

    def _outputs(self, embeddings, box, scores, packed) -> RegionOutputs:
        """Return packed maps as float32 values in anchor order, deltas with their level's scale."""
        flat = lambda output: packed.flatten(output).astype(jnp.float32)
        embeddings, deltas = flat(embeddings), flat(box)
        logits = {name: flat(output)[..., 0] for name, output in scores.items()}
        pixels = [height * width for height, width in packed.sizes]
        scales = jnp.repeat(self.scales[...], np.asarray(pixels), total_repeat_length=sum(pixels))
        return RegionOutputs(
            embeddings=embeddings,
            deltas=deltas * scales[:, None],
            centerness=logits.pop("centerness"),
            proposal_logits=logits,
        )

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether TPU kernels handle a packed map of this shape on this device."""
        if not self.fused:
            return False
        kernels = [layer.conv.kernel for layer in (*self.reg_convs, *self.cls_convs)]
        kernels.append(self.embed.kernel)
        inputs, outputs = (max(kernel.shape[axis] for kernel in kernels) for axis in (2, 3))
        # Outputs of the regression branch, in high and low parts.
        precise = 2 * (4 + 1 + len(self.proposal_scores) + 27)
        needed = max(
            packed_conv.vmem_bytes((*shape[:3], inputs), outputs),
            packed_conv.vmem_bytes((*shape[:3], inputs), precise, jnp.float32),
        )
        return place.vmem_budget() >= needed

    def _branch(self, convs, outputs, x, packed, extents, inside, precise=False) -> list[Array]:
        """Return the maps of `outputs` after `convs`; `outputs` run as one joint convolution.

        If `precise`, that convolution does not round its kernel and its result to bfloat16.
        """
        for layer in convs:
            x = layer(x, packed, inside)
        with jax.named_scope("outputs"):
            kernel = _joint_kernel(outputs)
            if precise:
                return _split(conv.conv3x3_float32(x, kernel), outputs)
            return _split(conv.conv3x3(x, kernel.astype(x.dtype)), outputs)

    def _branch_by_kernels(
        self, convs, outputs, x, packed, extents, inside, precise=False
    ) -> list[Array]:
        """Compute `_branch` by TPU kernels.

        Each kernel normalizes and activates its input, which is the convolution before it, and
        returns the statistics of its own convolution.
        """

        def convolve(images, kernel, dtype=None):
            x, norm, extents = images
            return packed_conv.packed_conv(x, norm, kernel, packed.rectangles, extents, dtype)

        norm = None
        for layer in convs:
            kernel = layer.conv.kernel[...]
            x, statistics = place.on_each_device(convolve, (x, norm, extents), kernel)
            norm = packed_conv.Norm(
                *layer.norm.scale_and_offset(statistics.mean, statistics.variance)
            )
        with jax.named_scope("outputs"):
            kernel = _joint_kernel(outputs)
            images = (x, norm, extents)
            if not precise:
                return _split(place.on_each_device(convolve, images, kernel)[0], outputs)
            wide = functools.partial(convolve, dtype=jnp.float32)
            parts = jnp.concatenate(conv.high_and_low(kernel), axis=-1)
            high, low = jnp.split(place.on_each_device(wide, images, parts)[0], 2, axis=-1)
            return _split(high + low, outputs)


def _joint_kernel(outputs: Sequence[nnx.Conv]) -> Float[Array, "3 3 C O"]:
    """Return the kernel of one convolution that computes several convolutions of the same map."""
    return jnp.concatenate([output.kernel[...] for output in outputs], axis=-1)


def _split(x: Float[Array, "B H W O"], outputs: Sequence[nnx.Conv]) -> list[Array]:
    """Split the result of the joint convolution into its maps, and add each one's bias."""
    ends = np.cumsum([output.kernel.shape[-1] for output in outputs])[:-1]
    maps = jnp.split(x, ends, axis=-1)
    return [map_ + output.bias[...].astype(x.dtype) for map_, output in zip(maps, outputs)]
