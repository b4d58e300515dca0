import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run
from PIL import Image

from detclipv2_jax import export
from detclipv2_jax.common import lock
from detclipv2_jax.inference import checkpoint, detector
from detclipv2_jax.text import tokenizer
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import utilization

STOPPED = r"stopped by SIGTERM after step (\d+), which is saved\. Run the same command"


@pytest.fixture(scope="session")
def data(made_once):
    return made_once("symbols", tiny_run.prepare)


@pytest.fixture(scope="session")
def finished(data, made_once):
    """An undisturbed run, profiled in steps 3 and 4: (workdir, standard output). Read only."""

    def make(workdir):
        process = _run_with(data, workdir, "--profile=3:5")
        assert process.returncode == 0, process.stderr[-3000:]
        (workdir / "stdout").write_text(process.stdout)

    workdir = made_once("finished", make)
    return workdir, (workdir / "stdout").read_text()


def _run_with(data, workdir, *options, **overrides):
    """As `tiny_run.run`, with more options."""
    line = [*tiny_run.command(data, workdir, **overrides), *options]
    environment = tiny_run.environment()
    return subprocess.run(line, env=environment, capture_output=True, text=True, cwd=tiny_run.ROOT)


def _losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["kind"], x["loss"], x["gradient_norm"]) for x in lines if "kind" in x]


def _checkpoints(workdir):
    root = workdir / "checkpoints"
    return sorted(int(p.name) for p in root.iterdir() if p.name.isdigit()) if root.is_dir() else []


def _check_goodput(workdir, printed, lost):
    """Goodput over all starts: in the log, by part in the checkpoint, and in the final report."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "kind" in line]
    totals = [line["seconds"] for line in lines]
    assert totals == sorted(totals)
    for line in lines:
        assert 0 < line["goodput"] < 1 and 0 <= line["data_wait"] < 1
        assert 0 < line["step_seconds"] < 60 and line["model_tflops_per_second"] > 0
    # A busy host may notice the end of one step late and give its time to the next; the mean holds.
    seconds = [line["step_seconds"] for line in lines]
    mfu = sum(line["mfu"] * s for line, s in zip(lines, seconds)) / sum(seconds)
    assert 0 < mfu < 2
    newest = workdir / f"checkpoints/{_checkpoints(workdir)[-1]}"
    parts = json.loads((newest / "meta/metadata").read_text())["seconds"]
    assert parts.keys() - {"lost"} == {
        "start", "compile", "other", "data", "train", "evaluate", "checkpoint"
    }  # fmt: skip
    assert (parts.get("lost", 0) > 0) == lost
    assert sum(parts.values()) >= totals[-1]
    assert re.search(r"\ngoodput \d+% of \d+ s \(this start \d+%\); the rest: \w+ \d+ s", printed)


def test_a_run_writes_the_files_that_the_readme_lists(finished):
    workdir, printed = finished
    losses = _losses(workdir)
    assert [step for step, *_ in losses] == list(range(1, len(losses) + 1))
    assert {kind for _, kind, *_ in losses} == {"detection", "grounding", "image_text"}
    results = json.loads((workdir / "results.json").read_text())
    assert set(results) == {
        "dataset", "step", "standard", "fixed", "groups", "settings", "threshold"
    }  # fmt: skip
    assert set(results["groups"]) == {"base", "novel"} and results["step"] == len(losses)
    assert {"AP", "AP50", "APr", "APc", "APf"} <= set(results["fixed"])
    assert json.loads((workdir / "config.json").read_text())["model"]["swin"]["embed_dim"] == 8
    pictures = [*(workdir / "detections").glob("*.png")]
    pictures += (phrases := [*(workdir / "detections/phrases").glob("*.png")])
    assert [path.name for path in phrases] == [f"step_{len(losses):08d}.png"]
    for picture in [workdir / "losses.png", *pictures]:
        assert min(Image.open(picture).size) > 100
    assert list((workdir / "tensorboard").glob("events*"))
    assert printed.count("compiled ") == 3, "one program for each (kind, canvas)"
    assert "fixed AP" in printed and "novel" in printed
    assert re.search(r"peak of a device \(cpu\): \S+ TFLOP/s \(measured, float32 ", printed)
    _check_goodput(workdir, printed, lost=False)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_losses(data, finished, tmp_path, kills):
    moments = random.Random(kills)
    expected = _losses(finished[0])
    log, redone = tmp_path / "metrics.jsonl", 0
    for kill in range(kills):
        # Somewhere in the next part of the run, and within a step of a line being written.
        part = len(expected) // kills
        after = moments.randint(kill * part + 1, (kill + 1) * part)
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
        redone += _losses(tmp_path)[-1][0] - max(_checkpoints(tmp_path), default=0)
    process = tiny_run.run(data, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert _losses(tmp_path) == expected
    _check_goodput(tmp_path, process.stdout, lost=redone > 0)
    a, b = (json.loads((w / "results.json").read_text()) for w in (tmp_path, finished[0]))
    assert a["fixed"] == b["fixed"]


def test_a_run_stopped_by_sigterm_whose_checkpoint_is_damaged_ends_with_the_same_losses(
    data, finished, tmp_path
):
    expected, log = _losses(finished[0]), tmp_path / "metrics.jsonl"
    process = subprocess.Popen(
        tiny_run.command(data, tmp_path), env=tiny_run.environment(), cwd=tiny_run.ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 6):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, stderr[-3000:]
    step = int(re.search(STOPPED, stderr)[1])
    saved = _checkpoints(tmp_path)
    assert saved[-1] == step and saved[0] == 4
    assert log.read_text().count("\n") == step  # every line is there

    for file in (tmp_path / "checkpoints" / str(step) / "model").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    process = tiny_run.run(data, tmp_path)
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"checkpoints/{step} must not be used (model/" in process.stdout
    assert "resuming after step 4" in process.stdout or step > 8
    assert (tmp_path / "checkpoints" / f"DAMAGED-{step}").is_dir()
    assert _losses(tmp_path) == expected


def _start(data, workdir, **overrides):
    workdir.mkdir()
    with open(workdir / "stderr", "w") as stderr:
        return subprocess.Popen(
            tiny_run.command(data, workdir, **overrides), env=tiny_run.environment(),
            cwd=tiny_run.ROOT, stdout=subprocess.DEVNULL, stderr=stderr,
        )  # fmt: skip


@contextlib.contextmanager
def _started(data, workdir, **overrides):
    run = _start(data, workdir, **{"train.epochs": 50.0}, **overrides)
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def _wait_until(process, what):
    while process.poll() is None and not what():
        time.sleep(0.005)
    assert process.poll() is None, process.args


@pytest.mark.slow
def test_signals_while_it_evaluates_while_it_saves_and_twice(data, tmp_path):
    """Three runs, each stopped at another moment."""
    evaluating, saving, hasty = (tmp_path / name for name in ("evaluating", "saving", "hasty"))

    def lines(workdir):
        log = workdir / "metrics.jsonl"
        return log.read_text().splitlines() if log.exists() else []

    # The line of a step is written before its evaluation, the line of the evaluation after it.
    with _started(data, evaluating, **{"train.eval_every": 1}) as run:
        _wait_until(run, lambda: len(lines(evaluating)) == 3)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    with _started(data, saving, **{"train.checkpoint_every": 1}) as run:
        _wait_until(run, lambda: list(saving.glob("checkpoints/*-tmp")) and lines(saving))
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    with _started(data, hasty) as run:
        _wait_until(run, lambda: lines(hasty))
        run.send_signal(signal.SIGINT)
        _wait_until(run, lambda: "press Ctrl-C again" in (hasty / "stderr").read_text())
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 128 + signal.SIGINT
    for workdir in (evaluating, saving):
        stderr = (workdir / "stderr").read_text()
        step = int(re.search(STOPPED, stderr)[1])
        assert _checkpoints(workdir)[-1] == step == _losses(workdir)[-1][0]
        assert not list(workdir.glob("checkpoints/*-tmp"))
    assert any("fixed/AP" in json.loads(line) for line in lines(evaluating)[3:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_at_once(data, tmp_path, number):
    """At random moments: imports, reading, initialization, tracing, compilation."""
    runs = [_start(data, tmp_path / str(i), **{"train.epochs": 50.0}) for i in range(3)]
    for i, run in enumerate(runs):
        time.sleep(random.uniform(0.5, 3))
        run.send_signal(number)
        assert run.wait(20) != 0
        stderr = (tmp_path / str(i) / "stderr").read_text()
        assert run.returncode in (128 + number, -number), stderr[-2000:]
    assert not list(tmp_path.glob("*/checkpoints/*"))


def test_a_workdir_that_cannot_be_written_to_is_a_user_error(
    data, finished, tmp_path, make_read_only
):
    """For a new run and for one to resume, whose checkpoints stay."""
    shutil.copytree(finished[0], tmp_path / "locked/finished")
    make_read_only(tmp_path / "locked")
    for name in ("new", "finished"):
        process = tiny_run.run(data, tmp_path / "locked" / name, **{"train.epochs": 3.0})
        assert process.returncode == 2, process.stderr[-3000:]
        assert "Traceback" not in process.stderr
        assert f"locked/{name}" in process.stderr.splitlines()[-1]
        assert "cannot be" in process.stderr.splitlines()[-1]
    assert _checkpoints(tmp_path / "locked/finished") == _checkpoints(finished[0])


@pytest.mark.slow
def test_a_start_on_a_full_disk_is_a_user_error_and_works_when_there_is_room(
    data, finished, small_disk, fill
):
    run = small_disk / "run"
    shutil.copytree(finished[0], run)
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    filling = fill(small_disk, 0)
    process = tiny_run.run(data, run)
    assert process.returncode == 2, process.stderr[-3000:]
    assert re.fullmatch(
        r"error: .*run/\S+: cannot be written \(No space left on device\)\. Free disk space, then "
        r"run the same command again\.",
        process.stderr.splitlines()[-1],
    )
    assert "Traceback" not in process.stderr
    filling.unlink()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    process = tiny_run.run(data, run)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resuming after step" in process.stdout and _losses(run) == _losses(finished[0])


def _damage(source, count):
    """Overwrite the first bytes of some stored images of a source, as a bad disk would."""
    shards = sorted(source.glob("*.array_record-*"))
    content = bytearray(shards[0].read_bytes())
    starts = [found.start() for found in re.finditer(b"\xff\xd8\xff", content)]
    for start in random.Random(0).sample(starts, count):
        content[start : start + 3] = bytes(3)
    shards[0].write_bytes(content)


@pytest.mark.slow
def test_a_run_over_data_with_damaged_images_finishes_and_counts_them(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    _damage(tmp_path / "data/detection", 1)
    _damage(tmp_path / "data/image_text", 2)
    share = {"data.max_broken_share": 0.06}
    process = tiny_run.run(tmp_path / "data", tmp_path / "run", **share)
    assert process.returncode == 0, process.stderr[-3000:]
    # Two epochs of 24, 16 and 40 records.
    assert "\ndetection: 2 of 48 records could not be read" in process.stdout
    assert "\nimage_text: 4 of 80 records could not be read" in process.stdout
    assert "\ngrounding: " not in process.stdout
    assert "record" in process.stderr and "source 'detection'" in process.stderr
    assert all(math.isfinite(loss) for _, _, loss, _ in _losses(tmp_path / "run"))
    assert (tmp_path / "run/results.json").is_file()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = [line for line in lines if "kind" in line][-1]
    assert counts["input/unreadable/detection"] == 2 and counts["input/read/detection"] == 48
    assert counts["input/unreadable/image_text"] == 4 and counts["input/unreadable/grounding"] == 0


@pytest.mark.slow
def test_data_that_has_no_room_is_counted(data, tmp_path):
    small = {"data.detection.max_boxes": 1, "data.grounding.table_size": 4, "train.epochs": 1.0}
    small |= {"data.detection.crop": True, "data.detection.scales": (1.5, 2.0), "eval.dataset": ""}
    process = tiny_run.run(data, tmp_path, **small)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("cut_boxes", "dropped_concepts", "cropped_boxes"):
        counts = [line[f"input/{name}"] for line in lines]
        assert counts == sorted(counts) and counts[-1] > 0
        assert f"\ninput: {counts[-1]} " in process.stdout
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events*"))
    assert b"input/cut_boxes" in events and b"detection/mfu" in events


@pytest.mark.slow
def test_a_run_with_rungs_compiles_each_canvas_and_counts_its_own_flops(data, tmp_path):
    rungs = {"data.detection.rungs": (0.5, 1.0), "data.detection.scales": (0.5, 1.0)}
    process = tiny_run.run(data, tmp_path, **rungs, **{"eval.dataset": "", "train.epochs": 3.0})
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.count("compiled ") == 4
    assert "\ndetection: canvases 64×64, 128×128; images cover " in process.stdout
    assert "\ndetection: images covered " in process.stdout
    config = config_lib.parse(json.loads((tmp_path / "config.json").read_text()))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    canvases = {line["canvas"] for line in lines if line["kind"] == "detection"}
    assert canvases == {"64x64", "128x128"}
    for line in lines:
        canvas = tuple(map(int, line["canvas"].split("x")))
        flops = utilization.model_flops(config, line["kind"], canvas)
        done = line["model_tflops_per_second"] * 1e12 * line["step_seconds"]
        assert done == pytest.approx(flops, rel=1e-3)


def test_a_profile_of_some_steps_is_written(finished):
    workdir, printed = finished
    assert f"profile: steps 3 to 4 are in {workdir}/profile. To open" in printed
    (trace,) = (workdir / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 10_000


@pytest.mark.slow
def test_a_resumed_run_is_profiled_in_the_steps_that_it_does(data, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    first, *later = _checkpoints(workdir)
    for step in later:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    process = _run_with(data, workdir, f"--profile={first}:{first + 3}")
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"profile: steps {first + 1} to {first + 2} are in" in process.stdout


def test_steps_to_profile_that_the_run_does_not_have_are_refused(data, tmp_path):
    process = _run_with(data, tmp_path, "--profile=1:99")
    assert process.returncode == 2
    assert "--profile=1:99 is outside of the run, which has steps 1 to " in process.stderr


_POISONED = """
import dataclasses, itertools, runpy, sys
import jax
import numpy as np
from detclipv2_jax.training import train

compile_programs, steps = train.compile_programs, {steps}

def poisoned(*args):
    def program(compiled):
        def run(state, batch):
            bad = next(count) in steps
            params = dict(state.params)
            if bad:
                scale = params["logit_scale"]
                nan = np.float32(np.nan)
                params["logit_scale"] = jax.device_put(nan, scale.sharding) if {explicit} else nan
            new, values = compiled(dataclasses.replace(state, params=params), batch)
            if bad:  # only this step gets the bad value
                new = dataclasses.replace(new, params=new.params | {{"logit_scale": scale}})
            return new, values
        return run
    count = itertools.count()
    return {{key: program(value) for key, value in compile_programs(*args).items()}}

train.compile_programs = poisoned
sys.argv[0] = "main"
runpy.run_module("detclipv2_jax.main", run_name="__main__")
"""


def _run_poisoned(data, workdir, steps, explicit=True, **overrides):
    _, _, _, *arguments = tiny_run.command(data, workdir, **overrides)
    return subprocess.run(
        [sys.executable, "-c", _POISONED.format(steps=steps, explicit=explicit), *arguments],
        env=tiny_run.environment(), capture_output=True, text=True, cwd=tiny_run.ROOT,
    )  # fmt: skip


def test_steps_that_are_not_finite_are_skipped_and_the_run_continues(data, tmp_path):
    process = _run_poisoned(data, tmp_path, {2, 3, 7})
    assert process.returncode == 0, process.stderr[-3000:]
    assert "3 updates were skipped: loss or gradient was not finite" in process.stdout
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "kind" in line]
    bad = [line["step"] for line in lines if None in (line["loss"], line["gradient_norm"])]
    assert bad == [3, 4, 8]
    assert [line["skipped"] for line in lines[:8]] == [0, 0, 1, 2, 2, 2, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines[8:])


@pytest.mark.slow
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(data, tmp_path):
    process = _run_poisoned(data, tmp_path, set(range(5, 99)), **{"train.max_skipped": 3})
    assert process.returncode == 2
    assert re.search(
        r"error: the last 3 updates, up to step 8 \(\w+, records .*last good checkpoint is that of "
        r"step 4\. Resume",
        process.stderr,
    )


@pytest.mark.slow
def test_an_implicit_transfer_ends_the_run(data, tmp_path):
    process = _run_poisoned(data, tmp_path, {1}, explicit=False)
    assert process.returncode == 1 and "Disallowed host-to-device transfer" in process.stderr


_WATCHED = """
import gc, itertools, resource, runpy, sys
import jax
from detclipv2_jax.training import train

compile_programs = train.compile_programs

def watched(*args):
    def program(compiled):
        def run(state, batch):
            if (step := next(count)) % 500 == 0:
                jax.block_until_ready(state)
                gc.collect()
                with open("/proc/self/statm") as file:
                    pages = int(file.read().split()[1])
                megabytes = pages * resource.getpagesize() / 1e6
                print("look", sys.getallocatedblocks(), len(jax.live_arrays()), megabytes)
            return compiled(state, batch)
        return run
    count = itertools.count()
    return {key: program(value) for key, value in compile_programs(*args).items()}

train.compile_programs = watched
sys.argv[0] = "main"
runpy.run_module("detclipv2_jax.main", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_does_not_grow_over_thousands_of_steps(data, tmp_path):
    """From step 500 on Python's objects grow by 0.1 per step, and arrays not at all."""
    small = {"train.epochs": 50.0, "train.checkpoint_every": 0, "eval.dataset": ""}
    small |= {f"data.{kind}.batch_size": 2 for kind in ("detection", "grounding", "image_text")}
    small |= {f"data.{kind}.shapes": ((64, 64),) for kind in ("detection", "grounding")}
    small |= {"data.image_text.shapes": ((32, 32),), "loss.proposals.group": 2}
    _, _, _, *arguments = tiny_run.command(data, tmp_path, **small)
    process = subprocess.run(
        [sys.executable, "-c", _WATCHED, *arguments],
        env=tiny_run.environment(), capture_output=True, text=True, cwd=tiny_run.ROOT,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    seen = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("look")]
    print(seen)
    (_, first, *_, last) = [(int(a), int(b), float(c)) for a, b, c in seen]
    assert len(seen) == 5
    blocks, arrays, megabytes = (after - before for before, after in zip(first, last))
    assert blocks < 1500 / 2 and arrays < 10 and megabytes < 10


def test_a_finished_run_that_is_started_again_only_reports(data, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    process = tiny_run.run(data, workdir)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "resuming after step" in process.stdout and "compiled " not in process.stdout
    assert ": the run is finished, and nothing is left to train" in process.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_start_that_is_refused_changes_nothing(data, finished, tmp_path):
    """Another process trains in the workdir; the run is finished and the settings are new."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with lock.held(workdir, "trains here", "wait"):
        process = tiny_run.run(data, workdir)
        assert process.returncode == 2
        assert re.search(
            rf"error: {workdir}: process {os.getpid()} on host \S+ trains here since .*\. Wait for "
            r"it, or give another --workdir\.$",
            process.stderr.strip(),
        )
    process = tiny_run.run(data, workdir, **{"optimizer.learning_rate": 0.5})
    assert process.returncode == 2
    assert "would train nothing: config.optimizer.learning_rate is 0.5, was" in process.stderr
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files


@pytest.mark.slow
def test_a_run_starts_from_an_exported_model(data, finished, tmp_path):
    directory = tmp_path / "exported"
    assert export.main([f"--checkpoint={finished[0]}", f"--output={directory}"]) == 0
    start = {"init.model": directory / "model.safetensors", "optimizer.learning_rate": 0.0}
    process = tiny_run.run(data, tmp_path / "run", **start, **{"train.epochs": 0.01})
    assert process.returncode == 0, process.stderr[-3000:]
    assert f"model from {directory}/model.safetensors (detclipv2_jax)" in process.stdout
    a, b = (json.loads((w / "results.json").read_text()) for w in (tmp_path / "run", finished[0]))
    assert a["step"] < b["step"] and a["fixed"] == b["fixed"] and a["standard"] == b["standard"]
    process = tiny_run.run(data, tmp_path / "other", **{"init.backbone": tmp_path / "none.pth"})
    assert process.returncode == 2 and "none.pth does not exist" in process.stderr


def test_a_checkpoint_is_known_as_the_last_and_as_the_best_of_its_run(finished):
    workdir, _ = finished
    assert checkpoint.is_finished(workdir)
    assert checkpoint.best_step(workdir) == checkpoint.steps(workdir)[-1]


def test_a_checkpoint_has_the_threshold_of_its_evaluation(finished):
    workdir, _ = finished
    results = json.loads((workdir / "results.json").read_text())
    loaded = checkpoint.load_model(workdir)
    if results["threshold"] is None:  # a run of seconds may find nothing
        assert loaded.threshold is None
    else:
        assert loaded.threshold == results["threshold"] | {"step": results["step"]}


def test_a_resumed_run_keeps_the_threshold_until_it_evaluates(data, finished, tmp_path):
    workdir, fitted = tmp_path / "run", {"score_threshold": 0.37, "step": 3}
    shutil.copytree(finished[0], workdir)
    newest = workdir / "checkpoints" / str(_checkpoints(workdir)[-1])
    meta = json.loads((newest / "meta/metadata").read_text()) | {"threshold": fitted}
    meta["digests"] = False  # as in an old checkpoint, so that its meta can be edited
    (newest / "digests.sha256").unlink()
    (newest / "meta/metadata").write_text(json.dumps(meta))
    process = tiny_run.run(data, workdir, **{"train.epochs": 2.2, "eval.dataset": ""})
    assert process.returncode == 0, process.stderr[-3000:]
    assert _checkpoints(workdir)[-1] > int(newest.name)
    assert checkpoint.load_model(workdir).threshold == fitted


@pytest.mark.slow
def test_a_run_is_fine_tuned_with_rehearsal_and_zero_shot_evaluation(data, finished, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("grounding", "image_text", "archives"):
        (tmp_path / "data" / name).symlink_to(data / name)
    (tmp_path / "data/target").mkdir()
    (tmp_path / "data/target/detection").symlink_to(data / "detection")
    dataset = {"eval.dataset": data / "archives/annotations/lvis_val.json"}
    start = {"init.model": finished[0], "eval.images": "archives/images/val"}
    line = tiny_run.command(tmp_path / "data", tmp_path / "run", **dataset, **start)
    line = [part.replace("pretrain.py:nano", "finetune_coco_format.py:nano") for part in line]
    process = subprocess.run(
        line, env=tiny_run.environment(), capture_output=True, text=True, cwd=tiny_run.ROOT
    )
    assert process.returncode == 0, process.stderr[-3000:]
    # 24 scenes; half as many phrases, twice as many captions as there are; all in batches of 8.
    epoch = "20 steps, 10 per epoch (3 detection, 2 grounding, 5 image_text"
    assert f"{epoch}; 7 of them rehearsal)" in process.stdout
    assert f"model from {finished[0]} (detclipv2_jax)" in process.stdout
    assert f"{tmp_path}/data/detection is missing, so it is not rehearsed" in process.stdout
    before, after, pretrained = (
        json.loads(path.read_text())
        for path in (
            tmp_path / "run/before.json",
            tmp_path / "run/results.json",
            finished[0] / "results.json",
        )
    )
    assert before["fixed"] == before["zero_shot"]["fixed"] == pretrained["fixed"]
    assert before["step"] == 0 and after["step"] == 20
    assert (tmp_path / "run/zero_shot/results.json").is_file()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[0]["zero_shot/fixed/AP"] == before["fixed"]["AP"]
    assert re.search(r"before +after\nstandard/AP", process.stdout)
    assert "zero_shot/novel/fixed/AP" in process.stdout


def test_another_model_in_the_same_workdir_is_a_user_error(data, finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    process = tiny_run.run(data, workdir, **{"model.swin.embed_dim": 16})
    assert process.returncode == 2
    assert "is of another model: backbone/" in process.stderr and "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.epoch": 3}, "--config.train.epoch is not a field of the config. Did you mean"),
        ({"trian.epochs": 3}, "--config.trian is not a field of the config. Did you mean train?"),
        ({"data_dir": "/nowhere"}, "detclip prepare symbols --to=data/symbols"),
        ({"train.epochs": "many"}, "many"),
        ({"eval.dataset": "none.json"}, "none.json"),
        ({"data.detection.sources": "('grounding',)"}, "grounding"),
    ],
)
def test_a_mistake_in_the_command_is_a_user_error(data, tmp_path, overrides, message):
    process = tiny_run.run(data, tmp_path, **overrides)
    assert process.returncode == 2, process.stderr[-2000:]
    assert message in process.stderr and "Traceback" not in process.stderr
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")


@pytest.mark.slow
def test_a_run_with_a_dictionary_uses_definitions_in_training_and_evaluation(data, tmp_path):
    script = [sys.executable, str(tiny_run.ROOT / "scripts/prepare_concepts.py")]
    script += [f"--from={data}", f"--to={tmp_path / 'concepts'}", "--min_count=2"]
    subprocess.run(script, check=True, capture_output=True)
    process = tiny_run.run(
        data,
        tmp_path / "run",
        **{"data.dictionary": tmp_path / "concepts", "data.detection.definitions": True},
        **{"train.epochs": 0.2},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    settings = json.loads((tmp_path / "run/results.json").read_text())["settings"]
    assert settings["definitions"] and settings["names_defined"] > 100

    # The checkpoint is enough: it needs neither the data nor the dictionary.
    (tmp_path / "concepts").rename(tmp_path / "gone")
    rows = (tmp_path / "gone/dictionary.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    known = {row["name"]: row["definition"] for row in map(json.loads, rows)}
    model = checkpoint.load_model(tmp_path / "run")
    # "": trained without a definition, and so asked without one.
    assert model.definitions == {name: text or "" for name, text in known.items()}
    name = next(name for name in model.names if known.get(name))
    texts = detector.Detector(model).encode([name, "hoverboard"])
    assert texts.prompts[0] == tokenizer.fitted([name], [known[name]])[0] != name
    assert texts.prompts[1].startswith("hoverboard, ")


def test_a_missing_dictionary_is_a_user_error(data, tmp_path):
    process = tiny_run.run(data, tmp_path, **{"data.dictionary": "none"})
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert "none/dictionary.jsonl: no such file. Make it with" in process.stderr


@pytest.mark.slow  # 60 s: two starts
def test_auto_step_lowers_the_rate_and_ends_the_run(data, tmp_path):
    """It evaluates after each epoch, and a run that ended stays as it is."""
    overrides = {
        "optimizer.auto_step.on": True,
        "optimizer.auto_step.patience": 1,
        "optimizer.auto_step.exit_patience": 1,
        "optimizer.auto_step.least_rate": 1e-3,
        "optimizer.learning_rate": 2e-3,
        "train.epochs": 40.0,
    }
    process = _run_with(data, tmp_path, **overrides)
    assert process.returncode == 0, process.stderr[-3000:]
    steps = _checkpoints(tmp_path)
    meta = checkpoint.load_model(tmp_path, step=steps[-1]).run
    assert meta["optimizer"]["auto_step"]["on"]
    evaluations = [
        line["step"]
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        if "fixed/AP" in line
    ]
    per_epoch = evaluations[0]
    assert np.all(np.diff(evaluations) == per_epoch)
    assert steps[-1] == evaluations[-1] < 40 * per_epoch
    again = _run_with(data, tmp_path, **overrides)
    assert again.returncode == 0, again.stderr[-3000:]
    assert _checkpoints(tmp_path) == steps  # a run that ended stays as it is
