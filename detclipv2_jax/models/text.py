"""Text tower: CLIP's causal transformer, which returns one feature per concept.

Architecture and initialization follow Radford et al. 2021. DetCLIPv2 encodes each concept as a
sentence of its own with at most 16 tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.initializers import Draws, normal
from detclipv2_jax.models.loop import run_blocks
from detclipv2_jax.models.norms import LayerNorm
from detclipv2_jax.models.remat import Remat, mark_dense_output, rematerialize
from detclipv2_jax.models.swin import linear
from detclipv2_jax.ops.kernels import causal, mlp, place
from detclipv2_jax.ops.kernels.mlp import Activation
from detclipv2_jax.ops.kernels.place import Kernels


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower.

    Attributes:
        width: channels.
        layers: transformer blocks.
        heads: attention heads.
        vocab: token ids of the tokenizer.
        context: maximum number of tokens of a concept.
        embed_dim: size of a feature. CLIP's projection is loaded if it has the same size: 512 for
            ViT-B.
        activation: of the MLPs. "quick_gelu" is that of OpenAI's towers; most towers of open_clip
            (LAION-2B, DataComp) have the exact "gelu".
        projection_gain: factor on the initial projection; CLIP uses 1.
    """

    width: int = 512
    layers: int = 12
    heads: int = 8
    vocab: int = 49408
    context: int = 16
    embed_dim: int = 512
    activation: Activation = "quick_gelu"
    projection_gain: float = 1.0

    def __post_init__(self):
        if self.activation not in get_args(Activation):
            raise UserError(
                f"config.model.text.activation is {self.activation!r}. Choose one of "
                f"{', '.join(get_args(Activation))}."
            )
        if self.width % self.heads:
            raise UserError(
                f"config.model.text: heads {self.heads} must divide width {self.width}. Change one "
                "of them."
            )


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return x·sigmoid(1.702x), the approximation of GELU that CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the exact GELU, x·Φ(x)."""
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "quick_gelu": quick_gelu}


class TextAttention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, cfg: TextConfig, *, dtype, rngs: Draws):
        self.heads = cfg.heads
        std, depth_scale = cfg.width**-0.5, (2 * cfg.layers) ** -0.5
        self.in_proj = linear(cfg.width, 3 * cfg.width, dtype, rngs, std=std)
        self.out_proj = linear(cfg.width, cfg.width, dtype, rngs, std=std * depth_scale)

    def __call__(self, x: Float[Array, "M L C"]) -> Float[Array, "M L C"]:
        """Attend from each position to itself and the positions before it; softmax in float32.

        Padding needs no mask: it follows [EOS], and only the feature at [EOS] is used.
        """
        batch, length, width = x.shape
        qkv = mark_dense_output(self.in_proj(x)).reshape(
            batch, length, 3 * self.heads, width // self.heads
        )
        query, key, value = jnp.split(qkv, 3, axis=2)
        query = query * (width // self.heads) ** -0.5
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        causal = np.tril(np.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1).astype(x.dtype)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return mark_dense_output(self.out_proj(out.reshape(batch, length, width)))


class TextMlp(nnx.Module):
    """Two linear layers with a GELU, exact or quick, in between."""

    def __init__(self, cfg: TextConfig, *, dtype, rngs: Draws):
        self.activation, width = cfg.activation, cfg.width
        self.c_fc = linear(width, 4 * width, dtype, rngs, std=(2 * width) ** -0.5)
        out_std = width**-0.5 * (2 * cfg.layers) ** -0.5
        self.c_proj = linear(4 * width, width, dtype, rngs, std=out_std)

    def __call__(self, x: Float[Array, "M L C"]) -> Float[Array, "M L C"]:
        """Apply the layers to each position."""
        hidden = _ACTIVATIONS[self.activation](mark_dense_output(self.c_fc(x)))
        return mark_dense_output(self.c_proj(hidden))


class TextBlock(nnx.Module):
    """Pre-norm causal attention and MLP, each a residual branch."""

    def __init__(self, cfg: TextConfig, *, dtype, kernels: Kernels = "auto", rngs: Draws):
        self.fused = kernels == "auto" and dtype == jnp.bfloat16
        self.ln_1 = LayerNorm(cfg.width)
        self.attn = TextAttention(cfg, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(cfg.width)
        self.mlp = TextMlp(cfg, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "M L C"]) -> Float[Array, "M L C"]:
        """Return the block's output."""
        if self.has_kernels(x.shape):
            return self._by_kernels(x)
        with jax.named_scope("attention"):
            x = x + self.attn(self.ln_1(x))
        with jax.named_scope("mlp"):
            return x + self.mlp(self.ln_2(x))

    def has_kernels(self, shape: tuple[int, ...]) -> bool:
        """Return whether TPU kernels handle sequences of this shape on this device."""
        _, length, width = shape
        if not self.fused or not causal.supports(width, self.attn.heads, length):
            return False
        tokens = (1, 16, causal.UNIT, width)  # more rows do not need more memory
        for_mlp = mlp.vmem_bytes(tokens, self.mlp.c_fc.kernel.shape[1])
        return place.vmem_budget() >= max(causal.vmem_bytes(width), for_mlp)

    def _by_kernels(self, x):
        """Compute the block by TPU kernels, whose backward pass stores only their inputs."""
        heads = self.attn.heads
        attend = lambda x, weights: causal.attention_branch(x, weights, heads=heads)
        with jax.named_scope("attention"):
            x = place.on_each_device(attend, x, self._attention_weights())
        with jax.named_scope("mlp"):
            mlp_branch = functools.partial(_mlp_branch, self.mlp.activation)
            return place.on_each_device(mlp_branch, x, self._mlp_weights())

    def _attention_weights(self) -> causal.Weights:
        attn, width = self.attn, self.ln_1.scale.shape[0]
        return causal.Weights(
            scale=self.ln_1.scale[...][None],
            offset=self.ln_1.bias[...][None],
            qkv=attn.in_proj.kernel[...].reshape(width, 3, width).swapaxes(0, 1),
            qkv_bias=attn.in_proj.bias[...].reshape(3, 1, width),
            proj=attn.out_proj.kernel[...],
            proj_bias=attn.out_proj.bias[...][None],
        )

    def _mlp_weights(self) -> mlp.Weights:
        return mlp.Weights(
            scale=self.ln_2.scale[...][None],
            offset=self.ln_2.bias[...][None],
            fc1=self.mlp.c_fc.kernel[...],
            fc1_bias=self.mlp.c_fc.bias[...][None],
            fc2=self.mlp.c_proj.kernel[...],
            fc2_bias=self.mlp.c_proj.bias[...][None],
        )


def _mlp_branch(
    activation: Activation, x: Float[Array, "M L C"], weights: mlp.Weights
) -> Float[Array, "M L C"]:
    """Compute the MLP branch by the kernel for maps; each row of the map is several sequences."""
    tokens, width = x.shape[0] * x.shape[1], x.shape[2]
    rows = x.reshape(1, -1, math.gcd(tokens, causal.UNIT), width)
    return mlp.mlp_branch(rows, jnp.ones(1), weights, activation).reshape(x.shape)


class TextTower(nnx.Module):
    """The text tower. Parameters have CLIP's names, which makes published weights easy to load.

    Args:
        cfg: sizes of the tower.
        dtype: of the activations; parameters, statistics of the norms and softmax are float32.
        remat: which activations of a block are stored for the backward pass.
        loop: whether the blocks run as a loop.
        kernels: "auto" uses TPU kernels where they apply, "xla" never does.
        rngs: initializes the parameters.
    """

    def __init__(
        self,
        cfg: TextConfig,
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
        self.token_embedding = nnx.Param(normal(0.02)(rngs, (cfg.vocab, cfg.width)))
        self.positional_embedding = nnx.Param(normal(0.01)(rngs, (cfg.context, cfg.width)))
        self.resblocks = nnx.List(
            TextBlock(cfg, dtype=dtype, kernels=kernels, rngs=rngs) for _ in range(cfg.layers)
        )
        self.ln_final = LayerNorm(cfg.width)
        std = cfg.projection_gain * cfg.width**-0.5
        self.text_projection = nnx.Param(normal(std)(rngs, (cfg.width, cfg.embed_dim)))

    @jax.named_scope("text")
    def __call__(self, tokens: Int[Array, "M L"]) -> Float[Array, "M D"]:
        """Return the features of M concepts, not normalized, in float32.

        Args:
            tokens: [SOT] … [EOS], then padding; L <= context. The feature is read at [EOS], which
                has the largest id of the vocabulary: at the first position of the row's largest id.
        """
        length = tokens.shape[1]
        with jax.named_scope("embedding"):
            # The gather is float32, so that the gradients of a frequent token add up in float32.
            x = self.token_embedding[...][tokens] + self.positional_embedding[...][:length]
            x = x.astype(self.dtype)
        x = self._run_blocks(x)
        with jax.named_scope("projection"):
            end = jnp.argmax(tokens, axis=1)
            # The norm works on each position by itself, so only the position at [EOS] needs it.
            feature = self.ln_final(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])
            projection = self.text_projection[...].astype(self.dtype)
            return jnp.matmul(feature, projection, preferred_element_type=jnp.float32)

    def _run_blocks(self, x: Float[Array, "M L C"]) -> Float[Array, "M L C"]:
        concepts, length, _ = x.shape
        by_kernels = self.resblocks[0].has_kernels(x.shape)
        if by_kernels:
            # Each device needs a whole number of the kernel's units.
            multiple = place.devices() * (causal.UNIT // length)
            x = jnp.pad(x, ((0, -concepts % multiple), (0, 0), (0, 0)))
        # The backward pass of the kernels recomputes what it needs.
        run = rematerialize(TextBlock.__call__, "none" if by_kernels else self.remat)
        x = run_blocks(lambda block, x, _: run(block, x), self.resblocks, x, None, loop=self.loop)
        return x[:concepts] if by_kernels else x
