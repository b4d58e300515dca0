"""The collectives of a step equal those of collectives.json: operations, counts and bytes."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_run
from measure_collectives import compile_ahead

TESTS = Path(__file__).parent
STORED = TESTS / "collectives.json"
UPDATE = (
    "PYTHONPATH=tests:scripts/benchmarks python tests/training/measure_collectives.py "
    "tests/training/collectives.json"
)


def differences(stored, found):
    """Return one line for each collective of each program that changed."""
    return [
        f"{program}: {name} was {stored.get(program, {}).get(name)}, is {now.get(name)}"
        for program, now in found.items()
        for name in sorted(stored.get(program, {}) | now)
        if stored.get(program, {}).get(name) != now.get(name)
    ]


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="other compilers may differ")
@pytest.mark.slow
def test_collectives_have_not_changed(tmp_path):
    """Count of each collective, and bytes of its results per device, in the compiled steps."""
    environment = {k: v for k, v in tiny_run.environment().items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(TESTS / "measure_collectives.py"), str(tmp_path / "now.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored, found = (json.loads(path.read_text()) for path in (STORED, tmp_path / "now.json"))
    assert stored.keys() == found.keys()
    changed = differences(stored, found)
    assert not changed, "\n".join([*changed, f"If that is intended, update the file: {UPDATE}"])


def test_no_gradient_is_summed_in_bfloat16():
    """With and without micro-batches, although the layers of these programs are bfloat16."""
    programs = json.loads(STORED.read_text())
    assert any("2 micro-batch" in name for name in programs)
    assert not any("in bfloat16" in name for found in programs.values() for name in found)


def test_collectives_of_a_program():
    """Loops count with their trips, asynchronous collectives by their result, a channel once."""
    text = """
%body (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %reduced = f32[8]{0} all-reduce(%x), channel_id=1, to_apply=%add
}

%piece (p: bf16[2,4]) -> bf16[8,4] {
  %part = bf16[8,4]{1,0} all-gather(%p), channel_id=2, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (f32[8], s32[]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %first = bf16[8,4]{1,0} fusion(%a), kind=kOutput, calls=%piece
  %second = bf16[8,4]{1,0} fusion(%a), kind=kOutput, calls=%piece
  %small = bf16[6]{0} all-reduce(%a), channel_id=4, to_apply=%add
  %wide = f32[6]{0} all-reduce(%a), channel_id=5, to_apply=%add.clone_promoted
  %moved = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=3
}
"""
    assert compile_ahead.collectives(text) == {
        "all-gather": {"count": 1, "bytes": 8 * 4 * 2},
        "all-reduce": {"count": 5, "bytes": 5 * 8 * 4},
        "all-reduce in bfloat16": {"count": 2, "bytes": 6 * 2 + 6 * 4},
        "collective-permute": {"count": 1, "bytes": 4 * 4},
    }
