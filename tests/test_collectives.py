"""What travels between devices in a step is what tests/collectives.json says: no more, no less."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

TESTS = Path(__file__).parent
STORED = TESTS / "collectives.json"
ANEW = "python tests/measure_collectives.py tests/collectives.json"

sys.path.append(str(TESTS.parent / "scripts"))


def differences(stored, found):
    """One line for each collective of each program that changed."""
    return [
        f"{program}: {name} was {stored.get(program, {}).get(name)}, is {now.get(name)}"
        for program, now in found.items()
        for name in sorted(stored.get(program, {}) | now)
        if stored.get(program, {}).get(name) != now.get(name)
    ]


@pytest.mark.skipif(jax.__version__ != "0.10.2", reason="another compiler, other collectives")
def test_nothing_new_travels(tmp_path):
    """The counts, and the bytes of results on a device, of the steps' compiled programs."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, str(TESTS / "measure_collectives.py"), str(tmp_path / "now.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored, found = (json.loads(path.read_text()) for path in (STORED, tmp_path / "now.json"))
    assert stored.keys() == found.keys()
    changed = differences(stored, found)
    assert not changed, "\n".join([*changed, f"If that is meant, write the file anew: {ANEW}"])
