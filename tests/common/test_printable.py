"""File names that are not UTF-8 are printed and stored, whatever the terminal and the parser."""

import io
import json
import os
import sys

import pytest

from detclipv2_jax.common import atomic
from detclipv2_jax.common.printable import (
    counted,
    print_any_text,
    printable,
    valid_json,
    valid_text,
)

LATIN1 = os.fsdecode(b"caf\xe9.jpg")  # as Python lists such a file


def test_valid_text_changes_only_what_is_not_unicode():
    assert valid_text(LATIN1) == r"caf\xe9.jpg"
    assert valid_text("a\ud800b") == r"a\ud800b"
    fine = "caf\xe9 \U0001f600 a\\b\n%20"
    assert valid_text(fine) == fine


def test_printable_is_one_line():
    assert printable("a\nb\x1b[31m\u202e.jpg") == r"a\nb\x1b[31m\u202e.jpg"
    assert printable(LATIN1) == r"caf\xe9.jpg" and printable("caf\xe9 1.jpg") == "caf\xe9 1.jpg"


@pytest.mark.parametrize(
    "text", [LATIN1, "\U0001f600", r"\udce9", "\ud800", "\udc80\udcff", 'a"\\']
)
def test_json_files_have_no_half_surrogates(tmp_path, text):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"image": text})
    written = json.loads(path.read_bytes().decode("utf-8"))["image"]
    assert written == valid_text(text)
    written.encode("utf-8")  # strict parsers refuse half a pair
    assert valid_json(json.dumps(text)) == json.dumps(valid_text(text))


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "caf\\xe9.jpg → 音\n"), ("ascii", "caf\\xe9.jpg \\u2192 \\u97f3\n")],
)
def test_commands_print_any_name_on_any_terminal(monkeypatch, encoding, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    print_any_text()
    print(f"{LATIN1} → 音")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == shown


def test_one_of_a_thing_is_singular():
    assert counted(1, "name") == "1 name"
    assert counted(0, "name") == "0 names"
    assert counted(1200, "box", "boxes") == "1,200 boxes"
