"""TensorFlow Datasets reads our sources, and training reads datasets that TFDS built."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from miniature_archives import coco, mdetr, write_images, write_json

from detclipv2_jax import prepare as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import ARRAYS, Source
from detclipv2_jax.data.prepare import registry, tfds_builders, tfds_index
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.report import format_report
from detclipv2_jax.data.prepare.sources.img2dataset import ParquetImage
from detclipv2_jax.data.records import decode
from detclipv2_jax.text import phrases


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Boxes, phrases and captions of eight images; one is damaged, one is missing."""
    folder = tmp_path_factory.mktemp("archive")
    names = write_images(folder, 8)
    (folder / "images" / "2.jpg").write_bytes(b"nothing")
    (folder / "images" / "4.jpg").unlink()
    write_json(folder / "annotations" / "boxes.json", coco(names))
    write_json(folder / "annotations" / "phrases.json", mdetr(names))
    write_json(folder / "image_data.json", [])  # Visual Genome's: none of these is COCO's
    rows = [{"image": name, "captions": ["A red cat near two dogs.", name]} for name in names]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def build(name, archive, data_dir, file_format=None, **config):
    builder = tfds.builder(name, data_dir=data_dir, file_format=file_format)
    config = tfds.download.DownloadConfig(manual_dir=archive, **config)
    builder.download_and_prepare(download_config=config)
    return builder


def records(source):
    return [decode(data) for data in ArrayRecordDataSource(list(source.shard_paths))]


def assert_same(a: Source, b: Source):
    for field in ARRAYS:
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
    assert a.concepts == b.concepts and a.kind == b.kind
    for field in ("dropped", "mended", "explained"):
        assert a.info[field] == b.info[field]
    for left, right in zip(records(a), records(b), strict=True):
        left, right = dataclasses.asdict(left), dataclasses.asdict(right)
        np.testing.assert_equal(left, right)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("coco_boxes", "coco"),
        ("goldg", "goldg"),
        ("custom/detection", "coco"),
        ("custom/image_text", "image_text"),
    ],
)
def test_built_by_tfds_and_by_us(name, source, archive, tmp_path):
    if source == "image_text":
        try:
            phrases.load()
        except UserError as error:
            pytest.skip(f"no English spaCy pipeline: {error}")
    builder = build(name, archive, tmp_path / "tfds", num_shards=2)
    directory = tmp_path / "tfds" / name / "1.0.0"
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    theirs = tfds_index.add_index(directory)
    assert before.items() <= {p: p.stat().st_mtime_ns for p in directory.iterdir()}.items()
    opened = (registry.SOURCES | registry.OF_KIND)[source].open_all(archive)
    ours = prepare(opened, tmp_path / "ours", name="mini", options=PrepareOptions(jobs=1))
    assert_same(theirs, ours)
    assert len(theirs.shard_paths) == 2 and "dropped images: unreadable" in format_report(theirs)
    assert len(builder.as_data_source("train")) == len(ours)


def test_a_prepared_directory_is_a_dataset(archive, tmp_path):
    opened = registry.SOURCES["coco"].open_all(archive)
    source = prepare(opened, tmp_path / "2-pets", name="2-pets", options=PrepareOptions(jobs=1))
    builder = tfds.builder_from_directory(tmp_path / "2-pets")
    assert (builder.name, builder.info.splits["train"].num_examples) == ("source_2_pets", 6)
    data = builder.as_data_source(split="train")
    for one, record in zip(data, records(source), strict=True):
        assert one["image"].shape == (40, 60, 3) and one["image_id"].decode() == record.image_id
        np.testing.assert_array_equal(one["boxes"], record.boxes)
        np.testing.assert_array_equal(one["labels"], record.labels)
        assert [text.decode() for text in one["concepts"]] == list(record.concepts)
    assert len(builder.as_data_source(split="train[:50%]")) == 3


def test_tfds_load_reads_what_is_built_as_tfrecord(archive, tmp_path):
    """TFDS has no tf.data reader for ArrayRecord; for tfds.load another format is built."""
    build("goldg", archive, tmp_path, "tfrecord")
    loaded = list(tfds.load("goldg", data_dir=tmp_path, split="train"))
    assert len(loaded) == 12 and loaded[0]["boxes"].shape == (3, 4)
    assert loaded[1]["concepts"].numpy().tolist() == [b"cat"]
    with pytest.raises(UserError, match="tfrecord. Build it as array_record"):
        tfds_index.add_index(tmp_path / "goldg" / "1.0.0")


def test_a_missing_archive_is_reported(tmp_path):
    with pytest.raises(AssertionError, match=r"Objects365.*docs/data\.md"):
        build("objects365", tmp_path / "nowhere", tmp_path)
    write_json(tmp_path / "empty" / "package.json", {"name": "web"})
    with pytest.raises(UserError, match="no detection file"):
        build("objects365", tmp_path / "empty", tmp_path)


@pytest.mark.parametrize("name", ["coco_boxes", "goldg"])
def test_beam_builds_the_same(name, archive, tmp_path, monkeypatch):
    beam = pytest.importorskip("apache_beam")
    for kind in tfds_builders.SHARD_EXAMPLES:
        monkeypatch.setitem(tfds_builders.SHARD_EXAMPLES, kind, 3)
    options = beam.options.pipeline_options.PipelineOptions(["--runner=DirectRunner"])
    built = [
        build(name, archive, tmp_path / how, num_shards=shards, beam_options=given)
        for how, shards, given in (("beam", 2, options), ("plain", 3, None))
    ]
    with_beam, plain = (tfds_index.add_index(Path(builder.data_dir)) for builder in built)
    assert not (with_beam.directory / "shards").exists()
    for explained in (with_beam.info["explained"], plain.info["explained"]):
        explained.clear()  # of the workers' drops only the counts are collected
    assert_same(with_beam, plain)


def test_examples_survive_the_files_for_beam(archive):
    for name in ("coco", "goldg", "image_text"):
        for opened in registry.SOURCES[name].open_all(archive):
            for example in opened.examples:
                for image in (example.image, ParquetImage(Path("a.parquet"), 2, 7)):
                    one = dataclasses.replace(example, image=image)
                    assert tfds_builders._from_line(tfds_builders._to_line(one)) == one


@pytest.fixture
def built(archive, tmp_path):
    build("coco_boxes", archive, tmp_path, num_shards=3)
    return tmp_path / "coco_boxes" / "1.0.0"


def test_command(built, capsys):
    for _ in range(2):
        assert door.main(["index", f"--from={built}", "--jobs=2"]) == 0
        assert "dropped images: missing" in capsys.readouterr().out
    assert len(Source.open(built)) == 6


def test_an_index_is_added_once_and_resumed(built, monkeypatch):
    indexed, real = [], tfds_index.decode

    def dying(data):
        if len(indexed) == 3:
            raise KeyboardInterrupt
        indexed.append(data)
        return real(data)

    monkeypatch.setattr(tfds_index, "decode", dying)
    with pytest.raises(KeyboardInterrupt):
        tfds_index.add_index(built)
    assert not (built / "info.json").exists()
    monkeypatch.setattr(tfds_index, "decode", lambda data: indexed.append(data) or real(data))
    source = tfds_index.add_index(built)
    assert len(source) == 6 and len(indexed) == 3 + 6 - 2  # the first file has two
    assert not (built / "index.partial").exists()
    monkeypatch.setattr(tfds_index, "decode", None)
    assert len(tfds_index.add_index(built)) == 6


def test_other_datasets_are_refused(built, tmp_path):
    with pytest.raises(UserError, match="not a dataset of TensorFlow Datasets"):
        tfds_index.add_index(tmp_path)
    with pytest.raises(UserError, match="no split 'test'. Choose --split from train"):
        tfds_index.add_index(built, split="test")
    shutil.copytree(built, tmp_path / "other")
    write_json(tmp_path / "other" / "metadata.json", {"kind": "masks"})
    with pytest.raises(UserError, match="'masks'"):
        tfds_index.add_index(tmp_path / "other")
    features = json.loads((built / "features.json").read_text())
    del features["featuresDict"]["features"]["concepts"]
    write_json(built / "features.json", features)
    with pytest.raises(UserError, match="features are not those"):
        tfds_index.add_index(built)


def test_a_damaged_record_is_named(built):
    path = next(built.glob("*-00001-of-00003"))
    content = bytearray(path.read_bytes())
    content[100:2000] = bytes(1900)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001-of-00003, record \d: .*Build the dataset again"):
        tfds_index.add_index(built)
