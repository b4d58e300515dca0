"""A checkpoint of an earlier commit gives the same detections, and its run resumes as then."""

import json
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import tiny_run

from detclipv2_jax.inference.checkpoint import load_model
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.training.workdir import refuse_foreign

FIXTURE = tiny_run.ROOT / "tests/fixtures/run_of_1da9f15"
MODEL = {"model.text.width": 4, "model.text.heads": 1}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    to = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURE / "run.tar.xz") as archive:
        archive.extractall(to, filter="data")
    return to / "run"


def test_it_loads_with_its_config_and_names(workdir):
    loaded = load_model(workdir)
    assert loaded.step == 16 and len(loaded.names) == 191
    assert loaded.definitions == {}


def test_its_folder_is_that_of_a_run(workdir):
    assert (workdir / "config.json").exists()
    refuse_foreign(workdir)
    shutil.copy(workdir / "config.json", workdir.parent)  # its config alone tells, too
    refuse_foreign(workdir.parent)


def test_its_detections_have_not_changed(workdir):
    expected = json.loads((FIXTURE / "answers.json").read_text())
    detector = Detector(workdir, score_threshold=0.0, max_detections=20, cache="")
    (found,) = detector([FIXTURE / "scene.jpg"], expected["names"])
    np.testing.assert_allclose(found.scores, expected["scores"], rtol=1e-4)
    # Scores may swap places within this tolerance, so boxes are compared as a set.
    boxes = np.array(sorted(found.boxes.round(1).tolist()))
    np.testing.assert_allclose(boxes, sorted(np.round(expected["boxes"], 1).tolist()), atol=0.2)


@pytest.mark.slow
def test_its_run_resumes_with_the_same_losses(workdir, tmp_path):
    """Losses of steps 17 to 24. On the machine that made the fixture they are equal to the bit."""
    tiny_run.prepare(tmp_path / "data")
    line = tiny_run.command(tmp_path / "data", workdir, **MODEL)
    line[1:3] = [str(FIXTURE / "as_then.py")]  # for -m detclipv2_jax.main
    process = subprocess.run(
        line, env=tiny_run.environment(), capture_output=True, text=True, cwd=tiny_run.ROOT
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (FIXTURE / "metrics.jsonl").read_text().splitlines()]
    losses = lambda log: [(x["step"], x["kind"], x["loss"]) for x in log if "kind" in x]
    assert [x[:2] for x in losses(lines)] == [x[:2] for x in losses(before)]
    np.testing.assert_allclose(
        [x[2] for x in losses(lines)], [x[2] for x in losses(before)], rtol=1e-3
    )
