"""Runs an exported detector on one image. Needs the file's own runtime, NumPy and Pillow.

    python example.py IMAGE                        the names that the export was made for
    python example.py IMAGE cat "traffic light"    an export that takes its names as an input

Prints a line for each detection: name, score, x_min, y_min, x_max, y_max in the image's pixels.
"""

import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


def load_stablehlo(role):
    """The detector or the text encoder as a function of arrays. Needs jax."""
    from jax import export

    exported = export.deserialize(bytearray((FOLDER / MANIFEST["files"][role]).read_bytes()))
    return exported.call


def load_savedmodel(role):
    """The same. Needs tensorflow."""
    import tensorflow as tf

    model = tf.saved_model.load(str(FOLDER / MANIFEST["files"][role]))
    function = model.signatures["serving_default" if role == "detector" else "encode_text"]
    names = [argument["name"] for argument in MANIFEST["inputs"][role]]

    def run(*inputs, model=model):  # the model must live as long as its signature
        outputs = function(**dict(zip(names, map(tf.constant, inputs))))
        return outputs if role == "detector" else outputs["texts"]

    return run


def load_onnx(role):
    """The same. Needs onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(FOLDER / MANIFEST["files"][role]))
    names = [argument["name"] for argument in MANIFEST["inputs"][role]]
    outputs = [output.name for output in session.get_outputs()]

    def run(*inputs):
        found = session.run(outputs, dict(zip(names, inputs)))
        return dict(zip(outputs, found)) if role == "detector" else found[0]

    return run


def load(role):
    """'detector' or 'text_encoder' of this folder."""
    loaders = {"stablehlo": load_stablehlo, "savedmodel": load_savedmodel, "onnx": load_onnx}
    return loaders[MANIFEST["format"]](role)


def letterbox(image):
    """The picture scaled into the canvas, top-left, zeros around it, and its (height, width)."""
    height, width = MANIFEST["canvas"]
    scale = min(height / image.height, width / image.width)
    size = [max(1, round(image.height * scale)), max(1, round(image.width * scale))]
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: size[0], : size[1]] = np.asarray(image.convert("RGB").resize(size[::-1]))
    return canvas, size


def prompt(name):
    """The text that stands for a name: with its definition, where it was trained with one."""
    return MANIFEST["prompts"].get(" ".join(name.lower().split()), name)


def tokens(names):
    """Token ids (N, 16) of the texts that stand for names. Needs tokenizers."""
    from tokenizers import Tokenizer

    texts = [prompt(name) for name in names]
    encoded = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode_batch(texts)
    return np.array([row.ids for row in encoded], np.int32)


def encode(names):
    """What the detector takes as texts: a row a name, and rows of zeros up to a fixed number."""
    texts = np.asarray(load("text_encoder")(tokens(names)))
    rows = MANIFEST["inputs"]["detector"][2]["shape"][0]
    if isinstance(rows, int):
        if len(names) > rows:
            sys.exit(f"{len(names)} names, but the export has room for {rows}: use --rows.")
        texts = np.pad(texts, ((0, rows - len(texts)), (0, 0)))
    return texts


def main(path, *names):
    """Detects and prints."""
    from PIL import Image

    if bool(names) == bool(MANIFEST["names"]):
        sys.exit("The names are in the export: name none." if names else "Name what to look for.")
    image = Image.open(path)
    canvas, size = letterbox(image)
    inputs = [canvas[None], np.array([size], np.int32)] + ([encode(names)] if names else [])
    found = {key: np.asarray(value)[0] for key, value in load("detector")(*inputs).items()}
    names = names or MANIFEST["names"]
    scale = np.tile([image.width / size[1], image.height / size[0]], 2)
    for slot in np.flatnonzero(found["mask"]):
        box = " ".join(f"{x:.1f}" for x in found["boxes"][slot] * scale)
        print(f"{names[found['labels'][slot]]}\t{found['scores'][slot]:.4f}\t{box}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
