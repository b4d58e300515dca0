import dataclasses
import html
import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
import tiny_run
from PIL import Image

from detclipv2_jax import page as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import page
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.detector import Detector


@pytest.fixture(scope="module")
def detector():
    return Detector(tiny_model.loaded(), max_detections=page.MAX_BOXES, cache="")


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
    assert page.parse_names("cat, traffic light, dog ,, Cat,a  b") == [
        *("Cat", "traffic light", "dog", "a  b")
    ]
    assert page.parse_names("bow, knot\nhat\n\n hat") == ["bow, knot", "hat"]
    with pytest.raises(UserError, match="at most 5,000 names at once, and these are 5,001"):
        page.parse_names("\n".join(map(str, range(5001))))
    for text in ("", " ,\n "):
        with pytest.raises(UserError, match="Type at least one name"):
            page.parse_names(text)


def test_detect_finds_what_the_detector_finds(detector, photo):
    pixels, found = page.detect(detector, photo, "cat\ndog")
    assert pixels.shape == (40, 60, 3) and len(found) > 1
    (other,) = detector(photo, ["cat", "dog"], score_threshold=page.MIN_SCORE)
    assert np.array_equal(found.boxes, other.boxes) and found.names == other.names


def test_uploads_are_turned_and_opaque(detector, tmp_path):
    exif, path = Image.Exif(), tmp_path / "photo.png"
    exif[0x0112] = 5
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 4), np.uint8)
    pixels[:20, :, 3], pixels[20:, :, 3] = 0, 255
    Image.fromarray(pixels).save(path, exif=exif)
    shown, _ = page.detect(detector, str(path), "cat")
    wanted = np.where(pixels[..., 3:] == 0, 255, pixels[..., :3]).swapaxes(0, 1)
    np.testing.assert_array_equal(shown, wanted)


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


def test_whatever_a_text_contains_it_is_shown_as_it_is():
    assert page.plain("cat, 'a b' (1)") == "cat, 'a b' (1)"
    for text in (
        "<b>x</b>",
        "![x](http://y/z.png)",
        "`a`",
        "_a_ *b*",
        "# a",
        "a|b",
        "&lt;",
        "<img src=x>",
    ):
        shown = page.plain(text)
        assert html.unescape(shown) == text and not set("<>[]!`*_|\\#") & set(
            re.sub(r"&#\d+;", "", shown)
        )


def test_names_that_are_cut_are_shown(detector):
    assert page.cut_names(detector, "cat, dog") == ""
    long = "word " * 15
    assert "1 of 2 names does not fit" in page.cut_names(detector, f"cat\n{long}")
    with pytest.raises(UserError, match="is the same as name 1"):
        page.cut_names(detector, f"{long} left\n{long} right")


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", 1), ("localhost", 1), ("::1", 1), ("0.0.0.0", 0), ("10.1.2.3", 0), ("x", 0)],
)
def test_only_loopback_addresses_are_loopback(host, expected):
    assert page.is_loopback(host) == bool(expected)


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
    nothing = dataclasses.replace(some([]), best_score=0.0042, threshold=0.005)
    assert page.show(pixels, nothing, 0.3, 5)[2] == (
        "Nothing found: no box has a score above 0.005. The best is 0.0042."
    )


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
    assert page.example_inputs(config) == [[photo, "cat\ntraffic light"]] * 3
    content["categories"] = [{"id": 1, "name": "bow, knot"}, {"id": 2, "name": "hat"}]
    (tmp_path / "val.json").write_text(json.dumps(content))
    examples = page.example_inputs(config)
    assert examples == [[photo, "bow, knot\nhat"]] * 3
    assert page.parse_names(examples[0][1]) == ["bow, knot", "hat"]
    content["annotations"] = [box for box in boxes if box["category_id"] == 1]
    (tmp_path / "val.json").write_text(json.dumps(content))
    examples = page.example_inputs(config)
    assert page.parse_names(examples[0][1]) == ["bow, knot"]
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
def test_the_page_listens_only_on_the_loopback(served, detector):
    address, port = served
    assert address.startswith(f"http://127.0.0.1:{port}")
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((other_address(), port), timeout=5)
    with pytest.raises(UserError, match=f"port {port} of 127.0.0.1 is not free"):
        page.serve(page.build_page(detector, "second", []), "127.0.0.1", port, wait=False)


@pytest.mark.slow
def test_a_request_for_another_host_is_refused(served):
    """Another site's name may lead to this address (DNS rebinding)."""
    _, port = served

    def status(host):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.putrequest("GET", "/config", skip_host=True)
        for one in [host] if isinstance(host, str) else host:
            connection.putheader("Host", one)
        connection.endheaders()
        return connection.getresponse().status

    for good in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", f"[::1]:{port}"):
        assert status(good) == 200, good
    evil = "evil.example"
    for bad in (
        evil,
        f"{evil}:{port}",
        "127.0.0.1.evil.example",
        "localhost:1@evil",
        "",
        "10.0.0.1",
    ):
        assert status(bad) in (400, 403), bad
    assert status((f"localhost:{port}", evil)) in (400, 403)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_uploads_are_deleted_when_the_page_is_stopped(tmp_path, number):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "tmp").mkdir()
    environment = tiny_run.environment() | {"TMPDIR": str(tmp_path / "tmp")}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    source = SERVED.format(port=port)
    process = subprocess.Popen(
        [sys.executable, "-c", source], env=environment, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("Open http"):
            break
    content = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nA\r\n--x--'
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/gradio_api/upload", content, kind)
    assert connection.getresponse().status == 200
    assert [path.name for path in (tmp_path / "tmp").rglob("*.png")] == ["a.png"]
    process.send_signal(number)
    assert process.wait(60) == (0 if number == signal.SIGINT else 143)
    assert not list((tmp_path / "tmp").rglob("*.png"))


SERVED = """
import argparse, tiny_model
from detclipv2_jax import page
from detclipv2_jax.inference import checkpoint
checkpoint.load_model = lambda *_: tiny_model.loaded()
raise SystemExit(page.main(["--checkpoint=run", "--port={port}"]))
"""


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
        tab.get_by_text("with a score above 0.10").or_(
            tab.get_by_text("No box has a score above 0.10")
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
