"""The road of own photos: prepare, train and detect, as docs/own_data.md has it, on miniatures."""

import json

import pytest
from own_photos import make_photos, prepared, tiny
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import checkpoint, checkpoint_files
from detclipv2_jax.training import train


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


def test_the_best_is_used_if_the_newest_was_measured(tmp_path, monkeypatch, capsys):
    scores = {10: 0.3, 20: 0.5, 30: 0.4}
    for step in (*scores, 40):
        (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
    monkeypatch.setattr(checkpoint_files, "scores", lambda _: scores)
    # The run has gone on since it was measured.
    assert checkpoint_files.by_preference(tmp_path) == [10, 20, 30, 40]
    scores[40] = 0.2
    assert checkpoint_files.by_preference(tmp_path) == [40, 10, 30, 20]
    scores[40] = 0.5  # of equal scores the newest
    assert checkpoint_files.by_preference(tmp_path)[-1] == 40
    checkpoint_files.note_choice(tmp_path, 40)
    assert capsys.readouterr().err == ""
    scores[40] = 0.2
    checkpoint_files.note_choice(tmp_path, 20)
    assert "using the checkpoint of step 20, the best on the valid" in capsys.readouterr().err


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
