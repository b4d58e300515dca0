"""Swin Transformer as a detection backbone: any image size in, three normalized maps out.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021.
Where the paper leaves a choice this follows its authors' detection code, so that published weights
fit.
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
from detclipv2_jax.models.remat import Remat, block_of, product
from detclipv2_jax.ops.kernels import attention, layer_norm, mlp, patch_merging, place
from detclipv2_jax.ops.kernels.place import Kernels

_MASKED = -1e9  # finite, so that a row of masked scores is no NaN


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin backbone. `drop_path` is the rate of the last block; the first one's is 0."""

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
                f"swin.depths {self.depths} and swin.num_heads {self.num_heads} must have four"
                " entries, one a stage"
            )
        for width, heads in zip(self.widths, self.num_heads):
            if width % heads:
                raise UserError(
                    f"swin.num_heads {self.num_heads} must divide the stages' widths {self.widths}"
                )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"swin.drop_path is {self.drop_path}; choose a rate in [0, 1)")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages; the returned maps have the last three."""
        return tuple(self.embed_dim * 2**stage for stage in range(len(self.depths)))


@functools.cache
def relative_position_index(window: int) -> Int[np.ndarray, "T T"]:
    """Row of the bias table for each (query, key) of a window of T = window² tokens."""
    place = np.stack(np.divmod(np.arange(window * window), window))  # (2, T): row, column
    difference = place[:, :, None] - place[:, None, :] + window - 1
    return difference[0] * (2 * window - 1) + difference[1]


@functools.cache
def shift_mask(height: int, width: int, window: int, shift: int) -> Bool[np.ndarray, "W T T"]:
    """Which keys each query may see once a (height, width) map has been rolled by `shift`.

    The map's sides are multiples of `window`. After the roll a window at the bottom or right edge
    holds tokens from opposite sides of the map; only those that were neighbors see each other.
    """

    def region(size):
        place = np.arange(size)
        return (place >= size - window).astype(np.int32) + (place >= size - shift)

    regions = 3 * region(height)[:, None] + region(width)[None, :]
    regions = regions.reshape(height // window, window, width // window, window)
    regions = regions.transpose(0, 2, 1, 3).reshape(-1, window * window)
    return regions[:, :, None] == regions[:, None, :]


def pad_to_multiple(x: Float[Array, "B H W C"], multiple: int) -> Float[Array, "B H2 W2 C"]:
    """Zeros at the bottom and the right until both sides are multiples of `multiple`."""
    _, height, width, _ = x.shape
    bottom, right = -height % multiple, -width % multiple
    return jnp.pad(x, ((0, 0), (0, bottom), (0, right), (0, 0))) if bottom or right else x


def partition_windows(x: Float[Array, "B H W C"], window: int) -> Float[Array, "B N T C"]:
    """Cut maps into N windows (row by row) of T = window² tokens (row by row)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, channels)


def merge_windows(
    windows: Float[Array, "B N T C"], height: int, width: int, window: int
) -> Float[Array, "B H W C"]:
    """The inverse of `partition_windows` for a map of (height, width)."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, height // window, width // window, window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, channels)


def drop_path(
    x: Float[Array, "B H W C"], factors: Float[Array, " B"] | None
) -> Float[Array, "B H W C"]:
    """Multiply each sample's residual branch by its factor in `factors` (0, or 1 / (1 - rate))."""
    return x if factors is None else x * factors.astype(x.dtype)[:, None, None, None]


def drop_path_factors(
    key: Array, rates: Float[np.ndarray, " N"], batch: int
) -> Float[Array, "N 2 B"]:
    """Stochastic-depth factors of N blocks' two branches (Huang et al. 2016), mean 1 a branch.

    All in one draw: a random bit generator is the slowest thing to compile here.
    """
    kept = 1.0 - np.asarray(rates, np.float32)[:, None, None]
    drawn = jax.random.uniform(key, (len(rates), 2, batch))
    return jnp.where(drawn < kept, 1.0 / kept, 0.0)


def linear(width: int, out: int, dtype, rngs: Draws, *, use_bias=True, std=0.02) -> nnx.Linear:
    """Linear layer with a normal kernel.

    The reference's 0.02 is truncated at ±2, a hundred deviations away, so it is a plain normal too.
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
    """A LayerNorm of maps."""

    def __init__(self, width: int, *, dtype, kernels: Kernels = "auto"):
        super().__init__(width)
        self.fused = kernels == "auto" and dtype == jnp.bfloat16

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Same shape and dtype."""
        return self._by_kernels(x) if self.has_kernels(x.shape) else super().__call__(x)

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether a map of this shape goes through a kernel, on the device that is traced for."""
        return self.fused and place.room() >= layer_norm.fast_memory(shape)

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
        """Attend within each of the N windows; softmax in float32."""
        batch, windows, tokens, width = x.shape
        qkv = product(self.qkv(x)).reshape(
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
        return product(self.proj(out.reshape(batch, windows, tokens, width)))

    def bias(self) -> Float[Array, "heads T T"]:
        """The relative position bias of every (query, key) of a window."""
        bias = self.relative_position_bias_table[...][relative_position_index(self.window)]
        return bias.transpose(2, 0, 1)


class Mlp(nnx.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int, hidden: int, *, dtype, rngs: Draws):
        self.fc1 = linear(width, hidden, dtype, rngs)
        self.fc2 = linear(hidden, width, dtype, rngs)

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Position by position."""
        return product(self.fc2(jax.nn.gelu(product(self.fc1(x)), approximate=False)))


class SwinBlock(nnx.Module):
    """Pre-norm window attention and MLP, each a residual branch; odd blocks shift their windows.

    The window keeps its size on a map that is smaller: the map is padded up to it.
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
        self, x: Float[Array, "B H W C"], factors: Float[Array, "2 B"] | None
    ) -> Float[Array, "B H W C"]:
        """One block; `factors` are the drop path factors of its two branches, None at inference."""
        if self.has_kernels(x.shape):
            return self._by_kernels(x, factors)
        attention_factors, mlp_factors = (
            (None, None) if factors is None else (factors[0], factors[1])
        )
        x = x + drop_path(self._attend(self.norm1(x)), attention_factors)
        return x + drop_path(self.mlp(self.norm2(x)), mlp_factors)

    def _attend(self, x):
        _, height, width, _ = x.shape
        x = pad_to_multiple(x, self.window)  # after the norm: the reference's pads are true zeros
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
        """Whether a map of this shape goes through kernels, on the device that is traced for."""
        if not self.fused:
            return False
        attend = attention.fast_memory(shape, self.attn.heads, self.window)
        return place.room() >= max(attend, mlp.fast_memory(shape, self.mlp.fc1.kernel.shape[1]))

    def _by_kernels(self, x, factors):
        """The same by the kernels, which keep nothing but their input for the backward pass."""
        factors = jnp.ones((2, len(x)), jnp.float32) if factors is None else factors
        options = {"window": self.window, "shift": self.shift}
        attend = lambda images, weights: attention.attention_branch(*images, weights, **options)
        x = place.on_each_device(attend, (x, factors[0]), self._attention_weights())
        expand = lambda images, weights: mlp.mlp_branch(*images, weights)
        return place.on_each_device(expand, (x, factors[1]), self._mlp_weights())

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
    """Halve the map: 2×2 neighbors concatenated, normalized, projected from 4C to 2C channels."""

    def __init__(self, width: int, *, dtype, kernels: Kernels = "auto", rngs: Draws):
        self.fused = kernels == "auto" and dtype == jnp.bfloat16
        self.norm = LayerNorm(4 * width)
        self.reduction = linear(4 * width, 2 * width, dtype, rngs, use_bias=False)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C2"]:
        """(H, W) to (⌈H/2⌉, ⌈W/2⌉); an odd side gets a row or column of zeros."""
        x = pad_to_multiple(x, 2)
        if self.has_kernels(x.shape):
            return self._by_kernels(x)
        x = standardize_patches(x)
        batch, height, width, channels = x.shape
        # The official order is (row, column) = 00, 10, 01, 11: columns outermost.
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        x = x.reshape(batch, height // 2, width // 2, 4 * channels)
        return self.reduction(self.norm.finish(x))

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Whether a map of even sides goes through a kernel, on the device that is traced for."""
        return self.fused and place.room() >= patch_merging.fast_memory(shape, 2 * shape[-1])

    def _by_kernels(self, x):
        width = x.shape[-1]
        weights = patch_merging.Weights(
            scale=self.norm.scale[...].reshape(4, 1, width),
            offset=self.norm.bias[...].reshape(4, 1, width),
            reduction=self.reduction.kernel[...].reshape(4, width, 2 * width),
        )
        return place.on_each_device(patch_merging.patch_merging, x, weights)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches, each flattened (row, column, color) and projected, then a norm."""

    def __init__(self, cfg: SwinConfig, *, dtype, kernels: Kernels = "auto", rngs: Draws):
        self.patch = cfg.patch_size
        self.proj = linear(3 * cfg.patch_size**2, cfg.embed_dim, dtype, rngs)
        self.norm = MapNorm(cfg.embed_dim, dtype=dtype, kernels=kernels)

    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 C"]:
        """(H, W) pixels to (⌈H/patch⌉, ⌈W/patch⌉) tokens, zeros beyond the bottom and right."""
        x = pad_to_multiple(x, self.patch)
        batch, height, width, _ = x.shape
        rows, columns = height // self.patch, width // self.patch
        x = x.reshape(batch, rows, self.patch, columns, self.patch, 3).transpose(0, 1, 3, 2, 4, 5)
        return self.norm(self.proj(x.reshape(batch, rows, columns, -1)))


class Stage(nnx.Module):
    """The blocks of one resolution, and the merging that leads to the next."""

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
    """The backbone.

    Args:
        cfg: its sizes.
        dtype: of the activations; parameters, norms' statistics and softmax are float32.
        remat: what of a block is kept for the backward pass.
        loop: whether the pairs of blocks of a stage are a loop.
        kernels: "auto" runs blocks by kernels where there are TPUs and they can do it; "xla" never.
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
        """The drop path factors of a batch; None without a key (inference) or a rate."""
        if key is None or self.rates[-1] == 0:
            return None
        return drop_path_factors(key, np.asarray(self.rates), images)

    def __call__(
        self, x: Float[Array, "B H W 3"], factors: Float[Array, "N 2 B"] | None = None
    ) -> tuple[Float[Array, "B H2 W2 C2"], ...]:
        """Maps of the last three stages (strides 8, 16, 32 for patches of 4), a LayerNorm on each.

        Args:
            x: normalized images of any size.
            factors: drop path factors of each block's two branches; None keeps every branch.
        """
        x = self.patch_embed(x.astype(self.dtype))
        maps, index = [], 0
        for number, stage in enumerate(self.layers):
            here = None if factors is None else factors[index : index + len(stage.blocks)]
            # The kernels compute again what they need by themselves.
            by_kernels = all(block.has_kernels(x.shape) for block in stage.blocks)
            run = block_of(SwinBlock.__call__, "none" if by_kernels else self.remat)
            x = run_blocks(run, stage.blocks, x, here, loop=self.loop, period=2)
            index += len(stage.blocks)
            if number:
                maps.append(self.norms[number - 1](x))
            if stage.downsample is not None:
                x = stage.downsample(x)
        return tuple(maps)
