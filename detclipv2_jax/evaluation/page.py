"""A web page to try a checkpoint (Gradio)."""

import abc
import argparse
import os
import pathlib
import re
import tempfile
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
    import gradio


# What the detector keeps, so that the sliders only choose among it and no image is asked twice.
LOWEST, MOST = 0.01, 300
_WAITING = 8  # requests; whoever comes then is told to try again
_EXAMPLES = 3
_ANNOTATIONS_UP_TO = 64e6  # bytes: larger ones take too long to read for a few examples
_COLUMNS = ["name", "score", "x_min", "y_min", "x_max", "y_max"]


def asked_names(text: str) -> list[str]:
    """The names in a text, between commas and line breaks, each once.

    Raises:
      UserError: there are none.
    """
    names = {normalize(name): name.strip() for name in re.split(r"[,\n]", text) if name.strip()}
    if not names:
        raise UserError("type at least one name to look for, such as: cat, traffic light")
    return list(names.values())


def find(
    detector: Detector, image: images.Source | None, text: str
) -> tuple[UInt8[np.ndarray, "h w 3"], ImageDetections]:
    """The image's pixels and everything found in it, however low its score.

    Raises:
      UserError: no image or no names were given, or the image cannot be read.
    """
    if image is None:
        raise UserError("drop an image first, or choose one of the examples")
    names = asked_names(text)
    pixels = images.read(image, upright=True)
    (found,) = detector(pixels, names, score_threshold=LOWEST, max_detections=MOST)
    return pixels, found


def show(
    pixels: UInt8[np.ndarray, "h w 3"], found: ImageDetections, threshold: float, most: int
) -> tuple[Image.Image, list[list[Any]], str]:
    """The picture with the `most` best boxes over `threshold`, a row for each, and a sentence."""
    over = int(np.sum(found.scores > threshold))
    best = found.best(min(over, int(most)))
    picture = drawing.draw_boxes(pixels, best.boxes, best.names, best.scores)
    rows = [
        [name, f"{score:.3f}", *(f"{x:.1f}" for x in box)]
        for name, score, box in zip(best.names, best.scores.tolist(), best.boxes.tolist())
    ]
    if over:
        said = f"{len(rows)} of {over} boxes over {threshold:.2f}"
    elif len(found):
        said = f"nothing over {threshold:.2f}; the best score is {found.scores[0]:.2f}"
    else:
        said = f"nothing found over {LOWEST}"
    return picture, rows, said


def examples(config: dict[str, Any]) -> list[list[str]]:
    """[image, names] of a few validation images of the run, with what is in each; none if gone."""
    root, section = pathlib.Path(config.get("data_dir", "")), config["eval"]
    path = root / section.get("dataset", "")
    try:
        if not path.is_file() or path.stat().st_size > _ANNOTATIONS_UP_TO:
            return []
        truth = datasets.load_ground_truth(path)
    except (UserError, OSError):
        return []
    found = []
    for image in truth.images[:200]:
        file = datasets.find_image(image, root / section["images"])
        if file and (names := _names_in(truth, image.id)):
            found.append([str(file.absolute()), ", ".join(names)])
        if len(found) == _EXAMPLES:
            break
    return found


def _names_in(truth: coco.GroundTruth, image_id: int) -> list[str]:
    names = {category.id: report.readable(category.name) for category in truth.categories}
    return sorted({names[int(key)] for key in truth.category_ids[truth.rows[image_id]]})


def build(detector: Detector, title: str, samples: list[list[str]]) -> "gradio.Blocks":
    """The page; what was found in an image stays with its visitor, for the sliders to show."""
    gr = _gradio()

    # An image that gives its file as it is: what is none is for `find` to say, in a sentence. Made
    # past Gradio's own metaclass, which would write a page.pyi beside this file.
    fields = {"is_template": True, "preprocess": lambda self, upload: upload and upload.path}
    Upload = abc.ABCMeta.__new__(type(gr.Image), "Upload", (gr.Image,), fields)

    def search(image, text, threshold, most):
        try:
            answer = find(detector, image, text)
        except UserError as error:
            return None, None, [], f"⚠ {_without_folder(error, image)}"
        return answer, *show(*answer, threshold, most)

    def move(answer, threshold, most):
        return show(*answer, threshold, most) if answer else (None, [], "")

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        answer = gr.State()
        gr.Markdown(f"## {title}\nDrop an image, type names of what to look for, see the boxes.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = Upload(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=280
                )
                text = gr.Textbox(
                    label="Names, between commas or one a line",
                    placeholder="cat, traffic light",
                    lines=3,
                    max_lines=12,
                )
                button = gr.Button("Find", variant="primary")
                threshold = gr.Slider(LOWEST, 0.99, value=0.3, step=0.01, label="Score over")
                most = gr.Slider(1, MOST, value=50, step=1, label="Boxes at most")
            with gr.Column(scale=3, min_width=400):
                picture = gr.Image(
                    label="Found",
                    type="pil",
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],  # and none that would share it
                )
                said = gr.Markdown()
                table = gr.Dataframe(
                    headers=_COLUMNS, label="Boxes, in pixels", interactive=False, max_height=300
                )
        if samples:
            gr.Examples(samples, [image, text], label="Examples")
        shown = [picture, table, said]
        once = {"concurrency_id": "detector", "concurrency_limit": 1, "api_visibility": "private"}
        asked = [image, text, threshold, most]
        gr.on([button.click, text.submit], search, asked, [answer, *shown], **once)
        gr.on(
            [threshold.input, most.input], move, [answer, threshold, most], shown,
            api_visibility="private", show_progress="hidden", trigger_mode="always_last",
        )  # fmt: skip
    return page.queue(max_size=_WAITING, api_open=False)


def _without_folder(error: UserError, image: str | None) -> str:
    """What went wrong, without where the upload lies on disk."""
    return str(error).replace(image, pathlib.Path(image).name) if image else str(error)


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gradio
    except ImportError:
        raise UserError(
            "the page needs Gradio, which is not installed: pip install -r requirements-page.txt"
        ) from None
    return gradio


def launch(page: "gradio.Blocks", host: str, port: int, *, wait: bool = True) -> str:
    """Serves the page, until it is stopped if `wait`; its address."""
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
            f"port {port} of {host} is not free ({error}); give another --port"
        ) from None
    print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
    if wait:
        page.block_thread()
    return address


def run(args: argparse.Namespace) -> None:
    """Serves the page of a checkpoint until Ctrl-C."""
    _gradio()
    from detclipv2_jax.inference.checkpoint import load_model  # orbax

    loaded = load_model(args.checkpoint, args.step)
    detector = Detector(loaded, score_threshold=LOWEST, max_detections=MOST)
    detector(np.zeros((*detector.predictor.canvas, 3), np.uint8), ["cat"])  # compiles
    title = f"DetCLIPv2 · {pathlib.Path(args.checkpoint).name} · step {loaded.step}"
    with tempfile.TemporaryDirectory(prefix="detclipv2_page_") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # gone with the page
        launch(build(detector, title, examples(loaded.run)), args.host, args.port)
