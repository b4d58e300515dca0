"""What an export is, for programs: `manifest.json`, and the tokenizer where names are an input."""

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.exporters.served import ServedModel
from detclipv2_jax.models.detclip import IMAGE_MEAN, IMAGE_STD
from detclipv2_jax.text.tokenizer import CONTEXT, END, START, tokenizer


def manifest(served: ServedModel, form: str, rows: int | str) -> dict[str, Any]:
    """Inputs and outputs with their shapes, and every setting that makes answers comparable.

    A shape's symbols (`batch`, `rows`, `count`) stand for any number; `rows` is the number of names
    that an input has room for.
    """
    height, width = served.canvas
    max_detections = served.config.max_detections
    argument = lambda name, shape, dtype, what: {
        "name": name,
        "shape": list(shape),
        "dtype": dtype,
        "what": what,
    }
    detector = [
        argument("images", ("batch", height, width, 3), "uint8", "RGB, top-left, zeros around"),
        argument("sizes", ("batch", 2), "int32", "(height, width) of each picture on its canvas"),
    ]
    inputs = {"detector": detector}
    if served.names is None:
        what = "encoded names; a row of zeros is no name"
        detector.append(argument("texts", (rows, served.width), "float32", what))
        what = "ids of tokenizer.json"
        inputs["text_encoder"] = [argument("tokens", ("count", CONTEXT), "int32", what)]
    outputs = [
        argument(
            "boxes", ("batch", max_detections, 4), "float32", "x_min, y_min, x_max, y_max in pixels"
        ),
        argument("scores", ("batch", max_detections), "float32", "0 to 1, best first"),
        argument("labels", ("batch", max_detections), "int32", "number of the name, from 0"),
        argument("mask", ("batch", max_detections), "bool", "false: no detection, padding"),
    ]
    return {
        "format": form,
        "canvas": [height, width],
        "names": None if served.names is None else list(served.names),
        "inputs": inputs,
        "outputs": outputs,
        "normalization": {"inside": True, "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)},
        "compute": "float32",
        "settings": dataclasses.asdict(served.config),
    }


def versions(form: str) -> dict[str, str]:
    """The packages that wrote the file, as far as they are installed."""
    wanted = ["jax", "flax", "numpy"]
    wanted += {"savedmodel": ["tensorflow-cpu", "tensorflow"], "onnx": ["jax2onnx", "onnx"]}.get(
        form, []
    )
    found = {}
    for name in wanted:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_tokenizer(path: pathlib.Path) -> None:
    """CLIP's tokenizer for `tokenizers.Tokenizer.from_file`: start, end and padding included.

    It gives the ids that `tokenize` gives, of texts that need no mending.
    """
    result = Tokenizer.from_str(tokenizer().to_str())
    result.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", START), ("<|endoftext|>", END)],
    )
    result.enable_truncation(CONTEXT)
    result.enable_padding(length=CONTEXT, pad_id=0)
    with replacing(path) as temporary:
        temporary.write_text(result.to_str(), encoding="utf-8")
