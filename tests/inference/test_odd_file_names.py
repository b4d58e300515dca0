"""Files whose names are not UTF-8 are detected in like others, and named in valid JSON."""

import json
import os

import numpy as np
import tiny_model
from PIL import Image

from detclipv2_jax import detect
from detclipv2_jax.inference import detect_command
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.video import Video
from detclipv2_jax.inference.video_writer import video_writer

LATIN1 = os.fsdecode(b"caf\xe9")


def test_detect_in_a_folder(tmp_path, monkeypatch, capsys):
    tiny = Detector(tiny_model.loaded(), score_threshold=0.05)
    monkeypatch.setattr(detect_command, "Detector", lambda *args, **options: tiny)
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "in" / f"{LATIN1}.png")
    flags = ["--checkpoint=none", "--names=cat", f"--output={tmp_path / 'out'}"]
    assert detect.main([*flags, str(tmp_path / "in")]) == 0
    assert r"caf\xe9.png: " in capsys.readouterr().out  # a strict stream in UTF-8
    found = json.loads((tmp_path / "out" / "detections.json").read_text(encoding="utf-8"))
    (image,) = found["images"]
    assert image["image"] == str(tmp_path / "in") + r"/caf\xe9.png"
    assert (tmp_path / "out" / image["picture"]).is_file()
    coco = json.loads((tmp_path / "out" / "coco.json").read_text(encoding="utf-8"))
    assert coco["images"][0]["file_name"].endswith(r"caf\xe9.png")


def test_a_video(tmp_path):
    with video_writer(tmp_path / "a.mp4", 10) as add:
        for shade in range(4):
            add(np.full((48, 64, 3), shade * 40, np.uint8))
    path = (tmp_path / "a.mp4").rename(tmp_path / f"{LATIN1}.mp4")
    assert len(list(Video(path))) == 4  # OpenCV crashes on such a path
