"""Every command of README.md and docs/ is parsed whole, and run on miniatures or listed below."""

import importlib
import re
import shlex

import pytest
import tiny_run
from own_photos import TINY, make_photos, prepared, tiny

from detclipv2_jax.__main__ import COMMANDS
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import train

PAGES = [
    page
    for page in [*tiny_run.ROOT.glob("*.md"), *(tiny_run.ROOT / "docs").rglob("*.md")]
    if page.name != "CHANGELOG.md"
]
#: Commands that no test of this file runs, by pattern, with the reason.
NOT_RUN = {
    r"scripts/(quickstart|test)\.sh": "installs an environment; the quickstart's run is "
    "tests/training/test_train.py on miniatures",
    r"scripts/(benchmarks|verify)/": "measures for minutes; tests/scripts/ runs it",
    r"scripts/(choose_shapes|show_batches|show_definitions|data_statistics|compare_runs|"
    r"prepare_concepts)\.py": "tests/scripts/ runs it on miniatures",
    r"make_target\.py": "needs two drawn sets of symbols",
    r"prepare(_data\.py)? (objects365|goldg|conceptual_captions|lvis|coco|concepts|index)": "needs "
    "an archive of gigabytes; tests/data/prepare/ runs it on miniatures",
    r"prepare_data\.py (symbols|…)": "tests/data/prepare/test_symbols.py runs it on miniatures",
    r"--config=(configs/)?(pretrain|supervised)\.py:\S*swin": "needs GPUs and published archives",
    r"--config=(configs/)?pretrain\.py:nano": "ten minutes; tests/training/ runs it on miniatures",
    r"finetune_coco_format\.py:swin_t": "needs GPUs; the same commands are run with nano",
    r"--checkpoint=runs/(quickstart|swin_t|with_0|photos)": "needs a run of minutes or days; "
    "tests/evaluation, tests/inference and tests/exporters run it on miniatures",
    r" … ": "continues a command above it",
    r"--config=… ": "needs a cluster; tests/training/test_processes.py runs two processes",
    r"custom --from=(my_symbols|photos) ": "a diary of docs/results, on data that is not published",
    r"data_dir=data/photos": "a diary of docs/results, half an hour",
}
ROADS = ("README.md", "own_data.md", "finetune.md")  # their other commands are run below
STARTS = r"(?:detclip |python -m detclipv2_jax|python scripts/|python docs/|\./scripts/)"


def commands_of(page):
    """The commands in the code blocks of a page, with continued lines joined."""
    for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = re.sub(r"\s+#.*| {3,}[(\w].*", "", line.strip())
            if re.match(STARTS, line):
                yield " ".join(line.split())


EVERY = [(page, command) for page in PAGES for command in commands_of(page)]


def reason(command):
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


def as_door(command):
    """(door, arguments) of a command of ours; None for a script."""
    command = command.replace("python scripts/prepare_data.py", "detclip prepare")
    command = re.sub(r"python -m detclipv2_jax\.main", "detclip train", command)
    command = re.sub(r"python -m detclipv2_jax(?:\.| )", "detclip ", command)
    if not command.startswith("detclip "):
        return None
    _, door, *arguments = shlex.split(command)
    return door, arguments


def test_every_command_is_run_or_has_a_reason():
    assert len(EVERY) > 60
    for page, command in EVERY:
        assert reason(command) or page.name in ROADS, f"{page.name}: {command}"
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for _, command in EVERY), f"no command has {pattern}"


@pytest.fixture
def parse_config(monkeypatch):
    """`parse_config(arguments)`: the values that a training command sets."""
    import absl.flags
    from ml_collections import config_flags

    from detclipv2_jax.training import flags

    def parse_config(arguments):
        values = absl.flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, flag_values=values)
        for name in ("workdir", "coordinator_address", "num_processes", "process_id", "profile"):
            absl.flags.DEFINE_string(name, None, "", flag_values=values)
        monkeypatch.setattr("absl.flags.FLAGS", values)
        flags.parse_flags(["train", *arguments])
        return values

    return parse_config


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(tiny_run.ROOT)))
def test_every_command_parses(page, parse_config, monkeypatch):
    monkeypatch.chdir(tiny_run.ROOT)
    for command in commands_of(page):
        if "…" in command or (found := as_door(command)) is None:
            continue
        door, arguments = found
        # Placeholders: numbers of a loop, optional parts, names in capitals.
        arguments = [one.replace("$seed", "0").strip("[]") for one in arguments]
        arguments = [one.replace("--format=NAME", "--format=onnx") for one in arguments]
        if door == "train":
            config_lib.parse(parse_config(arguments).config.to_dict())
            continue
        module = importlib.import_module(f"detclipv2_jax.{COMMANDS[door][0]}")
        make = getattr(module, "parser", None) or module.build_parser
        make().parse_args(arguments)  # SystemExit where it does not parse


def go(page, pattern, parse_config):
    """Run the commands of a page that match, in this directory, with a tiny model."""
    found = [one for one in commands_of(tiny_run.ROOT / page) if re.search(pattern, one)]
    for command in found:
        door, arguments = as_door(command)
        if door == "train":
            values = parse_config(arguments)
            recipe, _, size = next(a for a in arguments if a.startswith("--config=")).partition(":")
            name = recipe.removeprefix("--config=").removesuffix(".py")
            stored = values.config.to_dict()
            config = tiny(
                name,
                size or "nano",
                data_dir=stored["data_dir"],
                init__model=stored["init"]["model"],
            )
            train.train(config, importlib.import_module("pathlib").Path(values.workdir).absolute())
            continue
        module = importlib.import_module(f"detclipv2_jax.{COMMANDS[door][0]}")
        jobs = ["--jobs=1"] if door == "prepare" else []
        assert module.main([*arguments, *jobs]) == 0, command
    return found


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/own_data.md"])
def test_the_road_of_own_photos(page, tmp_path, monkeypatch, parse_config, capsys):
    """`detect` finds something in the pictures, at the threshold that belongs to the run."""
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "my_photos", names=("raccoon",))
    monkeypatch.setitem(TINY, "train.epochs", 6.0)
    assert len(go(page, r"my_photos\b(?!.*target)", parse_config)) >= 3
    printed = capsys.readouterr()
    assert " for validation with " in printed.out and "runs/my_photos/" in printed.out
    assert (tmp_path / "runs/my_photos/results.json").is_file()
    assert (tmp_path / "found/detections.json").is_file()
    assert " raccoon -> found/" in printed.out


@pytest.mark.slow
def test_the_road_of_fine_tuning(tmp_path, monkeypatch, parse_config, capsys):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "my_photos", names=("raccoon",))
    prepared("my_photos", "old")
    nothing = dict(data__grounding__sources=(), data__image_text__sources=(), eval__dataset="")
    first = dict(data_dir="old", data__detection__sources=("detection",), train__epochs=0.2)
    train.train(tiny("pretrain", "nano", **nothing, **first), tmp_path / "runs/quickstart")
    assert len(go("docs/finetune.md", "symbols/target|:nano", parse_config)) == 2
    printed = capsys.readouterr().out
    assert "does not exist, so zero-shot AP is not measured" in printed
    assert (tmp_path / "runs/tuned/checkpoints").is_dir()
