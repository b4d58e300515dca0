"""TensorFlow's SavedModel, through jax2tf.

The network is StableHLO inside it. What follows is TensorFlow's own: its top-k, because TensorFlow
2.21 cannot read JAX's, and its suppression a name.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.exporters.served import ServedModel, dense
from detclipv2_jax.exporters.stablehlo import PLATFORMS
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.models.detclip import build
from detclipv2_jax.text.tokenizer import CONTEXT

_SIGNATURE, _ENCODER = "serving_default", "encode_text"


def write(served: ServedModel, output: pathlib.Path) -> dict[str, str]:
    """Writes the folder `saved_model`, whole or not at all.

    Its signature `serving_default` is the detector; without a fixed vocabulary it has a second one,
    `encode_text`. Returns the folder and the signatures by their role.

    Raises:
      UserError: TensorFlow is not installed, or is too old for this JAX.
    """
    try:
        import tensorflow as tf
    except ModuleNotFoundError:
        raise UserError(
            "--format=savedmodel needs TensorFlow, which is not installed: pip install "
            "tensorflow-cpu, or choose --format=stablehlo."
        ) from None

    _check_that_it_reads(tf)
    module = tf.Module()
    fixed = served.texts is not None
    params = {k: v for k, v in served.params.items() if not (fixed and k == "text")}
    module.params = jax.tree.map(lambda value: tf.Variable(np.asarray(value)), params)
    module.detect = _detector(tf, served, module.params)
    signatures = {_SIGNATURE: module.detect}
    if not fixed:
        module.encode = _encoder(tf, served, module.params)
        signatures[_ENCODER] = module.encode

    path = output / "saved_model"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        tf.saved_model.save(module, str(temporary), signatures=signatures)
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written ({reason}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {"detector": path.name} | ({} if fixed else {"text_encoder": path.name})


def _check_that_it_reads(tf: Any) -> None:
    """TensorFlow tells when a file is first run, and at length: better ask it before writing."""
    gelu = functools.partial(jax.nn.gelu, approximate=False)  # of what the model uses, the newest
    probe = tf.function(_converted(gelu, ["(batch,)"]), autograph=False)
    try:
        probe(tf.zeros(1))
    except tf.errors.OpError:
        raise UserError(
            f"TensorFlow {tf.__version__} cannot read what jax {jax.__version__} writes: export "
            "with an older jax (0.10.2, on Python 3.11), or choose --format=stablehlo or onnx."
        ) from None


def _detector(tf: Any, served: ServedModel, params: Mapping[str, Any]) -> Any:
    height, width = served.canvas
    shapes = [None, f"(batch, {height}, {width}, 3)", "(batch, 2)"]

    def network(params, images, sizes, texts):
        params = served.params | params  # the text tower's are not read where they are left out
        return dense(build(served.graphdef, params), served.config, images, sizes, texts)

    def spec(name, shape, dtype):
        return tf.TensorSpec(shape, dtype, name=name)

    arguments = [
        spec("images", (None, height, width, 3), tf.uint8),
        spec("sizes", (None, 2), tf.int32),
    ]
    if served.texts is not None:
        fixed = served.texts
        network = functools.partial(network, texts=fixed)
        converted = _converted(network, shapes)
    else:
        arguments.append(spec("texts", (None, served.width), tf.float32))
        converted = _converted(network, [*shapes, f"(rows, {served.width})"])

    @tf.function(input_signature=arguments, autograph=False)
    def detect(*inputs):
        boxes, scores = converted(params, *inputs)
        return suppressed(tf, served.config, boxes, scores)

    return detect


def _encoder(tf: Any, served: ServedModel, params: Mapping[str, Any]) -> Any:
    encode = lambda params, tokens: build(served.graphdef, params).encode_text(tokens)
    converted = _converted(encode, [None, f"(count, {CONTEXT})"])
    spec = tf.TensorSpec((None, CONTEXT), tf.int32, name="tokens")

    @tf.function(input_signature=[spec], autograph=False)
    def encode_text(tokens):
        return {"texts": converted(params, tokens)}

    return encode_text


def _converted(function: Any, shapes: list[str | None]) -> Any:
    from jax.experimental import jax2tf

    return jax2tf.convert(
        function,
        polymorphic_shapes=shapes,
        with_gradient=False,
        native_serialization_platforms=PLATFORMS,
    )


def suppressed(tf: Any, config: DecodeConfig, boxes: Any, scores: Any) -> dict[str, Any]:
    """What `class_nms` makes of the boxes (B, K, 4) and scores (B, C, K), by TensorFlow."""
    count = tf.minimum(config.pre_nms_top_k, tf.shape(scores)[-1])
    values, anchors = tf.math.top_k(scores, count)
    candidates = tf.gather(boxes, anchors, batch_dims=1)  # (B, C, candidates, 4)
    found = tf.image.combined_non_max_suppression(
        tf.transpose(candidates, [0, 2, 1, 3]),
        tf.transpose(values, [0, 2, 1]),
        max_output_size_per_class=config.pre_nms_top_k,
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
