"""The road of own photos: prepare, train and detect, as docs/own_data.md has it, on miniatures."""

import json

import numpy as np
import pytest
import tiny_run
from ml_collections import ConfigDict
from PIL import Image

from detclipv2_jax import prepare as prepare_door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes, train

COLORS = {"apple": (200, 30, 30), "leaf": (30, 160, 60), "sky": (40, 80, 220)}


def make_photos(folder, count=24, names=("apple",)):
    """A folder of own photos: each shows one rectangle per name, in its color."""
    generator = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
    }
    for number in range(count):
        pixels = generator.integers(90, 160, (48, 64, 3), dtype=np.uint8)
        for category, name in enumerate(names):
            x, y = generator.integers(0, 40), generator.integers(0, 24)
            pixels[y : y + 20, x : x + 20] = COLORS[name]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [int(x), int(y), 20, 20],
                }
            )
        Image.fromarray(pixels).save(folder / f"images/{number}.jpg", quality=95)
        content["images"].append(
            {"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64}
        )
    (folder / "annotations/instances_train.json").write_text(json.dumps(content))
    return folder


TINY = {
    name: value
    for name, value in tiny_run.OVERRIDES.items()
    if name.startswith("model.") or name in ("eval.pre_nms_top_k", "eval.max_detections")
} | {
    "data.detection.batch_size": 4,
    "data.detection.shapes": ((64, 64),),
    "data.detection.table_size": 32,
    "data.detection.concepts_per_image": 8,
    "eval.canvas": (64, 64),
    "eval.batch_size": 4,
    "eval.pictures": 2,
    "train.epochs": 3.0,
}


def tiny(recipe, size, **fields):
    """The config of a shipped recipe at a size, with a tiny model; fields with __ for dots."""
    values = recipes.load(recipe).get_config(size)
    for name, value in (TINY | {k.replace("__", "."): v for k, v in fields.items()}).items():
        section, _, field = name.rpartition(".")
        place = values
        for part in filter(None, section.split(".")):
            place = place[part]
        place[field] = value
    assert isinstance(values, ConfigDict)
    return config_lib.parse(values.to_dict())


def prepared(origin, to, *flags):
    assert prepare_door.main(["custom", f"--from={origin}", f"--to={to}", "--jobs=1", *flags]) == 0
    return to


@pytest.fixture(scope="module")
def road(made_once):
    """The folder of a road that was gone once: photos, data, run."""

    def make(folder):
        photos = make_photos(folder / "photos")
        data = prepared(photos, folder / "data", "--val_share=0.2")
        train.train(tiny("coco_format", "nano", data_dir=str(data)), folder / "run")

    return made_once("own_photos", make)


def test_each_epoch_is_measured_on_pictures_that_were_held_out(road):
    held_out = json.loads((road / "data/validation/annotations.json").read_text())["images"]
    steps = -(-(24 - len(held_out)) // 4)  # of an epoch
    rows = [json.loads(line) for line in (road / "run/metrics.jsonl").read_text().splitlines()]
    measured = [row["step"] for row in rows if "coco/AP" in row]
    assert measured == [steps, 2 * steps, 3 * steps]
    results = json.loads((road / "run/results.json").read_text())
    assert results["settings"]["images"] == len(held_out) > 0
    stored = json.loads((road / "run/config.json").read_text())["eval"]
    assert stored["dataset"] == "validation/annotations.json"


def test_the_best_checkpoint_is_kept(road):
    rows = [json.loads(line) for line in (road / "run/metrics.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["coco/AP"] for row in rows if "coco/AP" in row}
    best = max(scores, key=lambda step: (scores[step], step))
    assert best in checkpoint.steps(road / "run")
    assert checkpoint.best_step(road / "run") == best


def test_the_picture_of_the_losses_has_a_curve_of_the_validation(road):
    with Image.open(road / "run/losses.png") as picture:
        width, height = picture.size
    assert width > 2 * height  # two panels


def test_without_a_validation_set_the_last_lines_say_how_to_measure(road, tmp_path, capsys):
    data = prepared(road / "photos", tmp_path / "data")
    train.train(
        tiny("coco_format", "nano", data_dir=str(data), train__epochs=0.2), tmp_path / "run"
    )
    printed = capsys.readouterr().out
    assert "validation/annotations.json does not exist, so this run is not measured" in printed
    last = printed.rstrip().splitlines()[-3:]
    assert last[0] == f"{tmp_path}/run/: losses.png, metrics.jsonl, checkpoints/"
    assert last[1].startswith("nothing was measured") and "detclip evaluate" in last[2]
    for name in last[0].split(": ")[1].split(", "):
        assert (tmp_path / "run" / name).exists()


def test_a_validation_file_that_somebody_names_must_exist(road, tmp_path):
    wrong = tiny("coco_format", "nano", data_dir=str(road / "data"), eval__dataset="vall.json")
    with pytest.raises(UserError, match="vall.json"):
        train.train(wrong, tmp_path / "run")


def test_missing_data_names_the_command_for_this_folder(tmp_path, road):
    model = str(road / "run")
    with pytest.raises(UserError, match=f"--from=YOUR_FOLDER --to={tmp_path}/data/target"):
        train.train(
            tiny("finetune_coco_format", "nano", data_dir=f"{tmp_path}/data", init__model=model),
            tmp_path / "run",
        )
