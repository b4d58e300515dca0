"""Records survive the way to disk and back; a source appears whole or not at all."""

import dataclasses
import os

import numpy as np
import pytest
import tensorflow as tf
from array_record.python.array_record_data_source import ArrayRecordDataSource
from miniature_archives import jpeg
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare.record_writer import RecordWriter
from detclipv2_jax.data.records import Record, ShardWriter, decode, encode, features, parse

CONCEPTS = ("cat", "dog", "traffic light")


def record(boxes=((1, 2, 30.5, 20),), labels=(1,), concepts=CONCEPTS, image_id="7") -> Record:
    return Record(
        image=jpeg(),
        height=40,
        width=60,
        image_id=image_id,
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array(labels, np.int32),
        concepts=tuple(concepts),
    )


def assert_same(a: Record, b: Record):
    for field in dataclasses.fields(Record):
        left, right = getattr(a, field.name), getattr(b, field.name)
        np.testing.assert_array_equal(left, right)
        assert getattr(left, "dtype", None) == getattr(right, "dtype", None)


def written_by_tfds(one: Record) -> bytes:
    fields = dict(vars(one), concepts=list(one.concepts), labels=one.labels.astype(np.int64))
    serializer = ExampleSerializer(features().get_serialized_info())
    example = serializer.get_tf_example(features().encode_example(fields))
    return example.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "one",
    [
        record(),
        record(boxes=(), labels=(), concepts=()),
        record(boxes=(), labels=(), concepts=("A Straße, 日", "日", "")),
        record(
            boxes=[(0, 0, 60, 40)] * 300,
            labels=range(300),
            concepts=map(str, range(300)),
            image_id="Straße/日.jpg#2",
        ),
    ],
)
def test_round_trip(one):
    data = encode(one)
    assert data == tf.train.Example.FromString(data).SerializeToString(deterministic=True)
    assert data == written_by_tfds(one)
    assert_same(decode(data), one)
    parsed = {name: value.numpy() for name, value in parse(data).items()}
    assert parsed["boxes"].shape == one.boxes.shape
    np.testing.assert_array_equal(parsed["boxes"], one.boxes)
    np.testing.assert_array_equal(parsed["labels"], one.labels)
    assert [text.decode() for text in parsed["concepts"]] == list(one.concepts)
    assert (parsed["height"], parsed["width"]) == (40, 60)
    assert parsed["image"] == one.image and parsed["image_id"].decode() == one.image_id


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": np.array([3], np.int32)}, "a label is not in 0 … 2"),
        ({"labels": np.array([-1], np.int32)}, "a label is not in 0 … 2"),
        ({"concepts": ("cat", "dog", "cat")}, "twice"),
        ({"boxes": np.array([[0, 0, 61, 40]], np.float32)}, "outside"),
        ({"boxes": np.array([[-0.1, 0, 6, 4]], np.float32)}, "outside"),
        ({"boxes": np.array([[5, 5, 5, 9]], np.float32)}, "no area"),
        ({"boxes": np.array([[np.nan, 0, 6, 4]], np.float32)}, "outside"),
        ({"boxes": np.zeros((2, 4), np.float32)}, "2, 4"),
        ({"boxes": np.zeros(4, np.float32)}, "1 labels"),
        ({"image": b"\x89PNG"}, "not a JPEG"),
        ({"height": 0}, "0x60"),
        ({"width": 70_000}, "70000"),
    ],
)
def test_contradictions_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        encode(dataclasses.replace(record(), **changes))


@pytest.mark.parametrize("data", [b"", b"nonsense", encode(record())[:-7]])
def test_damaged_record(data):
    with pytest.raises(UserError, match="Not a valid record"):
        decode(data)


def test_writer_spreads_shards_and_any_record_is_found(tmp_path):
    written = [record(labels=[i % 3], image_id=str(i)) for i in range(11)]
    with RecordWriter(tmp_path / "s", name="n", kind="detection", shard_records=4) as writer:
        for one in written:
            writer.write(one)
        source = writer.finish(dropped={"boxes: crowd": 2})
    assert source.info["shards"] == [4, 4, 3] and len(source) == 11
    assert source.info["dropped"] == {"boxes: crowd": 2}
    stored = ArrayRecordDataSource(list(source.shard_paths))
    for i in (10, 0, 7, 3, 4):
        assert_same(decode(stored[i]), written[i])
        shard = int(np.searchsorted(source.shard_starts, i, side="right")) - 1
        within = ArrayRecordDataSource(source.shard_paths[shard])
        assert_same(decode(within[i - source.shard_starts[shard]]), written[i])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_index_of_positives(tmp_path):
    boxes = [(0, 0, 9, 9)] * 4
    with RecordWriter(tmp_path / "d", name="d", kind="detection", names=["cat", "ox"]) as writer:
        writer.write(record(boxes=boxes, labels=[1, 0, 1, 1], concepts=["dog", "cat"]))
        writer.write(record(boxes=(), labels=(), concepts=()))
        writer.write(record(labels=[0], concepts=["bus"]))
        detection = writer.finish()
    positives = [detection.positives_of(i).tolist() for i in range(3)]
    assert positives == [[2, 0], [], [3]]  # in the order of the record
    assert [(row["name"], row["count"]) for row in detection.concepts] == [
        ("cat", 3),
        ("ox", 0),
        ("dog", 1),
        ("bus", 1),
    ]
    with RecordWriter(tmp_path / "t", name="t", kind="image_text") as writer:
        writer.write(record(boxes=(), labels=(), concepts=["a red cat", "cat"]))
        writer.write(record(boxes=(), labels=(), concepts=["cat", "a red cat"]))
        writer.write(record(boxes=(), labels=(), concepts=["the end"]))
        pairs = writer.finish()
    assert pairs.positives_of(1).tolist() == [1, 0]  # the caption stays first
    assert pairs.vocabulary.tolist() == [True, True, False]  # somebody's phrase, or a caption only
    assert (detection.height.tolist(), detection.width.tolist()) == ([40] * 3, [60] * 3)


def test_nothing_appears_where_writing_failed(tmp_path):
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "s", name="n", kind="grounding") as w:
        w.write(record())
        raise RuntimeError("the disk burns")
    assert list(tmp_path.iterdir()) == []


def test_a_rest_of_a_killed_run_is_no_obstacle_and_the_old_source_gives_way(tmp_path):
    (tmp_path / "s.partial").mkdir()
    (tmp_path / "s.partial" / "stamp.json").write_text('{"inputs": null}')
    (tmp_path / "s.partial" / "records-00000").write_bytes(b"half a file")
    for count in (2, 5):
        with RecordWriter(tmp_path / "s", name="n", kind="detection") as writer:
            for _ in range(count):
                writer.write(record())
            writer.finish()
        assert len(Source.open(tmp_path / "s")) == count
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_writer_never_replaces_a_directory_of_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a prepared source"):
        RecordWriter(tmp_path, name="n", kind="detection")
    assert (tmp_path / "thesis.txt").exists()


def test_a_full_disk_is_told(tmp_path):
    path = tmp_path / "0.array_record"
    (tmp_path / f".0.array_record.{os.getpid()}.partial").symlink_to("/dev/full")
    told = pytest.raises(UserError, match="No space left on device. Free disk space")
    with told, ShardWriter(path) as writer:
        for _ in range(2000):
            writer.write(record())
    assert list(tmp_path.iterdir()) == []


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="'boxes'"):
        RecordWriter(tmp_path / "s", name="n", kind="boxes")
