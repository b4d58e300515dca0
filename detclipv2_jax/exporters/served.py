"""What every format serves: one function of pictures, and one that encodes names."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.predict import clipped_boxes, predict, score_names
from detclipv2_jax.models.detclip import DetCLIP, build
from detclipv2_jax.text.tokenizer import CONTEXT


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model's parts, the shape of its pictures, and its vocabulary if that is fixed.

    The graph computes in float32. `texts` are the encoded `names`; None: the file takes them as an
    input (R, D), of which a row of zeros stands for no name.
    """

    graphdef: nnx.GraphDef
    params: Mapping[str, Any]
    canvas: tuple[int, int]  # (height, width)
    config: DecodeConfig
    names: tuple[str, ...] | None = None
    texts: Float[np.ndarray, "C D"] | None = None

    @property
    def width(self) -> int:
        """D, the length of an embedding."""
        return self.params["text"]["text_projection"].shape[1]

    def model(self) -> DetCLIP:
        """The model with its parameters, to be traced as constants."""
        return build(self.graphdef, jax.tree.map(jnp.asarray, self.params))

    def answer(self) -> Callable[..., dict[str, Array]]:
        """(images, sizes[, texts]) → boxes, scores, labels, mask: `predict`, with suppression."""

        def answer(
            images: UInt8[Array, "B H W 3"],
            sizes: Int[Array, "B 2"],
            texts: Float[Array, "R D"] | None = None,
        ) -> dict[str, Array]:
            texts = jnp.asarray(self.texts) if texts is None else texts
            mask = jnp.any(texts != 0, axis=-1)
            found = predict(self.model(), images, sizes, texts, mask, config=self.config)
            return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}

        return answer

    def encode(self) -> Callable[[Int[Array, "N 16"]], Float[Array, "N D"]]:
        """Token ids → what `answer` takes as texts."""
        return lambda tokens: self.model().encode_text(tokens)

    def image_spec(self, batch: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Shapes of images and sizes for a batch, a number or a symbol."""
        images = jax.ShapeDtypeStruct((batch, *self.canvas, 3), jnp.uint8)
        return images, jax.ShapeDtypeStruct((batch, 2), jnp.int32)

    def text_spec(self, rows: Any) -> jax.ShapeDtypeStruct:
        """Shape of the texts of `answer` for a number of rows."""
        return jax.ShapeDtypeStruct((rows, self.width), jnp.float32)

    @staticmethod
    def token_spec(rows: Any) -> jax.ShapeDtypeStruct:
        """Shape of the token ids of `encode` for a number of rows."""
        return jax.ShapeDtypeStruct((rows, CONTEXT), jnp.int32)


def dense(
    model: DetCLIP,
    config: DecodeConfig,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    texts: Float[Array, "C D"],
) -> tuple[Float[Array, "B K 4"], Float[Array, "B C K"]]:
    """What `predict` has before suppression, for runtimes that bring their own.

    Boxes are clipped to the picture. A score is -1 where there can be no detection: off the
    picture, a box without area, a score that is not finite, a row of zeros in `texts`.
    """
    regions = model.encode_image(images)
    boxes, there = clipped_boxes(model, regions, images.shape[1:3], sizes)
    scores = score_names(model, regions, texts, jnp.any(texts != 0, axis=-1), config)
    return boxes, jnp.where(there[:, None], scores, -1.0)
