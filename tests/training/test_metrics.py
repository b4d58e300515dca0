import json
import math
import time

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import clock as clock_lib
from detclipv2_jax.training import config, metrics, profiling, recorder, sharding, utilization
from detclipv2_jax.training.recipes import load


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_log_drops_lines_after_the_checkpoint(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    for step in range(1, 8):
        log.write(step, {"kind": "detection", "loss": step / 10})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # killed while it wrote
    log = metrics.MetricsLog(tmp_path, 5)
    log.write(6, {"kind": "detection", "loss": 99.0})
    log.close()
    assert [(x["step"], x["loss"]) for x in _lines(tmp_path)] == [
        (1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4), (5, 0.5), (6, 99.0)
    ]  # fmt: skip


def test_values_that_are_not_finite_are_null_in_json(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write(1, {"kind": "detection", "loss": math.nan, "box": math.inf})
    log.close()
    assert _lines(tmp_path) == [{"step": 1, "kind": "detection", "loss": None, "box": None}]


def test_counters_are_in_the_log_and_in_tensorboard(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write(1, {"kind": "detection", "loss": 1.0}, {"seconds": 2.0}, {"cut_boxes": 3})
    log.close()
    assert _lines(tmp_path) == [
        {"step": 1, "kind": "detection", "loss": 1.0, "seconds": 2.0, "input/cut_boxes": 3}
    ]
    events = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").glob("events*"))
    for tag in (b"detection/loss", b"run/seconds", b"input/cut_boxes"):
        assert tag in events


def test_the_final_report_lists_what_was_left_out():
    counters = {"cut_boxes": 3, "dropped_concepts": 0, "read/a": 9, "unreadable/a": 1}
    counters |= {"image_pixels/grounding": 0, "canvas_pixels/grounding": 0}
    counters |= {"image_pixels/detection": 765, "canvas_pixels/detection": 1000}
    counters |= {"read/b": 5, "unreadable/b": 0}
    assert recorder.input_report(recorder.sum_over_processes(counters)) == [
        "input: 3 boxes were left out because a canvas had more than max_boxes",
        "a: 1 of 9 records could not be read",
        "detection: images covered 76.5% of the pixels of their canvases",
    ]


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
    ],
)
def test_the_peak_of_a_known_device_is_published(kind, tflops):
    assert utilization.published_peak(kind).flops_per_second == tflops * 1e12
    assert utilization.published_peak("cpu") is utilization.published_peak("TPU v4 lite") is None


def test_the_peak_of_an_unknown_device_is_measured_in_a_second():
    began = time.monotonic()
    peak = utilization.measured_peak("float32")
    assert time.monotonic() - began < 5  # a second on an idle machine
    assert 1e9 < peak.flops_per_second < 1e14 and "float32" in peak.source


def test_utilization_is_model_arithmetic_over_time_and_peak(capsys):
    run = config.parse(load("pretrain").get_config("nano").to_dict())
    use = utilization.Utilization(run, sharding.make_mesh(2, 2))
    flops = utilization.model_flops(run, "detection", (128, 128))
    found = use.metrics("detection", (128, 128), 0.5)
    assert found["step_seconds"] == 0.5
    assert found["model_tflops_per_second"] == pytest.approx(flops / 0.5 / 1e12, rel=1e-3)
    mfu = flops / 0.5 / (4 * use.peak.flops_per_second)
    assert found["mfu"] == pytest.approx(mfu, rel=1e-3)
    assert "peak of a device (cpu): " in capsys.readouterr().out


def test_the_steps_to_profile_are_checked():
    assert profiling.parse_steps("", 10) == range(0)
    assert profiling.parse_steps("8:11", 10) == range(8, 11)
    for text, message in [
        ("3", "must be FIRST:LAST"),
        ("a:b", "must be FIRST:LAST"),
        ("5:5", "selects no step"),
        ("7:5", "selects no step"),
        ("0:5", "outside of the run, which has steps 1 to 10"),
        ("8:12", "outside of the run.*numbers from 1 to 11"),
    ]:
        with pytest.raises(UserError, match=message):
            profiling.parse_steps(text, 10)


def test_an_error_of_the_profiler_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("Only one profile may be run at a time.\nSecond line")

    monkeypatch.setattr(profiling.jax.profiler, "start_trace", fails)
    with profiling.Profiler(range(1, 2), tmp_path, resumed_at=0) as profiler:
        with profiler.step(1, None):
            pass
        profiler.step_dispatched(1, None)
    warning = capsys.readouterr().err
    assert "warning: no profile is written (Only one profile may be run at a time.)" in warning


def test_a_trace_of_a_run_that_ends_early_is_written(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda _: calls.append("start"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with profiling.Profiler(range(2, 9), tmp_path, resumed_at=2) as profiler:
        for step in (3, 4):
            with profiler.step(step, None):
                pass
            profiler.step_dispatched(step, None)
    assert calls == ["start", "stop"]
    assert "profile: steps 3 to 4 are in" in capsys.readouterr().out
    with profiling.Profiler(range(2, 9), tmp_path, resumed_at=8):
        pass
    assert "no trace is written" in capsys.readouterr().out and len(calls) == 2


@pytest.fixture
def tick(monkeypatch):
    """Replace the clock: `tick(5)` lets five seconds pass."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    return tick


def test_every_second_counts_as_the_part_that_the_host_is_in(tick):
    clock = clock_lib.Clock(began=97.0)
    tick(4)
    with clock("compile"):
        tick(10)
    clock.enter("other")
    with clock("evaluate"):
        tick(2)
        with clock("data"):
            tick(1)
    tick(0.5)
    assert clock.totals() == {"start": 7, "compile": 10, "evaluate": 2, "data": 1, "other": 0.5}


def test_waiting_for_data_counts_only_while_the_devices_are_idle(tick):
    clock = clock_lib.Clock()
    clock.enter("other")
    clock.step_begins()
    with clock("data"):
        tick(3)  # hidden behind the step
        clock.step_ends(skipped=False)
        tick(2)
    clock.step_begins()
    clock.step_begins()  # dispatched while the first is computed
    tick(4)
    assert clock.step_ends(skipped=False) == 4
    tick(4)
    assert clock.step_ends(skipped=False) == 4
    tick(1)
    assert clock.totals() == {"start": 0, "train": 11, "data": 2, "other": 1}
    figures = clock.figures()
    assert figures["goodput"] == pytest.approx(11 / 14, abs=1e-4)
    assert figures["data_wait"] == pytest.approx(2 / 14, abs=1e-4)


def test_a_skipped_step_does_not_count_as_goodput(tick):
    clock = clock_lib.Clock()
    clock.step_begins()
    clock.step_begins()
    tick(3)
    clock.step_ends(skipped=False)
    tick(5)
    clock.step_ends(skipped=True)
    assert clock.totals() == {"start": 0, "train": 3, "skipped": 5}


def test_time_after_the_checkpoint_is_lost(tick, tmp_path):
    clock, log = clock_lib.Clock(), metrics.MetricsLog(tmp_path, 0)
    for step in range(1, 6):
        clock.step_begins()
        tick(10)
        clock.step_ends(skipped=False)
        if step == 3:
            saved = json.loads(json.dumps(clock.totals()))
        log.write(step, {"kind": "detection"}, clock.figures())
    log.close()  # killed

    log, clock = metrics.MetricsLog(tmp_path, 3), clock_lib.Clock()
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]
    clock.resume(saved, log.seconds)
    tick(10)
    clock.step_begins()
    tick(30)
    clock.step_ends(skipped=False)
    assert clock.totals() == {"start": 10, "train": 60, "lost": 20}
    figures = clock.figures()
    assert figures["seconds"] == 90
    assert figures["goodput"] == pytest.approx(60 / 90, abs=1e-4)
    assert figures["goodput_this_start"] == pytest.approx(30 / 40, abs=1e-4)
    assert (
        clock.summary() == "goodput 67% of 90 s (this start 75%); the rest: lost 20 s, start 10 s"
    )
    log.close()


class _Computed:
    """An output that the devices need 0.1 s for."""

    def __array__(self, *_, **__):
        time.sleep(0.1)
        return np.int32(0)


def test_the_clock_notices_when_the_devices_are_done():
    """Data takes 0.2 s: half of the wait is hidden behind the step before."""
    clock = clock_lib.Clock()
    clock.enter("other")
    for _ in range(5):
        with clock("data"):
            time.sleep(0.2)
        step = clock.watch(_Computed())
    seconds = clock.totals()
    assert 0.4 <= seconds["train"] < 0.7
    assert 0.5 <= seconds["data"] < 0.9
    assert 0.1 <= step.result() < 0.2


def test_a_dispatch_that_computes_counts_for_its_step(tick):
    """On CPU the call of a program may return when most of it is computed."""
    clock = clock_lib.Clock()
    clock.enter("other")
    tick(1)
    with clock("train"):
        tick(3)
    clock.step_begins()
    tick(2)
    assert clock.step_ends(skipped=False) == 5
    assert clock.totals() == {"start": 0, "other": 1, "train": 5}


# TensorBoard's writer thread dies of the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_the_log(small_disk, fill, capsys):
    log = metrics.MetricsLog(small_disk, 0)
    log.write(1, {"kind": "detection", "loss": 1.0})
    filling = fill(small_disk, 0)
    for step in range(2, 300):
        log.write(step, {"kind": "detection", "loss": 1.0, "note": "x" * 100})
    printed = capsys.readouterr().out
    warning = "metrics.jsonl: cannot be written (No space left on device). Its lines"
    assert printed.count(warning) == 1
    filling.unlink()
    log.write(300, {"kind": "detection", "loss": 2.0})
    log.close()
    assert [line["step"] for line in _lines(small_disk)] == list(range(1, 301))


def test_the_last_lines_name_only_what_exists(tmp_path):
    assert recorder.written(tmp_path) == []
    (tmp_path / "checkpoints/8").mkdir(parents=True)
    (tmp_path / "detections/phrases").mkdir(parents=True)  # a folder without pictures of boxes
    (tmp_path / "metrics.jsonl").touch()
    assert recorder.written(tmp_path) == ["metrics.jsonl", "checkpoints/"]
    (tmp_path / "detections/1.png").touch()
    (tmp_path / "results.json").touch()
    assert recorder.written(tmp_path) == [
        "detections/*.png",
        "results.json",
        "metrics.jsonl",
        "checkpoints/",
    ]
