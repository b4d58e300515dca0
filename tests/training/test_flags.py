"""The command line of training: mistakes are one sentence that names file, line or field."""

import json
import subprocess
import sys

import absl.flags
import pytest
import tiny_run
from ml_collections import config_flags

from detclipv2_jax.common import config_help
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import flags, recipes
from detclipv2_jax.training.config import RunConfig

COCO = str(recipes.directory() / "coco_format.py")


@pytest.fixture
def parse(monkeypatch):
    """`parse(*arguments)`: the config that a command line sets, as nested dicts."""

    def parse(*arguments):
        values = absl.flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values)
        absl.flags.DEFINE_string("workdir", None, "", flag_values=values)
        monkeypatch.setattr("absl.flags.FLAGS", values)
        flags.parse_flags(["train", *arguments])
        return values.config.to_dict()

    return parse


def message_of(parse, *arguments):
    """The message of a command line's mistake."""
    with pytest.raises(UserError) as raised:
        parse(*arguments)
    return str(raised.value)


@pytest.mark.parametrize("more", [[], ["--config.data_dir=data"]])
@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("configs/coco_format.py", "--config=coco_format.py, without a folder"),
        ("configs/coco_fromat.py", "did you mean coco_format.py?"),
        ("coco_format", "--config=coco_format.py, without a folder"),
        ("mine.py", "The shipped recipes are coco_format.py, "),
    ],
)
def test_a_config_that_does_not_exist(parse, tmp_path, monkeypatch, file, hint, more):
    monkeypatch.chdir(tmp_path)
    message = message_of(parse, f"--config={file}:nano", "--workdir=w", *more)
    assert message.startswith(f"{file}: no such file; ") and hint in message


def test_a_recipe_is_found_by_its_name_from_any_directory(parse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config=coco_format.py:nano")["train"]["epochs"] == 12.0
    (tmp_path / "coco_format.py").write_text("import recipe_of_my_own")
    message = message_of(parse, "--config=coco_format.py")
    assert message.startswith("coco_format.py, line 1: ModuleNotFoundError: No module named")


def test_what_is_not_a_config_file(parse, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path}: a directory; " in message_of(parse, f"--config={tmp_path}")
    assert "config.json: not a Python file; " in message_of(
        parse, f"--config={tmp_path}/config.json"
    )


@pytest.mark.parametrize("more", [[], ["--config.data_dir=x"]])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config():\n  x = {\n", ", line 2: SyntaxError: '{' was never closed. "),
        ("def get_config():\n  x = {}\n  return x['a']", ", line 3: KeyError: 'a'. "),
        ("import numpy as np\nx = np.zeros(-1)", ", line 2: ValueError: negative dimensions"),
        ("def config(): pass", ": has no function get_config. "),
        ("def get_config(): return 3", ": get_config returns int, not a ConfigDict. "),
    ],
)
def test_a_config_file_that_fails(parse, tmp_path, text, message, more):
    (tmp_path / "mine.py").write_text(text)
    found = message_of(parse, f"--config={tmp_path}/mine.py", "--workdir=w", *more)
    assert found.startswith(f"{tmp_path}/mine.py{message}")


@pytest.mark.parametrize("recipe", [path.stem for path in recipes.directory().glob("*.py")])
def test_an_unknown_size_keeps_its_reason(parse, recipe):
    message = message_of(parse, f"--config={recipe}.py:nan", "--config.data_dir=x")
    assert message.startswith(f"configs/{recipe}.py:nan: unknown size 'nan'. Did you mean nano?")
    assert ", ".join(recipes.sizes(recipes.directory() / f"{recipe}.py")) in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=w"], "--config is missing. Give a recipe"),
        (["--config.train.epochs=3"], "--config is missing. Give a recipe"),
        (["--config="], "--config has no value"),
        (["--config", "--workdir=w"], "--config has no value"),
        (["--config=coco_format.py", "--config=pretrain.py"], "--config is given 2 times: coco_fo"),
        (["--config=coco_format.py", "--workdir"], "Missing value for flag --workdir"),
        (["--config=coco_format.py", "--workdri=w"], "Unknown command line flag 'workdri'. Did yo"),
        (["--config=coco_format.py", "photos"], "unexpected argument 'photos'. Every option"),
        (
            ["--config=coco_format.py", "--config.train.epochs=many"],
            "--config.train.epochs=many: must be of type float. ",
        ),
        (
            ["--config=coco_format.py", "--config.data.skip_missing=maybe"],
            "--config.data.skip_missing=maybe: must be of type bool. ",
        ),
        (
            ["--config=coco_format.py", "--config.data.detection.batch_size=4.5"],
            "--config.data.detection.batch_size=4.5: must be of type int. ",
        ),
        (["--config=coco_format.py", "--config.train=3"], "--config.train is a section. Set one "),
        (
            ["--config=coco_format.py", "--config.train.epoch=3"],
            "--config.train.epoch is not a field of the config. Did you mean epochs?",
        ),
        (
            ["--config=coco_format.py", "--config.train.epoch", "3"],
            "--config.train.epoch is not a field of the config. Did you mean epochs?",
        ),
    ],
)
def test_mistakes_on_the_command_line(parse, arguments, message):
    assert message_of(parse, *arguments).startswith(message)


def test_fields_may_stand_before_the_config(parse):
    for config in (["--config=coco_format.py"], ["--config", "coco_format.py"]):
        assert parse("--config.train.epochs=3", *config)["train"]["epochs"] == 3.0


def test_every_field_of_the_config_has_a_meaning():
    fields = config_help.fields(RunConfig)
    assert [field.path for field in fields if not field.meaning] == []
    of = {field.path: field for field in fields}
    assert of["train.epochs"].meaning == "passes over every source (paper §4.1)"
    assert of["train.epochs"].type == "float"
    assert of["eval.dataset"].meaning.startswith("LVIS or COCO JSON, relative to")
    assert of["anchors.scale" if "anchors.scale" in of else "model.anchors.scale"].meaning == (
        "side of an anchor, in strides."
    )
    assert of["data.detection.scored_on"].type == "'table' | 'source' | 'own'"
    assert "names of its own source, or only its own" in of["data.detection.scored_on"].meaning


def test_help_on_a_recipe_lists_its_sizes_and_fields(capsys):
    flags._print_help(sys.modules[__name__], ["train", "--help", "--config=coco_format.py:nano"])
    text = capsys.readouterr().out
    assert "\n  nano, swin_t\n" in text
    assert "  train.epochs = 12.0  (float) passes over every source (paper §4.1)\n" in text


def test_the_config_is_printed_as_json():
    line = [sys.executable, "-m", "detclipv2_jax.main", "--config.seed=7", f"--config={COCO}"]
    options = dict(env=tiny_run.environment(), capture_output=True, text=True)
    done = subprocess.run([*line, "--print_config"], **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["seed"] == 7


def test_home_directory_and_windows_paths(parse, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = parse(f"--config={COCO}", "--workdir=~/run", "--config.data_dir=~/data")
    assert config["data_dir"] == "/home/me/data" and absl.flags.FLAGS.workdir == "/home/me/run"
    message = message_of(parse, f"--config={COCO}", "--config.data_dir=C:\\data")
    assert message.startswith("C:\\data: is a Windows path")
    assert message_of(parse, "--config=~/mine.py").startswith("/home/me/mine.py: no such file")
