"""A prepared source opens as it was written, or one sentence says what is wrong with it."""

import json
import os

import numpy as np
import pytest
from miniature_archives import jpeg

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source, shard_name
from detclipv2_jax.data.prepare.record_writer import RecordWriter
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


def another_format(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def another_kind(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "masks"}))


def no_shards(path):
    info = json.loads(path.read_text())
    del info["shards"]
    path.write_text(json.dumps(info))


def more_records(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "records": 4, "shards": [4]}))


def more_files(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": ["a", "b"]}))


def fewer_rows(path):
    np.save(path, np.load(path)[:-1])


def wrong_values(path):
    np.save(path, np.load(path) + 100)


def pickled(path):
    np.save(path, np.array([{"a": 1}], object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "apply"),
    [
        damage("info.json", no_json),
        damage("info.json", empty),
        damage("info.json", a_list),
        damage("info.json", another_format),
        damage("info.json", another_kind),
        damage("info.json", no_shards),
        damage("info.json", more_files),
        damage("index/height.npy", remove),
        damage("index/height.npy", cut),
        damage("index/width.npy", fewer_rows),
        damage("index/positives.npy", wrong_values),
        damage("index/positives.npy", pickled),
        damage("index/positives_offsets.npy", wrong_values),
        damage("index/positives_offsets.npy", empty),
        damage("tokens.npy", fewer_rows),
        damage("tokens.npy", cut),
        damage("keys.npy", remove),
        damage("vocabulary.npy", fewer_rows),
        damage(shard_name("pets", 0, 1), remove),
        damage(shard_name("pets", 0, 1), cut),
    ],
)
def test_damage_is_named(prepared, file, apply):
    apply(prepared)
    with pytest.raises(UserError, match="detclip prepare") as caught:
        Source.open(prepared)
    sentence = str(caught.value)
    assert str(prepared / file) in sentence and "\n" not in sentence


def test_counts_that_do_not_agree(prepared):
    more_records(prepared / "info.json")
    with pytest.raises(UserError, match="height.npy"):
        Source.open(prepared)
