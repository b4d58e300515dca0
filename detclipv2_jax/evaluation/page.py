"""The web page of `detclip page`, made with Gradio: try a checkpoint in a browser."""

import abc
import argparse
import ipaddress
import os
import pathlib
import re
import signal
import tempfile
import threading
import warnings
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
from detclipv2_jax.inference.names import cut_off_text, names_from_text, text_from_names
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    import gradio  # pyright: ignore[reportMissingImports]  # optional


# The detector returns this much; the sliders choose from it, so the model runs once per image.
MIN_SCORE, MAX_BOXES = 0.01, 300
_MAX_NAMES = 5000
_UPLOAD_SECONDS = 3600  # how long an upload and its boxes are kept
_MAX_QUEUE = 8  # requests that may wait; more are asked to try again
_EXAMPLES = 3
_MAX_ANNOTATION_BYTES = 64e6  # reading a larger file for a few examples takes too long
_COLUMNS = ["name", "score", "x_min", "y_min", "x_max", "y_max"]


def parse_names(text: str) -> list[str]:
    """Return the names in a text, each once: `names_from_text` says how they are separated.

    Raises:
      UserError: there are none, or too many.
    """
    found = {normalize(name): name for name in names_from_text(text)}
    if not found:
        raise UserError("Type at least one name to look for, for example: cat, traffic light")
    if len(found) > _MAX_NAMES:
        raise UserError(
            f"The page looks for at most {_MAX_NAMES:,} names at once, and these are "
            f"{len(found):,}. `detclip detect --names_file` takes any number."
        )
    return list(found.values())


def detect(
    detector: Detector, image: images.ImageSource | None, text: str
) -> tuple[UInt8[np.ndarray, "h w 3"], ImageDetections]:
    """Return the pixels of an image and what is found in it, down to a score of `lowest`.

    Args:
      detector: the model.
      image: the uploaded image; None if there is none.
      text: the names.

    Raises:
      UserError: there is no image or no name, the image cannot be read, or the model reads two
        names as the same tokens.
    """
    if image is None:
        raise UserError("Drop an image first, or choose an example.")
    names = parse_names(text)
    pixels = images.read(image)
    with warnings.catch_warnings(action="ignore"):  # `cut_names` shows it on the page
        (found,) = detector(
            pixels, names, score_threshold=lowest(detector), max_detections=MAX_BOXES
        )
    return pixels, found


def lowest(detector: Detector) -> float:
    """Return the least score that the sliders can choose."""
    return min(MIN_SCORE, detector.threshold.score_threshold)


def cut_names(detector: Detector, text: str) -> str:
    """Return a sentence about the names that do not fit into the model's tokens; "": all fit."""
    return cut_off_text(detector.encode(parse_names(text))) or ""


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
        summary = f"{len(rows)} of {above} boxes with a score above {_shown(threshold)}"
    elif len(found):
        best_score = _shown(float(found.scores[0]))
        summary = f"No box has a score above {_shown(threshold)}. The best is {best_score}."
    else:
        best_score = f" The best is {found.best_score:.2g}." if found.best_score else ""
        floor = _shown(MIN_SCORE if found.threshold is None else found.threshold)
        summary = f"Nothing found: no box has a score above {floor}.{best_score}"
    return picture, rows, summary


def _shown(score: float) -> str:
    """Return a score with two digits, or with three where it has them."""
    return f"{score:.2f}" if round(score, 2) == round(score, 3) else f"{score:.3f}"


def plain(text: str) -> str:
    """Return a text as Markdown that shows it as it is, whatever it contains."""
    return re.sub(r"[^\w\s,.:;%/'\"()-]|_", lambda match: f"&#{ord(match[0])};", text)


def example_inputs(config: Mapping[str, Any]) -> list[list[str]]:
    """Return [image, names] of a few validation images of a run: what is in them, one per line.

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
        folder = datasets.image_folder(truth, root / section["images"])
    except (UserError, OSError):
        return []
    examples = []
    for image in truth.images[:200]:
        file = datasets.find_image(image, folder)
        names = _names_in(truth, image.id)
        if file and names and names_from_text(text := text_from_names(names)) == names:
            examples.append([str(file.absolute()), text])
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
            cut = cut_names(detector, text)
        except UserError as error:
            return None, None, [], f"⚠ {plain(_without_folder(error, image))}"
        picture, rows, summary = show(pixels, found, threshold, max_boxes)
        return (pixels, found), picture, rows, summary + (f"\n\n⚠ {plain(cut)}" if cut else "")

    def choose(answer, threshold, max_boxes):
        if not answer:
            return None, [], ""
        pixels, found = answer
        return show(pixels, found, threshold, max_boxes)

    # Long, because Gradio declares a page as nested blocks.
    keep = (_UPLOAD_SECONDS, _UPLOAD_SECONDS)
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=keep) as page:
        answer = gr.State(time_to_live=_UPLOAD_SECONDS)
        gr.Markdown(f"## {plain(title)}\nDrop an image and type the names of what to look for.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = Upload(
                    label="Image", type="filepath", sources=["upload", "clipboard"], height=280
                )
                text = gr.Textbox(
                    label="Names, one per line, or a single line with commas",
                    placeholder="cat, traffic light",
                    lines=3,
                    max_lines=12,
                )
                button = gr.Button("Find", variant="primary")
                threshold = gr.Slider(
                    round(lowest(detector), 3),
                    0.99,
                    value=round(detector.threshold.score_threshold, 3),
                    step=0.001,
                    label="Score threshold",
                    info=detector.threshold.source,
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
            app_kwargs={"middleware": _middleware(host)},
        )
    except OSError as error:
        raise UserError(
            f"port {port} of {host} is not free ({error}). Choose another --port."
        ) from None
    print(f"Open {address} in a browser. Press Ctrl-C to stop.", flush=True)
    if wait:
        try:
            _wait_for_signal()
        finally:
            page.close()
    return address


def _wait_for_signal() -> None:
    """Return on Ctrl-C, which is how a page is ended; SIGTERM is raised as `Stopped`."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt as stop:
        if getattr(stop, "signal", signal.SIGINT) != signal.SIGINT:
            raise
        print("stopped", flush=True)


def _middleware(host: str) -> list[Any]:
    """Return what the server does before it answers: on loopback, check the `Host` header.

    Another site can give its own name this machine's address (DNS rebinding). Its scripts could
    then use the page; their requests carry that name.
    """
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]  # Gradio's

    return [Middleware(OnlyLoopback)] if is_loopback(host) else []


class OnlyLoopback:
    """ASGI middleware that refuses requests for any other host than this machine's loopback."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan" or _asks_for_loopback(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        text = b"This page is only for this machine: open it as http://127.0.0.1 or localhost."
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 403, "headers": headers})
        await send({"type": "http.response.body", "body": text})


def _asks_for_loopback(scope: Any) -> bool:
    hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
    if len(hosts) != 1:
        return False
    match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?", hosts[0])
    return bool(match) and is_loopback(match[1].strip("[]"))


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is that of this machine's loopback."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(args: argparse.Namespace) -> None:
    """Serve the page of a checkpoint until Ctrl-C or SIGTERM, then delete what was uploaded."""
    _gradio()
    from detclipv2_jax.inference.checkpoint import load_model  # orbax

    loaded = load_model(args.checkpoint, args.step)
    detector = Detector(loaded, max_detections=MAX_BOXES)
    detector(np.zeros((*detector.predictor.canvas, 3), np.uint8), ["cat"])  # compiles
    title = f"DetCLIPv2 · {pathlib.Path(args.checkpoint).name} · step {loaded.step}"
    with tempfile.TemporaryDirectory(
        prefix="detclipv2_page_", ignore_cleanup_errors=True
    ) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # deleted when the page stops
        serve(build_page(detector, title, example_inputs(loaded.run)), args.host, args.port)
