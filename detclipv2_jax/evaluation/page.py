"""The web page of `detclip page`, made with Gradio: try a checkpoint in a browser."""

import abc
import argparse
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, datasets, report
from detclipv2_jax.inference import drawing, images
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    import gradio  # pyright: ignore[reportMissingImports]  # optional


# The detector returns this much; the sliders choose from it, so the model runs once per image.
MIN_SCORE, MAX_BOXES = 0.01, 300
_MAX_QUEUE = 8  # requests that may wait; more are asked to try again
_EXAMPLES = 3
_MAX_ANNOTATION_BYTES = 64e6  # reading a larger file for a few examples takes too long
_COLUMNS = ["name", "score", "x_min", "y_min", "x_max", "y_max"]


def parse_names(text: str) -> list[str]:
    """Return the names in a text, separated by commas or line breaks, each once.

    Raises:
      UserError: there are none.
    """
    names = {normalize(name): name.strip() for name in re.split(r"[,\n]", text) if name.strip()}
    if not names:
        raise UserError("Type at least one name to look for, for example: cat, traffic light")
    return list(names.values())


def detect(
    detector: Detector, image: images.ImageSource | None, text: str
) -> tuple[UInt8[np.ndarray, "h w 3"], ImageDetections]:
    """Return the pixels of an image and what is found in it, down to a score of `MIN_SCORE`.

    Args:
      detector: the model.
      image: the uploaded image; None if there is none.
      text: the names.

    Raises:
      UserError: there is no image or no name, or the image cannot be read.
    """
    if image is None:
        raise UserError("Drop an image first, or choose an example.")
    names = parse_names(text)
    pixels = images.read(image)
    (found,) = detector(pixels, names, score_threshold=MIN_SCORE, max_detections=MAX_BOXES)
    return pixels, found


def show(
    pixels: UInt8[np.ndarray, "h w 3"], found: ImageDetections, threshold: float, max_boxes: int
) -> tuple[Image.Image, list[list[Any]], str]:
    """Return the picture with the best boxes above the threshold, their table, and a summary."""
    above = int(np.sum(found.scores > threshold))
    best = found.best(min(above, int(max_boxes)))
    picture = drawing.draw_boxes(pixels, best.boxes, best.names, best.scores)
    rows = [
        [name, f"{score:.3f}", *(f"{x:.1f}" for x in box)]
        for name, score, box in zip(best.names, best.scores.tolist(), best.boxes.tolist())
    ]
    if above:
        summary = f"{len(rows)} of {above} boxes with a score above {threshold:.2f}"
    elif len(found):
        summary = f"No box has a score above {threshold:.2f}. The best is {found.scores[0]:.2f}."
    else:
        summary = f"Nothing found: no box has a score above {MIN_SCORE}."
    return picture, rows, summary


def example_inputs(config: Mapping[str, Any]) -> list[list[str]]:
    """Return [image, names] of a few validation images of a run, with the names that are in them.

    Args:
      config: the run's config, as the checkpoint stores it.

    Returns:
      An empty list if the data is not available.
    """
    root, section = pathlib.Path(config.get("data_dir", "")), config["eval"]
    path = root / section.get("dataset", "")
    try:
        if not path.is_file() or path.stat().st_size > _MAX_ANNOTATION_BYTES:
            return []
        truth = datasets.load_ground_truth(path)
    except (UserError, OSError):
        return []
    examples = []
    for image in truth.images[:200]:
        file = datasets.find_image(image, root / section["images"])
        if file and (names := _names_in(truth, image.id)):
            examples.append([str(file.absolute()), ", ".join(names)])
        if len(examples) == _EXAMPLES:
            break
    return examples


def _names_in(truth: coco.GroundTruth, image_id: int) -> list[str]:
    names = {category.id: report.readable_name(category.name) for category in truth.categories}
    return sorted({names[int(key)] for key in truth.category_ids[truth.boxes_of_image[image_id]]})


def build_page(detector: Detector, title: str, examples: list[list[str]]) -> "gradio.Blocks":
    """Return the page. Each visitor's last detections are kept for the sliders."""
    gr = _gradio()

    # An image component that passes on the uploaded file, so that `detect` reports a file that is
    # not an image. Made without Gradio's metaclass, which would write a page.pyi next to this file.
    fields = {"is_template": True, "preprocess": lambda self, upload: upload and upload.path}
    Upload = abc.ABCMeta.__new__(type(gr.Image), "Upload", (gr.Image,), fields)

    def search(image, text, threshold, max_boxes):
        try:
            pixels, found = detect(detector, image, text)
        except UserError as error:
            return None, None, [], f"⚠ {_without_folder(error, image)}"
        return (pixels, found), *show(pixels, found, threshold, max_boxes)

    def choose(answer, threshold, max_boxes):
        if not answer:
            return None, [], ""
        pixels, found = answer
        return show(pixels, found, threshold, max_boxes)

    # Long, because Gradio declares a page as nested blocks.
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        answer = gr.State()
        gr.Markdown(f"## {title}\nDrop an image and type the names of what to look for.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = Upload(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=280
                )
                text = gr.Textbox(
                    label="Names, separated by commas or line breaks",
                    placeholder="cat, traffic light",
                    lines=3,
                    max_lines=12,
                )
                button = gr.Button("Find", variant="primary")
                threshold = gr.Slider(
                    MIN_SCORE, 0.99, value=0.3, step=0.01, label="Score threshold"
                )
                max_boxes = gr.Slider(1, MAX_BOXES, value=50, step=1, label="Maximum boxes")
            with gr.Column(scale=3, min_width=400):
                picture = gr.Image(
                    label="Detections",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],  # without the one that shares it
                )
                summary = gr.Markdown()
                table = gr.Dataframe(
                    headers=_COLUMNS, label="Boxes, in pixels", interactive=False, max_height=300
                )
        if examples:
            gr.Examples(examples, [image, text], label="Examples")
        outputs = [picture, table, summary]
        inputs = [image, text, threshold, max_boxes]
        # One image at a time: the model uses the whole device.
        once = {"concurrency_id": "detector", "concurrency_limit": 1, "api_visibility": "private"}
        gr.on([button.click, text.submit], search, inputs, [answer, *outputs], **once)
        gr.on(
            [threshold.input, max_boxes.input], choose, [answer, threshold, max_boxes], outputs,
            api_visibility="private", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
    return page.queue(max_size=_MAX_QUEUE, api_open=False)


def _without_folder(error: UserError, image: str | None) -> str:
    """Return the message without the folder of the upload, which means nothing to a visitor."""
    return str(error).replace(image, pathlib.Path(image).name) if image else str(error)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio  # pyright: ignore[reportMissingImports]  # optional
    except ImportError:
        raise UserError(
            "the page needs Gradio, which is not installed. Run "
            "`pip install -r requirements-page.txt`."
        ) from None
    return gradio


def serve(page: "gradio.Blocks", host: str, port: int, *, wait: bool = True) -> str:
    """Serve the page; return its address.

    Args:
      page: the page.
      host: address to listen on.
      port: port to listen on.
      wait: whether to return only when the page is stopped.

    Raises:
      UserError: the port is not free.
    """
    gr = _gradio()
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]
    )
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            pwa=False,
            max_file_size="100mb",
            theme=theme,
        )
    except OSError as error:
        raise UserError(
            f"port {port} of {host} is not free ({error}). Choose another --port."
        ) from None
    print(f"Open {address} in a browser. Press Ctrl-C to stop.", flush=True)
    if wait:
        page.block_thread()
    return address


def run(args: argparse.Namespace) -> None:
    """Serve the page of a checkpoint until Ctrl-C."""
    _gradio()
    from detclipv2_jax.inference.checkpoint import load_model  # orbax

    loaded = load_model(args.checkpoint, args.step)
    detector = Detector(loaded, score_threshold=MIN_SCORE, max_detections=MAX_BOXES)
    detector(np.zeros((*detector.predictor.canvas, 3), np.uint8), ["cat"])  # compiles
    title = f"DetCLIPv2 · {pathlib.Path(args.checkpoint).name} · step {loaded.step}"
    with tempfile.TemporaryDirectory(prefix="detclipv2_page_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # deleted when the page stops
        serve(build_page(detector, title, example_inputs(loaded.run)), args.host, args.port)
