"""ONNX through jax2onnx: the converted network, followed by ONNX's own top-k and suppression.

jax2onnx is not a dependency of this package because it requires an old version of orbax.
docs/export.md describes how to install both.
"""

import logging
import pathlib
import re
from typing import Any

import jax

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.exporters.served import ServedModel, boxes_and_scores
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.ops.boxes import level_sizes

OPSET = 21


def write(served: ServedModel, output: pathlib.Path) -> dict[str, str]:
    """Write the detector and, if names are an input, the text encoder.

    Args:
      served: the model.
      output: directory for the files.

    Returns:
      Role ('detector', 'text_encoder') -> file name.

    Raises:
      UserError: jax2onnx or onnx is not installed.
    """
    _require_packages()
    model = served.model()
    arguments, names = list(served.image_specs("batch")), ["images", "sizes"]
    if served.texts is not None:
        network = lambda images, sizes: boxes_and_scores(
            model, served.config, images, sizes, served.texts
        )
    else:
        network = lambda *inputs: boxes_and_scores(model, served.config, *inputs)
        arguments.append(served.text_spec("rows"))
        names.append("texts")
    converted = _convert(network, arguments, names, ["all_boxes", "all_scores"])
    _save(_with_suppression(converted, served), output / "detector.onnx")
    if served.texts is not None:
        return {"detector": "detector.onnx"}
    tokens = served.token_spec("count")
    encoder = _convert(served.encode_function(), [tokens], ["tokens"], ["texts"])
    _save(encoder, output / "text_encoder.onnx")
    return {"detector": "detector.onnx", "text_encoder": "text_encoder.onnx"}


def _require_packages() -> None:
    try:
        import jax2onnx  # noqa: F401 - only to check
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--format=onnx needs jax2onnx, and {error.name} is not installed. Run "
            "`pip install onnx onnx-ir` and `pip install --no-deps jax2onnx==0.17.1`."
        ) from None


def _convert(
    function: Any, arguments: list[jax.ShapeDtypeStruct], inputs: list[str], outputs: list[str]
) -> Any:
    """Return a function of arrays as an ONNX model with named inputs and outputs."""
    import jax2onnx

    # They warn at length of packages that only their examples need, and of shapes without a type.
    for noisy in ("jax2onnx", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    return jax2onnx.to_onnx(
        function,
        inputs=arguments,
        model_name="detclipv2",
        opset=OPSET,
        input_names=inputs,
        output_names=outputs,
    )


# `ops.nms.class_nms` in ONNX's text format: one suppression for each name in each image, then the
# best boxes of each image. NonMaxSuppression returns a list of indices of any length; they are
# scattered back into the table of scores, so that the outputs have a fixed size. Words in capitals
# are replaced by numbers.
_SUPPRESSION = """
<ir_version: IR_VERSION, opset_import: ["": OPSET]>
suppression (float[batch, ANCHORS, 4] all_boxes, float[batch, NAMES, ANCHORS] all_scores)
    => (float[batch, KEEP, 4] boxes, float[batch, KEEP] scores, int32[batch, KEEP] labels,
        bool[batch, KEEP] mask)
    <int64[1] nms_count = {COUNT}, int64[1] nms_keep = {KEEP}, int64[1] nms_last = {-1},
     int64[1] nms_anchor_count = {ANCHORS}, int64[1] nms_most = {MOST},
     int64[4] nms_padding = {0, 0, 0, KEEP}, int64 nms_zero = {0}, float nms_zero_score = {0.0},
     float[1] nms_iou = {NMS_IOU}, float[1] nms_threshold = {SCORE_THRESHOLD},
     float nms_nothing = {-1.0}>
{
    nms_shape = Shape (all_scores)
    nms_blank = Expand (nms_nothing, nms_shape)
    ENTRANTS
    nms_kept = NonMaxSuppression (all_boxes, nms_scores, nms_most, nms_iou, nms_threshold)
    nms_kept_scores = GatherND (nms_scores, nms_kept)
    nms_table = ScatterND (nms_blank, nms_kept, nms_kept_scores)
    nms_flat = Flatten (nms_table)
    nms_padded = Pad (nms_flat, nms_padding, nms_nothing)
    nms_best, nms_places = TopK <axis = -1> (nms_padded, nms_keep)
    mask = Greater (nms_best, nms_nothing)
    scores = Where (mask, nms_best, nms_zero_score)
    nms_found = Where (mask, nms_places, nms_zero)
    nms_labels = Div (nms_found, nms_anchor_count)
    labels = Cast <to = 6> (nms_labels)
    nms_anchors = Mod (nms_found, nms_anchor_count)
    nms_anchor_places = Unsqueeze (nms_anchors, nms_last)
    nms_found_boxes = GatherND <batch_dims = 1> (all_boxes, nms_anchor_places)
    nms_box_mask = Unsqueeze (mask, nms_last)
    boxes = Where (nms_box_mask, nms_found_boxes, nms_zero_score)
}
"""
_ALL_ANCHORS = "nms_scores = Identity (all_scores)"
_BEST_ANCHORS = """nms_top, nms_top_anchors = TopK <axis = -1> (all_scores, nms_count)
    nms_scores = ScatterElements <axis = -1> (nms_blank, nms_top_anchors, nms_top)"""


def suppression(config: DecodeConfig, anchors: int, names: int | str, ir_version: int) -> Any:
    """Return `ops.nms.class_nms` as an ONNX model.

    Args:
      config: suppression and limits.
      anchors: K, their number.
      names: their number, or a symbol.
      ir_version: of the ONNX format.
    """
    import onnx

    values = {
        "IR_VERSION": ir_version,
        "OPSET": OPSET,
        "ANCHORS": anchors,
        "NAMES": names,
        "COUNT": min(config.pre_nms_top_k, anchors),
        "MOST": min(config.max_detections, anchors),
        "KEEP": config.max_detections,
        "NMS_IOU": float(config.nms_iou),
        "SCORE_THRESHOLD": float(config.score_threshold),
    }
    entrants = _BEST_ANCHORS if config.pre_nms_top_k else _ALL_ANCHORS
    text = _SUPPRESSION.replace("ENTRANTS", entrants)
    text = re.sub(r"\b[A-Z_]{4,}\b", lambda match: str(values[match[0]]), text)
    return onnx.parser.parse_model(text)


def _with_suppression(network: Any, served: ServedModel) -> Any:
    """Return the network with suppression behind it, as one ONNX model."""
    import onnx

    anchors = sum(level_sizes(*served.canvas, served.model().cfg.anchors))
    names = "rows" if served.texts is None else len(served.texts)
    behind = suppression(served.config, anchors, names, network.ir_version)
    connections = [(name, name) for name in ("all_boxes", "all_scores")]
    return onnx.compose.merge_models(network, behind, io_map=connections)


def _save(model: Any, path: pathlib.Path) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
