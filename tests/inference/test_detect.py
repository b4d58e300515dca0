import json
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import detect
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import detect_files
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.video import Video, writing


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
    from detclipv2_jax.inference import predictor

    detector(picture(), ["cat"])
    before = predictor._predict._cache_size()
    detector(picture(), ["dog", "traffic light", "sofa"])
    assert predictor._predict._cache_size() == before


def test_thresholds_and_top_k_of_one_call(detector):
    from detclipv2_jax.inference import predictor

    images, names = [picture(), picture(64, 40, seed=1)], ["cat", "dog"]
    everything = detector(images, names)
    before = predictor._predict._cache_size()
    middle = float(np.median(everything[0].scores))
    above = detector(images, names, score_threshold=middle)
    best = detector(images, names, max_detections=3)
    lower = detector(images, names, score_threshold=0.0)
    assert predictor._predict._cache_size() == before
    for whole, part, few, more in zip(everything, above, best, lower):
        count = int((whole.scores > middle).sum())
        np.testing.assert_array_equal(part.boxes, whole.boxes[:count])
        assert part.names == whole.names[:count]
        np.testing.assert_array_equal(few.scores, whole.scores[:3])
        assert len(few) == len(few.names) == len(few.labels) == len(few.boxes) == 3
        assert len(more) >= len(whole)
    more = detector(
        images, names, score_threshold=0.0, max_detections=101
    )  # than it does: compiles
    np.testing.assert_allclose(more[0].scores, lower[0].scores, rtol=1e-4)
    for options in ({"score_threshold": 2}, {"max_detections": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            detector(images, names, **options)


def test_answers_as_supervision_wants_them(detector, monkeypatch):
    (found,) = detector(picture(), ["cat", "dog"])
    assert found.xyxy.dtype == np.float32 and found.xyxy.shape == (len(found), 4)
    assert found.confidence.shape == found.class_id.shape == (len(found),)
    assert np.issubdtype(found.class_id.dtype, np.integer)
    assert found.data["class_name"].tolist() == list(found.names)
    (nothing,) = detector(picture(), ["cat"], score_threshold=0.99)
    assert nothing.xyxy.shape == (0, 4) and nothing.data["class_name"].shape == (0,)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()
    stand_in = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    fields = found.to_supervision()
    assert list(fields) == ["xyxy", "confidence", "class_id", "data"]


def test_supervision_takes_the_answers(detector):
    supervision = pytest.importorskip("supervision")
    for threshold in (0.05, 0.99):
        (found,) = detector(picture(), ["cat", "dog"], score_threshold=threshold)
        taken = found.to_supervision()
        assert isinstance(taken, supervision.Detections) and len(taken) == len(found)
        assert list(taken["class_name"]) == list(found.names)


def test_pictures_of_every_sort(detector, tmp_path):
    """One pixel, gray, transparent, 16 bits, CMYK, moving: the answer for what is seen."""
    from PIL import ImageSequence

    color = Image.fromarray(picture())
    gray = Image.fromarray(picture()[..., 0])
    deep = Image.fromarray(picture()[..., 0].astype(np.uint16) << 8)
    rgba = color.convert("RGBA")
    moving = [gray, gray.rotate(90), gray.rotate(180)]
    gray.save(tmp_path / "moves.gif", save_all=True, append_images=moving[1:])
    deep.save(tmp_path / "deep.png")
    rgba.save(tmp_path / "rgba.png")
    cmyk = color.convert("CMYK")
    cmyk.save(tmp_path / "cmyk.tif")
    with Image.open(tmp_path / "moves.gif") as image:
        first = np.asarray(next(iter(ImageSequence.Iterator(image))).convert("RGB"))
    for source, same in (
        (gray, np.asarray(gray.convert("RGB"))),
        (np.asarray(gray), np.asarray(gray.convert("RGB"))),
        (tmp_path / "deep.png", np.asarray(gray.convert("RGB"))),
        (tmp_path / "rgba.png", picture()),
        (np.asarray(rgba), picture()),
        (tmp_path / "cmyk.tif", np.asarray(cmyk.convert("RGB"))),
        (tmp_path / "moves.gif", first),
    ):
        found, wanted = detector([source, same], ["cat"])
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    (dot,) = detector(np.full((1, 1, 3), 200, np.uint8), ["cat"], score_threshold=0.0)
    assert dot.size == (1, 1) and len(dot) > 0
    assert (dot.boxes >= 0).all() and (dot.boxes <= 1).all()


def test_files_are_turned_as_they_say(detector, tmp_path):
    for orientation, turn in ((1, 0), (3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture(40, 64)).save(tmp_path / "a.png", exif=exif)
        found, wanted = detector([tmp_path / "a.png", np.rot90(picture(40, 64), turn)], ["cat"])
        assert found.size == wanted.size
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    with Image.open(tmp_path / "a.png") as image:  # what a program holds is taken as it is
        found, wanted = detector([image, picture(40, 64)], ["cat"])
    np.testing.assert_array_equal(found.boxes, wanted.boxes)


@pytest.mark.slow
def test_huge_pictures(detector, tmp_path):
    """20,000 × 20,000 pixels: an array is answered, a file is more than PIL opens for strangers."""
    found, wanted = detector(
        [np.zeros((20_000, 20_000, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)], ["cat"]
    )
    assert found.size == (20_000, 20_000) and len(found) == len(wanted)
    np.testing.assert_allclose(found.boxes, wanted.boxes * (20_000 / 64), rtol=1e-5)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge\.png: holds more than [\d,]+ pixels.*as an array"):
        detector([tmp_path / "huge.png"], ["cat"])


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (8, 8)), "mode 'F' does not say what is white"),
        (np.zeros((8, 8, 3), np.uint16), "uint8"),
    ],
)
def test_pictures_that_cannot_be_asked(detector, image, reason):
    with pytest.raises(UserError, match=reason):
        detector([image], ["cat"])


@pytest.mark.slow
def test_a_hundred_thousand_names(tmp_path):
    names = [f"thing {n}" for n in range(100_000)]
    detector = Detector(
        tiny_model.loaded(), score_threshold=0.0, max_detections=2000, cache=tmp_path
    )
    (found,) = detector(picture(), names)
    assert len(list(tmp_path.iterdir())) == 1
    labels = np.unique(found.labels)
    # Names that were answered are answered alike among fewer.
    few = [names[label] for label in labels[:3]]
    for name in few:
        (alone,) = detector(picture(), [name], max_detections=2000)
        rows = np.array(found.names) == name
        np.testing.assert_allclose(found.scores[rows], alone.scores[: rows.sum()], rtol=1e-4)
    assert labels[-1] > 50_000


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
        (["cat", 7], "name 2 of 2 is 7; give it as a text"),
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
    from detclipv2_jax.inference import checkpoint

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


def test_command_takes_folders(checkpoint, tmp_path, capsys):
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("b.png", "a.JPG", "deep/down/a.webp", ".hidden.png", "deep/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(64, 90)).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "deep" / "broken.png").write_bytes(b"")
    flags = ["--checkpoint=run", "--names=cat", f"--output={output}", "--score_threshold=0.05"]
    for _ in range(2):  # what it drew is not asked again
        assert detect.main([*flags, str(folder)]) == 2
        found = json.loads((output / "detections.json").read_text())
        drawn = ["a.png", "b.png", "deep/a.png", "deep/down/a.png"]
        assert [row["picture"] for row in found["images"]] == drawn
        assert [row["image"] for row in found["failed"]] == [str(folder / "deep" / "broken.png")]
        assert all((output / name).is_file() for name in drawn)
    (tmp_path / "empty").mkdir()
    assert detect.main([*flags, str(tmp_path / "empty")]) == 2
    assert "empty: holds no image" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_command_takes_videos(checkpoint, tmp_path, kind):
    frames = [picture(40, 60, seed=n) for n in range(5)]
    path = tmp_path / f"moves.{kind}"
    if kind == "mp4":
        with writing(path, 10) as add:
            for frame in frames:
                add(frame)
    else:
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, duration=100)
    flags = ["--checkpoint=run", "--names=cat, dog", f"--output={tmp_path}/out", "--batch_size=2"]
    assert detect.main([*flags, "--score_threshold=0.05", str(path)]) == 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    (video,) = found["videos"]
    assert not found["images"] and video["frames_per_second"] == 10
    assert [row["frame"] for row in video["frames"]] == list(range(5))
    assert [row["seconds"] for row in video["frames"]] == [0, 0.1, 0.2, 0.3, 0.4]
    detector = Detector(tiny_model.loaded(), score_threshold=0.05)
    for row, wanted in zip(video["frames"], detector(Video(path), ["cat", "dog"])):
        assert [detection["name"] for detection in row["detections"]] == list(wanted.names)
    drawn = list(Video(tmp_path / "out" / "moves.mp4"))
    assert len(drawn) == 5 and drawn[0].shape == (426, 640, 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "coco.json",
        "detections.json",
        "moves.mp4",
    ]


def test_command_says_which_video_it_cannot_read(checkpoint, tmp_path, capsys):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    for name in ("text.mp4", "empty.avi"):
        (tmp_path / name).write_text("no video" * (name == "text.mp4"))
    files = [str(tmp_path / name) for name in ("text.mp4", "empty.avi", "none.mov", "a.png")]
    assert detect.main(["--checkpoint=run", "--names=cat", f"--output={tmp_path}/o", *files]) == 2
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert [row["video"] for row in found["failed"]] == files[:3] and len(found["images"]) == 1
    assert "no frame can be decoded" in found["failed"][0]["error"]
    assert "no such file" in found["failed"][2]["error"]
    assert not list((tmp_path / "o").glob("*.mp4"))


def test_command_writes_coco_s_form(checkpoint, tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    Image.fromarray(picture()).save(tmp_path / "a.png")
    with writing(tmp_path / "b.mp4", 10) as add:
        add(picture(40, 60))
        add(picture(40, 60, seed=1))
    flags = ["--checkpoint=run", "--names=cat,dog", f"--output={tmp_path}/o"]
    flags += ["--score_threshold=0.05", str(tmp_path / "a.png"), str(tmp_path / "b.mp4")]
    assert detect.main(flags) == 0
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    coco = COCO(tmp_path / "o" / "coco.json")
    assert {c["name"] for c in coco.loadCats(coco.getCatIds())} == {"cat", "dog"}
    assert [image.get("frame") for image in coco.loadImgs(coco.getImgIds())] == [None, 0, 1]
    rows = [found["images"][0], *found["videos"][0]["frames"]]
    for image, row in zip(coco.loadImgs(coco.getImgIds()), rows):
        boxes = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(boxes) == len(row["detections"]) > 0
        for box, detection in zip(boxes, row["detections"]):
            x, y, width, height = box["bbox"]
            corners = [x, y, x + width, y + height]
            np.testing.assert_allclose(corners, detection["box"], atol=1e-6)
            assert coco.loadCats(box["category_id"])[0]["name"] == detection["name"]
            assert box["score"] == detection["score"]


def test_names_of_a_file_and_sentences(checkpoint, tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\n\n traffic light \ncafé, closed\n".encode())
    flags = ["--checkpoint=run", f"--output={tmp_path}/o", str(tmp_path / "a.png")]
    flags += [f"--names_file={tmp_path}/names.txt", "--prompts=a photo of a {}.", "--prompts={}"]
    assert detect.main(flags) == 0
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert found["names"] == ["cat", "traffic light", "café, closed"]
    assert found["prompts"][0] == "a photo of a cat. | cat"
    assert found["settings"]["prompts"] == ["a photo of a {}.", "{}"]


@pytest.mark.parametrize(
    "content, reason",
    [(None, "cannot be read"), (b"\n \n", "holds no name"), (b"caf\xe9", "no UTF-8 text")],
)
def test_files_of_names_that_hold_none(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"names\.txt: .*{reason}"):
        detect_files.asked_names(None, str(tmp_path / "names.txt"))


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
