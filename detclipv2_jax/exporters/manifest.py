"""`manifest.json`, which describes an export to programs, and `tokenizer.json`."""

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from detclipv2_jax.common.atomic import write_text
from detclipv2_jax.exporters.served import ServedModel
from detclipv2_jax.models.detclip import IMAGE_MEAN, IMAGE_STD
from detclipv2_jax.text.tokenizer import CONTEXT, END, START, tokenizer


def describe(served: ServedModel, format_name: str, rows: int | str) -> dict[str, Any]:
    """Return the manifest of a detector: its inputs, outputs and settings.

    In shapes, the symbols `batch`, `rows` and `count` stand for any number.

    Args:
      served: the model.
      format_name: value of --format.
      rows: rows of the input `texts`, a number or 'rows'; not used if the names are fixed.
    """
    return {
        "format": format_name,
        "canvas": list(served.canvas),
        "names": None if served.names is None else list(served.names),
        "inputs": _inputs(served, rows),
        "outputs": _outputs(served.config.max_detections),
        "normalization": {"inside": True, "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD)},
        "compute": "float32",
        "settings": dataclasses.asdict(served.config),
        "prompts": dict(served.prompts),
    }


def _inputs(served: ServedModel, rows: int | str) -> dict[str, list[dict[str, Any]]]:
    height, width = served.canvas
    images = _array(
        "images", ("batch", height, width, 3), "uint8", "RGB, image at the top left, zeros around"
    )
    sizes = _array("sizes", ("batch", 2), "int32", "(height, width) of each image on its canvas")
    if served.names is not None:
        return {"detector": [images, sizes]}
    texts = _array(
        "texts",
        (rows, served.embedding_size),
        "float32",
        "text embeddings of the names; a row of zeros is not a name",
    )
    tokens = _array("tokens", ("count", CONTEXT), "int32", "token ids from tokenizer.json")
    return {"detector": [images, sizes, texts], "text_encoder": [tokens]}


def _outputs(max_detections: int) -> list[dict[str, Any]]:
    shape = ("batch", max_detections)
    return [
        _array("boxes", (*shape, 4), "float32", "x_min, y_min, x_max, y_max in canvas pixels"),
        _array("scores", shape, "float32", "0 to 1, best first"),
        _array("labels", shape, "int32", "index of the name, from 0"),
        _array("mask", shape, "bool", "false: padding, not a detection"),
    ]


def _array(name: str, shape: tuple[int | str, ...], dtype: str, what: str) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "dtype": dtype, "what": what}


def versions(format_name: str) -> dict[str, str]:
    """Return the versions of the installed packages that write a format."""
    converters = {"savedmodel": ["tensorflow-cpu", "tensorflow"], "onnx": ["jax2onnx", "onnx"]}
    found = {}
    for name in ["jax", "flax", "numpy", *converters.get(format_name, [])]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_tokenizer(path: pathlib.Path) -> None:
    """Write CLIP's tokenizer for `tokenizers.Tokenizer.from_file`.

    It adds start, end and padding, and gives the same ids as `tokenize` for texts that `normalize`
    only lower-cases and strips of extra spaces.
    """
    result = Tokenizer.from_str(tokenizer().to_str())
    result.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", START), ("<|endoftext|>", END)],
    )
    result.enable_truncation(CONTEXT)
    result.enable_padding(length=CONTEXT, pad_id=0)
    write_text(path, result.to_str())
