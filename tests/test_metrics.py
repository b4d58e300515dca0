import json
import math

from detclipv2_jax import metrics


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


def test_clock_adds_up_over_restarts():
    clock = metrics.Clock({"train": 10.0})
    with clock("train"):
        pass
    with clock("data"):
        pass
    assert clock.seconds["train"] >= 10.0
    assert set(clock.seconds) == {"train", "data"}
