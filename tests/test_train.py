import json
import random
import signal
import subprocess
import time

import pytest
import tiny_run
from PIL import Image


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    to = tmp_path_factory.mktemp("symbols") / "data"
    tiny_run.prepare(to)
    return to


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """A run that nothing disturbed: (workdir, what it printed)."""
    workdir = tmp_path_factory.mktemp("finished")
    process = tiny_run.run(data, workdir)
    assert process.returncode == 0, process.stderr[-3000:]
    return workdir, process.stdout


def _losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["kind"], x["loss"], x["gradient_norm"]) for x in lines if "kind" in x]


def test_a_run_leaves_what_the_readme_says(finished):
    workdir, printed = finished
    losses = _losses(workdir)
    assert [step for step, *_ in losses] == list(range(1, len(losses) + 1))
    assert {kind for _, kind, *_ in losses} == {"detection", "grounding", "image_text"}
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == {"dataset", "step", "standard", "fixed", "groups", "settings"}
    assert set(results["groups"]) == {"base", "novel"} and results["step"] == len(losses)
    assert {"AP", "AP50", "APr", "APc", "APf"} <= set(results["fixed"])
    assert json.loads((workdir / "config.json").read_text())["model"]["swin"]["embed_dim"] == 8
    for picture in [workdir / "losses.png", *(workdir / "detections").glob("*.png")]:
        assert min(Image.open(picture).size) > 100
    assert list((workdir / "tensorboard").glob("events*"))
    assert printed.count("compiled ") == 3, "one program for each (kind, canvas)"
    assert "fixed AP" in printed and "novel" in printed


@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_three_times_ends_with_the_same_losses(data, finished, tmp_path, seed):
    moments = random.Random(seed)
    expected = _losses(finished[0])
    log = tmp_path / "metrics.jsonl"
    for kill in range(3):
        # Somewhere in the next third of the run, and within a step of a line being written.
        after = moments.randint(kill * len(expected) // 3 + 1, (kill + 1) * len(expected) // 3)
        process = subprocess.Popen(
            tiny_run.command(data, tmp_path), env=tiny_run.environment(), cwd=tiny_run.ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (
            log.exists() and log.read_text().count("\n") >= after
        ):
            time.sleep(0.01)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = tiny_run.run(data, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert _losses(tmp_path) == expected
    a, b = (json.loads((w / "results.json").read_text()) for w in (tmp_path, finished[0]))
    assert a["fixed"] == b["fixed"]


def test_a_finished_run_started_again_only_reports(data, finished):
    before = (finished[0] / "metrics.jsonl").read_text()
    process = tiny_run.run(data, finished[0])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "going on after step" in process.stdout and "compiled " not in process.stdout
    assert (finished[0] / "metrics.jsonl").read_text() == before


def test_another_model_in_the_same_workdir_is_one_sentence(data, finished):
    process = tiny_run.run(data, finished[0], **{"model.swin.embed_dim": 16})
    assert process.returncode == 2
    assert "is of another model: backbone/" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 3}, "epoch"),
        ({"data_dir": "/nowhere"}, "prepare_data.py symbols --to=data/symbols"),
        ({"train.epochs": "many"}, "many"),
        ({"eval.dataset": "none.json"}, "none.json"),
        ({"data.detection.sources": "('grounding',)"}, "grounding"),
    ],
)
def test_a_mistake_at_the_start_is_one_sentence(data, tmp_path, overrides, message):
    process = tiny_run.run(data, tmp_path, **overrides)
    assert process.returncode == 2, process.stderr[-2000:]
    assert message in process.stderr and "Traceback" not in process.stderr
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")
