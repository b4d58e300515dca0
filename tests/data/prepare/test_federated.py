"""LVIS's lists of absent and not exhaustively annotated names reach the plan of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.record_writer import RecordWriter
from detclipv2_jax.data.prepare.sources import coco, lvis
from detclipv2_jax.data.records import Record
from detclipv2_jax.data.vocabulary import Vocabulary

NAMES = ["cat", "hot_dog", "sofa", "car", "tea_cup", "kite"]
# Category ids, from 1: of the boxes, absent, with more objects than boxes. Nothing has "kite" but
# the first image's list.
IMAGES = [([1, 2], [6, 4], [2]), ([2], [], []), ([3, 3], [5, 1], []), ([], [3], [])]


def annotations(folder, *, with_lists=True, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    images, boxes = [], []
    for number, (own, absent, partial) in enumerate(IMAGES):
        Image.new("RGB", (60, 40), (number * 9, 0, 0)).save(folder / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 40, "width": 60})
        if with_lists:
            lists = {"neg_category_ids": absent, "not_exhaustive_category_ids": partial}
            images[-1] |= lists | (changes if number == 1 else {})
        boxes += [
            {"id": len(boxes) + i, "image_id": number, "category_id": c, "bbox": [1, 2, 20 + i, 9]}
            for i, c in enumerate(own)
        ]
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    path = folder / "lvis_v1_train.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


def prepared(folder, jobs=1, reader=lvis.read, **changes):
    path = annotations(folder / "in", **changes)
    options = PrepareOptions(jobs=jobs)
    return prepare([reader(path, ImageFolder(folder / "in"))], folder / "out", name="lvis",
                   options=options)  # fmt: skip


def names_of(source, lists, record):
    return {source.concepts[local]["name"] for local in lists.of(record)}


def test_the_lists_of_every_image_are_in_the_index(tmp_path):
    source = prepared(tmp_path)
    spoken = [name.replace("_", " ") for name in NAMES]
    for record, (_, absent, partial) in enumerate(IMAGES):
        assert names_of(source, source.absent, record) == {spoken[i - 1] for i in absent}
        assert names_of(source, source.partial, record) == {spoken[i - 1] for i in partial}
    assert source.info["federated"] is True
    # A name that no box has is a concept of the source, with a count of 0.
    assert [row["count"] for row in source.concepts] == [1, 2, 2, 0, 0, 0]
    assert [row["name"] for row in source.concepts] == spoken and source.vocabulary.all()


def test_a_source_without_lists_has_no_such_files(tmp_path):
    source = prepared(tmp_path, with_lists=False, reader=coco.read)
    assert source.absent is source.partial is None and "federated" not in source.info
    files = {path.name for path in (tmp_path / "out" / "index").iterdir()}
    assert files == {"height.npy", "width.npy", "positives.npy", "positives_offsets.npy"}


def test_training_is_scored_as_the_lists_say(tmp_path):
    source = prepared(tmp_path)
    vocabulary = Vocabulary({"lvis": source})
    config = KindConfig(
        sources=("lvis",), batch_size=4, shapes=((8, 8),), table_size=8, scored_on="source",
        federated=True,
    )  # fmt: skip
    step = Plan({"lvis": source}, vocabulary, {"detection": config}, 0).plan(0)
    table = np.array(vocabulary.names(step.concepts))
    for slot, record in enumerate(step.records):
        own, absent, partial = (set(ids) for ids in IMAGES[record])
        expected = {NAMES[i - 1].replace("_", " ") for i in (own | absent) - partial}
        assert set(table[step.scored[slot]]) == expected


def test_an_image_without_lists_beside_others_is_known_by_its_boxes_alone(tmp_path):
    nothing = {"neg_category_ids": None, "not_exhaustive_category_ids": None}
    source = prepared(tmp_path, **nothing)
    assert source.absent.of(1).size == 0 and source.absent.of(0).size == 2


@pytest.mark.parametrize(
    "value, reason", [("3", "malformed entry"), ([[3]], "malformed entry"), ([99], None)]
)
def test_bad_lists_are_counted(tmp_path, value, reason):
    source = prepared(tmp_path, neg_category_ids=value)
    if reason:
        assert source.info["dropped"] == {f"images: {reason}": 1, "boxes: unknown image": 1}
    else:
        assert source.info["mended"] == {"images: unknown category in a list": 1}
        assert len(source) == 4 and source.absent.of(1).size == 0


def write(directory, lists):
    with RecordWriter(directory, name="s", kind="detection", names=NAMES) as writer:
        for number, (absent, partial) in enumerate(lists):
            boxes = np.array([[1, 1, 9, 9]], np.float32)
            record = Record(b"\xff\xd8", 9, 9, str(number), boxes, np.zeros(1, np.int32), ("cat",))
            writer.write(record, absent, partial)
        return writer.finish()


@pytest.mark.parametrize("file", ["absent", "absent_offsets", "partial", "partial_offsets"])
@pytest.mark.parametrize("damage", ["missing", "too large", "too many"])
@pytest.mark.parametrize("digests", [True, False])
def test_damaged_lists_are_named(tmp_path, file, damage, digests):
    write(tmp_path / "s", [(["kite"], ["cat"]), ((), ())])
    if not digests:  # prepared by an older version
        info = json.loads((tmp_path / "s/info.json").read_text())
        kept = {field: value for field, value in info.items() if not field.startswith("digest")}
        (tmp_path / "s/info.json").write_text(json.dumps(kept))
    path = tmp_path / "s" / "index" / f"{file}.npy"
    array = np.load(path)
    if damage == "missing":
        path.unlink()
    elif damage == "too large":
        np.save(path, array + 9)
    else:
        np.save(path, np.append(array, array[-1:] + (file.endswith("offsets"))))
    with pytest.raises(UserError, match="index/.*(missing or damaged|damaged or replaced)"):
        Source.open(tmp_path / "s")
