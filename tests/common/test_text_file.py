"""Text and JSON files as other tools write them: encodings, gzip, damage."""

import gzip
import json

import pytest

from detclipv2_jax.common import json_file, text_file
from detclipv2_jax.common.errors import UserError

TEXT = '{"name": "café \U0001f600", "list": [1, 2.5]}\r\n'
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
# With their byte order marks, as .NET, PowerShell and Excel write; Python's names have none.
MARKS = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


def write(tmp_path, data, name="file.json"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def packed(data):
    return gzip.compress(data, mtime=0)  # the cases are named by their bytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_the_same(tmp_path, encoding, mark, packed):
    data = MARKS.get(encoding, b"") * mark + TEXT.encode(encoding)
    path = write(tmp_path, gzip.compress(data) if packed else data)  # the suffix does not count
    assert text_file.read_text(path) == TEXT
    assert json_file.read_json(path) == json.loads(TEXT)
    if mark or encoding not in MARKS:
        assert list(text_file.read_lines(path)) == [(1, TEXT.rstrip())]
    lists = list(json_file.read_lists(path, ["list"]))
    assert lists == [("list", 0, 1), ("list", 1, 2.5)]


def test_lines_end_only_at_line_ends(tmp_path):
    """A caption may contain characters at which Python's splitlines splits."""
    lines = ["", "a\u2028b\x0bc\x85d", " ", "e\tf", "g"]
    for encoding in ("utf-8-sig", "utf-16"):
        path = write(tmp_path, "\r\n".join(lines).encode(encoding))
        assert list(text_file.read_lines(path)) == [(2, lines[1]), (4, lines[3]), (5, lines[4])]


def test_a_line_that_is_not_text_is_one_error(tmp_path):
    path = write(tmp_path, b"one\ncaf\xe9\nthree\n")
    (_, one), (number, error), (_, three) = text_file.read_lines(path)
    assert (one, number, three) == ("one", 2, "three") and isinstance(error, ValueError)
    assert "byte 3 of the line: 0xe9 is not UTF-8 text (in Windows-1252 it is 'é')" in str(error)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"name": "caf\xe9"}', "file.json, byte 13: 0xe9 is not UTF-8 text (in Windows-1252 it"),
        (b'\xef\xbb\xbf{"name": "caf\xe9"}', "file.json, byte 16: 0xe9 is not UTF-8 text"),
        (b'{"name": "caf\xc3', "byte 13: 0xc3 is not UTF-8 text (unexpected end of data)"),
        ("\ufeffabc".encode("utf-16-le") + b"d", "is not UTF-16 text (truncated data)"),
        (b"", "file.json: empty."),
        (b" \n ", "file.json: empty."),
        (b"\xef\xbb\xbf", "file.json: empty."),
        (packed(b""), "file.json: empty."),
        (packed(TEXT.encode())[:-12], "its gzip data are damaged (ends too early)"),
        (packed(TEXT.encode())[:-8] + b"12345678", "gzip data are damaged (CRC check"),
        (b"PK\x03\x04abc", "file.json: a zip archive. Unpack it"),
        (b'{"a": [1], "b"', "line 1, column 15: not valid JSON (Expecting ':'), because the file"),
        (b'{"a": [1], "b": "cut', "because the file ends too early"),
        (b'{"a": 1}\n{"a": 2}\n', "line 2, column 1: a second JSON value begins here"),
        (b'[1]\n[2]\n', "line 2, column 1: a second JSON value begins here"),
        (b'{"a": 1, "a": 2}', 'the top level has two values for "a"'),
        (b'{"l": [{"id": 1, "id": 2}]}', 'column 8: an object has two values for "id"'),
        (b'{"l": [{"id" : 1, "id" : 2}]}', 'an object has two values for "id"'),
        (b'{"l": [{"m": {"x": 1, "x": 2}}]}', 'an object has two values for "x"'),
        (b'{"l": [{"m": [{"x": 1, "x": 2}]}]}', 'an object has two values for "x"'),
        (b'{"l": [[{"x": 1, "x": 2}]]}', 'an object has two values for "x"'),
        (b'[{"id": 1, "id": "1"}]', 'an object has two values for "id"'),
    ],
)  # fmt: skip
def test_damaged_json_is_located(tmp_path, data, message):
    with pytest.raises(UserError) as caught:
        json_file.read_json(write(tmp_path, data))
    sentence = str(caught.value)
    assert message in sentence and "\n" not in sentence and sentence.endswith(".")


def test_a_key_given_twice_with_the_same_value(tmp_path):
    data = b'{"l": [{"id": 1, "id": 1, "t": "\\": x", "u": "http://a", "nan": NaN, "nan": NaN}]}'
    (entry,) = json_file.read_json(write(tmp_path, data))["l"]
    assert list(entry) == ["id", "t", "u", "nan"] and entry["id"] == 1


@pytest.mark.parametrize(
    ("data", "found"), [("[1]", "list"), ("null", "null"), ("3", "number"), ('"a"', "text")]
)
def test_the_top_level_is_of_another_type(tmp_path, data, found):
    path = write(tmp_path, data)
    with pytest.raises(UserError, match=f"holds a JSON {found}, not an object"):
        json_file.read_object(path)
    with pytest.raises(UserError, match=f"holds a JSON {found}, expected an object with the lists"):
        list(json_file.read_lists(path, ["images"]))
    if found != "list":
        with pytest.raises(UserError, match=f"holds a JSON {found}, not a list"):
            list(json_file.read_entries(path))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        json_file.read_json(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        text_file.read_text(tmp_path)
