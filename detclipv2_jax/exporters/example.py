"""Run an exported detector on one image and print what it finds.

    python example.py IMAGE                        if the names were fixed at export
    python example.py IMAGE cat "traffic light"    if the names are an input

Prints one line per detection, separated by tabs: name, score, and the box as
"x_min y_min x_max y_max" in pixels of the image, turned as its EXIF orientation says.

Needs NumPy, Pillow and the runtime of the export: jax, tensorflow or onnxruntime. With names as an
input it also needs tokenizers. Use this file as a template for your own program.
"""

import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).parent
MANIFEST = json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))
TURNS = {  # what makes a picture upright, by its EXIF orientation
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def main(path, *names):
    """Detect in the image file `path` and print the detections."""
    if names and MANIFEST["names"]:
        sys.exit("The names of this export are fixed. Give only the image.")
    if not names and not MANIFEST["names"]:
        sys.exit("Give the names to look for after the image.")
    image = read(path)
    pixels, size = scale_to_canvas(image)
    inputs = [pixels[None], np.array([size], np.int32)]
    if names:
        inputs.append(encode(names))
    detections = load("detector")(*inputs)
    found = {key: np.asarray(value)[0] for key, value in detections.items()}
    names = names or MANIFEST["names"]
    scale = np.tile([image.width / size[1], image.height / size[0]], 2)  # canvas to image
    # The detector returns more than this, so that you can choose another threshold.
    limit = MANIFEST["threshold"]["score_threshold"]
    kept = found["mask"] & (found["scores"] > limit)
    about = f"score threshold {limit:g} ({MANIFEST['threshold']['score_threshold_from']})"
    if not kept.any():
        best = found["scores"][found["mask"]].max(initial=0)
        about = f"nothing found: the best score is {best:.4f}; {about}"
    print(about, file=sys.stderr)
    for number in np.flatnonzero(kept):
        box = " ".join(f"{x:.1f}" for x in found["boxes"][number] * scale)
        print(f"{names[found['labels'][number]]}\t{found['scores'][number]:.4f}\t{box}")


# ---- Inputs: an image and names as arrays.


def read(path):
    """Return an image file as RGB: turned as its EXIF says, with transparent parts in white."""
    from PIL import Image

    try:
        image = Image.open(path)
        image.load()
    except Exception as error:  # decoders raise anything
        sys.exit(f"{path}: cannot be read as an image ({error}).")
    try:
        turn = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF
        turn = None
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        sys.exit(f"{path}: which of its values is white is unknown. Save it with 8 bits.")
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if turn is None else image.transpose(Image.Transpose[turn])


def scale_to_canvas(image):
    """Return the image in the top-left corner of the canvas, and its (height, width) there."""
    height, width = MANIFEST["canvas"]
    scale = min(height / image.height, width / image.width)
    size = [max(1, round(image.height * scale)), max(1, round(image.width * scale))]
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: size[0], : size[1]] = np.asarray(image.resize(size[::-1]))
    return pixels, size


def encode(names):
    """Return the text embeddings of the names, one row per name.

    If the detector takes a fixed number of rows, rows of zeros fill it up.
    """
    texts = np.asarray(load("text_encoder")(tokens(names)))
    rows = MANIFEST["inputs"]["detector"][2]["shape"][0]
    if isinstance(rows, int):
        if len(names) > rows:
            sys.exit(f"{len(names)} names, but this export takes {rows}. Export with --rows.")
        texts = np.pad(texts, ((0, rows - len(texts)), (0, 0)))
    return texts


def tokens(names):
    """Return the token ids (N, 16) of the texts that stand for the names."""
    from tokenizers import Tokenizer

    texts = [prompt(name) for name in names]
    encoded = Tokenizer.from_file(str(FOLDER / "tokenizer.json")).encode_batch(texts)
    return np.array([row.ids for row in encoded], np.int32)


def prompt(name):
    """Return the text that stands for a name: with its definition if the model trained with it."""
    return MANIFEST["prompts"].get(" ".join(name.lower().split()), name)


# ---- The model: 'detector' or 'text_encoder' as a function of arrays.


def load(role):
    """Load the detector or the text encoder from this folder."""
    loaders = {"stablehlo": load_stablehlo, "savedmodel": load_savedmodel, "onnx": load_onnx}
    return loaders[MANIFEST["format"]](role)


def load_stablehlo(role):
    """Load with jax."""
    from jax import export

    exported = export.deserialize(bytearray((FOLDER / MANIFEST["files"][role]).read_bytes()))
    return exported.call


def load_savedmodel(role):
    """Load with tensorflow."""
    import tensorflow as tf

    model = tf.saved_model.load(str(FOLDER / MANIFEST["files"][role]))
    function = model.signatures["serving_default" if role == "detector" else "encode_text"]
    names = [argument["name"] for argument in MANIFEST["inputs"][role]]

    def run(*inputs, model=model):  # the signature does not keep the model alive
        outputs = function(**dict(zip(names, map(tf.constant, inputs))))
        return outputs if role == "detector" else outputs["texts"]

    return run


def load_onnx(role):
    """Load with onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(FOLDER / MANIFEST["files"][role]))
    names = [argument["name"] for argument in MANIFEST["inputs"][role]]
    outputs = [output.name for output in session.get_outputs()]

    def run(*inputs):
        found = session.run(outputs, dict(zip(names, inputs)))
        return dict(zip(outputs, found)) if role == "detector" else found[0]

    return run


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
