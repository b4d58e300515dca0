import json
import math
import time

import numpy as np
import pytest

from detclipv2_jax.training import clock as clock_lib
from detclipv2_jax.training import metrics


def _lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_log_that_goes_on_drops_what_came_after_the_checkpoint(tmp_path):
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


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
    log = metrics.MetricsLog(tmp_path, 0)
    log.write(1, {"kind": "detection", "loss": math.nan, "box": math.inf})
    log.close()
    assert _lines(tmp_path) == [{"step": 1, "kind": "detection", "loss": None, "box": None}]


@pytest.fixture
def tick(monkeypatch):
    """A made-up time: `tick(5)` lets five seconds pass."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])

    def tick(seconds):
        now[0] += seconds

    return tick


def test_every_second_belongs_to_the_part_that_the_host_is_in(tick):
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
    clock.step_begins()  # handed in while the first is computed
    tick(4)
    clock.step_ends(skipped=False)
    tick(4)
    clock.step_ends(skipped=False)
    tick(1)
    assert clock.totals() == {"start": 0, "train": 11, "data": 2, "other": 1}
    figures = clock.figures()
    assert figures["goodput"] == pytest.approx(11 / 14, abs=1e-4)
    assert figures["data_wait"] == pytest.approx(2 / 14, abs=1e-4)


def test_a_skipped_step_is_no_goodput(tick):
    clock = clock_lib.Clock()
    clock.step_begins()
    clock.step_begins()
    tick(3)
    clock.step_ends(skipped=False)
    tick(5)
    clock.step_ends(skipped=True)
    assert clock.totals() == {"start": 0, "train": 3, "skipped": 5}


def test_what_was_done_after_the_checkpoint_is_lost(tick, tmp_path):
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
    clock.go_on(saved, log.seconds)
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
    """A figure that the devices need 0.1 s for."""

    def __array__(self, *_, **__):
        time.sleep(0.1)
        return np.int32(0)


def test_the_clock_learns_by_itself_when_the_devices_are_done():
    """Data take 0.2 s: half of the wait is hidden behind the step before."""
    clock = clock_lib.Clock()
    clock.enter("other")
    for _ in range(5):
        with clock("data"):
            time.sleep(0.2)
        clock.watch(_Computed())
    seconds = clock.totals()
    assert 0.4 <= seconds["train"] < 0.7
    assert 0.5 <= seconds["data"] < 0.9


# TensorBoard's own thread dies of it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_the_log(small_disk, fill, capsys):
    log = metrics.MetricsLog(small_disk, 0)
    log.write(1, {"kind": "detection", "loss": 1.0})
    filling = fill(small_disk, 0)
    for step in range(2, 300):
        log.write(step, {"kind": "detection", "loss": 1.0, "note": "x" * 100})
    said = capsys.readouterr().out
    assert said.count("metrics.jsonl: cannot be written (No space left on device): its lines") == 1
    filling.unlink()
    log.write(300, {"kind": "detection", "loss": 2.0})
    log.close()
    assert [line["step"] for line in _lines(small_disk)] == list(range(1, 301))
