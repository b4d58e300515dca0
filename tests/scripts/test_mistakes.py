"""The list of deliberate mistakes fits the code; `scripts/verify/mutations.py` makes them."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MISTAKES = tomllib.loads((ROOT / "tests/parity/mistakes.toml").read_text())["mistake"]


@pytest.mark.parametrize("mistake", MISTAKES, ids=[m["what"] for m in MISTAKES])
def test_a_mistake_can_be_made(mistake):
    text = (ROOT / "detclipv2_jax" / mistake["file"]).read_text()
    assert text.count(mistake["right"]) == 1 and mistake["wrong"] != mistake["right"]
    assert (ROOT / mistake["tests"]).is_file()
