"""Names, table and picture of the benchmark; the measurement itself takes minutes."""

import importlib.util

import pytest
import tiny_run


@pytest.fixture(scope="module")
def benchmark():
    path = tiny_run.ROOT / "scripts/benchmarks/benchmark_detect.py"
    spec = importlib.util.spec_from_file_location("benchmark_detect", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_are_different_and_fit_their_prompt(benchmark):
    names = benchmark.names(20_000)
    assert len(set(names)) == 20_000 and names[:2] == ["cat", "dog"]
    assert benchmark.names(80) == names[:80]
    tokens = (benchmark.tokenize(names[: benchmark.CHUNK]) > 0).sum() - 2 * benchmark.CHUNK
    assert tokens + benchmark.CHUNK + 2 <= 256  # a full stop after each, [CLS] and [SEP]
    with pytest.raises(SystemExit, match="at most"):
        benchmark.names(30_000)


def test_ours_alone_is_measured_without_the_others(benchmark, tmp_path):
    class Quick:
        texts = answer = read_names = staticmethod(lambda _: None)
        temporary_bytes = staticmethod(lambda _: 10**9)

    rows = benchmark.measure(Quick(), None, [80, 20_000], 1)
    assert [list(row["seconds"]) for row in rows] == [[benchmark.OURS]] * 2
    assert len(benchmark.table(rows).splitlines()) == 4
    benchmark.draw(rows, tmp_path / "detect.png")


def test_table_and_picture(benchmark, tmp_path):
    rows = [
        {
            "names": count,
            "chunks": -(-count // 40),
            "seconds": {benchmark.OURS: 2.0, benchmark.DINO: 400.0, benchmark.OWL: 5.0},
            "core_seconds": {benchmark.OURS: 4.0, benchmark.DINO: 600.0, benchmark.OWL: 8.0},
            "names_core_seconds": {benchmark.OURS: 1.0, benchmark.OWL: 2.0},
            "temporary_mb": 1036.2,
        }
        for count in (80, 1203)
    ]
    lines = benchmark.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 8
    assert (
        "| Grounding DINO, 31 chunks | 400.00 | 0.0025 | 200.0 × | 600.00 | 150.0 × |" in lines[6]
    )
    benchmark.draw(rows, tmp_path / "detect.png")
    assert (tmp_path / "detect.png").stat().st_size > 5_000
