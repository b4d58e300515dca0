"""The benchmark of decoding on a small canvas: both kinds of scores, with and without a limit."""

import importlib.util

import pytest
import tiny_run


@pytest.mark.parametrize("kind", ["random", "trained"])
def test_rows(kind):
    path = tiny_run.ROOT / "scripts/benchmarks/benchmark_decoding.py"
    spec = importlib.util.spec_from_file_location("benchmark_decoding", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    limited, whole = module.measure(9, kind, (256, 256), [3000], 1)
    assert (limited["pre_nms_top_k"], whole["pre_nms_top_k"]) == (100, 0)
    assert 9 < limited["boxes"] < whole["boxes"] <= 3000
    assert limited["most_of_a_name"] <= 100 < whole["most_of_a_name"]
