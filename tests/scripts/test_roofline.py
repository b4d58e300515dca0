"""The roofline script, without the TPU compiler."""

import importlib.util
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"


@pytest.fixture(scope="module")
def roofline():
    spec = importlib.util.spec_from_file_location("roofline", SCRIPTS / "roofline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(part, flops, moved, *, loops=False, compiled=0.0):
    return {
        "step": "detection:4x800x1344", "part": part, "flops": flops, "bytes_accessed": moved,
        "compiler_flops": compiled,
        "least_bytes": moved / 2, "temporary_bytes": 2**30, "loops": loops,
    }  # fmt: skip


def test_the_bound_is_one_where_arithmetic_binds_and_a_share_where_bytes_do(roofline):
    bound = lambda *args, **options: roofline.bound(row("neck", *args, **options), "v5e")
    assert bound(197e12, 819e9) == 1.0  # a second of each
    assert bound(197e12, 8190e9) == pytest.approx(0.1)
    assert bound(197e12, 1.0) == 1.0
    assert bound(0.0, 819e9) == 0.0
    assert bound(197e12, 1.0, compiled=394e12) == 0.5  # half of it is computed twice
    assert bound(197e12, 1.0, compiled=1e12) == 1.0  # a loop that is counted once


def test_the_table_says_what_binds_and_brackets_what_a_loop_hides(roofline, tmp_path):
    rows = [row("backbone", 1.97e12, 81.9e9), row("text", 1.97e12, 0.819e9, loops=True)]
    *_, first, second = roofline.table(rows, "v5e").splitlines()
    assert "| 81.90 |" in first and "| 10.00 | 100.00 | bytes | 10% |" in first
    assert "| (0.82) |" in second and "| 10.00 | 1.00 | FLOPs | 100% |" in second
    roofline.draw(rows, "v5e", tmp_path / "v5e.png")
    assert (tmp_path / "v5e.png").stat().st_size > 1000


def test_only_chips_whose_limits_are_known_can_be_asked_for(roofline, capsys):
    with pytest.raises(SystemExit):
        roofline.options(["--output=x", "--chip=v2"])
    assert "v5e" in capsys.readouterr().err
