"""Evaluation jobs that are killed, shared among processes, or follow a run."""

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
from detclipv2_jax.evaluation import datasets, threshold
from detclipv2_jax.evaluation import job as job_lib
from detclipv2_jax.inference import checkpoint, checkpoint_files
from detclipv2_jax.training import checkpointer, state
from detclipv2_jax.training.optimizer import OptimizerConfig, create

IMAGES = 40  # three chunks, with batches of one
_TIMEOUT = 300  # seconds; the machine may be busy


@pytest.fixture
def run(monkeypatch):
    """A run on one device with checkpoints of steps 7 and 9, the last and the best. They differ."""

    def load(path, step):
        graphdef, params = tiny_model.parts(seed=step - 7)
        return dataclasses.replace(tiny_model.loaded(), graphdef=graphdef, params=params)

    monkeypatch.setattr(checkpoint, "steps", lambda path: [7, 9])
    monkeypatch.setattr(checkpoint, "require_steps", lambda path: [7, 9])
    monkeypatch.setattr(checkpoint_files, "chosen_intact", lambda path: 9)
    monkeypatch.setattr(checkpoint_files, "newest_intact", lambda path: 9)
    monkeypatch.setattr(checkpoint, "best_step", lambda path: 9)
    monkeypatch.setattr(checkpoint, "is_finished", lambda path: True)
    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])


@pytest.fixture
def dataset(tmp_path):
    return make_set(tmp_path, images=IMAGES)


def job(dataset, output, *flags):
    """Run the command in this process; return its exit status."""
    command = ["--checkpoint=run", f"--dataset={dataset}", f"--output={output}", "--batch_size=1"]
    return evaluate.main([*command, *flags])


def predictions(output):
    """Return file name -> arrays of the chunks."""
    found = {}
    for path in sorted((output / "predictions").glob("part-*.npz")):
        with np.load(path) as file:
            found[path.name] = {name: file[name] for name in file.files}
    return found


def assert_same(output, expected):
    assert (output / "results.json").read_bytes() == (expected / "results.json").read_bytes()
    found, wanted = predictions(output), predictions(expected)
    assert len(found) == 3 and found.keys() == wanted.keys()
    for chunk in wanted:
        for name, array in wanted[chunk].items():
            np.testing.assert_array_equal(found[chunk][name], array)


def test_complete_chunks_are_not_answered_again(run, dataset, tmp_path, capsys):
    assert job(dataset, tmp_path / "whole", "--step=7") == 0
    assert job(dataset, tmp_path / "out", "--step=7") == 0
    assert_same(tmp_path / "out", tmp_path / "whole")
    chunks = tmp_path / "out" / "predictions"
    (chunks / "part-00001.npz").unlink()
    (chunks / "part-00002.npz").write_bytes((chunks / "part-00002.npz").read_bytes()[:-9])
    (chunks / ".part-00002.npz.1.partial").write_bytes(b"left by a kill")
    before = (chunks / "part-00000.npz").stat().st_mtime_ns
    capsys.readouterr()
    assert job(dataset, tmp_path / "out", "--step=7") == 0
    assert (chunks / "part-00000.npz").stat().st_mtime_ns == before
    printed = capsys.readouterr()
    assert "1 of 3 chunks of images are answered" in printed.out
    assert f"{IMAGES - 16}/{IMAGES - 16} " in printed.err
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_answers_of_another_job_are_refused(run, dataset, tmp_path, capsys):
    out = tmp_path / "out"
    assert job(dataset, out, "--step=7") == 0
    for flags, difference in (
        (["--step=9"], "step: stored 7, now 9"),
        (["--step=7", "--prompts=a photo of a {}."], "settings: stored prompts null"),
        (["--step=7", "--batch_size=2"], "settings: stored batch_size 1, now batch_size 2"),
    ):
        capsys.readouterr()
        assert job(dataset, out, *flags) == 2
        error = capsys.readouterr().err
        assert f"{out}/predictions has the answers of another job ({difference}" in error
        assert "Choose another --output" in error and "Traceback" not in error


def test_a_job_of_an_older_version_resumes(run, dataset, tmp_path, capsys):
    """Version 1da9f15 called two settings `keep` and `candidates`."""
    out = tmp_path / "out"
    assert job(dataset, out, "--step=7") == 0
    path = out / "predictions" / "job.json"
    stored = json.loads(path.read_text())
    stored["settings"]["keep"] = stored["settings"].pop("max_detections")
    stored["settings"]["candidates"] = stored["settings"].pop("pre_nms_top_k")
    path.write_text(json.dumps(stored))
    (out / "predictions" / "part-00002.npz").unlink()
    capsys.readouterr()
    assert job(dataset, out, "--step=7") == 0
    assert "2 of 3 chunks of images are answered" in capsys.readouterr().out


def test_chunks_with_missing_images_are_answered_again(run, dataset, tmp_path):
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


def test_several_devices_give_the_answers_of_one(run, dataset, tmp_path, monkeypatch):
    assert job(dataset, tmp_path / "one", "--step=7") == 0
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    assert len(jax.local_devices()) == 2
    assert job(dataset, tmp_path / "all", "--step=7") == 0
    assert_same(tmp_path / "all", tmp_path / "one")


def test_a_results_file_has_the_metrics_of_the_job(run, dataset, tmp_path):
    out = tmp_path / "out"
    assert job(dataset, out, "--step=7", "--results_json") == 0
    flags = [f"--predictions={out}/predictions.json", f"--dataset={dataset}"]
    assert evaluate.main([*flags, f"--output={tmp_path}/again"]) == 0
    job_, file = (json.loads((d / "results.json").read_text()) for d in (out, tmp_path / "again"))
    assert job_["standard"] == file["standard"] and job_["fixed"] == file["fixed"]
    assert file["settings"]["entries"] > IMAGES


def test_several_checkpoints_give_a_table_over_steps(run, dataset, tmp_path, capsys):
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
def test_step_chooses_checkpoints(run, tmp_path, step, folders):
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", f"--step={step}") == 0
    found = sorted((tmp_path / "out").rglob("results.json"))
    assert [str(path.parent.relative_to(tmp_path / "out")).strip(".") for path in found] == folders
    assert json.loads(found[-1].read_text())["step"] == 9


def test_an_unknown_step_is_an_error(run, tmp_path, capsys):
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", "--step=7,8") == 2
    assert "has no checkpoint of step 8. Its steps are 7, 9." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job(dataset, tmp_path / "out", "--step=last")


def test_follow_evaluates_a_run_to_its_last_step(run, tmp_path, monkeypatch, capsys):
    """Checkpoints are written one by one; one of them is deleted before it is evaluated."""
    present, load = [], checkpoint.load_model
    written = iter([[5, 7], [7], [7, 9]])

    def wait(seconds):
        present[:] = next(written)

    def load_model(path, step):
        if step == 5:  # training keeps the newest ones
            present.remove(5)
            raise FileNotFoundError
        return load(path, step)

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    monkeypatch.setattr(checkpoint, "steps", lambda path: list(present))
    monkeypatch.setattr(checkpoint, "is_finished", lambda path: present[-1:] == [9])
    monkeypatch.setattr(job_lib.time, "sleep", wait)
    dataset = make_set(tmp_path, images=1)
    assert job(dataset, tmp_path / "out", "--follow") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["step"] for row in summary["steps"]] == [7, 9]
    printed = capsys.readouterr()
    assert "waiting for a checkpoint after step 7" in printed.out
    assert "training deleted the checkpoint of step 5" in printed.err


def test_sigterm_ends_a_job_with_its_own_exit_status(run, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checkpoint, "steps", lambda path: [])
    monkeypatch.setattr(job_lib.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert job(make_set(tmp_path, images=1), tmp_path / "out", "--follow") == 143
    assert "Run the same command to resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_odinw_has_a_row_per_dataset_and_their_average(run, tmp_path, capsys):
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


def test_the_fitted_threshold_is_offered_and_stored_only_if_asked(
    run, dataset, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    fit = {"score_threshold": 0.07, "f1": 0.5, "precision": 0.5, "recall": 0.5, "iou": 0.5}
    fit |= {"dataset": "val.json", "images": 1, "boxes": 1}
    monkeypatch.setattr(threshold, "fitted", lambda *_: fit)
    flags = [f"--dataset={dataset}", f"--output={tmp_path / 'out'}", f"--checkpoint={workdir}"]
    assert evaluate.main([*flags, "--step=7"]) == 0
    out = capsys.readouterr().out
    assert "score threshold with the best F1: 0.07 (F1 0.500" in out
    assert "--store_threshold stores the one above in the run" in out
    assert not list(workdir.iterdir())
    assert json.loads((tmp_path / "out/results.json").read_text())["threshold"] == fit

    assert evaluate.main([*flags, "--step=7", "--store_threshold"]) == 0
    assert "stored the score threshold 0.07 in" in capsys.readouterr().out
    stored = json.loads((workdir / "thresholds.json").read_text())
    assert stored == {"7": fit | {"step": 7}}
    odinw = ["--dataset=odinw13", f"--data_dir={tmp_path}", "--store_threshold"]
    assert evaluate.main([*flags[1:], *odinw]) == 2


def test_two_categories_of_one_name_get_the_same_scores(run, tmp_path):
    dataset = make_set(tmp_path, images=2, federated=False)
    content = json.loads(dataset.read_text())
    content["categories"][1]["name"] = NAMES[0].upper()
    dataset.write_text(json.dumps(content))
    assert job(dataset, tmp_path / "out", "--results_json") == 0
    entries = json.loads((tmp_path / "out" / "predictions.json").read_text())
    of = {key: [e["score"] for e in entries if e["category_id"] == key] for key in (0, 1)}
    shorter = min(map(len, of.values()))
    assert shorter and of[0][:shorter] == of[1][:shorter]


def test_an_empty_name_is_located(run, tmp_path, capsys):
    dataset = make_set(tmp_path, images=1)
    content = json.loads(dataset.read_text())
    for name in ("", " ", "_"):
        content["categories"][2]["name"] = name
        dataset.write_text(json.dumps(content))
        assert job(dataset, tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "categories[2].name" in error or "name 3 of 4 is empty" in error


def test_metrics_are_none_without_annotations(run, tmp_path, capsys):
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
    """A run with one checkpoint, of step 7."""
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


def test_a_checkpoint_knows_whether_it_is_the_best_and_the_last(workdir):
    assert checkpoint.steps(workdir) == [7] and checkpoint.best_step(workdir) == 7
    assert checkpoint.is_finished(workdir) and checkpoint.load_model(workdir).total_steps == 7
    for half in ("8.orbax-checkpoint-tmp-1", "DAMAGED-9"):
        (workdir / "checkpoints" / half).mkdir()
        assert checkpoint.steps(workdir) == [7]  # incomplete checkpoints are ignored
        (workdir / "checkpoints" / half).rmdir()
    assert checkpoint.steps(workdir / "none") == [] and not checkpoint.is_finished("none")


@pytest.mark.timeout(900)
def test_a_killed_job_resumes_and_gives_the_results_of_an_uninterrupted_one(
    workdir, tmp_path, monkeypatch
):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    dataset = make_set(tmp_path, images=IMAGES)
    rng = np.random.default_rng(1)
    for n in range(16, IMAGES):  # large, so that the job is killed in the middle
        Image.fromarray(rng.integers(0, 256, (1200, 1920, 3), np.uint8)).save(
            tmp_path / "images" / f"{n}.png"
        )
    out, first = tmp_path / "out", tmp_path / "out" / "predictions" / "part-00000.npz"
    process, deadline = start(workdir, dataset, out), time.monotonic() + _TIMEOUT
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
def test_several_processes_give_the_results_of_one(workdir, tmp_path, count, devices):
    dataset = make_set(tmp_path, images=IMAGES)
    assert start(workdir, dataset, tmp_path / "one").wait(_TIMEOUT) == 0
    args = (workdir, dataset, tmp_path / "all")
    with together(count, *args, devices=devices) as started:
        assert [process.wait(_TIMEOUT) for process in started] == [0] * count
    assert_same(tmp_path / "all", tmp_path / "one")
    assert not list((tmp_path / "all").glob(".*.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_error_in_process_0_ends_all_processes(workdir, tmp_path):
    """Process 0 reports the missing step to the other one; neither waits for long."""
    dataset = make_set(tmp_path, images=1)
    with together(2, workdir, dataset, tmp_path / "out", "--step=8") as started:
        assert [process.wait(120) for process in started] == [2, 2]


def test_datasets_are_loaded_before_a_checkpoint(tmp_path, capsys):
    assert job(tmp_path / "none.json", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/none.json: no such file")
    assert datasets.NAMES
