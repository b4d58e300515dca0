"""A run writes into an empty folder or into its own, and replaces no file of somebody else."""

import json

import pytest

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import config, recipes
from detclipv2_jax.training.workdir import refuse_foreign


def make(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"config.json": '{"name": "my app"}'}, "config.json"),
        ({"config.json": '{"name": '}, "config.json"),
        ({"config.json": '{"model": "bert", "train": {}}'}, "config.json"),
        ({"metrics.jsonl": '{"loss": 1}\n'}, "metrics.jsonl"),
        ({"results.json": "[]", "photo.jpg": ""}, "results.json"),
        ({"checkpoints/last.pt": "", "config.json": "[]"}, "config.json"),
        ({"checkpoints/100/model.bin": ""}, "checkpoints"),
        ({"detections/1.png": ""}, "detections"),
    ],
)
def test_files_of_somebody_else_are_not_replaced(tmp_path, files, named):
    make(tmp_path, files)
    with pytest.raises(UserError) as caught:
        refuse_foreign(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / named}: exists") and f"{tmp_path}/run" in message
    assert {name: (tmp_path / name).read_text() for name in files} == files


def test_a_file_is_not_a_workdir(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is not a folder"):
        refuse_foreign(tmp_path / "run")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"notes.txt": "of mine", "train.json": "{}"},  # which no run writes
        {"config.json": "CONFIG", "metrics.jsonl": ""},  # stopped before its first checkpoint
        {"config.json": "CONFIG", "results.json": "{}", "checkpoints/7/meta/metadata": "{}"},
        {"config.json": "{", "checkpoints/7/meta/metadata": "{}"},  # damaged
        {"metrics.jsonl": "", "checkpoints/DAMAGED-7/meta/metadata": "{}"},
    ],
)
def test_a_run_goes_on_in_its_own_folder(tmp_path, files):
    parsed = config.parse(recipes.load("pretrain").get_config("nano").to_dict())
    own = json.dumps(config_dict.to_dict(parsed))
    make(tmp_path, {name: own if text == "CONFIG" else text for name, text in files.items()})
    (tmp_path / "checkpoints").mkdir(exist_ok=True)  # empty: of a run that was stopped early
    refuse_foreign(tmp_path)
