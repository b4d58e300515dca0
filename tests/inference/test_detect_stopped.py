"""`detect` keeps what was answered, and the files of the user."""

import json
import signal

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import detect, evaluate, export
from detclipv2_jax.common.interruption import Stopped
from detclipv2_jax.inference import detect_command, drawing
from detclipv2_jax.inference.detector import Detector


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Command line of `detect` with five photos in `in/` and the output `out/`."""
    tiny = Detector(tiny_model.loaded(), score_threshold=0.05)
    monkeypatch.setattr(detect_command, "Detector", lambda *args, **options: tiny)
    (tmp_path / "in").mkdir()
    for n in range(5):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"in/{n}.png")
    return ["--checkpoint=none", "--names=cat", f"--output={tmp_path}/out", str(tmp_path / "in")]


@pytest.mark.parametrize(
    ("error", "status"),
    [(Stopped(signal.SIGINT), 130), (Stopped(signal.SIGTERM), 143), (BrokenPipeError(), 141)],
)
def test_what_was_answered_is_written(flags, tmp_path, monkeypatch, capsys, error, status):
    draw, drawn = drawing.draw_boxes, []

    def draw_three(*args, **options):
        if len(drawn) == 3:
            raise error
        drawn.append(1)
        return draw(*args, **options)

    monkeypatch.setattr(drawing, "draw_boxes", draw_three)
    assert detect.main(flags) == status
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert status == 141 or "3 of 5 files are answered" in said
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert (found["complete"], found["answered"], found["files"]) == (False, 3, 5)
    assert len(found["images"]) == 3
    coco = json.loads((tmp_path / "out/coco.json").read_text())
    assert coco["info"]["complete"] is False and len(coco["images"]) == 3
    assert not list((tmp_path / "out").glob(".*partial*"))
    monkeypatch.setattr(drawing, "draw_boxes", draw)
    assert detect.main(flags) == 0  # the same command, over its own incomplete results
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert found["complete"] is True and len(found["images"]) == 5


def test_photos_in_the_output_folder_are_not_replaced(flags, tmp_path, capsys):
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    assert detect.main([*flags[:2], f"--output={tmp_path}/in", str(tmp_path / "in")]) == 2
    assert "0.png: exists, " in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}


@pytest.mark.parametrize(
    ("command", "name", "line"),
    [
        (export, "README.md", ["--checkpoint=none"]),
        (export, "model.safetensors", ["--checkpoint=none"]),
        (evaluate, "results.json", ["--checkpoint=none", "--dataset=coco"]),
        (evaluate, "results.json", ["--predictions=none.json", "--dataset=coco"]),
    ],
)
def test_files_of_the_user_stay(tmp_path, capsys, command, name, line):
    (tmp_path / name).write_text("mine")
    assert command.main([*line, f"--output={tmp_path}"]) == 2
    assert f"{name}: exists, and this command did not write it" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
