"""Swin Transformer as a detection backbone: images of any size in, three normalized maps out.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
Details that the paper leaves open follow the authors' detection code, so that published weights can
be loaded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.initializers import Draws, normal
from detclipv2_jax.models.loop import run_blocks
from detclipv2_jax.models.norms import LayerNorm, standardize_patches
from detclipv2_jax.models.remat import Remat, mark_dense_output, rematerialize
from detclipv2_jax.ops.kernels import attention, layer_norm, mlp, patch_merging, place
from detclipv2_jax.ops.kernels.place import Kernels

_MASKED = -1e9  # finite, so that the softmax of a fully masked row is not NaN


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin backbone.

    Attributes:
        embed_dim: channels of the first stage; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window: side of an attention window, in tokens.
        patch_size: side of a patch, in pixels.
        mlp_ratio: width of the hidden layer of a block's MLP over the block's width.
        drop_path: drop path rate of the last block. Rates grow linearly from 0 at the first block.
        qkv_bias: whether queries, keys and values have a bias.
    """

    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    patch_size: int = 4
    mlp_ratio: float = 4.0
    drop_path: float = 0.2
    qkv_bias: bool = True

    def __post_init__(self):
        if len(self.depths) != 4 or len(self.num_heads) != 4:
            raise UserError(
                f"config.model.swin: depths {self.depths} and num_heads {self.num_heads} must have "
                "four entries. Give one per stage."
            )
        for width, heads in zip(self.widths, self.num_heads):
            if width % heads:
                raise UserError(
                    f"config.model.swin: num_heads {self.num_heads} must divide the widths of the "
                    f"stages, {self.widths}. Change num_heads or embed_dim."
                )
        if not 0 <= self.drop_path < 1:
            raise UserError(
                f"config.model.swin.drop_path is {self.drop_path}. Choose a rate in [0, 1)."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages; the backbone returns maps of the last three."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))


@functools.cache
def relative_position_index(window: int) -> Int[np.ndarray, "T T"]:
    """Return the row of the bias table of each (query, key) in a window of T = window² tokens."""
    position = np.stack(np.divmod(np.arange(window * window), window))  # (2, T): row, column
    difference = position[:, :, None] - position[:, None, :] + window - 1
    return difference[0] * (2 * window - 1) + difference[1]


@functools.cache
def shift_mask(height: int, width: int, window: int, shift: int) -> Bool[np.ndarray, "W T T"]:
    """Return which keys each query may attend to in each window of a map rolled by `shift`.

    After the roll, a window at the bottom or right edge contains tokens from opposite sides of the
    map. Only tokens that were neighbors before the roll attend to each other.

    Args:
        height: of the map in tokens, a multiple of `window`.
        width: of the map in tokens, a multiple of `window`.
        window: side of a window in tokens.
        shift: tokens by which the map was rolled up and left.
    """

    def region(size):
        position = np.arange(size)
        return (position >= size - window).astype(np.int32) + (position >= size - shift)

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    regions = regions.reshape(height // window, window, width // window, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return regions[:, :, None] == regions[:, None, :]


def pad_to_multiple(x: Float[Array, "B H W C"], multiple: int) -> Float[Array, "B H2 W2 C"]:
    """Pad zeros at the bottom and right until both sides are multiples of `multiple`."""
    _, height, width, _ = x.shape
    bottom, right = -height % multiple, -width % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def partition_windows(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B N T C"]:
    """Cut maps into N windows of T = window² tokens; windows and tokens are row by row."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, channels)


def merge_windows(
    windows: Float[Array, "B N T C"], height: int, width: int, window: int
) -> Float[Array, "B H W C"]:
    """Return the (height, width) maps of their windows: the inverse of `partition_windows`."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def drop_path(
    x: Float[Array, "B H W C"], drop_path_factors: Float[Array, " B"] | None
) -> Float[Array, "B H W C"]:
    """Multiply the residual branch of each image by its factor; None keeps all branches.

    A factor is 0, which drops the branch, or 1 / (1 - rate).
    """
    if drop_path_factors is None:
        return x
    return x * drop_path_factors.astype(x.dtype)[:, None, None, None]


def draw_drop_path_factors(
    key: Array, rates: Float[np.ndarray, " N"], images: int
) -> Float[Array, "N 2 B"]:
    """Draw the drop path factors of N blocks for a batch (stochastic depth, Huang et al. 2016).

    Each block has two factors per image: of its attention branch and of its MLP branch. Their mean
    is 1. There is a single draw, because random bit generators compile slowly.

    Args:
        key: of the draw.
        rates: drop path rate of each block.
        images: size B of the batch.
    """
    kept = 1.0 - np.asarray(rates, np.float32)[:, None, None]
    drawn = jax.random.uniform(key, (len(rates), 2, images))
    return jnp.where(drawn < kept, 1.0 / kept, 0.0)


def linear(width: int, out: int, dtype, rngs: Draws, *, use_bias=True, std=0.02) -> nnx.Linear:
    """Return a linear layer whose kernel is initialized from a normal distribution.

    The reference truncates at ±2, which for its standard deviation of 0.02 never happens.
    """
    return nnx.Linear(
        width,
        out,
        use_bias=use_bias,
        kernel_init=normal(std),
        dtype=dtype,
        rngs=rngs,
    )


class MapNorm(LayerNorm):
    """LayerNorm of maps, by a TPU kernel where it applies."""

    def __init__(self, width: int, *, dtype, kernels: Kernels = "auto"):
        super().__init__(width)
        self.fused = kernels == "auto" and dtype == jnp.bfloat16

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Return the normalized map, in the same dtype."""
        return self._by_kernels(x) if self.has_kernels(x.shape) else super().__call__(x)

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether the TPU kernel handles a map of this shape on this device."""
        return self.fused and place.vmem_budget() >= layer_norm.vmem_bytes(shape)

    def _by_kernels(self, x):
        weights = layer_norm.Weights(scale=self.scale[...][None], offset=self.bias[...][None])
        return place.on_each_device(layer_norm.layer_norm, x, weights)


class WindowAttention(nnx.Module):
    """Multi-head self-attention inside windows, with a learned relative position bias."""

    def __init__(self, width: int, heads: int, cfg: SwinConfig, *, dtype, rngs: Draws):
        self.heads = heads
        self.window = cfg.window
        self.qkv = linear(width, 3 * width, dtype, rngs, use_bias=cfg.qkv_bias)
        self.proj = linear(width, width, dtype, rngs)
        self.relative_position_bias_table = nnx.Param(
            normal(0.02)(rngs, ((2 * cfg.window - 1) ** 2, heads))
        )

    def __call__(
        self, x: Float[Array, "B N T C"], mask: Bool[np.ndarray, "N T T"] | None
    ) -> Float[Array, "B N T C"]:
        """Attend within each of the N windows; the softmax is float32.

        Args:
            x: N windows of T tokens.
            mask: which keys each query of each window may attend to; None: all of its window.
        """
        batch, windows, tokens, width = x.shape
        qkv = mark_dense_output(self.qkv(x)).reshape(
            batch, windows, tokens, 3 * self.heads, width // self.heads
        )
        query, key, value = jnp.split(qkv, 3, axis=3)
        query = query * (width // self.heads) ** -0.5
        scores = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=jnp.float32)
        bias = self.bias()[None]
        if mask is not None:
            bias = jnp.where(mask[:, None], bias, _MASKED)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
        out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value)
        return mark_dense_output(self.proj(out.reshape(batch, windows, tokens, width)))

    def bias(self) -> Float[Array, "heads T T"]:
        """Return the relative position bias of every (query, key) of a window."""
        bias = self.relative_position_bias_table[...][relative_position_index(self.window)]
        return bias.transpose(2, 0, 1)


class Mlp(nnx.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, width: int, hidden: int, *, dtype, rngs: Draws):
        self.fc1 = linear(width, hidden, dtype, rngs)
        self.fc2 = linear(hidden, width, dtype, rngs)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Apply the layers to each position."""
        return mark_dense_output(
            self.fc2(jax.nn.gelu(mark_dense_output(self.fc1(x)), approximate=False))
        )


class SwinBlock(nnx.Module):
    """Pre-norm window attention and MLP, each a residual branch.

    A map that is smaller than a window is padded to the size of a window.

    Args:
        width: channels.
        heads: attention heads.
        shifted: whether the windows are shifted by half a window.
        cfg: sizes of the backbone.
        dtype: of the activations.
        kernels: "auto" uses TPU kernels where they apply, "xla" never does.
        rngs: initializes the parameters.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        shifted: bool,
        cfg: SwinConfig,
        *,
        dtype,
        kernels: Kernels = "auto",
        rngs: Draws,
    ):
        supported = attention.supports(width, heads, cfg.window) and dtype == jnp.bfloat16
        self.fused = kernels == "auto" and supported
        self.window = cfg.window
        self.shift = cfg.window // 2 if shifted else 0
        self.norm1 = LayerNorm(width)
        self.attn = WindowAttention(width, heads, cfg, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * cfg.mlp_ratio), dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], drop_path_factors: Float[Array, "2 B"] | None
    ) -> Float[Array, "B H W C"]:
        """Return the block's output.

        Args:
            x: map of any size.
            drop_path_factors: factors of the attention branch and of the MLP branch for each image;
                None at inference.
        """
        if self.has_kernels(x.shape):
            return self._by_kernels(x, drop_path_factors)
        for_attention = for_mlp = None
        if drop_path_factors is not None:
            for_attention, for_mlp = drop_path_factors[0], drop_path_factors[1]
        with jax.named_scope("attention"):
            x = x + drop_path(self._attend(self.norm1(x)), for_attention)
        with jax.named_scope("mlp"):
            return x + drop_path(self.mlp(self.norm2(x)), for_mlp)

    def _attend(self, x):
        _, height, width, _ = x.shape
        # Padding follows the norm, so that the attention sees zeros, as in the reference.
        x = pad_to_multiple(x, self.window)
        _, padded_height, padded_width, _ = x.shape
        mask = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            mask = shift_mask(padded_height, padded_width, self.window, self.shift)
        windows = self.attn(partition_windows(x, self.window), mask)
        x = merge_windows(windows, padded_height, padded_width, self.window)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return x[:, :height, :width]

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether TPU kernels handle a map of this shape on this device."""
        if not self.fused:
            return False
        for_attention = attention.vmem_bytes(shape, self.attn.heads, self.window)
        for_mlp = mlp.vmem_bytes(shape, self.mlp.fc1.kernel.shape[1])
        return place.vmem_budget() >= max(for_attention, for_mlp)

    def _by_kernels(self, x, drop_path_factors):
        """Compute the block by TPU kernels, whose backward pass stores only their inputs."""
        if drop_path_factors is None:
            drop_path_factors = jnp.ones((2, len(x)), jnp.float32)
        options = {"window": self.window, "shift": self.shift}
        attend = lambda images, weights: attention.attention_branch(*images, weights, **options)
        with jax.named_scope("attention"):
            images = (x, drop_path_factors[0])
            x = place.on_each_device(attend, images, self._attention_weights())
        expand = lambda images, weights: mlp.mlp_branch(*images, weights)
        with jax.named_scope("mlp"):
            images = (x, drop_path_factors[1])
            return place.on_each_device(expand, images, self._mlp_weights())

    def _attention_weights(self) -> attention.Weights:
        attn, width = self.attn, self.norm1.scale.shape[0]
        qkv_bias = attn.qkv.bias[...] if attn.qkv.bias is not None else jnp.zeros(3 * width)
        return attention.Weights(
            scale=self.norm1.scale[...][None],
            offset=self.norm1.bias[...][None],
            qkv=attn.qkv.kernel[...].reshape(width, 3, width).swapaxes(0, 1),
            qkv_bias=qkv_bias.reshape(3, 1, width),
            bias=attention.unit_bias(attn.bias(), self.window),
            proj=attn.proj.kernel[...],
            proj_bias=attn.proj.bias[...][None],
        )

    def _mlp_weights(self) -> mlp.Weights:
        return mlp.Weights(
            scale=self.norm2.scale[...][None],
            offset=self.norm2.bias[...][None],
            fc1=self.mlp.fc1.kernel[...],
            fc1_bias=self.mlp.fc1.bias[...][None],
            fc2=self.mlp.fc2.kernel[...],
            fc2_bias=self.mlp.fc2.bias[...][None],
        )


class PatchMerging(nnx.Module):
    """Halve a map: concatenate 2×2 neighbors, normalize them, project 4C to 2C channels."""

    def __init__(self, width: int, *, dtype, kernels: Kernels = "auto", rngs: Draws):
        self.fused = kernels == "auto" and dtype == jnp.bfloat16
        self.norm = LayerNorm(4 * width)
        self.reduction = linear(4 * width, 2 * width, dtype, rngs, use_bias=False)

    @jax.named_scope("merging")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        """Return a map of (⌈H/2⌉, ⌈W/2⌉); an odd side is padded with a row or column of zeros."""
        x = pad_to_multiple(x, 2)
        if self.has_kernels(x.shape):
            return self._by_kernels(x)
        x = standardize_patches(x)
        batch, height, width, channels = x.shape
        # The official order of the neighbors (row, column) is 00, 10, 01, 11: columns outermost.
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.reduction(self.norm.scale_and_shift(x))

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether the TPU kernel handles a map of this (even) shape on this device."""
        return self.fused and place.vmem_budget() >= patch_merging.vmem_bytes(shape, 2 * shape[-1])

    def _by_kernels(self, x):
        width = x.shape[-1]
        weights = patch_merging.Weights(
            scale=self.norm.scale[...].reshape(4, 1, width),
            offset=self.norm.bias[...].reshape(4, 1, width),
            reduction=self.reduction.kernel[...].reshape(4, width, 2 * width),
        )
        return place.on_each_device(patch_merging.patch_merging, x, weights)


class PatchEmbed(nnx.Module):
    """Cut images into patches, flatten each (row, column, color), project and normalize it."""

    def __init__(self, cfg: SwinConfig, *, dtype, kernels: Kernels = "auto", rngs: Draws):
        self.patch = cfg.patch_size
        self.proj = linear(3 * cfg.patch_size**2, cfg.embed_dim, dtype, rngs)
        self.norm = MapNorm(cfg.embed_dim, dtype=dtype, kernels=kernels)

    @jax.named_scope("patch_embed")
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 C"]:
        """Return (⌈H/patch⌉, ⌈W/patch⌉) tokens; zeros pad images at the bottom and the right."""
        x = pad_to_multiple(x, self.patch)
        batch, height, width, _ = x.shape
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(batch, rows, self.patch, columns, self.patch, 3).transpose(0, 1, 3, 2, 4, 5)
        return self.norm(self.proj(x.reshape(batch, rows, columns, -1)))


class Stage(nnx.Module):
    """The blocks of one resolution, and the patch merging that follows them."""

    def __init__(
        self, stage: int, cfg: SwinConfig, *, dtype, kernels: Kernels = "auto", rngs: Draws
    ):
        width, heads = cfg.widths[stage], cfg.num_heads[stage]
        self.blocks = nnx.List(
            SwinBlock(width, heads, index % 2 == 1, cfg, dtype=dtype, kernels=kernels, rngs=rngs)
            for index in range(cfg.depths[stage])
        )
        last = stage == len(cfg.depths) - 1
        options = {"dtype": dtype, "kernels": kernels, "rngs": rngs}
        self.downsample = None if last else PatchMerging(width, **options)


class Swin(nnx.Module):
    """Swin Transformer that returns the maps of its last three stages.

    Args:
        cfg: sizes of the backbone.
        dtype: of the activations; parameters, statistics of the norms and softmax are float32.
        remat: which activations of a block are stored for the backward pass.
        loop: whether the pairs of blocks of a stage run as a loop.
        kernels: "auto" uses TPU kernels where they apply, "xla" never does.
        rngs: initializes the parameters.
    """

    def __init__(
        self,
        cfg: SwinConfig,
        *,
        dtype=jnp.float32,
        remat: Remat = "none",
        loop: bool = False,
        kernels: Kernels = "auto",
        rngs: Draws,
    ):
        self.dtype = dtype
        self.remat = remat
        self.loop = loop
        self.rates = tuple(np.linspace(0, cfg.drop_path, sum(cfg.depths)).tolist())
        options = {"dtype": dtype, "kernels": kernels}
        self.patch_embed = PatchEmbed(cfg, **options, rngs=rngs)
        self.layers = nnx.List(
            Stage(stage, cfg, **options, rngs=rngs) for stage in range(len(cfg.depths))
        )
        self.norms = nnx.List(MapNorm(width, **options) for width in cfg.widths[1:])

    def draw_drop_path(self, key: Array | None, images: int) -> Float[Array, "N 2 B"] | None:
        """Draw the drop path factors of all N blocks for a batch.

        Returns:
            See `draw_drop_path_factors`; None if `key` is None (inference) or the rate is 0.
        """
        if key is None or self.rates[-1] == 0:
            return None
        return draw_drop_path_factors(key, np.asarray(self.rates), images)

    @jax.named_scope("backbone")
    def __call__(
        self, x: Float[Array, "B H W 3"], drop_path_factors: Float[Array, "N 2 B"] | None = None
    ) -> tuple[Float[Array, "B H2 W2 C2"], ...]:
        """Return the normalized maps of the last three stages: strides 8, 16 and 32.

        Args:
            x: normalized images of any size.
            drop_path_factors: drop path factors of the two branches of all N blocks for each image
                (`draw_drop_path`); None keeps every branch.
        """
        x = self.patch_embed(x.astype(self.dtype))
        maps, first = [], 0
        for number, stage in enumerate(self.layers):
            end = first + len(stage.blocks)
            of_stage = None if drop_path_factors is None else drop_path_factors[first:end]
            first = end
            # The backward pass of the kernels recomputes what it needs.
            by_kernels = all(block.has_kernels(x.shape) for block in stage.blocks)
            run = rematerialize(SwinBlock.__call__, "none" if by_kernels else self.remat)
            with jax.named_scope(f"stage{number}"):
                x = run_blocks(run, stage.blocks, x, of_stage, loop=self.loop, period=2)
            if number:
                with jax.named_scope("norm"):
                    maps.append(self.norms[number - 1](x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps)
