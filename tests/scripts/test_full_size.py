"""The data benchmarks on tiny inputs."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_run
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source


@pytest.fixture(scope="module")
def full_size():
    return importlib.import_module("full_size")


@pytest.fixture(scope="module")
def made_up(full_size, tmp_path_factory):
    """Sources of 1/2000 of the paper's size."""
    to = tmp_path_factory.mktemp("made_up")
    full_size.write(to, scale=1 / 2000)
    return to


def test_a_made_up_index_is_a_source_like_any_other(made_up):
    boxes, phrases, pairs = (Source.open(made_up / n) for n in ("objects365", "goldg", "cc15m"))
    assert [len(s) for s in (boxes, phrases, pairs)] == [330, 385, 6500]
    assert [s.kind for s in (boxes, phrases, pairs)] == ["detection", "grounding", "image_text"]
    for source in (boxes, phrases, pairs):
        for record in range(0, len(source), 97):
            owned = source.positives_of(record).tolist()
            assert len(set(owned)) == len(owned)
    captions = pairs.positives[pairs.positives_offsets[:-1]]
    assert len(set(captions.tolist())) == len(pairs) and not pairs.vocabulary[captions].any()
    assert 2 < np.diff(pairs.positives_offsets).mean() - 1 < 4
    # Phrases are shared between the sources, so that their keys meet.
    assert np.isin(phrases.keys, pairs.keys).any() and not np.isin(boxes.keys, pairs.keys).any()


def test_writing_again_changes_nothing(full_size, made_up):
    before = (made_up / "goldg/info.json").stat().st_mtime_ns
    full_size.write(made_up, scale=1)
    assert (made_up / "goldg/info.json").stat().st_mtime_ns == before


def test_start_up_and_planning_are_measured(full_size, made_up):
    figures = full_size.measure(made_up, rounds=1)
    assert figures["records"] == 330 + 385 + 6500
    assert set(figures["start_up_seconds"]) == {"0", "150000"}
    assert set(figures["plan_seconds"]) == {"detection", "grounding", "image_text"}
    assert 0 < figures["imports_mb"] <= figures["peak_mb"]
    assert "150,000" in full_size.table(figures)


def choose(*arguments):
    command = [sys.executable, str(tiny_run.ROOT / "scripts/choose_shapes.py"), *arguments]
    environment = tiny_run.environment()
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_shapes_are_chosen_for_a_config(made_up):
    config = f"--config={tiny_run.ROOT}/configs/pretrain.py:swin_t"
    data = (f"--config.data_dir={made_up}", "--config.data.dictionary=")
    data += ("--config.data.detection.definitions=False",)
    done = choose(config, *data, "--steps=2", "--count=2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("| now |") for line in lines) == 3
    assert sum(line.startswith("| 2 |") for line in lines) == 3
    assert sum("(now)" in line for line in lines) == 3
    assert "detection: objects365" in lines and "image_text: cc15m" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either --config"),
        (("--data=DIR/goldg",), "--area"),
        (("--data=DIR/goldg", "--area=wide"), "--area=wide"),
        (("--data=DIR/none", "--area=64x64"), "none: no prepared source"),
    ],
)
def test_shapes_cannot_be_chosen(made_up, arguments, words):
    done = choose(*(argument.replace("DIR", str(made_up)) for argument in arguments))
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_shapes_are_chosen_for_a_directory(made_up):
    done = choose(f"--data={made_up}/goldg,{made_up}/cc15m", "--area=320x320", "--count=3")
    assert done.returncode == 0, done.stderr
    assert "| 3 |" in done.stdout and "6,885 images" in done.stdout


def test_ratios_are_those_of_a_round():
    benchmark = importlib.import_module("benchmark_data")
    figures = lambda rate: {
        "images_per_second": rate,
        "images_per_cpu_second": rate / 2,
        "peak_mb": 7,
    }
    rounds = {"pipeline": [10, 20, 60], "decoding": [20, 30, 60], "dataloader": [5, 40, 15]}
    results = {name: [figures(rate) for rate in rates] for name, rates in rounds.items()}
    found = benchmark._summary(results)
    assert found["decoding"]["images_per_second"] == 30
    assert found["decoding"]["pipeline_is"] == pytest.approx(2 / 3)  # of ½, ⅔ and 1
    assert found["dataloader"]["pipeline_is_by_cpu"] == 2  # of 2, ½ and 4
    skipped = {"dataloader": "torch is not installed"}
    printed = benchmark.speed_table({"work": {"contestants": found, "skipped": skipped}})
    assert "| work | decoding | 30 | 15 | 0.67 | 0.67 | 7 |" in printed
    assert "torch is not installed" in printed


@pytest.mark.slow
def test_the_race_runs(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{number}.jpg")
    command = [sys.executable, str(tiny_run.ROOT / "scripts/benchmarks/benchmark_data.py")]
    command += [f"--output={tmp_path / 'out'}", f"--photos={tmp_path / 'photos'}", "--rounds=1"]
    command += ["--work=image-text 320x320, stored at 448", "--images=32"]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny_run.environment())
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/benchmark_data.json").read_text())
    race = found["speed"]["image-text 320x320, stored at 448"]
    assert {"pipeline", "decoding"} <= set(race["contestants"])
    assert race["contestants"]["pipeline"]["pipeline_is"] == 1
    assert all(f["images_per_second"] > 0 for f in race["contestants"].values())
    assert {"dataloader"} == set(race["skipped"]) | (set(race["contestants"]) & {"dataloader"})
    assert "| pipeline |" in done.stdout


def test_a_folder_without_images_is_an_error(tmp_path):
    benchmark = importlib.import_module("benchmark_data")
    with pytest.raises(UserError, match="contains no JPEG files"):
        benchmark.prepare(tmp_path / "out", tmp_path)
    assert isinstance(benchmark.machine()["cores"], int)
    assert Path(tmp_path / "out").is_dir()
