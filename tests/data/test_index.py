"""A prepared source opens as it was written, or one sentence says what is wrong with it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from miniature_archives import jpeg

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import ARRAYS, Source, shard_name
from detclipv2_jax.data.prepare.record_writer import RecordWriter
from detclipv2_jax.data.reader import RecordFiles
from detclipv2_jax.data.records import Record
from detclipv2_jax.text.tokenizer import tokenize


def write_source(directory, records=3):
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)
    texts = ("a cat and a dog", "cat"), ("a cat and a dog", "dog", "cat"), ("dog",)
    with RecordWriter(directory, name="pets", kind="image_text", names=["cat"]) as writer:
        for i in range(records):
            writer.write(Record(jpeg(), 40, 60, str(i), *nothing, texts[i]))
        writer.finish()


@pytest.fixture
def prepared(tmp_path):
    write_source(tmp_path / "pets")
    return tmp_path / "pets"


@pytest.fixture(params=["today's", "an older version's"])
def any_prepared(prepared, request):
    """A source, also one that was prepared before digests were stored."""
    if request.param != "today's":
        path = prepared / "info.json"
        info = json.loads(path.read_text())
        del info["digest"], info["digests"]
        path.write_text(json.dumps(info))
    return prepared


def test_open(prepared):
    source = Source.open(str(prepared))
    assert (source.name, source.kind, len(source)) == ("pets", "image_text", 3)
    assert source.vocabulary.tolist() == [True, False, True]
    np.testing.assert_array_equal(source.tokens, tokenize(["cat", "a cat and a dog", "dog"]))
    assert source.concepts[1] == {
        "name": "a cat and a dog",
        "definition": None,
        "synset": None,
        "count": 2,
        "vocabulary": False,
    }
    assert [source.positives_of(i).tolist() for i in range(3)] == [[1, 0], [1, 2, 0], [2]]
    assert source.shard_starts.tolist() == [0, 3]
    assert source.height.dtype == np.uint16 and source.positives_offsets.dtype == np.int64
    assert not source.height.flags.writeable


def test_a_source_without_records_opens(tmp_path):
    write_source(tmp_path / "empty", records=0)
    source = Source.open(tmp_path / "empty")
    assert len(source) == 0 and source.shard_paths == () and source.shard_starts.tolist() == [0]


@pytest.mark.parametrize("missing", ["nowhere", ""])
def test_no_source_there(tmp_path, missing):
    with pytest.raises(UserError, match="detclip prepare") as caught:
        Source.open(tmp_path / missing)
    assert str(tmp_path / missing) in str(caught.value)


def damage(file, change):
    def apply(directory):
        path = directory / file
        change(path)

    return pytest.param(file, apply, id=f"{file}-{change.__name__}")


def remove(path):
    os.remove(path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def no_json(path):
    path.write_text("<html>404</html>")


def a_list(path):
    path.write_text("[]")


def with_field(field, value):
    def change(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    change.__name__ = f"{field}={value}"
    return change


def no_shards(path):
    info = json.loads(path.read_text())
    del info["shards"]
    path.write_text(json.dumps(info))


def fewer_rows(path):
    np.save(path, np.load(path)[:-1])


def wrong_values(path):
    np.save(path, np.load(path) + 100)


def wrong_type(path):
    np.save(path, np.load(path).astype(np.float64))


def all_65535(path):
    np.save(path, np.full_like(np.load(path), 65535))


def zeros(path):
    np.save(path, np.zeros_like(np.load(path)))


def huge_header(path):
    header = b"{'descr': '<u2', 'fortran_order': False, 'shape': (999999999999,), }"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def pickled(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "apply"),
    [
        damage("info.json", no_json),
        damage("info.json", empty),
        damage("info.json", a_list),
        damage("info.json", no_shards),
        *(
            damage("info.json", with_field(field, value))
            for field, value in [
                ("format", 99),
                ("kind", "masks"),
                ("kind", ["image_text"]),
                ("name", None),
                ("records", "3"),
                ("records", True),
                ("files", None),
                ("files", [7]),
                ("files", ["../../etc/passwd"]),
                ("files", ["a", "b"]),
                ("shards", 3),
                ("shards", [3.0]),
                ("shards", [-3]),
                ("shard_bytes", [None]),
                ("shard_bytes", {}),
                ("digests", None),
                ("digests", {}),
            ]
        ),
        damage("index/height.npy", remove),
        damage("index/height.npy", cut),
        damage("index/width.npy", fewer_rows),
        damage("index/width.npy", wrong_type),
        damage("index/height.npy", zeros),
        damage("index/height.npy", huge_header),
        damage("index/positives.npy", wrong_values),
        damage("index/positives.npy", pickled),
        damage("index/positives_offsets.npy", wrong_values),
        damage("index/positives_offsets.npy", empty),
        damage("tokens.npy", fewer_rows),
        damage("tokens.npy", all_65535),
        damage("tokens.npy", zeros),
        damage("tokens.npy", cut),
        damage("keys.npy", remove),
        damage("vocabulary.npy", fewer_rows),
        damage("vocabulary.npy", wrong_type),
        damage(shard_name("pets", 0, 1), remove),
        damage(shard_name("pets", 0, 1), cut),
    ],
)
def test_damage_is_named(any_prepared, file, apply):
    prepared = any_prepared
    apply(prepared)
    with pytest.raises(UserError, match="detclip prepare") as caught:
        Source.open(prepared)
    sentence = str(caught.value)
    assert str(prepared / file) in sentence and "\n" not in sentence


def test_counts_that_do_not_agree(any_prepared):
    change = with_field("records", 4)
    change(any_prepared / "info.json")
    with pytest.raises(UserError, match="height.npy|info.json"):
        Source.open(any_prepared)


def test_every_flipped_bit_of_the_index_is_found(prepared):
    rng = np.random.default_rng(0)
    files = ["info.json", "concepts.jsonl", *ARRAYS.values()]
    for file in files:
        path = prepared / file
        before = path.read_bytes()
        for bit in rng.choice(8 * len(before), 20, replace=False):
            flip_bit(path, bit)
            with pytest.raises(UserError) as caught:
                _ = Source.open(prepared).concepts
            assert str(path) in str(caught.value), (file, bit)
            path.write_bytes(before)
    assert len(Source.open(prepared).concepts) == 3


def test_flipped_bits_of_the_records_change_nothing(prepared):
    """A record is read as it was written, or not at all: ArrayRecord has checksums."""
    rng = np.random.default_rng(0)
    numbers = np.arange(3)
    source = Source.open(prepared)
    (path,) = map(Path, source.shard_paths)
    before, true = path.read_bytes(), RecordFiles({"pets": source}).read("pets", numbers)
    lost = 0
    used = np.flatnonzero(np.frombuffer(before, np.uint8))  # the file ends in zeros
    for byte in rng.choice(used, 60, replace=False):
        bit = 8 * byte + rng.integers(8)
        flip_bit(path, bit)
        try:
            found = RecordFiles({"pets": Source.open(prepared)}).read("pets", numbers)
        except UserError as error:
            assert str(path) in str(error)
            found = [None] * 3
        assert all(one in (None, right) for one, right in zip(found, true)), bit
        lost += None in found
        path.write_bytes(before)
    assert lost > 20  # else the test flips bits that nothing reads


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_file_that_is_overwritten_later_changes_nothing(prepared):
    """A mapped file that somebody makes shorter would kill the process."""
    source = Source.open(prepared)
    before = {field: getattr(source, field).copy() for field in ARRAYS}
    for path in ARRAYS.values():
        with open(prepared / path, "r+b") as file:
            file.truncate(0)
    for field, values in before.items():
        np.testing.assert_array_equal(getattr(source, field), values)
