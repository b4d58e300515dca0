"""TensorFlow's SavedModel through jax2tf.

The network is StableHLO inside the SavedModel. Suppression is TensorFlow's own: TensorFlow 2.21
cannot read JAX's top-k.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from detclipv2_jax.common.atomic import replacing_directory
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.exporters.served import ServedModel, boxes_and_scores
from detclipv2_jax.exporters.stablehlo import PLATFORMS
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.models.detclip import build
from detclipv2_jax.text.tokenizer import CONTEXT

_DETECTOR_SIGNATURE, _ENCODER_SIGNATURE = "serving_default", "encode_text"


def write(served: ServedModel, output: pathlib.Path) -> dict[str, str]:
    """Write the directory `saved_model`, atomically.

    Its signature `serving_default` is the detector. If names are an input, the signature
    `encode_text` is the text encoder.

    Args:
      served: the model.
      output: parent directory.

    Returns:
      Role ('detector', 'text_encoder') -> directory name.

    Raises:
      UserError: TensorFlow is not installed or too old for this JAX, or the directory cannot be
        written.
    """
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise UserError(
            "--format=savedmodel needs TensorFlow, which is not installed. Run "
            "`pip install tensorflow-cpu`, or choose --format=stablehlo."
        ) from None

    _check_compatibility(tf)
    module = tf.Module()
    is_fixed = served.texts is not None
    params = {k: v for k, v in served.params.items() if not (is_fixed and k == "text")}
    module.params = jax.tree.map(lambda value: tf.Variable(np.asarray(value)), params)
    module.detect = _detector(tf, served, module.params)
    signatures = {_DETECTOR_SIGNATURE: module.detect}
    if not is_fixed:
        module.encode = _encoder(tf, served, module.params)
        signatures[_ENCODER_SIGNATURE] = module.encode

    path = output / "saved_model"
    try:
        with replacing_directory(path) as temporary:
            tf.saved_model.save(module, str(temporary), signatures=signatures)
    except tf.errors.OpError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}).") from error
    return {"detector": path.name} | ({} if is_fixed else {"text_encoder": path.name})


def _check_compatibility(tf: Any) -> None:
    """Raise `UserError` if TensorFlow cannot run what this JAX writes.

    TensorFlow itself reports it only when the file is first run, and at length.
    """
    # Of the operations that the model uses, the one that was added to StableHLO last.
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    probe = tf.function(_convert(gelu, ["(batch,)"]), autograph=False)
    try:
        probe(tf.zeros(1))
    except tf.errors.OpError:
        raise UserError(
            f"TensorFlow {tf.__version__} cannot read what jax {jax.__version__} writes. Export "
            "with an older jax (0.10.2, on Python 3.11), or choose --format=stablehlo or onnx."
        ) from None


def _detector(tf: Any, served: ServedModel, params: Mapping[str, Any]) -> Any:
    """Return the detector as a `tf.function`; `params` are variables."""
    height, width = served.canvas
    shapes = [None, f"(batch, {height}, {width}, 3)", "(batch, 2)"]

    def network(params, images, sizes, texts):
        # With fixed names, `params` lacks the text tower. It is not used then.
        params = served.params | params
        model = build(served.graphdef, params)
        return boxes_and_scores(model, served.config, images, sizes, texts)

    def spec(name, shape, dtype):
        return tf.TensorSpec(shape, dtype, name=name)

    arguments = [
        spec("images", (None, height, width, 3), tf.uint8),
        spec("sizes", (None, 2), tf.int32),
    ]
    if served.texts is not None:
        converted = _convert(functools.partial(network, texts=served.texts), shapes)
    else:
        size = served.embedding_size
        arguments.append(spec("texts", (None, size), tf.float32))
        converted = _convert(network, [*shapes, f"(rows, {size})"])

    @tf.function(input_signature=arguments, autograph=False)
    def detect(*inputs):
        boxes, scores = converted(params, *inputs)
        return suppress(tf, served.config, boxes, scores)

    return detect


def _encoder(tf: Any, served: ServedModel, params: Mapping[str, Any]) -> Any:
    """Return the text encoder as a `tf.function`; `params` are variables."""
    encode = lambda params, tokens: build(served.graphdef, params).encode_text(tokens)
    converted = _convert(encode, [None, f"(count, {CONTEXT})"])
    spec = tf.TensorSpec((None, CONTEXT), tf.int32, name="tokens")

    @tf.function(input_signature=[spec], autograph=False)
    def encode_text(tokens):
        return {"texts": converted(params, tokens)}

    return encode_text


def _convert(function: Any, shapes: list[str | None]) -> Any:
    from jax.experimental import jax2tf

    return jax2tf.convert(
        function,
        polymorphic_shapes=shapes,
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )


def suppress(tf: Any, config: DecodeConfig, boxes: Any, scores: Any) -> dict[str, Any]:
    """Return the detections of `ops.nms.class_nms`, computed by TensorFlow.

    Args:
      tf: the module `tensorflow`.
      config: suppression and limits.
      boxes: (B, K, 4), one per anchor.
      scores: (B, C, K), of each name.
    """
    class_boxes = boxes[:, None]  # the same for all names
    if config.pre_nms_top_k:
        count = tf.minimum(config.pre_nms_top_k, tf.shape(scores)[-1])
        scores, anchors = tf.math.top_k(scores, count)
        class_boxes = tf.gather(boxes, anchors, batch_dims=1)  # (B, C, count, 4)
    found = tf.image.combined_non_max_suppression(
        tf.transpose(class_boxes, [0, 2, 1, 3]),
        tf.transpose(scores, [0, 2, 1]),
        max_output_size_per_class=tf.minimum(config.max_detections, tf.shape(scores)[-1]),
        max_total_size=config.max_detections,
        iou_threshold=config.nms_iou,
        score_threshold=config.score_threshold,
        clip_boxes=False,
    )
    return {
        "boxes": found.nmsed_boxes,
        "scores": found.nmsed_scores,
        "labels": tf.cast(found.nmsed_classes, tf.int32),
        "mask": tf.sequence_mask(found.valid_detections, config.max_detections),
    }
