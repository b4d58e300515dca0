import json
import pathlib
import shutil
import socket
import sys

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import page as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import page
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.detector import Detector


@pytest.fixture(scope="module")
def detector():
    return Detector(
        tiny_model.loaded(), score_threshold=page.MIN_SCORE, max_detections=page.MAX_BOXES, cache=""
    )


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def some(scores):
    count = len(scores)
    boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    names = tuple(f"name {n}" for n in range(count))
    return ImageDetections(boxes, np.array(scores, np.float32), np.arange(count), names, (40, 60))


def test_parse_names():
    text = "cat, traffic light\n dog ,,\n\nCat,a  b"
    assert page.parse_names(text) == ["Cat", "traffic light", "dog", "a  b"]
    for text in ("", " ,\n, "):
        with pytest.raises(UserError, match="Type at least one name"):
            page.parse_names(text)


def test_detect_finds_what_the_detector_finds(detector, photo):
    pixels, found = page.detect(detector, photo, "cat\ndog")
    assert pixels.shape == (40, 60, 3) and len(found) > 1
    (other,) = detector(photo, ["cat", "dog"], score_threshold=page.MIN_SCORE)
    assert np.array_equal(found.boxes, other.boxes) and found.names == other.names


def test_missing_image_missing_names_and_broken_image_are_errors(detector, photo, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    with pytest.raises(UserError, match="Drop an image first"):
        page.detect(detector, None, "cat")
    with pytest.raises(UserError, match="Type at least one name"):
        page.detect(detector, photo, " ")
    with pytest.raises(UserError, match="broken.jpg: cannot be read") as error:
        page.detect(detector, str(broken), "cat")
    assert page._without_folder(error.value, str(broken)).startswith("broken.jpg: cannot be read")


def test_show_selects_by_score_and_number():
    pixels, found = np.zeros((40, 60, 3), np.uint8), some([0.9, 0.5, 0.3, 0.02])
    picture, rows, summary = page.show(pixels, found, 0.4, 50)
    assert picture.size == (640, 427) and summary == "2 of 2 boxes with a score above 0.40"
    assert rows[0][:2] == ["name 0", "0.900"]
    assert rows[1] == ["name 1", "0.500", "4.0", "5.0", "6.0", "7.0"]
    _, rows, summary = page.show(pixels, found, 0.01, 2)
    assert len(rows) == 2 and summary == "2 of 4 boxes with a score above 0.01"
    _, rows, summary = page.show(pixels, found, 0.95, 50)
    assert rows == [] and summary == "No box has a score above 0.95. The best is 0.90."
    assert page.show(pixels, some([]), 0.3, 5)[2] == "Nothing found: no box has a score above 0.01."


def test_example_inputs_are_validation_images_with_their_names(tmp_path, photo):
    images = [{"id": n, "file_name": "photo.png", "height": 40, "width": 60} for n in range(9)]
    images[0]["file_name"] = "missing.png"
    boxes = [
        {"id": n, "image_id": n // 2, "category_id": 1 + n % 2, "bbox": [1, 2, 9, 9], "area": 81}
        for n in range(18)
    ]
    categories = [{"id": 1, "name": "traffic_light"}, {"id": 2, "name": "cat"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    (tmp_path / "val.json").write_text(json.dumps(content))
    config = {"data_dir": str(tmp_path), "eval": {"dataset": "val.json", "images": ""}}
    assert page.example_inputs(config) == [[photo, "cat, traffic light"]] * 3
    (tmp_path / "val.json").write_text("{")
    assert page.example_inputs(config) == []
    assert page.example_inputs({"eval": {"dataset": "", "images": ""}}) == []


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert door.main(["--checkpoint=nowhere"]) == 2
    assert "pip install -r requirements-page.txt" in capsys.readouterr().err


def other_address():
    """Return an address of this machine other than the loopback; skip the test if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no other network address")
        return probe.getsockname()[0]


@pytest.fixture
def served(detector, photo):
    pytest.importorskip("gradio")
    blocks = page.build_page(detector, "tiny", [[photo, "cat, dog"]])
    source = pathlib.Path(page.__file__)
    assert not source.with_suffix(".pyi").exists(), "Gradio wrote a .pyi file for the Upload class"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield page.serve(blocks, "127.0.0.1", port, wait=False), port
    blocks.close()


@pytest.mark.slow
def test_the_page_listens_only_on_the_loopback(served):
    address, port = served
    assert address.startswith(f"http://127.0.0.1:{port}")
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((other_address(), port), timeout=5)
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is not free"):
        page.serve(page.build_page(None, "second", []), "127.0.0.1", port, wait=False)


@pytest.mark.slow
def test_a_browser_finds_boxes_and_contacts_no_other_server(served, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("no browser")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff not a picture")
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.set_default_timeout(180_000)
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(served[0])
        find = tab.get_by_role("button", name="Find")
        find.click()
        tab.get_by_text("Drop an image first").wait_for()

        tab.get_by_text("cat, dog").first.click()  # the example
        tab.get_by_label("Names").and_(tab.locator("textarea")).wait_for()
        tab.locator("img[src*='photo']").first.wait_for()
        find.click()
        tab.get_by_text("with a score above 0.30").or_(
            tab.get_by_text("No box has a score above 0.30")
        ).wait_for()
        tab.get_by_label("number input for Score threshold").fill("0.01")
        tab.get_by_label("number input for Score threshold").press("Enter")
        tab.get_by_text("boxes with a score above 0.01").wait_for()
        assert tab.locator("table").last.locator("tr").count() > 1

        tab.get_by_label("Remove Image").or_(tab.get_by_label("Clear")).first.click()
        with tab.expect_response(lambda answer: "/upload" in answer.url):
            tab.locator("input[type=file]").first.set_input_files(str(broken))
        tab.locator("img[src*='broken']").first.wait_for(state="attached")
        find.click()
        tab.get_by_text("broken.jpg: cannot be read").wait_for()
        elsewhere = [
            url for url in asked if not url.startswith((served[0].rstrip("/"), "data:", "blob:"))
        ]
        assert elsewhere == []
        browser.close()
