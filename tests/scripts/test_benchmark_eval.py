"""The benchmark's contestants agree on a small dataset."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

# From lvis-api.
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts/benchmarks/benchmark_eval.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_eval", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_contestants_agree(benchmark, monkeypatch):
    small = {"images": 12, "detections": 320}
    lvis = dataclasses.replace(benchmark.LVIS_VAL, categories=20, **small)
    coco = dataclasses.replace(benchmark.COCO_VAL, categories=5, **small)
    work = [("lvis", "ours", lvis), ("coco", "ours", coco), ("coco", "pycocotools", coco)]
    if importlib.util.find_spec("lvis"):
        monkeypatch.setattr(np, "float", float, raising=False)
        work += [("lvis", "lvis_api", lvis), ("lvis", "lvis_api_fixed", lvis)]
    rows = []
    for name, contestant, shape in work:
        found = benchmark.contest(contestant, shape, name == "lvis")
        assert found["seconds"] > 0 and found["mebibytes"] > 0
        rows.append({"set": name, "contestant": contestant, **dataclasses.asdict(shape), **found})
    gaps = benchmark.differences(rows)
    assert len(gaps) == len(work) - 2
    assert max(gaps.values()) < 1e-9
    assert rows[0]["figures"]["standard AP"] > 0
