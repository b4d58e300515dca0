"""Jobs that are killed, shared, and that follow a run: every image counts just once."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_datasets
import tiny_model
import tiny_run
from PIL import Image
from test_evaluate import NAMES, make_set

from detclipv2_jax import evaluate
from detclipv2_jax.common.interruption import Interrupted
from detclipv2_jax.evaluation import datasets
from detclipv2_jax.evaluation import job as job_lib
from detclipv2_jax.inference import checkpoint
from detclipv2_jax.training import checkpointer, state
from detclipv2_jax.training.optimizer import OptimizerConfig, create

IMAGES = 40  # three parts, of batches of one
_PATIENCE = 300  # seconds, on a busy machine


@pytest.fixture
def run(monkeypatch):
    """A run of steps 7 and 9, of one device; step 9 is another model, the last and the best."""

    def load(path, step):
        loaded = tiny_model.loaded()
        loaded.graphdef, loaded.params = tiny_model.parts(seed=step - 7)
        return loaded

    monkeypatch.setattr(checkpoint, "steps", lambda path: [7, 9])
    monkeypatch.setattr(checkpoint, "best_step", lambda path: 9)
    monkeypatch.setattr(checkpoint, "is_finished", lambda path: True)
    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def dataset(tmp_path):
    return make_set(tmp_path, images=IMAGES)


def job(dataset, output, *flags):
    """Runs the command in this process; its exit status."""
    command = ["--checkpoint=run", f"--dataset={dataset}", f"--output={output}", "--batch_size=1"]
    return evaluate.main([*command, *flags])


def predictions(output):
    """Part → its arrays."""
    found = {}
    for path in sorted((output / "predictions").glob("part-*.npz")):
        with np.load(path) as file:
            found[path.name] = {name: file[name] for name in file.files}
    return found


def assert_same(output, expected):
    assert (output / "results.json").read_bytes() == (expected / "results.json").read_bytes()
    found, wanted = predictions(output), predictions(expected)
    assert len(found) == 3 and found.keys() == wanted.keys()
    for part in wanted:
        for name, array in wanted[part].items():
            np.testing.assert_array_equal(found[part][name], array)


def test_a_part_that_is_there_is_not_answered_again(run, dataset, tmp_path, capsys):
    assert job(dataset, tmp_path / "whole", "--step=7") == 0
    assert job(dataset, tmp_path / "out", "--step=7") == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    parts = tmp_path / "out" / "predictions"
    (parts / "part-00001.npz").unlink()
    (parts / "part-00002.npz").write_bytes((parts / "part-00002.npz").read_bytes()[:-9])
    (parts / ".part-00002.npz.1.partial").write_bytes(b"what a kill leaves")
    before = (parts / "part-00000.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert job(dataset, tmp_path / "out", "--step=7") == 0
    assert (parts / "part-00000.npz").stat().st_mtime_ns == before
    told = capsys.readouterr()
    assert "1 of 3 parts were answered before" in told.out
    assert f"{IMAGES - 16}/{IMAGES - 16} " in told.err
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_predictions_of_another_job_are_not_mixed_in(run, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert job(dataset, out, "--step=7") == 0
    for flags, told in (
        (["--step=9"], "step: 7 there, 9 now"),
        (["--step=7", "--prompts=a photo of a {}."], "settings: prompts null there"),
        (["--step=7", "--batch_size=2"], "settings: batch_size 1 there, batch_size 2 now"),
    ):
        capsys.readouterr()
        assert job(dataset, out, *flags) == 2
        error = capsys.readouterr().err
        assert f"{out}/predictions holds the predictions of another job ({told}" in error
        assert "give another --output" in error and "Traceback" not in error


def test_an_image_that_was_missing_is_asked_for_once_it_is_there(run, dataset, tmp_path):
    image, out = tmp_path / "images" / "3.png", tmp_path / "out"
    image.rename(tmp_path / "3.png")
    (tmp_path / "images" / "20.png").rename(tmp_path / "20.png")
    (tmp_path / "images" / "20.png").write_text("broken")
    assert job(dataset, out, "--step=7") == 0
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert settings["images_missing"] == settings["images_unreadable"] == 1
    (tmp_path / "3.png").rename(image)
    (tmp_path / "20.png").rename(tmp_path / "images" / "20.png")
    assert job(dataset, out, "--step=7") == 0
    assert job(dataset, tmp_path / "whole", "--step=7") == 0
    assert_same(out, tmp_path / "whole")


def test_several_devices_answer_as_one(run, dataset, tmp_path, monkeypatch):
    assert job(dataset, tmp_path / "one", "--step=7") == 0
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    assert len(jax.local_devices()) == 2
    assert job(dataset, tmp_path / "all", "--step=7") == 0
    assert_same(tmp_path / "all", tmp_path / "one")


def test_a_results_file_has_the_figures_of_the_job(run, dataset, tmp_path):
    out = tmp_path / "out"
    assert job(dataset, out, "--step=7", "--results_json") == 0
    flags = [f"--predictions={out}/predictions.json", f"--dataset={dataset}"]
    assert evaluate.main([*flags, f"--output={tmp_path}/again"]) == 0
    job_, file = (json.loads((d / "results.json").read_text()) for d in (out, tmp_path / "again"))
    assert job_["standard"] == file["standard"] and job_["fixed"] == file["fixed"]
    assert file["settings"]["entries"] > IMAGES


def test_several_checkpoints_make_a_table_over_steps(run, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert job(dataset, out, "--step=all") == 0
    printed = capsys.readouterr().out
    assert "2 checkpoints" in printed and "score above 0, NMS IoU 0.6" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert [row["step"] for row in summary["steps"]] == [7, 9]
    for row in summary["steps"]:
        alone = json.loads((out / f"step_{row['step']:08d}" / "results.json").read_text())
        assert row["fixed"] == alone["fixed"] and row["standard"] == alone["standard"]
    assert Image.open(out / "steps.png").width > 900  # a panel for each protocol
    for block in printed.split("2 checkpoints")[1].split("\n\n")[1:3]:
        assert ("fixed" in block) != ("standard" in block)
        assert block.count("\nstep ") == 2


@pytest.mark.parametrize(
    ("step", "folders"),
    [("best", [""]), ("9,7", ["step_00000007", "step_00000009"]), ("newest", [""])],
)
def test_checkpoints_are_chosen(run, tmp_path, step, folders):
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", f"--step={step}") == 0
    found = sorted((tmp_path / "out").rglob("results.json"))
    assert [str(path.parent.relative_to(tmp_path / "out")).strip(".") for path in found] == folders
    assert json.loads(found[-1].read_text())["step"] == 9


def test_an_unknown_step_is_told(run, tmp_path, capsys):
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", "--step=7,8") == 2
    assert "has no checkpoint of step 8: it has 7, 9" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job(dataset, tmp_path / "out", "--step=last")


def test_a_run_is_followed_to_its_last_step(run, tmp_path, monkeypatch, capsys):
    """Checkpoints come one by one; one of them is deleted before its turn."""
    there, load = [], checkpoint.load_model
    coming = iter([[5, 7], [7], [7, 9]])

    def wait(seconds):
        there[:] = next(coming)

    def load_model(path, step):
        if step == 5:  # training keeps the newest ones
            there.remove(5)
            raise FileNotFoundError
        return load(path, step)

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(checkpoint, "steps", lambda path: list(there))
    monkeypatch.setattr(checkpoint, "is_finished", lambda path: there[-1:] == [9])
    monkeypatch.setattr(job_lib.time, "sleep", wait)
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", "--follow") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["step"] for row in summary["steps"]] == [7, 9]
    printed = capsys.readouterr()
    assert "waiting for a checkpoint after step 7" in printed.out
    assert "step 5 was deleted before its turn" in printed.err


def test_sigterm_ends_a_job_with_its_own_exit_status(run, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checkpoint, "steps", lambda path: [])
    monkeypatch.setattr(job_lib.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert job(make_set(tmp_path, images=1), tmp_path / "out", "--follow") == 143
    assert "the same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Interrupted), job_lib._ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def test_odinw_has_a_row_a_set_and_their_average(run, tmp_path, capsys):
    test_datasets.make_odinw(tmp_path / "odinw")
    out = tmp_path / "out"
    assert job("odinw13", out, f"--data_dir={tmp_path}") == 0
    results = json.loads((out / "results.json").read_text())
    assert len(results["sets"]) == 13 and results["settings"]["images"] == 13
    found = [row["AP50"] for row in results["sets"].values()]
    assert results["average"]["AP50"] == pytest.approx(np.mean(found))
    alone = json.loads((out / "pothole" / "results.json").read_text())
    assert alone["coco"] == results["sets"]["pothole"]
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed if line.startswith(("average", "Raccoon"))] == [
        "average", "Raccoon",
    ]  # fmt: skip


def test_two_categories_of_one_name_are_answered_alike(run, tmp_path):
    dataset = make_set(tmp_path, images=2, federated=False)
    content = json.loads(dataset.read_text())
    content["categories"][1]["name"] = NAMES[0].upper()
    dataset.write_text(json.dumps(content))
    assert job(dataset, tmp_path / "out", "--results_json") == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    of = {key: [e["score"] for e in entries if e["category_id"] == key] for key in (0, 1)}
    shorter = min(map(len, of.values()))
    assert shorter and of[0][:shorter] == of[1][:shorter]


def test_an_empty_name_is_told_with_its_place(run, tmp_path, capsys):
    dataset = make_set(tmp_path, images=1)
    content = json.loads(dataset.read_text())
    for name in ("", " ", "_"):
        content["categories"][2]["name"] = name
        dataset.write_text(json.dumps(content))
        assert job(dataset, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "categories[2].name" in error or "name 3 of 4 is empty" in error


def test_without_annotations_there_are_no_figures(run, tmp_path, capsys):
    dataset = make_set(tmp_path, images=1)
    content = json.loads(dataset.read_text())
    dataset.write_text(json.dumps(content | {"annotations": []}))
    assert job(dataset, tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["fixed"]["AP"] is None and results["standard"]["AP"] is None
    assert " - " in capsys.readouterr().out


# ---- Real processes, with a checkpoint on disk.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of one checkpoint, of step 7."""
    directory = tmp_path_factory.mktemp("run")
    loaded = tiny_model.loaded()
    _, params = tiny_model.parts()
    new = state.create(params, create(OptimizerConfig(), params, 10))
    saver = checkpointer.Checkpointer(directory, 1)
    meta = {"config": {"model": tiny_model.CONFIG.to_dict(), **loaded.run}, "names": ["cat"]}
    meta |= {"total_steps": 7, "score": 0.5}
    saver.save(dataclasses.replace(new, step=jnp.asarray(7, jnp.int32)), meta, 0.5)
    saver.close()
    return directory


def start(workdir, dataset, output, *flags, devices=1):
    command = [sys.executable, "-m", "detclipv2_jax.evaluate", f"--checkpoint={workdir}"]
    command += [f"--dataset={dataset}", f"--output={output}", "--batch_size=1", *flags]
    xla = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count="
    return subprocess.Popen(
        command, env=tiny_run.environment() | {"XLA_FLAGS": f"{xla}{devices}"}, cwd=tiny_run.ROOT
    )


def test_the_checkpoint_tells_that_it_is_the_best_and_the_last(workdir):
    assert checkpoint.steps(workdir) == [7] and checkpoint.best_step(workdir) == 7
    assert checkpoint.is_finished(workdir) and checkpoint.load_model(workdir).total_steps == 7
    for half in ("8.orbax-checkpoint-tmp-1", "9.damaged"):
        (workdir / "checkpoints" / half).mkdir()
        assert checkpoint.steps(workdir) == [7]  # nothing that is written half
        (workdir / "checkpoints" / half).rmdir()
    assert checkpoint.steps(workdir / "none") == [] and not checkpoint.is_finished("none")


@pytest.mark.timeout(900)
def test_a_job_that_was_killed_goes_on_and_ends_as_if_nothing_had_been(
    workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    dataset = make_set(tmp_path, images=IMAGES)
    rng = np.random.default_rng(1)
    for n in range(16, IMAGES):  # what takes long enough to be killed in the middle
        Image.fromarray(rng.integers(0, 256, (1200, 1920, 3), np.uint8)).save(
            tmp_path / "images" / f"{n}.png"
        )
    out, first = tmp_path / "out", tmp_path / "out" / "predictions" / "part-00000.npz"
    process, deadline = start(workdir, dataset, out), time.monotonic() + _PATIENCE
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "results.json").exists() and len(predictions(out)) < 3
    before = first.stat().st_mtime_ns
    for output in (out, tmp_path / "whole"):
        assert job(dataset, output, f"--checkpoint={workdir}") == 0
    assert first.stat().st_mtime_ns == before
    assert_same(out, tmp_path / "whole")


@contextlib.contextmanager
def together(count, *args, devices=1):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = [f"--coordinator_address={address}", f"--num_processes={count}"]
    started = [start(*args, *flags, f"--process_id={n}", devices=devices) for n in range(count)]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("count", "devices"), [(2, 1), (2, 2), (4, 1)])
def test_processes_share_the_images_and_find_the_same(workdir, tmp_path, count, devices):
    dataset = make_set(tmp_path, images=IMAGES)
    assert start(workdir, dataset, tmp_path / "one").wait(_PATIENCE) == 0
    args = (workdir, dataset, tmp_path / "all")
    with together(count, *args, devices=devices) as started:
        assert [process.wait(_PATIENCE) for process in started] == [0] * count
    assert_same(tmp_path / "all", tmp_path / "one")
    assert not list((tmp_path / "all").glob(".*.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_one_process_finds_wrong_ends_all(workdir, tmp_path):
    """Of the step that is not there, process 0 tells the other; neither waits for long."""
    dataset = make_set(tmp_path, images=1)
    with together(2, workdir, dataset, tmp_path / "out", "--step=8") as started:
        assert [process.wait(120) for process in started] == [2, 2]


def test_sets_are_loaded_before_a_checkpoint_is(tmp_path, capsys):
    assert job(tmp_path / "none.json", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.json: no such file")
    assert datasets.NAMES
