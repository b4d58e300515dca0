"""The streaming JSON reader, compared with json.loads."""

import json
import random

import pytest

from detclipv2_jax.common import json_file
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_lists

VALUES = [
    0, -1, 12345678901234567890, 1.5, -2e-7, True, None, "", "é😀\\\"\n", [], {}, [[1], {"a": [2]}],
    {"id": 3, "bbox": [1.25, 2, 3, 4], "name": "a b"}, float("inf"), "x" * 300,
]  # fmt: skip


def read(tmp_path, data: bytes, fields=("a", "b")):
    path = tmp_path / "file.json"
    path.write_bytes(data)
    return list(read_lists(path, fields))


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 22])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_entries_equal_those_of_json_loads(tmp_path, monkeypatch, chunk, encoding):
    monkeypatch.setattr(json_file, "_CHUNK", max(chunk, 4))  # the encoding shows in four bytes
    generator = random.Random(chunk)
    for indent in (None, 1):
        document = {
            "info": {"year": 2020},
            "b": generator.choices(VALUES, k=30),
            "skipped": VALUES,
            "empty": [],
            "a": [*generator.choices(VALUES, k=30), 1234567],
            "last": 7,
        }
        text = json.dumps(document, indent=indent, ensure_ascii=bool(indent))
        found = read(tmp_path, text.encode(encoding))
        whole = json.loads(text)
        assert found == [(f, i, v) for f in ("b", "a") for i, v in enumerate(whole[f])]


def test_spaces_and_empty_lists(tmp_path):
    assert read(tmp_path, b' {\n"a" :\t[ ] , "b":[1 ,\r\n 2 ] } \n') == [("b", 0, 1), ("b", 1, 2)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": [1], "b": [2', "line 1, column 19: not valid JSON (Expecting ',')"),
        (b'{"a": [1],\n "b": [2 3]}', "line 2, column 10: not valid JSON (Expecting ',')"),
        (b'{"a": [1],\n\n "b": [{"x": 1,}]}', "line 3, column 16: not valid JSON"),
        (b'{"a": [1,], "b": []}', "line 1, column 10: not valid JSON (Expecting value)"),
        (b'{"a": [1] "b": []}', "Expecting ','"),
        (b'{"a" [1]}', "Expecting ':'"),
        (b"{a: [1]}", "property name"),
        (b'{"a": ["x}', "Unterminated string"),
        (b'{"a": [], "b": []} 7', "Extra data"),
        (b'{"a": [], "b": {}}', 'no list "b"'),
        (b'{"a": [nul], "b": []}', "column 8"),
        (b'{"a": [1], "b": [], "a": [2]}', 'its top level has "a" twice'),
        (b'{"a": [' + b"9" * 5000 + b'], "b": []}', "not valid JSON (Exceeds"),
        (b'{"a": [' + b"[" * 100_000 + b"]}", "nested too deeply"),
        (b'{"a": ["\xff"], "b": []}', "byte 8: 0xff is not UTF-8 text (in Windows-1252"),
        (b"\x00\x01\x02", "not"),
    ],
)
@pytest.mark.parametrize("chunk", [4, 1 << 22])
def test_invalid_json_is_located(tmp_path, monkeypatch, text, message, chunk):
    monkeypatch.setattr(json_file, "_CHUNK", chunk)
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    sentence = str(caught.value)
    assert message in sentence and "file.json" in sentence and "\n" not in sentence


def test_memory_is_bounded(tmp_path):
    """Of a long list, only a chunk is held; a malformed one is not read to its end."""
    path = tmp_path / "long.json"
    entry = json.dumps({"id": 1, "text": "x" * 900})
    path.write_text('{"a": [' + ", ".join([entry] * 30_000) + "]}")
    scanner_text = []
    with open(path, "rb") as file:
        scanner = json_file._Scanner(path, file)
        next(scanner.fields())
        for _ in scanner.entries():
            scanner_text.append(len(scanner._text))
    assert len(scanner_text) == 30_000 and max(scanner_text) < 2 * json_file._CHUNK + 1000
    path.write_text('{"a": [}' + "x" * (3 * json_file._CHUNK))
    with open(path, "rb") as file:
        scanner = json_file._Scanner(path, file)
        next(scanner.fields())
        with pytest.raises(json_file._Malformed, match="Expecting value"):
            list(scanner.entries())
        assert file.tell() == json_file._CHUNK
