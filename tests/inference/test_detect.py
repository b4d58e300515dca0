import dataclasses
import io
import json
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax import detect
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import names as names_lib
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.video import Video


def random_image(height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_mp4(path, frames, rate=10):
    """Write an MP4 as other programs do."""
    size = frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


@pytest.fixture(scope="module")
def detector():
    return Detector(tiny_model.loaded(), score_threshold=0.05)


def test_paths_arrays_and_pil_images_give_equal_results(detector, tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        random_image(),
        Image.fromarray(random_image()),
    ]
    results = detector(sources, ["cat", "dog"])
    assert len(results) == 4 and len(results[0]) > 0
    for result in results:
        np.testing.assert_array_equal(result.boxes, results[0].boxes)
        assert result.size == (64, 64) and set(result.names) <= {"cat", "dog"}
        assert [["cat", "dog"][label] for label in result.labels] == list(result.names)
        assert (np.diff(result.scores) <= 0).all() and (result.scores > 0.05).all()


def test_files_in_any_form_are_turned_as_exif_says(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8  # to be shown turned to the left
    Image.fromarray(random_image(64, 96)).save(tmp_path / "a.png", exif=exif)
    (wanted,) = detector(np.ascontiguousarray(np.rot90(random_image(64, 96))), ["cat"])
    data = (tmp_path / "a.png").read_bytes()
    with open(tmp_path / "a.png", "rb") as file:
        for source in (tmp_path / "a.png", data, io.BytesIO(data), file):
            (found,) = detector(source, ["cat"])
            np.testing.assert_array_equal(found.boxes, wanted.boxes)
            assert found.size == wanted.size == (96, 64)


def test_pictures_that_cannot_be_decoded_do_not_stop_the_others(detector, tmp_path):
    """Decoders raise whatever they like: here AVIF's a RuntimeError."""
    files = [tmp_path / name for name in ("a.png", "b.avif", "c.png", "d.jpg", "e.png")]
    for file in files:
        Image.fromarray(random_image(32, 48)).save(file)
    head, tail = files[1].read_bytes().split(b"mdat")
    files[1].write_bytes(head + b"mdat" + b"\xff" * 20 + tail[20:])
    files[3].write_bytes(files[3].read_bytes()[:-50])
    damaged = bytearray(files[4].read_bytes())
    damaged[200] ^= 1
    files[4].write_bytes(damaged)
    found = dict(detector.predictor.stream(files, detector.encode(["cat"])))
    for number, file in enumerate(files):
        if number in (0, 2):
            assert found[number].size == (32, 48)
        else:
            assert str(found[number]).startswith(f"{file}: cannot be read as an image (")


def test_results_are_in_the_order_of_the_images(detector):
    sizes = [(64, 96), (96, 64), (30, 90), (96, 60), (64, 96)]
    images = [random_image(*size, seed=n) for n, size in enumerate(sizes)]
    assert [result.size for result in detector(images, ["cat"])] == sizes


def test_a_single_image_and_no_images(detector):
    assert len(detector(random_image(), ["cat"])) == 1
    assert detector([], ["cat"]) == []


def test_names_padded_to_the_same_number_need_no_compilation(detector):
    from detclipv2_jax.inference import predictor

    detector(random_image(), ["cat"])
    before = predictor._compiled_predict._cache_size()
    detector(random_image(), ["dog", "traffic light", "sofa"])
    assert predictor._compiled_predict._cache_size() == before


def test_threshold_and_limit_of_one_call(detector):
    from detclipv2_jax.inference import predictor

    images, names = [random_image(), random_image(64, 40, seed=1)], ["cat", "dog"]
    everything = detector(images, names)
    before = predictor._compiled_predict._cache_size()
    middle = float(np.median(everything[0].scores))
    above = detector(images, names, score_threshold=middle)
    best = detector(images, names, max_detections=3)
    lower = detector(images, names, score_threshold=0.0)
    assert predictor._compiled_predict._cache_size() == before
    for whole, part, few, more in zip(everything, above, best, lower):
        count = int((whole.scores > middle).sum())
        np.testing.assert_array_equal(part.boxes, whole.boxes[:count])
        assert part.names == whole.names[:count]
        np.testing.assert_array_equal(few.scores, whole.scores[:3])
        assert len(few) == len(few.names) == len(few.labels) == len(few.boxes) == 3
        assert len(more) >= len(whole)
    # More than the detector's limit: compiles.
    more = detector(images, names, score_threshold=0.0, max_detections=301)
    np.testing.assert_allclose(more[0].scores, lower[0].scores, rtol=1e-4)
    for options in ({"score_threshold": 2}, {"max_detections": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            detector(images, names, **options)


def test_the_best_score_is_told_where_nothing_is_found(detector):
    """It is the one that a threshold of 0 would return first."""
    names = ["cat", "dog", "traffic light"]
    (everything,) = detector(random_image(), names, score_threshold=0.0)
    top, name = float(everything.scores[0]), everything.names[0]
    for threshold in (0.0, top - 1e-3, top + 1e-3, 0.9):
        (found,) = detector(random_image(), names, score_threshold=threshold)
        assert found.best_score == pytest.approx(top, rel=1e-5) and found.best_name == name
        assert found.threshold == threshold and bool(len(found)) == (threshold < top)
    expected = f"nothing found: best score {top:.2f} ({name}), not above score_threshold 0.9"
    assert str(found) == expected
    assert str(everything).split(", ")[0].split(" ", 1)[1] in names
    close = dataclasses.replace(found, best_score=0.29996, best_name="cat", threshold=0.3)
    assert "best score 0.299960 (cat), not above score_threshold 0.3" in str(close)
    odd = dataclasses.replace(close, best_name="a\nb\x1b[2J")
    assert r"(a\nb\x1b[2J), not" in str(odd)
    none = dataclasses.replace(found, best_score=0.0, best_name=None)
    assert str(none) == "nothing found: no region has a score above 0"


def test_properties_for_supervision(detector, monkeypatch):
    (found,) = detector(random_image(), ["cat", "dog"])
    assert found.xyxy.dtype == np.float32 and found.xyxy.shape == (len(found), 4)
    assert found.confidence.shape == found.class_id.shape == (len(found),)
    assert np.issubdtype(found.class_id.dtype, np.integer)
    assert found.data["class_name"].tolist() == list(found.names)
    (nothing,) = detector(random_image(), ["cat"], score_threshold=0.99)
    assert nothing.xyxy.shape == (0, 4) and nothing.data["class_name"].shape == (0,)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match="pip install supervision"):
        found.to_supervision()
    stand_in = types.SimpleNamespace(Detections=lambda **fields: fields)
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    fields = found.to_supervision()
    assert list(fields) == ["xyxy", "confidence", "class_id", "data"]


def test_supervision_accepts_the_results(detector):
    supervision = pytest.importorskip("supervision")
    for threshold in (0.05, 0.99):
        (found,) = detector(random_image(), ["cat", "dog"], score_threshold=threshold)
        taken = found.to_supervision()
        assert isinstance(taken, supervision.Detections) and len(taken) == len(found)
        assert list(taken["class_name"]) == list(found.names)


def test_image_modes(detector, tmp_path):
    """Each mode gives the results of the RGB image that a viewer shows."""
    from PIL import ImageSequence

    color = Image.fromarray(random_image())
    gray = Image.fromarray(random_image()[..., 0])
    deep = Image.fromarray(random_image()[..., 0].astype(np.uint16) << 8)
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
        (tmp_path / "rgba.png", random_image()),
        (np.asarray(rgba), random_image()),
        (tmp_path / "cmyk.tif", np.asarray(cmyk.convert("RGB"))),
        (tmp_path / "moves.gif", first),
    ):
        found, wanted = detector([source, same], ["cat"])
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    (dot,) = detector(np.full((1, 1, 3), 200, np.uint8), ["cat"], score_threshold=0.0)
    assert dot.size == (1, 1) and len(dot) > 0
    assert (dot.boxes >= 0).all() and (dot.boxes <= 1).all()


def test_exif_orientation_is_applied_to_files(detector, tmp_path):
    for orientation, turn in ((1, 0), (3, 2), (6, 3), (8, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(random_image(40, 64)).save(tmp_path / "a.png", exif=exif)
        found, wanted = detector(
            [tmp_path / "a.png", np.rot90(random_image(40, 64), turn)], ["cat"]
        )
        assert found.size == wanted.size
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    with Image.open(tmp_path / "a.png") as image:  # PIL images are not rotated
        found, wanted = detector([image, random_image(40, 64)], ["cat"])
    np.testing.assert_array_equal(found.boxes, wanted.boxes)


@pytest.mark.slow
def test_huge_images(detector, tmp_path):
    """An array of 20,000 × 20,000 pixels is accepted; PIL refuses a file of that size."""
    found, wanted = detector(
        [np.zeros((20_000, 20_000, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)], ["cat"]
    )
    assert found.size == (20_000, 20_000) and len(found) == len(wanted)
    np.testing.assert_allclose(found.boxes, wanted.boxes * (20_000 / 64), rtol=1e-5)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge\.png: has more than [\d,]+ pixels.*as an array"):
        detector([tmp_path / "huge.png"], ["cat"])


@pytest.mark.parametrize(
    "image, reason",
    [
        (Image.new("RGB", (0, 5)), "no pixels"),
        (Image.new("F", (8, 8)), "brightest value is 0 "),
        (np.zeros((8, 8, 3), np.uint16), "uint8"),
    ],
)
def test_invalid_images_are_refused(detector, image, reason):
    with pytest.raises(UserError, match=reason):
        detector([image], ["cat"])


@pytest.mark.slow
def test_a_hundred_thousand_names(tmp_path):
    names = [f"thing {n}" for n in range(100_000)]
    detector = Detector(
        tiny_model.loaded(), score_threshold=0.0, max_detections=2000, cache=tmp_path
    )
    (found,) = detector(random_image(), names)
    assert len(list(tmp_path.iterdir())) == 1
    labels = np.unique(found.labels)
    # Names that were found get the same scores in a list of one name.
    few = [names[label] for label in labels[:3]]
    for name in few:
        (alone,) = detector(random_image(), [name], max_detections=2000)
        same = np.array(found.names) == name
        np.testing.assert_allclose(found.scores[same], alone.scores[: same.sum()], rtol=1e-4)
    assert labels[-1] > 50_000


def test_order_of_names_only_changes_labels(detector):
    (a,), (b,) = detector(random_image(), ["cat", "dog"]), detector(random_image(), ["dog", "cat"])
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    assert sorted(a.names) == sorted(b.names)


@pytest.mark.parametrize(
    "names, reason",
    [
        ([], "no names"),
        (["cat", ""], "name 2 of 2 is empty"),
        (["cat", "dog", " CAT "], "name 3, ' CAT ', is the same as name 1"),
        ("cat", "Give a list"),
        (["cat", 7], "name 2 of 2 is 7, expected a string"),
    ],
)
def test_invalid_names_are_refused(detector, names, reason):
    with pytest.raises(UserError, match=reason):
        detector([random_image()], names)


def test_error_names_the_unreadable_image(detector, tmp_path):
    with pytest.raises(UserError, match=r"missing\.jpg: no such file"):
        detector([random_image(), tmp_path / "missing.jpg"], ["cat"])


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
        Image.fromarray(random_image()).save(tmp_path / folder / "street.png")
    images = [str(tmp_path / folder / "street.png") for folder in ("a", "b")]
    output = tmp_path / "out"
    flags = ["--checkpoint=run", "--names=cat, traffic light,", f"--output={output}"]
    assert detect.main([*flags, "--score_threshold=0.05", *images]) == 0
    found = json.loads((output / "detections.json").read_text())
    assert found["names"] == ["cat", "traffic light"] and found["step"] == 7
    assert [entry["picture"] for entry in found["images"]] == ["street.png", "street-2.png"]
    assert [entry["image"] for entry in found["images"]] == images
    for entry in found["images"]:
        assert (entry["height"], entry["width"]) == (64, 64) and entry["detections"]
        for detection in entry["detections"]:
            assert detection["name"] in found["names"] and 0.05 < detection["score"] < 1
            x0, y0, x1, y1 = detection["box"]
            assert 0 <= x0 <= x1 <= 64 and 0 <= y0 <= y1 <= 64
        assert Image.open(output / entry["picture"]).size == (640, 640)
    assert "street-2.png" in capsys.readouterr().out
    assert detect.main([*flags, "--score_threshold=0.95", *images]) == 0
    printed = capsys.readouterr().out
    for entry in json.loads((output / "detections.json").read_text())["images"]:
        assert not entry["detections"] and 0 < entry["best_score"] < 0.95
        assert entry["best_name"] in found["names"]
        what = f"best score {entry['best_score']:.2f} ({entry['best_name']}), not above"
        assert f"{entry['image']}: nothing found: {what} score_threshold 0.95" in printed


def test_command_with_folders(checkpoint, tmp_path, capsys):
    folder, output = tmp_path / "in", tmp_path / "in" / "out"
    for name in ("b.png", "a.JPG", "deep/down/a.webp", ".hidden.png", "deep/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_image(64, 90)).convert("RGB").save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    (folder / "deep" / "broken.png").write_bytes(b"")
    flags = ["--checkpoint=run", "--names=cat", f"--output={output}", "--score_threshold=0.05"]
    for _ in range(2):  # the second run ignores the drawings of the first
        assert detect.main([*flags, str(folder)]) == 2
        found = json.loads((output / "detections.json").read_text())
        drawn = ["a.png", "b.png", "deep/a.png", "deep/down/a.png"]
        assert [entry["picture"] for entry in found["images"]] == drawn
        assert [entry["image"] for entry in found["failed"]] == [
            str(folder / "deep" / "broken.png")
        ]
        assert all((output / name).is_file() for name in drawn)
    (tmp_path / "empty").mkdir()
    assert detect.main([*flags, str(tmp_path / "empty")]) == 2
    assert "empty: contains no image" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_command_with_videos(checkpoint, tmp_path, kind):
    frames = [random_image(40, 60, seed=n) for n in range(5)]
    path = tmp_path / f"moves.{kind}"
    if kind == "mp4":
        write_mp4(path, frames)
    else:
        first, *rest = map(Image.fromarray, frames)
        first.save(path, save_all=True, append_images=rest, duration=100)
    flags = ["--checkpoint=run", "--names=cat, dog", f"--output={tmp_path}/out", "--batch_size=2"]
    assert detect.main([*flags, "--score_threshold=0.05", str(path)]) == 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    (video,) = found["videos"]
    assert not found["images"] and video["frames_per_second"] == 10
    assert [entry["frame"] for entry in video["frames"]] == list(range(5))
    assert [entry["seconds"] for entry in video["frames"]] == [0, 0.1, 0.2, 0.3, 0.4]
    detector = Detector(tiny_model.loaded(), score_threshold=0.05)
    for entry, wanted in zip(video["frames"], detector(Video(path), ["cat", "dog"])):
        assert [detection["name"] for detection in entry["detections"]] == list(wanted.names)
    drawn = list(Video(tmp_path / "out" / "moves.webm"))
    assert len(drawn) == 5 and drawn[0].shape == (426, 640, 3)
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "coco.json",
        "detections.json",
        "moves.webm",
    ]


def test_command_reports_unreadable_videos(checkpoint, tmp_path, capsys):
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    for name in ("text.mp4", "empty.avi"):
        (tmp_path / name).write_text("not a video" if name == "text.mp4" else "")
    files = [str(tmp_path / name) for name in ("text.mp4", "empty.avi", "none.mov", "a.png")]
    assert detect.main(["--checkpoint=run", "--names=cat", f"--output={tmp_path}/o", *files]) == 2
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert [entry["video"] for entry in found["failed"]] == files[:3] and len(found["images"]) == 1
    assert "no frame can be decoded" in found["failed"][0]["error"]
    assert "no such file" in found["failed"][2]["error"]
    assert not list((tmp_path / "o").glob("*.webm"))


def test_command_reports_videos_without_frames(checkpoint, tmp_path, monkeypatch):
    write_mp4(tmp_path / "a.mp4", [random_image(40, 60)])
    monkeypatch.setattr(Video, "timed", lambda self: iter(()))
    flags = ["--checkpoint=run", "--names=cat", f"--output={tmp_path}/o", str(tmp_path / "a.mp4")]
    assert detect.main(flags) == 2
    (failed,) = json.loads((tmp_path / "o" / "detections.json").read_text())["failed"]
    assert "no frame can be decoded" in failed["error"]
    assert not list((tmp_path / "o").glob("*.webm"))


def test_command_writes_coco_format(checkpoint, tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    Image.fromarray(random_image()).save(tmp_path / "a.png")
    write_mp4(tmp_path / "b.mp4", [random_image(40, 60), random_image(40, 60, seed=1)])
    flags = ["--checkpoint=run", "--names=cat,dog", f"--output={tmp_path}/o"]
    flags += ["--score_threshold=0.05", str(tmp_path / "a.png"), str(tmp_path / "b.mp4")]
    assert detect.main(flags) == 0
    found = json.loads((tmp_path / "o" / "detections.json").read_text())
    coco = COCO(tmp_path / "o" / "coco.json")
    assert {c["name"] for c in coco.loadCats(coco.getCatIds())} == {"cat", "dog"}
    assert [image.get("frame") for image in coco.loadImgs(coco.getImgIds())] == [None, 0, 1]
    entries = [found["images"][0], *found["videos"][0]["frames"]]
    for image, entry in zip(coco.loadImgs(coco.getImgIds()), entries):
        boxes = coco.loadAnns(coco.getAnnIds(image["id"]))
        assert len(boxes) == len(entry["detections"]) > 0
        for box, detection in zip(boxes, entry["detections"]):
            x, y, width, height = box["bbox"]
            corners = [x, y, x + width, y + height]
            np.testing.assert_allclose(corners, detection["box"], atol=1e-6)
            assert coco.loadCats(box["category_id"])[0]["name"] == detection["name"]
            assert box["score"] == detection["score"]


def test_names_file_and_prompts(checkpoint, tmp_path):
    Image.fromarray(random_image()).save(tmp_path / "a.png")
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
    [(None, "no such file"), (b"\n \n", "contains no name"), (b"caf\xe9", "UTF-8")],
)
def test_invalid_names_files_are_refused(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=rf"names\.txt.*{reason}"):
        names_lib.names_from_flags(None, str(tmp_path / "names.txt"))


def test_command_continues_after_a_broken_image(checkpoint, tmp_path, capsys):
    Image.fromarray(random_image()).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_text("not an image")
    images = [str(tmp_path / name) for name in ("bad.jpg", "good.png")]
    flags = ["--checkpoint=run", "--names=cat", f"--output={tmp_path}/out"]
    flags.append("--score_threshold=0.05")
    assert detect.main([*flags, *images]) == 2
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["image"] for entry in found["images"]] == images[1:]
    assert found["failed"][0]["image"] == images[0]
    assert capsys.readouterr().err.count("error: ") == 1


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--checkpoint=elsewhere", "--names=cat"], "no checkpoint in elsewhere"),
        (["--checkpoint=run", "--names= , "], "contains no name"),
        (["--checkpoint=run", "--names=cat,Cat"], "the same as name 1"),
        (["--checkpoint=run", "--names=cat", "--score_threshold=7"], "score_threshold"),
    ],
)
def test_command_reports_an_error_in_one_line(checkpoint, tmp_path, capsys, flags, reason):
    assert detect.main([*flags, f"--output={tmp_path}", "image.jpg"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and reason in captured.err
    assert captured.err.count("\n") == 1


def test_detection_does_not_need_tensorflow():
    code = (
        "import sys; sys.modules['tensorflow'] = None; import detclipv2_jax.detect; "
        "import detclipv2_jax.evaluate"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_package_imports_nothing_heavy_before_the_first_use_of_detector():
    code = (
        "import sys, detclipv2_jax; assert detclipv2_jax.__version__; "
        "assert not {'jax', 'numpy', 'flax'} & set(sys.modules); "
        "from detclipv2_jax import Detector; from detclipv2_jax import detect; "
        "assert Detector is detect.Detector and 'Detector' in dir(detclipv2_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
