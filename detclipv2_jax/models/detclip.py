"""DetCLIPv2 (Yao et al. 2023): a dense detector and a text tower, compared by a dot product."""

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
from detclipv2_jax.models.closed_set import ClosedSet
from detclipv2_jax.models.fpn import FPN
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.norms import BatchNorm
from detclipv2_jax.models.padding import level_extents
from detclipv2_jax.models.remat import Remat
from detclipv2_jax.models.swin import Swin, SwinConfig
from detclipv2_jax.models.text import TextConfig, TextTower
from detclipv2_jax.ops.boxes import AnchorConfig, anchor_grid, anchors_inside
from detclipv2_jax.ops.kernels.place import Kernels

# Of ImageNet, for RGB in 0..255. Published Swin weights were trained with them.
IMAGE_MEAN = (123.675, 116.28, 103.53)
IMAGE_STD = (58.395, 57.12, 57.375)
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
_SIMILARITIES = ("cosine", "dot", "batch_norm")
_BATCH_NORM_SCALE = math.exp(-1)  # YOLO-World's start


@dataclasses.dataclass(frozen=True)
class DetCLIPConfig:
    """Sizes and options of the whole model.

    Attributes:
        swin: the backbone.
        neck_channels: channels of the FPN's levels.
        neck_coarse_gain: factor on the initial laterals of the FPN's two coarser maps. 1 is the
            FPN's own, right for a pretrained backbone. When the backbone trains from scratch, use a
            small value: at first the coarser maps do not help to tell fine positions apart, and
            they drown the finest map.
        head: the head.
        text: the text tower.
        anchors: the anchors of all levels.
        classes: names of a closed label space. The model then has no text tower and knows no other
            name: plain ATSS, a supervised baseline (models/closed_set.py). Both embed_dim are their
            number. (): an open vocabulary.
        similarity: how regions and texts are compared: "cosine" (both are L2-normalized), "dot", or
            "batch_norm" (texts are L2-normalized and regions batch-normalized, as in YOLO-World's
            contrastive head). Its statistics are those of the step's batch in training, over the
            anchors inside images; with micro-batches, of each device's micro-batch.
        initial_scale: initial factor on cosines; 1/0.07 is CLIP's. For D = 512, the cosines of
            unrelated features have a standard deviation of 1/23. So the logits of negatives start
            within ±1.3 of the bias, and a cosine of 0.5 is already a confident match:
            0.5/0.07 - 4.6 = 2.5. Dot products always start at scale 1,
            "batch_norm" at exp(-1).
        mask_padding: whether neck and head ignore the padding of the canvas: their convolutions
            read zeros there, and the statistics of the norms are those of the image. The outputs
            for an image then hardly depend on its canvas: only the backbone's windows still see
            padding at the image's border.
        prior: probability that an untrained model predicts for every concept at every anchor
            (RetinaNet uses 0.01). The bias starts at log(prior / (1 - prior)).
        dtype: of the activations; parameters, statistics of the norms and softmax are float32.
        remat: which activations of each Swin and text block are stored for the backward pass:
            "none": all; "dots": the outputs of dense layers; "blocks": only the block's input. The
            backward pass recomputes the rest.
        loop: run the equal blocks of a stage and of the text tower as a loop over their stacked
            parameters. The values are the same. A deep model compiles in a fraction of the time and
            memory.
        kernels: "auto" runs the blocks of both towers and the head in bfloat16 by fused kernels
            (ops/kernels/) on TPUs. "xla" never does.
    """

    swin: SwinConfig = SwinConfig()
    neck_channels: int = 256
    neck_coarse_gain: float = 1.0
    head: HeadConfig = HeadConfig()
    text: TextConfig = TextConfig()
    classes: tuple[str, ...] = ()
    anchors: AnchorConfig = AnchorConfig()
    similarity: str = "cosine"
    initial_scale: float = 1 / 0.07
    mask_padding: bool = False
    prior: float = 0.01
    dtype: str = "float32"
    remat: Remat = "none"
    loop: bool = False
    kernels: Kernels = "auto"

    def __post_init__(self):
        for name, choices in (
            ("dtype", _DTYPES),
            ("remat", get_args(Remat)),
            ("kernels", get_args(Kernels)),
            ("similarity", _SIMILARITIES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"config.model.{name} is {value!r}. Choose one of {', '.join(choices)}."
                )
        if self.head.embed_dim != self.text.embed_dim:
            raise UserError(
                f"config.model: head.embed_dim {self.head.embed_dim} and text.embed_dim "
                f"{self.text.embed_dim} must be equal, because regions and texts are compared by a "
                "dot product. Change one of them."
            )
        if self.classes and (self.head.embed_dim != len(self.classes) or self.similarity != "dot"):
            raise UserError(
                f"config.model.classes has {len(self.classes)} names: head.embed_dim "
                f"{self.head.embed_dim} must be that number, and similarity {self.similarity!r} "
                "must be 'dot'. Change them."
            )
        strides = tuple(self.swin.patch_size * 2**level for level in range(1, 6))
        if tuple(self.anchors.strides) != strides:
            raise UserError(
                f"config.model: anchors.strides is {tuple(self.anchors.strides)}, but with "
                f"swin.patch_size {self.swin.patch_size} the levels have strides {strides}. Change "
                "one of them."
            )
        if not 0 < self.prior < 1:
            raise UserError(f"config.model.prior is {self.prior}. Choose a probability in (0, 1).")
        if self.initial_scale <= 0:
            raise UserError(
                f"config.model.initial_scale is {self.initial_scale}. Choose a positive number."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetCLIPConfig":
        """Return the config of nested dicts as `to_dict` returns them; absent fields are defaults.

        Raises:
            UserError: a key is unknown or a value has a wrong type; the message names its path.
        """
        return config_dict.from_dict(cls, values, "model")

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested dicts that JSON can store."""
        return config_dict.to_dict(self)


def normalize_images(images: UInt8[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Scale RGB pixels 0..255 to mean 0 and variance 1 per channel (of ImageNet), in float32."""
    mean, std = np.asarray(IMAGE_MEAN, np.float32), np.asarray(IMAGE_STD, np.float32)
    return (images.astype(jnp.float32) - mean) / std


def l2_normalize(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Scale vectors to length 1; a zero vector stays zero, with a finite gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, 1e-12))


class DetCLIP(nnx.Module):
    """Backbone, neck, head and text tower, with a learned scale and bias of the similarity.

    Args:
        cfg: sizes and options.
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
        self.text = (
            ClosedSet(cfg.classes)
            if cfg.classes
            else TextTower(cfg.text, kernels=cfg.kernels, **blocks, **options)
        )
        if cfg.similarity == "batch_norm":
            self.region_norm = BatchNorm(cfg.head.embed_dim)
        starts = {"cosine": cfg.initial_scale, "dot": 1.0, "batch_norm": _BATCH_NORM_SCALE}
        start = starts[cfg.similarity]
        self.logit_scale = nnx.Param(jnp.asarray(math.log(start), jnp.float32))
        bias = math.log(cfg.prior / (1 - cfg.prior))
        self.logit_bias = nnx.Param(jnp.asarray(bias, jnp.float32))

    def encode_image(
        self,
        images: UInt8[Array, "B H W 3"],
        drop_path_factors: Float[Array, "N 2 B"] | None = None,
        sizes: Int[Array, "B 2"] | None = None,
        training: bool = False,
    ) -> RegionOutputs:
        """Return embedding, box and centerness of every anchor of `anchor_grid(H, W, cfg.anchors)`.

        Args:
            images: RGB, 0..255, any size.
            drop_path_factors: drop path factors of the backbone's N blocks
                (`backbone.draw_drop_path`); None at inference.
            sizes: height and width of each image on its canvas, pixels. None: the whole canvas.
                Read only if `mask_padding` or `training`.
            training: normalize by the statistics of these images, and return them, if `similarity`
                is "batch_norm".

        Returns:
            float32 outputs. The embeddings are unit vectors if `similarity` is "cosine".
        """
        outputs = self.head_outputs(images, drop_path_factors, sizes)
        return self.comparable_regions(outputs, images.shape[1:3], sizes, training)

    def head_outputs(
        self,
        images: UInt8[Array, "B H W 3"],
        drop_path_factors: Float[Array, "N 2 B"] | None,
        sizes: Int[Array, "B 2"] | None,
    ) -> RegionOutputs:
        """Return the head's outputs, whose embeddings are not normalized yet.

        The outputs of an image depend on no other image. The arguments are those of `encode_image`.
        """
        extents = None
        if self.cfg.mask_padding and sizes is not None:
            extents = level_extents(sizes, self.cfg.anchors.strides)
        maps = self.backbone(normalize_images(images), drop_path_factors)
        return self.head(self.neck(maps, extents), extents)

    def comparable_regions(
        self,
        outputs: RegionOutputs,
        canvas: tuple[int, int],
        sizes: Int[Array, "B 2"] | None,
        training: bool,
    ) -> RegionOutputs:
        """Return the outputs with embeddings that can be compared with texts.

        Args:
            outputs: of the head.
            canvas: padded image size (height, width), pixels.
            sizes, training: as in `encode_image`.
        """
        if self.cfg.similarity == "batch_norm":
            return self._batch_normalized(outputs, canvas, sizes, training)
        return dataclasses.replace(outputs, embeddings=self._comparable(outputs.embeddings))

    @jax.named_scope("region_norm")
    def _batch_normalized(self, outputs, canvas, sizes, training) -> RegionOutputs:
        if not training:
            embeddings = self.region_norm(outputs.embeddings)
            return dataclasses.replace(outputs, embeddings=embeddings)
        if sizes is None:
            sizes = jnp.tile(jnp.asarray(canvas), (len(outputs.embeddings), 1))
        counted = anchors_inside(jnp.asarray(anchor_grid(*canvas, self.cfg.anchors)), sizes)
        mean, variance = self.region_norm.statistics(outputs.embeddings, counted)
        found = {"mean": mean, "variance": variance, "pieces": jnp.ones(())}
        return dataclasses.replace(
            outputs,
            embeddings=self.region_norm(outputs.embeddings, (mean, variance)),
            statistics={"region_statistics": jax.lax.stop_gradient(found)},
        )

    def encode_text(self, tokens: Int[Array, "M L"]) -> Float[Array, "M D"]:
        """Return the features of M concepts, in float32; unit vectors unless they are "dot".

        Args:
            tokens: see `TextTower.__call__`.
        """
        return self._comparable(self.text(tokens))

    def scale(self) -> Float[Array, ""]:
        """Return exp(a), the factor on all similarities, where a is the learned `logit_scale`."""
        return jnp.exp(self.logit_scale[...])

    def logits(
        self, regions: Float[Array, "... K D"], texts: Float[Array, "M D"]
    ) -> Float[Array, "... K M"]:
        """Return the logits exp(a) · regions · textsᵀ + b of every region for every text.

        Products accumulate in float32. The scale multiplies the texts, which are the smallest array
        of the three.
        """
        products = jnp.matmul(regions, (self.scale() * texts).T, preferred_element_type=jnp.float32)
        return products + self.logit_bias[...]

    def _comparable(self, x):
        return x if self.cfg.similarity == "dot" else l2_normalize(x)


def abstract(cfg: DetCLIPConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Return `create`'s results with `jax.ShapeDtypeStruct`s as arrays; allocates no memory."""
    return jax.eval_shape(lambda: _split(DetCLIP(cfg, rngs=Draws())))


def create(cfg: DetCLIPConfig, seed: int) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Return a new model as its static graph and its parameters.

    Parameters are nested dicts of float32 arrays with strings as keys. The path of a parameter is
    its keys joined by '/'. The same seed gives the same parameters on any number of devices.
    """
    return _initializer(cfg)(jax.random.key(seed))


@functools.cache
def _initializer(cfg: DetCLIPConfig):
    _, shapes = abstract(cfg)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))

    @jax.jit
    def initialize(key):
        # Without the barrier XLA repeats the draw for every slice of it.
        draw = jax.lax.optimization_barrier(jax.random.normal(key, (size,)))
        return _split(DetCLIP(cfg, rngs=Draws(draw)))

    return initialize


def build(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> DetCLIP:
    """Return the model of a graph and parameters, the inverse of `create`; also inside `jit`."""
    to_index = lambda key: int(key) if key.isdigit() else key
    return nnx.merge(graphdef, nnx.State(_map_keys(params, to_index)))


def _split(model: DetCLIP) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graphdef, state = nnx.split(model)
    return graphdef, _map_keys(nnx.to_pure_dict(state), str)


def _map_keys(tree, rename):
    if not isinstance(tree, Mapping):
        return tree
    return {rename(key): _map_keys(value, rename) for key, value in tree.items()}
