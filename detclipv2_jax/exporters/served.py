"""`ServedModel`: what all detector formats export, as functions of arrays."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.names import cut_off_text
from detclipv2_jax.inference.predict import clipped_boxes, predict, score_names
from detclipv2_jax.models.detclip import DetCLIP, build
from detclipv2_jax.text.tokenizer import CONTEXT, normalize

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A detector with a fixed canvas, and with fixed names or names as an input.

    Attributes:
      graphdef: structure of the model, which computes in float32.
      params: the averaged parameters.
      canvas: (height, width) in pixels of the input images.
      config: score threshold, suppression and limits.
      names: the fixed names. None: names are an input.
      texts: text embeddings of the fixed names. None: an input (R, D), where a row of zeros is not
        a name.
      prompts: normalized name -> the text that stands for it: of the fixed names, or else of all
        names whose definition is known.
    """

    graphdef: nnx.GraphDef
    params: Mapping[str, Any]
    canvas: tuple[int, int]
    config: DecodeConfig
    names: tuple[str, ...] | None = None
    texts: Float[np.ndarray, "C D"] | None = None
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def embedding_size(self) -> int:
        """D, the length of a text embedding."""
        return self.params["head"]["embed"]["kernel"].shape[-1]

    def model(self) -> DetCLIP:
        """Return the model with its parameters as constants."""
        return build(self.graphdef, jax.tree.map(jnp.asarray, self.params))

    def detect_function(self) -> Callable[..., dict[str, Array]]:
        """Return the function (images, sizes[, texts]) -> {boxes, scores, labels, mask}.

        It is `predict`, suppression included.
        """

        def detect(
            images: UInt8[Array, "B H W 3"],
            sizes: Int[Array, "B 2"],
            texts: Float[Array, "R D"] | None = None,
        ) -> dict[str, Array]:
            texts = jnp.asarray(self.texts) if texts is None else texts
            mask = jnp.any(texts != 0, axis=-1)
            found = predict(self.model(), images, sizes, texts, mask, config=self.config)
            return {name: getattr(found, name) for name in ("boxes", "scores", "labels", "mask")}

        return detect

    def encode_function(self) -> Callable[[Int[Array, "N 16"]], Float[Array, "N D"]]:
        """Return the function from token ids to text embeddings."""
        return lambda tokens: self.model().encode_text(tokens)

    def image_specs(self, batch: Any) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Return the shapes of `images` and `sizes`; `batch` is a number or a symbol."""
        images = jax.ShapeDtypeStruct((batch, *self.canvas, 3), jnp.uint8)
        return images, jax.ShapeDtypeStruct((batch, 2), jnp.int32)

    def text_spec(self, rows: Any) -> jax.ShapeDtypeStruct:
        """Return the shape of `texts`; `rows` is a number or a symbol."""
        return jax.ShapeDtypeStruct((rows, self.embedding_size), jnp.float32)

    @staticmethod
    def token_spec(rows: Any) -> jax.ShapeDtypeStruct:
        """Return the shape of the token ids; `rows` is a number or a symbol."""
        return jax.ShapeDtypeStruct((rows, CONTEXT), jnp.int32)


def served_model(
    loaded: "LoadedModel",
    names: Sequence[str] | None = None,
    *,
    canvas: tuple[int, int] | None = None,
    score_threshold: float = 0.05,
    max_detections: int = 300,
    definitions: str | None = None,
) -> ServedModel:
    """Return a checkpoint's model for export. It computes in float32, whatever the run used.

    Args:
      loaded: the checkpoint.
      names: the names to detect. None: names are an input.
      canvas: (height, width) in pixels. None: the canvas of the run's config.
      score_threshold: only detections with a higher score are returned.
      max_detections: at most this many boxes per image.
      definitions: 'on', 'off' or 'as_trained'. None: as the run's config says.

    Raises:
      UserError: a name is empty or given twice, or an option is not valid.
    """
    from detclipv2_jax.inference.detector import Detector
    from detclipv2_jax.models import detclip

    graphdef, _ = detclip.abstract(
        dataclasses.replace(loaded.model, dtype="float32", remat="none", loop=False, kernels="xla")
    )
    detector = Detector(
        dataclasses.replace(loaded, graphdef=graphdef),
        score_threshold=score_threshold,
        max_detections=max_detections,
        definitions=definitions,
    )
    served = ServedModel(
        graphdef=graphdef,
        params=jax.tree.map(np.asarray, loaded.params),
        canvas=tuple(canvas or loaded.detect.canvas),
        config=detector.predictor.config,
    )
    if names is None:
        return dataclasses.replace(served, prompts=detector.prompter.dictionary_prompts())
    encoded = detector.encode(names)
    if sentence := cut_off_text(encoded):
        print(f"warning: {sentence}", file=sys.stderr)
    return dataclasses.replace(
        served,
        names=tuple(names),
        texts=np.asarray(encoded.embeddings)[: len(names)],
        prompts={normalize(name): text for name, text in zip(names, encoded.prompts)},
    )


def boxes_and_scores(
    model: DetCLIP,
    config: DecodeConfig,
    images: UInt8[Array, "B H W 3"],
    sizes: Int[Array, "B 2"],
    texts: Float[Array, "C D"],
) -> tuple[Float[Array, "B K 4"], Float[Array, "B C K"]]:
    """Return what `predict` computes before suppression, for runtimes with their own suppression.

    Boxes are clipped to the image. A score is -1 where no detection is possible: the anchor is
    outside the image, the box has no area, the score is not finite, or the row of `texts` is zero.
    """
    regions = model.encode_image(images, sizes=sizes)
    boxes, box_mask = clipped_boxes(model, regions, images.shape[1:3], sizes)
    scores = score_names(model, regions, texts, jnp.any(texts != 0, axis=-1), config)
    return boxes, jnp.where(box_mask[:, None], scores, -1.0)
