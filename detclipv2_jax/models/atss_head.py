"""ATSS head that embeds regions instead of classifying them (DetCLIPv2 §3.3; Zhang et al. 2020)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.deform_conv import deform_conv_by_kernel, deform_conv_levels
from detclipv2_jax.models.fpn import conv3x3
from detclipv2_jax.models.initializers import Draws, normal
from detclipv2_jax.models.norms import GroupNorm
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.models.remat import Remat, block_of
from detclipv2_jax.ops import conv
from detclipv2_jax.ops.kernels import deform, packed_conv, place
from detclipv2_jax.ops.kernels.place import Kernels

_OUTPUT_STD = 0.01  # ATSS's, of the kernels that end the branches


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """Sizes of the head.

    convs: convolutions of each branch; groups: GroupNorm's.
    branch_std: of the initial kernels inside the branches: ATSS's 0.01. A GroupNorm undoes their
        scale, so it only sets how fast they turn: by rate / std a step.
    """

    channels: int = 256
    convs: int = 4
    groups: int = 32
    embed_dim: int = 256
    deformable: bool = True
    branch_std: float = 0.01

    def __post_init__(self):
        if self.channels % self.groups:
            raise UserError(f"head.groups {self.groups} must divide head.channels {self.channels}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RegionOutputs:
    """What the head says of each of the K anchors, in the order of `anchor_grid`, in float32."""

    embeddings: Float[Array, "B K D"]
    deltas: Float[Array, "B K 4"]  # normalized by the coder's stds; see ops/boxes.py
    centerness: Float[Array, "B K"]  # logits


class ConvNormRelu(nnx.Module):
    """3×3 convolution, GroupNorm, ReLU."""

    def __init__(self, width: int, cfg: HeadConfig, *, dtype, rngs: Draws):
        self.conv = conv3x3(
            width, cfg.channels, dtype, rngs, use_bias=False, kernel_init=normal(cfg.branch_std)
        )
        self.norm = GroupNorm(cfg.channels, cfg.groups)

    def __call__(self, x: Float[Array, "B H W C"], canvas: PackedLevels) -> Float[Array, "B H W D"]:
        """Same canvas, zeros in its gaps."""
        x = jax.nn.relu(self.norm(self.conv(x), canvas))
        return jnp.where(canvas.mask, x, jnp.zeros((), x.dtype))  # jax2onnx reads 0 as float64


class DeformConv(nnx.Module):
    """The deformable convolution at the start of the classification branch.

    It samples the FPN's feature at places that the regression branch's feature chooses, which is
    how the contrastive gradient of box-free pairs reaches that branch. Offsets start at zero and
    the modulation at a half: their convolution starts as zeros, as DCNv2's does.

    `remat` and `kernels` are the head's.
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

    def __call__(
        self, x: Float[Array, "B H W C"], where: Float[Array, "B H W 27"], canvas: PackedLevels
    ) -> Float[Array, "B H W D"]:
        """Convolve the canvas `x`, level by level, where `offset` of the other branch says."""
        if self.has_kernels(x.shape):  # keeps nothing of its inside
            offsets, mask = self._points(where)
            return deform_conv_by_kernel(x, canvas, offsets, mask, self.kernel[...])
        run = block_of(lambda module, *arrays: module._by_levels(*arrays, canvas), self.remat)
        return run(self, x, where)

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether a kernel samples a canvas of this shape, on the device that is traced for."""
        wanted = deform.fast_memory(shape, self.kernel.shape[3])
        return self.fused and place.room() >= wanted

    def _points(self, where):
        """Offsets and weights of the taps."""
        where = where.astype(jnp.float32)
        return where[..., :18], jax.nn.sigmoid(where[..., 18:])

    def _by_levels(self, x, where, canvas):
        offsets, mask = self._points(canvas.flatten(where))
        by_tap = self.remat != "none"
        out = deform_conv_levels(x, canvas, offsets, mask, self.kernel[...], by_tap=by_tap)
        return canvas.unflatten(out)


class ATSSHead(nnx.Module):
    """Two branches shared by all levels: a region embedding, a box and a centerness an anchor.

    Args:
        width: channels of the incoming levels.
        levels: how many there are; each has its own learned factor on the box deltas.
        cfg: its sizes.
        dtype: of the activations; parameters and norms' statistics are float32.
        remat: all but "none" keep nothing of the inside of the deformable convolution, and go
            through its nine taps one after another.
        kernels: "auto" convolves by kernels where there are TPUs and they can do it; "xla" never.
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
        outputs = {"embed": cfg.embed_dim, "box": 4, "centerness": 1}
        for name, out in outputs.items():
            conv = conv3x3(cfg.channels, out, dtype, rngs, kernel_init=normal(_OUTPUT_STD))
            setattr(self, name, conv)
        self.scales = nnx.Param(jnp.ones((levels,), jnp.float32))

    def __call__(self, levels: Sequence[Float[Array, "B H W C"]]) -> RegionOutputs:
        """Outputs of all anchors of all levels, fine to coarse, each level row by row."""
        canvas = PackedLevels(tuple(x.shape[1:3] for x in levels))
        x = canvas.place(levels)
        branch = self._branch_by_kernels if self.has_kernels(x.shape) else self._branch
        by_regression = [self.box, self.centerness]
        if self.dcn is None:
            region = x
            box, centerness = branch(self.reg_convs, by_regression, x, canvas)
        else:
            by_regression.append(self.dcn.offset)
            box, centerness, where = branch(self.reg_convs, by_regression, x, canvas)
            region = self.dcn(x, where, canvas)
        (embeddings,) = branch(self.cls_convs, [self.embed], region, canvas)
        embeddings, deltas, centerness = (
            canvas.flatten(output).astype(jnp.float32) for output in (embeddings, box, centerness)
        )
        pixels = [height * width for height, width in canvas.sizes]
        scales = jnp.repeat(self.scales[...], np.asarray(pixels), total_repeat_length=sum(pixels))
        return RegionOutputs(
            embeddings=embeddings,
            deltas=deltas * scales[:, None],
            centerness=centerness[..., 0],
        )

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether a canvas of this shape goes through kernels, on the device traced for."""
        if not self.fused:
            return False
        kernels = [layer.conv.kernel for layer in (*self.reg_convs, *self.cls_convs)]
        kernels.append(self.embed.kernel)
        inputs, outputs = (max(kernel.shape[axis] for kernel in kernels) for axis in (2, 3))
        return place.room() >= packed_conv.fast_memory((*shape[:3], inputs), outputs)

    def _branch(self, convs, outputs, x, canvas):
        """The convolutions one after another, then all of `outputs`, which are one convolution."""
        for layer in convs:
            x = layer(x, canvas)
        return _split(conv.conv3x3(x, _joint(outputs).astype(x.dtype)), outputs)

    def _branch_by_kernels(self, convs, outputs, x, canvas):
        """The same by kernels; each normalizes and activates what the one before it convolved."""
        convolve = lambda images, kernel: packed_conv.packed_conv(
            *images, kernel, canvas.rectangles
        )
        norm = None
        for layer in convs:
            kernel = layer.conv.kernel[...]
            x, statistics = place.on_each_device(convolve, (x, norm), kernel)
            norm = packed_conv.Norm(*layer.norm.factors(statistics.mean, statistics.variance))
        x, _ = place.on_each_device(convolve, (x, norm), _joint(outputs))
        return _split(x, outputs)


def _joint(outputs: Sequence[nnx.Conv]) -> Float[Array, "3 3 C O"]:
    """The kernels of convolutions of one map, side by side."""
    return jnp.concatenate([output.kernel[...] for output in outputs], axis=-1)


def _split(x: Float[Array, "B H W O"], outputs: Sequence[nnx.Conv]) -> list[Array]:
    """What `_joint` convolved, apart again, each with its bias."""
    ends = np.cumsum([output.kernel.shape[-1] for output in outputs])[:-1]
    parts = jnp.split(x, ends, axis=-1)
    return [part + out.bias[...].astype(x.dtype) for part, out in zip(parts, outputs)]
