"""Captions: the best region of each phrase, from the predictor and as a command."""

import json
import sys

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import detect
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.models.detclip import build
from detclipv2_jax.text import phrases as phrases_lib

CAPTION = "A man in a red shirt rides the horse."
PHRASES = ["man", "red shirt", "horse"]


def random_image(height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def run(monkeypatch):
    """A checkpoint named "run", and a spaCy that finds `PHRASES` in `CAPTION` alone."""
    find = lambda captions: (PHRASES if caption == CAPTION else [] for caption in captions)
    monkeypatch.setattr(phrases_lib, "noun_phrases", find)
    monkeypatch.setattr(checkpoint, "load_model", lambda directory, step=None: tiny_model.loaded())
    return "--checkpoint=run"


def test_best_regions_are_the_best_detections_of_each_phrase():
    """Images of other sizes with other phrases, one without; also the unreadable image."""
    detector = Detector(tiny_model.loaded(), batch_size=2)
    predictor = detector.predictor
    images = [random_image(40, 90), "missing.png", random_image(64, 64, 1), random_image(90, 33, 2)]
    asked = [PHRASES, ["cat"], [], [f"thing {n}" for n in range(9)]]
    found = dict(predictor.stream_phrases(images, predictor.encode_each(asked)))
    assert sorted(found) == [0, 1, 2, 3] and isinstance(found[1], UserError)
    assert found[2].phrases == () and found[2].boxes.shape == (0, 4)
    best = DecodeConfig(pre_nms_top_k=1, max_detections=64, score="alignment")
    graphdef, params = tiny_model.parts()
    model = build(graphdef, params)
    for n in (0, 3):
        ((_, wanted),) = predictor.stream([images[n]], predictor.encode(asked[n]), best)
        order = np.argsort(wanted.labels)
        assert found[n].phrases == tuple(asked[n]) and found[n].size == images[n].shape[:2]
        np.testing.assert_array_equal(wanted.labels[order], np.arange(len(asked[n])))
        np.testing.assert_allclose(found[n].boxes, wanted.boxes[order], rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found[n].scores, wanted.scores[order], rtol=1e-5)
        logits = float(model.scale()) * found[n].similarities + float(model.logit_bias[...])
        np.testing.assert_allclose(found[n].scores, 1 / (1 + np.exp(-logits)), rtol=1e-4)
        assert (np.abs(found[n].similarities) <= 1 + 1e-5).all()  # cosines


def test_no_phrase_at_all_is_refused():
    with pytest.raises(UserError, match="no names"):
        Detector(tiny_model.loaded()).predictor.encode_each([[], []])


def test_command_with_a_caption(run, tmp_path, capsys):
    Image.fromarray(random_image(40, 60)).save(tmp_path / "ride.png")
    (tmp_path / "bad.jpg").write_text("not an image")
    files = [str(tmp_path / name) for name in ("ride.png", "bad.jpg")]
    assert detect.main([run, f"--caption={CAPTION}", f"--output={tmp_path}/out", *files]) == 2
    assert capsys.readouterr().err.count("error: ") == 1
    content = json.loads((tmp_path / "out/phrases.json").read_text())
    assert content["step"] == 7 and content["failed"][0]["image"] == files[1]
    (entry,) = content["images"]
    assert (entry["height"], entry["width"]) == (40, 60) and entry["caption"] == CAPTION
    assert [row["phrase"] for row in entry["phrases"]] == PHRASES
    for row in entry["phrases"]:
        x0, y0, x1, y1 = row["box"]
        assert 0 <= x0 < x1 <= 60 and 0 <= y0 < y1 <= 40
        assert 0 < row["score"] < 1 and -1 <= row["similarity"] <= 1
    with Image.open(tmp_path / "out" / entry["picture"]) as picture:
        assert picture.width == 640 and picture.height > 427 + 20
    assert not (tmp_path / "out/coco.json").exists()


def test_given_phrases_need_no_spacy(run, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "load_model", lambda directory, step=None: tiny_model.loaded())
    monkeypatch.setitem(sys.modules, "spacy", None)
    phrases_lib.load.cache_clear()
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    flags = [run, f"--caption={CAPTION}", f"--output={tmp_path}/out", str(tmp_path / "a.png")]
    assert detect.main(flags) == 2
    error = capsys.readouterr().err
    assert "pip install spacy" in error and "--phrases=" in error
    assert detect.main([*flags, "--phrases=The horse; a red  shirt;;horse"]) == 0
    (entry,) = json.loads((tmp_path / "out/phrases.json").read_text())["images"]
    assert [row["phrase"] for row in entry["phrases"]] == ["horse", "red shirt"]


@pytest.mark.parametrize("layout", ["jsonl", "tsv", "coco"])
def test_command_with_a_file_of_captions(run, tmp_path, layout, capsys):
    (tmp_path / "photos").mkdir()
    for n in range(2):
        Image.fromarray(random_image(seed=n)).save(tmp_path / f"photos/{n}.png")
    pairs = [("0.png", CAPTION), ("none.png", CAPTION), ("1.png", "running"), ("1.png", CAPTION)]
    if layout == "jsonl":
        lines = [json.dumps({"image": name, "caption": text}) for name, text in pairs]
    elif layout == "tsv":
        lines = [f"{text}\t{name}" for name, text in pairs]
    else:
        images = [{"id": n, "file_name": name} for n, (name, _) in enumerate(pairs)]
        texts = [{"id": n, "image_id": n, "caption": text} for n, (_, text) in enumerate(pairs)]
        lines = [json.dumps({"images": images, "annotations": texts})]
    path = tmp_path / f"captions.{'json' if layout == 'coco' else layout}"
    path.write_text("\n".join(lines))
    flags = [run, f"--captions_file={path}", f"--output={tmp_path}/out", str(tmp_path / "photos")]
    assert detect.main(flags) == 0
    assert "images: missing: 1 left out" in capsys.readouterr().err
    entries = json.loads((tmp_path / "out/phrases.json").read_text())["images"]
    assert [entry["picture"] for entry in entries] == ["0.png", "1.png", "1-2.png"]
    assert [len(entry["phrases"]) for entry in entries] == [3, 0, 3]
    assert all((tmp_path / "out" / entry["picture"]).is_file() for entry in entries)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--caption=running"], "no noun phrase is found in 'running'"),
        ([f"--caption={CAPTION}", "--phrases=; ;"], "names nothing"),
        ([f"--caption={CAPTION}", "--definitions=on"], "--definitions does not go with a caption"),
        ([f"--caption={CAPTION}", "--prompts={}"], "--prompts does not go with a caption"),
        ([f"--caption={CAPTION}", "--score_threshold=0.5"], "--score_threshold does not go"),
        (["--names=cat", "--phrases=cat"], "Give --caption too"),
        (["--captions_file=none.jsonl", "--phrases=cat"], "those of one caption"),
        (["--captions_file=none.jsonl"], "none.jsonl: no such"),
        (["--captions_file={folder}"], "is a folder"),
        (["--captions_file={folder}/empty.jsonl"], "no caption of an image that exists"),
    ],
)
def test_command_refuses(run, tmp_path, capsys, flags, reason):
    (tmp_path / "empty.jsonl").write_text("\n")
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    assert detect.main([run, *flags, f"--output={tmp_path}/out", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


def test_a_video_has_no_caption(run, tmp_path, capsys):
    flags = [run, f"--caption={CAPTION}", f"--output={tmp_path}", "drive.mp4"]
    assert detect.main(flags) == 2
    assert "drive.mp4: is a video" in capsys.readouterr().err
