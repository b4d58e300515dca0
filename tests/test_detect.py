import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import detect
from detclipv2_jax.detect import Detector
from detclipv2_jax.errors import UserError


def picture(height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def detector():
    return Detector(tiny_model.loaded(), score_threshold=0.05)


def test_files_arrays_and_pil_get_the_same_answers(detector, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    sources = [tmp_path / "a.png", str(tmp_path / "a.png"), picture(), Image.fromarray(picture())]
    answers = detector(sources, ["cat", "dog"])
    assert len(answers) == 4 and len(answers[0]) > 0
    for answer in answers:
        np.testing.assert_array_equal(answer.boxes, answers[0].boxes)
        assert answer.size == (64, 64) and set(answer.names) <= {"cat", "dog"}
        assert [["cat", "dog"][label] for label in answer.labels] == list(answer.names)
        assert (np.diff(answer.scores) <= 0).all() and (answer.scores > 0.05).all()


def test_answers_come_in_the_order_of_the_images(detector):
    sizes = [(64, 96), (96, 64), (30, 90), (96, 60), (64, 96)]
    images = [picture(*size, seed=n) for n, size in enumerate(sizes)]
    assert [answer.size for answer in detector(images, ["cat"])] == sizes


def test_one_image_and_none(detector):
    assert len(detector(picture(), ["cat"])) == 1
    assert detector([], ["cat"]) == []


def test_another_list_of_names_of_equal_table_size_compiles_nothing(detector):
    from detclipv2_jax import predictor

    detector(picture(), ["cat"])
    before = predictor._predict._cache_size()
    detector(picture(), ["dog", "traffic light", "sofa"])
    assert predictor._predict._cache_size() == before


def test_order_of_the_names_only_renumbers(detector):
    (a,), (b,) = detector(picture(), ["cat", "dog"]), detector(picture(), ["dog", "cat"])
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    assert sorted(a.names) == sorted(b.names)


@pytest.mark.parametrize(
    "names, reason",
    [
        ([], "no names"),
        (["cat", ""], "name 2 of 2 is empty"),
        (["cat", "dog", " CAT "], "name 3, ' CAT ', is the same as name 1"),
        ("cat", "give a list"),
    ],
)
def test_names_that_cannot_be_asked(detector, names, reason):
    with pytest.raises(UserError, match=reason):
        detector([picture()], names)


def test_an_image_that_cannot_be_read_is_named(detector, tmp_path):
    with pytest.raises(UserError, match=r"missing\.jpg: no such file"):
        detector([picture(), tmp_path / "missing.jpg"], ["cat"])


@pytest.fixture
def checkpoint(monkeypatch):
    from detclipv2_jax import checkpoint

    def load(directory, step=None):
        if directory != "run":
            raise UserError(f"there is no checkpoint in {directory}")
        return tiny_model.loaded()

    monkeypatch.setattr(checkpoint, "load_model", load)


def test_command(checkpoint, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.fromarray(picture()).save(tmp_path / folder / "street.png")
    images = [str(tmp_path / folder / "street.png") for folder in ("a", "b")]
    output = tmp_path / "out"
    flags = ["--checkpoint=run", "--names=cat, traffic light,", f"--output={output}"]
    assert detect.main([*flags, "--score_threshold=0.05", *images]) == 0
    found = json.loads((output / "detections.json").read_text())
    assert found["names"] == ["cat", "traffic light"] and found["step"] == 7
    assert [row["picture"] for row in found["images"]] == ["street.png", "street-2.png"]
    assert [row["image"] for row in found["images"]] == images
    for row in found["images"]:
        assert (row["height"], row["width"]) == (64, 64) and row["detections"]
        for detection in row["detections"]:
            assert detection["name"] in found["names"] and 0.05 < detection["score"] < 1
            x0, y0, x1, y1 = detection["box"]
            assert 0 <= x0 <= x1 <= 64 and 0 <= y0 <= y1 <= 64
        assert Image.open(output / row["picture"]).size == (640, 640)
    assert "street-2.png" in capsys.readouterr().out


def test_command_goes_on_after_a_broken_image(checkpoint, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("no picture")
    images = [str(tmp_path / name) for name in ("bad.jpg", "good.png")]
    flags = ["--checkpoint=run", "--names=cat", f"--output={tmp_path}/out"]
    flags.append("--score_threshold=0.05")
    assert detect.main([*flags, *images]) == 2
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [row["image"] for row in found["images"]] == images[1:]
    assert found["failed"][0]["image"] == images[0]
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--checkpoint=elsewhere", "--names=cat"], "no checkpoint in elsewhere"),
        (["--checkpoint=run", "--names= , "], "holds no name"),
        (["--checkpoint=run", "--names=cat,Cat"], "same as name 1"),
        (["--checkpoint=run", "--names=cat", "--score_threshold=7"], "score_threshold"),
    ],
)
def test_command_says_what_is_wrong_in_a_sentence(checkpoint, tmp_path, capsys, flags, reason):
    assert detect.main([*flags, f"--output={tmp_path}", "image.jpg"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and reason in captured.err
    assert captured.err.count("\n") == 1


def test_answering_needs_no_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None; import detclipv2_jax.detect; "
        "import detclipv2_jax.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
