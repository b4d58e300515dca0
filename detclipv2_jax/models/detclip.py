"""DetCLIPv2: a dense detector and a text tower that meet in one dot product."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.atss_head import ATSSHead, HeadConfig, RegionOutputs
from detclipv2_jax.models.fpn import FPN
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.remat import Remat
from detclipv2_jax.models.swin import Swin, SwinConfig
from detclipv2_jax.models.text import TextConfig, TextTower
from detclipv2_jax.ops.boxes import AnchorConfig
from detclipv2_jax.ops.kernels.place import Kernels

# ImageNet's, of RGB in 0..255: what published Swin weights were trained with.
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SIMILARITIES = ("cosine", "dot")


@dataclasses.dataclass(frozen=True)
class DetCLIPConfig:
    """The whole model's sizes.

    neck_coarse_gain: on the initial laterals of the FPN's two coarser maps. 1 is FPN's own, right
        for a backbone that is pretrained. From noise, what comes from above tells fine positions
        nothing of themselves and drowns what the finest map tells: start it small.
    similarity: how regions and texts are compared: 'cosine' (both L2-normalized) or 'dot' (raw).
    initial_scale: what cosines are multiplied by at the start: 1/0.07, CLIP's. With D = 256 the
        cosines of unrelated features spread by 1/16, so logits of negatives start within ±2 of the
        bias, and a cosine of 0.5 is already a confident yes: 0.5/0.07 - 4.6 = 2.5. Raw dot products
        start unscaled.
    prior: the probability that an untrained model gives any concept anywhere (RetinaNet's 0.01);
        the bias starts at log(prior / (1 - prior)).
    dtype: of the activations; parameters, norms' statistics and softmax are float32.
    remat: what is kept of each Swin and text block for the backward pass, which computes the rest
        again: 'none' is computed again, 'dots' keeps the outputs of the dense layers, 'blocks' the
        input alone.
    loop: run the equal blocks of a stage, and of the text tower, as a loop over their stacked
        parameters. The same values; a deep model compiles in a fraction of the time and memory.
    kernels: 'auto' runs the towers' blocks and the head in bfloat16 by fused kernels (ops/kernels/)
        on TPUs, 'xla' leaves all to the compiler, as on other devices.
    """

    swin: SwinConfig = SwinConfig()
    neck_channels: int = 256
    neck_coarse_gain: float = 1.0
    head: HeadConfig = HeadConfig()
    text: TextConfig = TextConfig()
    anchors: AnchorConfig = AnchorConfig()
    similarity: str = "cosine"
    initial_scale: float = 1 / 0.07
    prior: float = 0.01
    dtype: str = "float32"
    remat: Remat = "none"
    loop: bool = False
    kernels: Kernels = "auto"

    def __post_init__(self):
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype is {self.dtype!r}; choose one of {', '.join(_DTYPES)}")
        if self.remat not in get_args(Remat):
            raise UserError(f"remat is {self.remat!r}; choose one of {', '.join(get_args(Remat))}")
        if self.kernels not in get_args(Kernels):
            raise UserError(
                f"kernels is {self.kernels!r}; choose one of {', '.join(get_args(Kernels))}"
            )
        if self.similarity not in _SIMILARITIES:
            raise UserError(
                f"similarity is {self.similarity!r}; choose one of {', '.join(_SIMILARITIES)}"
            )
        if self.head.embed_dim != self.text.embed_dim:
            raise UserError(
                f"head.embed_dim {self.head.embed_dim} and text.embed_dim {self.text.embed_dim}"
                " must be equal: regions and texts meet in one dot product"
            )
        strides = tuple(self.swin.patch_size * 2**level for level in range(1, 6))
        if tuple(self.anchors.strides) != strides:
            raise UserError(
                f"anchors.strides {tuple(self.anchors.strides)} must be {strides}, those of the"
                f" five levels that patches of {self.swin.patch_size} pixels lead to"
            )
        if not 0 < self.prior < 1 or self.initial_scale <= 0:
            raise UserError(
                f"prior {self.prior} must lie within (0, 1) and initial_scale {self.initial_scale}"
                " must be positive"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetCLIPConfig":
        """From nested plain dicts, as `to_dict` makes; what is left out keeps its default.

        Raises:
            UserError: a key that no field has, or a value of another type, named with its path.
        """
        return config_dict.from_dict(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, which JSON can hold."""
        return config_dict.to_dict(self)


def normalize_images(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Pixels 0..255 to zero mean and unit variance a channel (ImageNet's), float32."""
    mean, std = np.asarray(IMAGE_MEAN, np.float32), np.asarray(IMAGE_STD, np.float32)
    return (images.astype(jnp.float32) - mean) / std


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Unit vectors; zeros stay zeros, with a finite gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


class DetCLIP(nnx.Module):
    """Backbone, neck, head and text tower, and the learned scale and bias of their similarity.

    Args:
        cfg: its sizes.
        rngs: initializes the parameters.
    """

    def __init__(self, cfg: DetCLIPConfig, *, rngs: Draws):
        options = {"dtype": _DTYPES[cfg.dtype], "rngs": rngs}
        self.cfg = cfg
        blocks = {"remat": cfg.remat, "loop": cfg.loop}
        self.backbone = Swin(cfg.swin, kernels=cfg.kernels, **blocks, **options)
        self.neck = FPN(cfg.swin.widths[1:], cfg.neck_channels, cfg.neck_coarse_gain, **options)
        levels = len(cfg.anchors.strides)
        self.head = ATSSHead(
            cfg.neck_channels, levels, cfg.head, remat=cfg.remat, kernels=cfg.kernels, **options
        )
        self.text = TextTower(cfg.text, kernels=cfg.kernels, **blocks, **options)
        start = cfg.initial_scale if cfg.similarity == "cosine" else 1.0
        self.logit_scale = nnx.Param(jnp.asarray(math.log(start), jnp.float32))
        bias = math.log(cfg.prior / (1 - cfg.prior))
        self.logit_bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def encode_image(
        self,
        images: UInt8[Array, "B H W 3"],
        drop_path_factors: Float[Array, "N 2 B"] | None = None,
    ) -> RegionOutputs:
        """Embedding, box and centerness of every anchor of `anchor_grid(H, W, cfg.anchors)`.

        Args:
            images: RGB, 0..255, any size; normalized here.
            drop_path_factors: drop path factors (`backbone.draw_drop_path`); None is inference.

        Returns:
            float32 outputs; the embeddings are unit vectors when `similarity` is 'cosine'.
        """
        outputs = self.head(self.neck(self.backbone(normalize_images(images), drop_path_factors)))
        return dataclasses.replace(outputs, embeddings=self._comparable(outputs.embeddings))

    def encode_text(self, tokens: Int[Array, "M L"]) -> Float[Array, "M D"]:
        """Features of M concepts in float32, unit vectors when `similarity` is 'cosine'."""
        return self._comparable(self.text(tokens))

    def scale(self) -> Float[Array, ""]:
        """exp(a), what every similarity is multiplied by."""
        return jnp.exp(self.logit_scale[...])

    def logits(
        self, regions: Float[Array, "... K D"], texts: Float[Array, "M D"]
    ) -> Float[Array, "... K M"]:
        """Detection logits s + b, where s = exp(a) · regions · textsᵀ, accumulated in float32.

        The scale goes on the texts, the smallest array of the three.
        """
        products = jnp.matmul(regions, (self.scale() * texts).T, preferred_element_type=jnp.float32)
        return products + self.logit_bias[...]

    def _comparable(self, x):
        return l2_normalize(x) if self.cfg.similarity == "cosine" else x


def abstract(cfg: DetCLIPConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """As `create`, with `jax.ShapeDtypeStruct`s for arrays: no memory, no compiling."""
    return jax.eval_shape(lambda: _split(DetCLIP(cfg, rngs=Draws())))


def create(cfg: DetCLIPConfig, seed: int) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A fresh model: its static graph and its parameters, nested dicts of float32 arrays.

    Every key is a string, so a parameter's path is its keys joined by '/'. The same seed gives the
    same parameters on any number of devices.
    """
    return _initializer(cfg)(jax.random.key(seed))


@functools.cache
def _initializer(cfg: DetCLIPConfig):
    _, shapes = abstract(cfg)
    enough = sum(leaf.size for leaf in jax.tree.leaves(shapes))

    @jax.jit
    def initialize(key):
        # The barrier keeps the compiler from repeating the draw for every piece of it.
        draw = jax.lax.optimization_barrier(jax.random.normal(key, (enough,)))
        return _split(DetCLIP(cfg, rngs=Draws(draw)))

    return initialize


def build(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> DetCLIP:
    """The model of a graph and parameters; the inverse of `create`, also inside `jit`."""
    to_index = lambda key: int(key) if key.isdigit() else key
    return nnx.merge(graphdef, nnx.State(_map_keys(params, to_index)))


def _split(model: DetCLIP) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graphdef, state = nnx.split(model)
    return graphdef, _map_keys(nnx.to_pure_dict(state), str)


def _map_keys(tree, rename):
    if not isinstance(tree, Mapping):
        return tree
    return {rename(key): _map_keys(value, rename) for key, value in tree.items()}
