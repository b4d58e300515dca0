"""Which annotation files are taken, what two of them have in common, and what changed since."""

import json
import os
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from miniature_archives import coco, jpeg, mdetr, write_images, write_json
from test_annotation_sets import box, categories, image

from detclipv2_jax import prepare as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import records
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import inputs, registry, shards
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.repeats import Distinct
from detclipv2_jax.data.prepare.sources import formats


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "from")
    return tmp_path / "from"


def run(folder, *more):
    to = folder.parent / "to"
    code = door.main(["custom", f"--from={folder}", f"--to={to}", "--jobs=1", *more])
    return code, to / "detection"


def contents(directory):
    """The boxes of each record of a source, by image id."""
    found = {}
    for path in Source.open(directory).shard_paths:
        reader = ArrayRecordReader(path)
        for record in map(records.decode, reader.read(range(reader.num_records()))):
            names = [record.concepts[label] for label in record.labels]
            found[record.image_id] = list(zip(names, np.round(record.boxes).astype(int).tolist()))
    return found


def annotations(pictures, notes, names=("cat",)):
    return {"images": pictures, "annotations": notes, "categories": categories(*names)}


# ---- Two files with the same pictures.


@pytest.mark.parametrize(
    "older", ["instances_train_old", "Copy of instances_train", "instances_train (1)", "a_copy"]
)
def test_of_two_versions_the_original_is_taken_and_the_rest_is_counted(folder, older, capsys):
    name = "instances_train"
    write_json(folder / f"{name}.json", annotations([image(1, "0.jpg")], [box(1)]))
    both = [image(7, "images/0.jpg"), image(8, "1.jpg")]
    notes = [box(7, xywh=(1, 1, 9, 9)), box(8)]
    write_json(folder / f"{older}.json", annotations(both, notes))
    code, to = run(folder)
    assert code == 0
    assert contents(to) == {"1": [("cat", [5, 4, 25, 14])], "8": [("cat", [5, 4, 25, 14])]}
    info = Source.open(to).info
    assert info["dropped"] == {"images: the same picture came before": 1}
    assert info["annotation_files"] == [
        {"file": f"{name}.json", "images": 1, "boxes": 1},
        {"file": f"{older}.json", "images": 1, "boxes": 1},
    ]
    printed = capsys.readouterr().out
    assert f"from {name}.json" in printed and f"from {older}.json" in printed


def test_the_same_bytes_under_another_name_in_two_files_are_one_picture(folder):
    shutil.copy(folder / "images" / "0.jpg", folder / "images" / "copy.jpg")
    write_json(folder / "a.json", annotations([image(1, "0.jpg")], [box(1)]))
    write_json(folder / "b.json", annotations([image(2, "copy.jpg"), image(3, "1.jpg")], [box(2)]))
    code, to = run(folder)
    assert code == 0 and set(contents(to)) == {"1", "3"}
    (sentence,) = Source.open(to).info["explained"]["images: the same picture came before"]
    assert "copy.jpg has the bytes of" in sentence


def test_names_that_only_lost_pictures_have_are_no_negatives(folder):
    """A file of stuff next to one of things: "sky" would be a negative on the sky's pictures."""
    write_json(folder / "a.json", annotations([image(1, "0.jpg")], [box(1)], ["cat"]))
    write_json(folder / "b.json", annotations([image(1, "0.jpg")], [box(1)], ["sky", "moon"]))
    _, to = run(folder)
    assert [row["name"] for row in Source.open(to).concepts] == ["cat", "moon"]


def test_names_that_one_of_two_files_lacks_are_noted(folder, capsys):
    write_json(folder / "a.json", annotations([image(1, "0.jpg")], [box(1)], ["cat"]))
    write_json(folder / "b.json", annotations([image(1, "1.jpg")], [box(1)], ["dog"]))
    _, to = run(folder)
    assert Source.open(to).info["noted"] == {"names: not in every file": 2}
    assert "'cat'; " in capsys.readouterr().out


def test_two_captions_of_one_picture_stay_two_and_equal_ones_are_one(folder):
    write_json(folder / "a.json", mdetr(["0.jpg"]))
    other = mdetr(["0.jpg"])
    other["images"][1]["caption"] = "A bird and a cat."
    write_json(folder / "b.json", other)
    archives = registry.open_archives(
        [folder / "a.json", folder / "b.json"], ImageFolder(folder / "images"), "grounding"
    )
    captions = [example.caption for example in Distinct(archives)]
    assert len(captions) == 3 and captions[-1] == "A bird and a cat."


# ---- Which files are taken.


def test_images_of_the_background(folder, capsys):
    content = annotations([image(1, "0.jpg"), image(2, "1.jpg")], [], ["cat", "cup"])
    write_json(folder / "annotations" / "instances_train.json", content)
    code, to = run(folder)
    assert code == 0 and contents(to) == {"1": [], "2": []}
    printed = capsys.readouterr().out
    assert f"  of which without boxes{'':<14}{2:>10}" in printed
    assert "names without boxes:         2 (cat, cup)" in printed


REFUSED = {
    "results.json": (
        [{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}],
        "results of a detector",
    ),
    "list.json": ([{"image": "0.jpg"}], "JSON list"),
    "panoptic_train.json": (
        {"images": [], "annotations": [{"segments_info": [{"bbox": []}]}], "categories": []},
        "panoptic",
    ),
    "stuff.json": (
        {"images": [], "annotations": [{"segmentation": []}], "categories": []},
        'have "segmentation" and no "bbox"',
    ),
    "image_info.json": ({"images": [], "categories": []}, 'has no "annotations"'),
    "lvis_v1_train.json": (
        {"images": [{"neg_category_ids": []}], "annotations": [], "categories": []},
        "detclip prepare lvis",
    ),
    "package.json": ({"name": "web"}, 'no "images" and "annotations" and "categories"'),
    "instances_val.json": (coco(["0.jpg", "1.jpg"]), "so it is not trained on"),
    ".instances_train.json": (coco(["0.jpg", "1.jpg"]), "hidden"),
    "instances_train.json.bak": (coco(["0.jpg", "1.jpg"]), "backup"),
    "instances_train.json~": (coco(["0.jpg", "1.jpg"]), "backup"),
    "empty.json": (b"", "empty"),
    "page.json": (b"<html>", "not JSON"),
    "zip.json": (b"PK\x03\x04......", "a zip archive"),
}


def test_each_file_that_is_left_out_has_its_reason(folder):
    for name, (content, _) in REFUSED.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    found, skipped = registry.discover(folder)
    assert not found and {path.name for path in skipped} == set(REFUSED)
    for path, reason in skipped.items():
        assert REFUSED[path.name][1] in reason, path.name


def test_a_detectors_results_are_refused_also_where_they_are_named(folder):
    path = write_json(folder / "results.json", REFUSED["results.json"][0])
    with pytest.raises(UserError, match="results.json: it is a list of boxes with scores"):
        registry.open_archives([path], ImageFolder(folder), "detection")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_the_format_is_found_in_every_encoding(folder, encoding):
    text = json.dumps(coco(["0.jpg", "1.jpg"]))
    (folder / "a.json").write_bytes(text.encode(encoding))
    assert formats.format_of(folder / "a.json") == "COCO instances"


# ---- What changed since a source was made.


def two(folder):
    write_json(folder / "a.json", annotations([image(1, "0.jpg"), image(2, "late.jpg")], [box(1)]))


def test_a_picture_that_was_missing_and_exists_now(folder, capsys):
    two(folder)
    assert run(folder)[0] == 0
    capsys.readouterr()
    assert run(folder)[0] == 0
    assert "images that were missing and still are: 1" in capsys.readouterr().out
    (folder / "images" / "late.jpg").write_bytes(jpeg(seed=9))
    code, to = run(folder)
    assert code == 2 and len(Source.open(to)) == 1
    error = capsys.readouterr().err
    assert "were missing and exist now: 1 (late.jpg). Add --overwrite" in error
    assert run(folder, "--overwrite")[0] == 0
    assert len(Source.open(to)) == 2 and run(folder)[0] == 0


def test_a_picture_that_was_damaged_and_is_whole_now(folder, capsys):
    two(folder)
    (folder / "images" / "late.jpg").write_bytes(jpeg(seed=9)[:300])
    assert run(folder)[0] == 0 and run(folder)[0] == 0
    (folder / "images" / "late.jpg").write_bytes(jpeg(seed=9))
    assert run(folder)[0] == 2
    assert "left out and have changed: 1" in capsys.readouterr().err


def test_a_picture_that_was_replaced(folder, capsys):
    two(folder)
    assert run(folder)[0] == 0
    path = folder / "images" / "0.jpg"
    data = path.read_bytes()
    os.utime(path, ns=(0, 0))  # a copy with another time is the same picture
    assert run(folder)[0] == 0
    path.write_bytes(data[:-2] + b"\xff\xd9"[::-1])  # of the same size
    assert run(folder)[0] == 2
    assert "have changed: 1" in capsys.readouterr().err
    path.unlink()  # what is gone was read before
    assert run(folder)[0] == 0


def test_a_moved_archive_is_the_same(folder):
    two(folder)
    assert run(folder)[0] == 0
    source = Source.open(folder.parent / "to" / "detection")
    moved = folder.rename(folder.parent / "moved")
    assert list(inputs.changes(source.directory, moved)) == []
    (moved / "images" / "late.jpg").write_bytes(jpeg(seed=9))
    assert "exist now: 1" in next(iter(inputs.changes(source.directory, moved)))


def test_a_new_annotation_file_and_an_edited_one_are_noticed(folder, capsys):
    two(folder)
    assert run(folder)[0] == 0
    write_json(folder / "b.json", annotations([image(1, "2.jpg")], [box(1)]))
    assert run(folder)[0] == 2
    assert "--overwrite" in capsys.readouterr().err
    (folder / "b.json").unlink()
    write_json(
        folder / "a.json", annotations([image(1, "0.jpg")], [box(1), box(1, xywh=(1, 1, 5, 5))])
    )
    assert run(folder)[0] == 2


def test_a_picture_that_changes_before_an_interrupted_preparation_goes_on(folder, tmp_path):
    two(folder)
    (archive,) = registry.open_archives(
        [folder / "a.json"], ImageFolder(folder / "images"), "detection"
    )
    examples = list(archive.examples)
    (tmp_path / "shards").mkdir()
    builder = shards.ShardBuilder(tmp_path / "shards", "detection", PrepareOptions())
    builder.build(0, examples)
    assert builder.finished(0, examples)
    (folder / "images" / "0.jpg").write_bytes(jpeg(seed=9))
    assert not builder.finished(0, examples)


def test_equal_bytes_in_one_file_are_kept_and_noted(folder):
    shutil.copy(folder / "images" / "0.jpg", folder / "images" / "twin.jpg")
    both = [image(1, "0.jpg"), image(2, "twin.jpg")]
    write_json(folder / "a.json", annotations(both, [box(1), box(2)]))
    code, to = run(folder)
    assert code == 0 and len(contents(to)) == 2
    assert Source.open(to).info["noted"] == {"images: the same bytes as another": 1}


def test_pictures_of_detection_that_grounding_has_too_are_told(folder, capsys):
    write_json(folder / "a.json", annotations([image(1, "0.jpg"), image(2, "1.jpg")], [box(1)]))
    write_json(folder / "b.json", mdetr(["0.jpg", "2.jpg"]))
    assert run(folder)[0] == 0
    assert "detection and grounding have 1 pictures in common" in capsys.readouterr().out


def test_cocos_folder_of_annotations(folder, capsys):
    """Keypoints and stuff have the pictures of instances: instances' boxes are taken."""
    files = {
        "instances_train2017": ([box(1), box(2)], ["person"]),
        "person_keypoints_train2017": ([box(1, keypoints=[1, 2, 2])], ["person"]),
        "stuff_train2017": ([box(1, segmentation=[])], ["sky"]),
    }
    for name, (notes, names) in files.items():
        content = annotations([image(1, "0.jpg"), image(2, "1.jpg")], notes, names)
        write_json(folder / "annotations" / f"{name}.json", content)
    code, to = run(folder)
    assert code == 0 and len(contents(to)) == 2
    source = Source.open(to)
    assert [row["name"] for row in source.concepts] == ["person"]
    assert source.info["dropped"] == {"images: the same picture came before": 4}
    assert [file["images"] for file in source.info["annotation_files"]] == [2, 0, 0]
