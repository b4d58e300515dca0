import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from detclipv2_jax.common.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/compare_runs.py"


@pytest.fixture(scope="module")
def compare_runs():
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(directory, **figures):
    results = {"fixed": {"AP": figures.pop("all")}}
    results["groups"] = {name: {"fixed": {"AP": value}} for name, value in figures.items()}
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps(results))
    return str(directory)


def test_a_table_and_a_picture(compare_runs, tmp_path):
    runs = [
        make_run(tmp_path / "a", all=0.25, base=0.3, novel=0.2),
        make_run(tmp_path / "b", all=0.35, base=0.4, novel=0.1),
        make_run(tmp_path / "c", all=0.5, base=None),
    ]
    arguments = [f"with={runs[0]}", f"without={runs[2]}", f"with={runs[1]}"]
    measured, groups = compare_runs.read_groups(arguments)
    assert compare_runs.table(measured, groups).splitlines() == [
        "| fixed AP | runs | all | base | novel |",
        "|---|---|---|---|---|",
        "| with | 2 | 0.300 (0.250–0.350) | 0.350 (0.300–0.400) | 0.150 (0.100–0.200) |",
        "| without | 1 | 0.500 | – | – |",
    ]
    picture = tmp_path / "pictures/comparison.png"
    for _ in range(2):  # its own picture is replaced
        assert compare_runs.main([*arguments, f"--picture={picture}"]) == 0
        assert Image.open(picture).width > 900
    picture.write_bytes(b"of mine")
    assert compare_runs.main([*arguments, f"--picture={picture}"]) == 2
    assert picture.read_bytes() == b"of mine"


def test_a_directory_without_results_is_refused(compare_runs, tmp_path):
    with pytest.raises(UserError, match="results.json: not the results of an evaluation"):
        compare_runs.read_groups([f"with={tmp_path}"])
    for argument in ("with", "with=", "=runs/a"):
        with pytest.raises(UserError, match="NAME=DIR"):
            compare_runs.read_groups([argument])


def test_fixed_and_coco_ap_never_share_a_table(compare_runs, tmp_path):
    lvis = make_run(tmp_path / "lvis", all=0.25)
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/results.json").write_text(json.dumps({"coco": {"AP": 0.3}}))
    with pytest.raises(UserError, match="its metric is coco AP, that of .* fixed AP"):
        compare_runs.read_groups([f"a={lvis},{tmp_path / 'coco'}"])
