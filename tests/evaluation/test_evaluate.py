import json
import types

import numpy as np
import pytest
import tiny_model
from PIL import Image
from stand_ins import encoded_names

from detclipv2_jax import evaluate
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.find_file import ImageFolder
from detclipv2_jax.evaluation import datasets, measure, report
from detclipv2_jax.inference import images
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import ImageDetections

NAMES = ("anchor", "black_chess_knight", "umbrella", "snowman")


def make_set(tmp_path, *, federated=True, images=6, folder="images"):
    """Write an annotation file and its images, (40, 64) pixels each; return the file."""
    rng = np.random.default_rng(0)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "annotations").mkdir(exist_ok=True)
    content = {"images": [], "annotations": [], "categories": []}
    for n, name in enumerate(NAMES):
        row = {"id": n, "name": name}  # ids start at 0
        extra = {"frequency": "rcff"[n], "group": "novel" if n == 3 else "base"}
        content["categories"].append(row | (extra if federated else {}))
    for n in range(images):
        pixels = rng.integers(0, 256, (40, 64, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / f"{n}.png")
        row = {"id": n, "height": 40, "width": 64, "file_name": f"{n}.png"}
        known = {"neg_category_ids": [3 - n % 4], "not_exhaustive_category_ids": []}
        content["images"].append(row | (known if federated else {}))
        for label in (n % 4, (n + 1) % 4):
            box = [*rng.integers(0, 20, 2).tolist(), *rng.integers(8, 20, 2).tolist()]
            row = {"id": len(content["annotations"]), "image_id": n, "category_id": label}
            content["annotations"].append(row | {"bbox": box, "area": box[2] * box[3]})
    path = tmp_path / "annotations" / "val.json"
    path.write_text(json.dumps(content))
    return path


class Oracle:
    """A predictor that answers with the ground truth of `make_set`, in another order."""

    config, canvas, batch_size = DecodeConfig(), (64, 64), 2

    def __init__(self, truth):
        self._truth = truth
        self._by_name = {image.file_name: image.id for image in truth.images}

    def encode(self, names):
        self.names = list(names)
        return encoded_names(names)

    def stream(self, sources, texts):
        for number, source in reversed(list(enumerate(sources))):
            path = source.path
            try:
                with Image.open(path) as image:
                    width, height = image.size
            except OSError:
                yield number, UserError(f"{path}: broken")
                continue
            rows = self._truth.boxes_of_image[self._by_name[path.name]]
            labels = self._truth.category_ids[rows]  # here an id is its index
            yield (
                number,
                ImageDetections(
                    boxes=self._truth.boxes[rows] * np.tile([width / 64, height / 40], 2),
                    scores=np.full(len(rows), 0.5, np.float32),
                    labels=labels,
                    names=tuple(texts.names[label] for label in labels),
                    size=(height, width),
                ),
            )


class RedFinder:
    """A predictor that finds the red rectangle of a picture, as a model sees it on its canvas."""

    config, canvas, batch_size = DecodeConfig(), (64, 96), 2

    def encode(self, names):
        return encoded_names(names)

    def stream(self, sources, texts):
        for number, source in enumerate(sources):
            image = images.fit_to_canvas(source, self.canvas)
            pixels = image.pixels.astype(int)
            rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 2] > 60)
            corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            scale = np.array(image.original_size)[[1, 0, 1, 0]] / np.array(image.size)[[1, 0, 1, 0]]
            box = np.float32([corners * scale])
            label, score = np.zeros(1, np.int32), np.float32([0.5])
            yield number, ImageDetections(box, score, label, texts.names, image.original_size)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_boxes_fit_pictures_that_exif_turns(tmp_path, suffix):
    """All eight orientations, annotated as viewers show them; four of them also as stored."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "red"}]}
    for orientation in range(1, 9):
        block = Image.Exif()
        block[0x0112] = orientation
        swaps = orientation > 4
        for as_stored in {False, swaps}:
            seen = np.full((64, 96, 3), 150, np.uint8)
            seen[8:24, 10:40] = (220, 30, 30)  # in the pixels that the annotation is for
            if not as_stored:  # the inverse turns, from the table of the EXIF specification
                inverse = (
                    0,
                    lambda p: p,
                    np.fliplr,
                    lambda p: np.rot90(p, 2),
                    np.flipud,
                    lambda p: p.swapaxes(0, 1),
                    np.rot90,
                    lambda p: np.rot90(p, 2).swapaxes(0, 1),
                    lambda p: np.rot90(p, -1),
                )
                stored = inverse[orientation](seen)
            else:
                stored = seen
            name = f"{orientation}{as_stored}.{suffix}"
            Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=block)
            number = len(content["images"])
            content["images"] += [{"id": number, "height": 64, "width": 96, "file_name": name}]
            box = {"bbox": [10, 8, 30, 16], "area": 480, "category_id": 1, "iscrowd": 0}
            content["annotations"] += [{"id": number, "image_id": number, **box}]
    (tmp_path / "val.json").write_text(json.dumps(content))
    truth = datasets.load_ground_truth(tmp_path / "val.json")
    found = measure.measure_model(RedFinder(), truth, tmp_path, step=1, progress=False)
    assert len(truth.images) == 12 and found["settings"]["images_other_size"] == 0
    assert found["coco"]["AP75"] == pytest.approx(1.0)


def test_perfect_detections_score_one(tmp_path):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    oracle = Oracle(truth)
    results = measure.measure_model(
        oracle, truth, tmp_path / "images", step=12, output=tmp_path / "out", progress=False
    )
    assert oracle.names == ["anchor", "black chess knight", "umbrella", "snowman"]
    assert set(results) == {
        *("dataset", "step", "standard", "fixed", "groups", "threshold", "settings")
    }
    assert results["threshold"]["f1"] == 1
    for part in (results["standard"], results["fixed"]):
        assert part["AP"] == part["APr"] == part["AP50"] == pytest.approx(1.0)
    for group in ("base", "novel"):
        assert results["groups"][group]["fixed"]["AP"] == pytest.approx(1.0)
    assert results["settings"]["images"] == 6 and results["step"] == 12
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    rows = json.loads((tmp_path / "out" / "categories.json").read_text())
    assert [row["fixed_AP"] for row in rows] == pytest.approx([1.0] * 4)
    sheet = Image.open(tmp_path / "out" / "detections" / "step_00000012.png")
    assert sheet.width > 4 * 480  # two pairs per row


def test_without_overlaps_keeps_the_best_box_of_a_place():
    boxes = np.float32([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 9, 10]])
    scores = np.float32([0.9, 0.8, 0.7, 0.6])
    found = ImageDetections(boxes, scores, np.arange(4), ("a", "b", "c", "d"), (40, 40))
    np.testing.assert_array_equal(report.without_overlaps(found), [0, 2])
    nothing = ImageDetections(boxes[:0], scores[:0], np.arange(0), (), (40, 40))
    assert not len(report.without_overlaps(nothing))


def test_coco_datasets_get_the_twelve_metrics(tmp_path):
    truth = datasets.load_ground_truth(make_set(tmp_path, federated=False))
    results = measure.measure_model(Oracle(truth), truth, tmp_path / "images", progress=False)
    assert set(results) == {"dataset", "step", "coco", "threshold", "settings"}
    assert results["coco"]["AP"] == results["coco"]["AR100"] == pytest.approx(1.0)
    assert results["coco"]["APl"] is None


def test_layout_can_be_forced(tmp_path):
    path = make_set(tmp_path)
    truth = datasets.load_ground_truth(path, "coco")
    results = measure.measure_model(Oracle(truth), truth, tmp_path / "images", progress=False)
    assert "coco" in results
    path = make_set(tmp_path, federated=False)
    with pytest.raises(UserError, match="neg_category_ids"):
        datasets.load_ground_truth(path, "lvis")


def test_missing_and_broken_images_are_counted_with_a_warning(tmp_path, capsys):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    (tmp_path / "images" / "0.png").unlink()
    (tmp_path / "images" / "1.png").write_text("broken")
    results = measure.measure_model(Oracle(truth), truth, tmp_path / "images", progress=False)
    settings = results["settings"]
    assert settings["images_missing"] == settings["images_unreadable"] == 1
    assert results["fixed"]["AP"] < 1  # nothing is detected in images that cannot be read
    errors = capsys.readouterr().err
    assert "image 0 was not found in" in errors and "1.png: broken" in errors
    assert "1 missing, 1 unreadable" in report.results_table(results)


def test_images_of_another_size_than_the_annotations_say(tmp_path, capsys):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    for n in range(5):
        Image.new("RGB", (128, 80)).save(tmp_path / "images" / f"{n}.png")
    results = measure.measure_model(
        Oracle(truth), truth, tmp_path / "images", output=tmp_path / "out", progress=False
    )
    assert results["fixed"]["AP"] == pytest.approx(1.0)
    assert results["settings"]["images_other_size"] == 5
    assert capsys.readouterr().err.count("80×128") == 3  # the first few only
    assert (tmp_path / "out" / "detections" / "detections.png").exists()


def test_no_image_at_all_is_an_error(tmp_path):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    with pytest.raises(UserError, match="none of the 6 images"):
        measure.measure_model(Oracle(truth), truth, tmp_path / "annotations", progress=False)


def test_images_are_found_by_name_or_url(tmp_path):
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "1.jpg").write_text("")
    (tmp_path / "2.jpg").write_text("")
    find = lambda **names: datasets.find_image(
        types.SimpleNamespace(**({"file_name": None, "coco_url": None} | names)),
        ImageFolder(tmp_path),
    )
    assert find(coco_url="http://x.org/val2017/1.jpg") == tmp_path / "val2017" / "1.jpg"
    assert find(coco_url="http://x.org/val2017/2.jpg") == tmp_path / "2.jpg"
    assert find(file_name="val2017/1.jpg") == tmp_path / "val2017" / "1.jpg"
    assert find(file_name="train2014/2.jpg") == tmp_path / "2.jpg"
    assert find(file_name="3.jpg") is None


def test_images_of_an_evaluation_are_found_as_those_of_preparation_are(tmp_path, capsys):
    home = tmp_path / "data"
    for file in ("images/cam1/1.jpg", "images/1.jpg", "images/b.JPG", "images/a 1.jpg"):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(file)
    (tmp_path / "secret.jpg").write_text("secret")
    names = ["cam1/1.jpg", "cam2/1.jpg", "b.jpg", "..\\x\\a%201.jpg", str(tmp_path / "secret.jpg")]
    images = [types.SimpleNamespace(file_name=name, coco_url=None) for name in names]
    truth = types.SimpleNamespace(path=str(home / "val.json"), images=images)
    assert datasets.guess_image_dir(truth) == home / "images"
    found = datasets.find_images(truth, home / "images")
    files = ["cam1/1.jpg", None, "b.JPG", "a 1.jpg", None]
    assert found == [file and home / "images" / file for file in files]
    told = capsys.readouterr().err
    assert "2 of 5 images are not evaluated, for example no file cam2/1.jpg; " in told
    assert "2 of 5 images are named differently in their folder" in told


def test_guess_image_dir(tmp_path):
    truth = datasets.load_ground_truth(make_set(tmp_path))
    assert datasets.guess_image_dir(truth) == tmp_path / "images"
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--images=DIR"):
        datasets.guess_image_dir(truth)


def test_table_keeps_the_protocols_apart():
    row = {"AP": 0.25, "AP50": 0.5, "APr": None}
    group = {"AP": 0.125, "AP50": 0.75}
    results = {
        "dataset": "val.json",
        "step": 3,
        "standard": row,
        "fixed": {**row, "AP": 0.375},
        "groups": {"base": {"standard": group, "fixed": group}},
        "settings": {
            "standard": "best 300 …",
            "fixed": "best 10,000 …",
            "images": 9,
            "images_missing": 0,
            "images_unreadable": 0,
            "images_other_size": 0,
        },
    }
    lines = report.results_table(results).splitlines()
    heads = [n for n, line in enumerate(lines) if " AP (" in line]
    assert [lines[n].split()[0] for n in heads] == ["fixed", "standard"]
    assert lines[heads[0] + 2].split() == ["all", "0.375", "0.500", "-"]
    assert lines[heads[1] + 2].split() == ["all", "0.250", "0.500", "-"]
    assert lines[heads[1] + 3].split() == ["base", "0.125", "0.750"]


@pytest.fixture
def checkpoint(monkeypatch):
    tiny_model.be_checkpoint(monkeypatch, tiny_model.loaded)


@pytest.mark.parametrize("federated", [True, False])
def test_command_with_a_real_model(checkpoint, tmp_path, capsys, federated):
    path = make_set(tmp_path, federated=federated, images=3)
    output = tmp_path / "out"
    flags = ["--checkpoint=run", f"--dataset={path}", f"--output={output}"]
    assert evaluate.main(flags) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["step"] == 7 and results["dataset"] == str(path)
    assert results["settings"]["max_detections"] == 20 and results["settings"]["canvas"] == [64, 64]
    figures = results["fixed" if federated else "coco"]
    assert 0 <= figures["AP"] < 0.5  # random weights
    assert len(list((output / "detections").glob("*.png"))) == 1
    printed = capsys.readouterr().out
    assert ("fixed AP" in printed) == federated and "AP50" in printed


def test_the_command_prints_a_user_error(checkpoint, tmp_path, capsys):
    assert evaluate.main(["--checkpoint=run", "--dataset=none.json", f"--output={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith("error: none.json: no such file")
