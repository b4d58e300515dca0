"""The validation set of own photos: found by its name, or held out by a hash of each picture."""

import json
import shutil

import numpy as np
import pytest
from miniature_archives import image_entries, jpeg, write_json

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import validation
from detclipv2_jax.data.prepare.examples import ImageFile
from detclipv2_jax.data.reader import RecordFiles
from detclipv2_jax.data.records import decode
from detclipv2_jax.prepare import main

BOX = [4.0, 5.0, 20.0, 10.0]


def boxes(names, category="cat"):
    """COCO instances: one box on each of the pictures of these names."""
    return {
        "images": image_entries(names),
        "categories": [{"id": 3, "name": category}],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 3, "bbox": BOX, "iscrowd": 0}
            for i in range(len(names))
        ],
    }


def pictures(folder, count, first=0):
    """Different pictures in a folder; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{first + i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(jpeg(seed=first + i))
    return names


def prepared(origin, to, *flags):
    """The exit status of `prepare custom`."""
    return main(["custom", f"--from={origin}", f"--to={to}", "--jobs=1", *flags])


def content(to):
    """The annotations of the validation set in `to`; each of its pictures must exist."""
    found = json.loads((to / "validation/annotations.json").read_text())
    for image in found["images"]:
        assert (to / "validation/images" / image["file_name"]).is_file()
    return found


def bytes_of(folder):
    return {path.read_bytes() for path in folder.glob("*.jpg")}


LAYOUTS = {  # train file, its pictures; validation file, its pictures
    "own": (
        "annotations/instances_train.json",
        "images",
        "annotations/instances_val.json",
        "images",
    ),
    "flat": ("train.json", "images", "val.json", "images"),
    "coco": (
        "annotations/instances_train2017.json",
        "train2017",
        "annotations/instances_val2017.json",
        "val2017",
    ),
    "roboflow": (
        "train/_annotations.coco.json",
        "train",
        "valid/_annotations.coco.json",
        "valid",
    ),
    "folders": ("train.json", "images", "validation/labels.json", "validation/images"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_file_for_validation_is_found(tmp_path, layout, capsys):
    train, of_train, val, of_val = LAYOUTS[layout]
    origin, to = tmp_path / "photos", tmp_path / "data"
    if layout == "coco":  # where training finds its pictures
        of_train = "images"
    names = pictures(origin / of_train, 3)
    write_json(origin / train, boxes(names))
    wanted = pictures(origin / of_val, 2, first=10)
    write_json(origin / val, boxes(wanted, "Tabby cat"))
    (origin / "test").mkdir()
    write_json(origin / "test/_annotations.coco.json", boxes(names))
    assert prepared(origin, to) == 0
    out = capsys.readouterr().out
    assert f"{to}/validation: 2 images for validation with 2 boxes of 1 name\n" in out
    assert f"{val}: skipped" not in out
    assert len(Source.open(to / "detection")) == 3
    found = content(to)
    assert [image["source_id"] for image in found["images"]] == ["0", "1"]
    assert [one["name"] for one in found["categories"]] == ["Tabby cat"]
    assert [one["bbox"] for one in found["annotations"]] == [BOX, BOX]
    assert bytes_of(to / "validation/images") == {jpeg(seed=10), jpeg(seed=11)}
    # Again: nothing to do. And from elsewhere: the pictures move with the data.
    assert prepared(origin, to) == 0
    assert "validation: already prepared, 2 images" in capsys.readouterr().out
    shutil.move(to, tmp_path / "elsewhere")
    content(tmp_path / "elsewhere")


def test_no_file_for_validation_is_told(tmp_path, capsys):
    names = pictures(tmp_path / "photos/images", 2)
    write_json(tmp_path / "photos/train.json", boxes(names))
    assert prepared(tmp_path / "photos", tmp_path / "data") == 0
    assert "hold out a tenth of the pictures with --val_share=0.1" in capsys.readouterr().out
    assert not (tmp_path / "data/validation").exists()


def test_captions_and_key_points_are_no_boxes_for_validation(tmp_path):
    names = pictures(tmp_path / "images", 2)
    write_json(tmp_path / "annotations/captions_val2017.json", {"annotations": [{"caption": "a"}]})
    assert validation.find(tmp_path) is None
    write_json(tmp_path / "annotations/person_keypoints_val2017.json", boxes(names))
    instances = write_json(tmp_path / "annotations/instances_val2017.json", boxes(names))
    assert validation.find(tmp_path) == instances
    write_json(tmp_path / "annotations/instances_val2014.json", boxes(names))
    with pytest.raises(UserError, match="several .* for validation: .*Name one with --validation"):
        validation.find(tmp_path)


def read(to):
    """(the pictures trained on, those held out), as bytes."""
    source = Source.open(to / "detection")
    files = RecordFiles({"photos": source})
    trained = {decode(one).image for one in files.read("photos", np.arange(len(source)))}
    return trained, bytes_of(to / "validation/images")


def test_pictures_are_held_out_whatever_their_name_and_stay(tmp_path, capsys):
    origin, to = tmp_path / "photos", tmp_path / "data"
    names = pictures(origin / "images", 40)
    write_json(origin / "train.json", boxes(names))
    assert prepared(origin, to, "--val_share=0.25") == 0
    out = capsys.readouterr().out
    trained, held_out = read(to)
    assert 3 <= len(held_out) <= 17 and len(trained) + len(held_out) == 40
    assert not trained & held_out and "\n  held out for validation" in out
    assert len(content(to)["annotations"]) == len(held_out)
    # More pictures, among them copies under other names and in a second file, in another order.
    more = pictures(origin / "images", 20, first=100)
    for name in names[:10]:
        shutil.copy(origin / "images" / name, origin / "images" / f"copy_of_{name}")
    copies = [f"copy_of_{name}" for name in names[:10]]
    write_json(origin / "train.json", boxes(more[::-1] + names[::-1]))
    write_json(origin / "train2.json", boxes(copies))
    assert prepared(origin, to, "--val_share=0.25") == 2
    assert "made from other files or options. Add --overwrite" in capsys.readouterr().err
    assert prepared(origin, to, "--val_share=0.25", "--overwrite") == 0
    again, held_again = read(to)
    assert not again & held_again and held_out <= held_again and trained <= again
    # Another seed: other pictures.
    assert prepared(origin, to, "--val_share=0.25", "--val_seed=1", "--overwrite") == 0
    assert read(to)[1] != held_again


def test_copies_that_roboflow_augmented_stay_together(tmp_path):
    names = [f"{i}_jpg.rf.{seed:08x}{i:024x}.jpg" for i in range(30) for seed in (1, 2, 3)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(jpeg(height=8, width=8, seed=i))
    files = [ImageFile(tmp_path / name) for name in names]
    held_out = validation.Split(0.3).held_out(files)
    sides = np.array([validation.picture_key(file) in held_out for file in files]).reshape(30, 3)
    assert (sides.all(axis=1) | ~sides.any(axis=1)).all() and 0 < sides[:, 0].sum() < 30


def test_one_picture_is_held_out_of_few_and_never_the_last(tmp_path, capsys):
    names = pictures(tmp_path / "photos/images", 2)
    write_json(tmp_path / "photos/train.json", boxes(names))
    assert prepared(tmp_path / "photos", tmp_path / "data", "--val_share=0.0001") == 0
    assert [len(one) for one in read(tmp_path / "data")] == [1, 1]
    write_json(tmp_path / "photos/train.json", boxes(names[:1]))
    assert prepared(tmp_path / "photos", tmp_path / "one", "--val_share=0.1") == 2
    assert "--val_share=0.1 leaves none of 1 picture to train on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val_share=0"], "--val_share=0: must be above 0 and below 1"),
        (["--val_share=10"], "--val_share=10: must be above 0 and below 1"),
        (["--val_share=0.1"], "has a file for validation"),
        (["--val_share=0.1", "--validation=val.json"], "exclude each other"),
        (["--validation=nothing.json"], "nothing.json: no such file"),
    ],
)
def test_wrong_flags(tmp_path, flags, message, capsys):
    names = pictures(tmp_path / "photos/images", 4)
    write_json(tmp_path / "photos/train.json", boxes(names))
    write_json(tmp_path / "photos/val.json", boxes(names))
    assert prepared(tmp_path / "photos", tmp_path / "data", *flags) == 2
    assert message in capsys.readouterr().err
    assert prepared(tmp_path / "photos", tmp_path / "data", "--validation=none") == 0
    assert not (tmp_path / "data/validation").exists()


def test_a_file_without_a_usable_picture_says_why(tmp_path, capsys):
    names = pictures(tmp_path / "photos/images", 2)
    write_json(tmp_path / "photos/train.json", boxes(names))
    write_json(tmp_path / "photos/val.json", boxes(["gone.jpg"]))
    assert prepared(tmp_path / "photos", tmp_path / "data") == 2
    error = capsys.readouterr().err
    assert "val.json: no usable box for validation, for example " in error and "gone.jpg" in error
    assert not (tmp_path / "data/validation").exists()


def both_files(folder, train, val):
    write_json(folder / "instances_train.json", boxes(train))
    write_json(folder / "instances_val.json", boxes(val))


def test_pictures_that_are_also_trained_on_are_told(tmp_path, capsys):
    folder = tmp_path / "own"
    names = pictures(folder / "images", 4)
    shutil.copy(folder / "images/0.jpg", folder / "images/copy.jpg")
    both_files(folder, names[:3], ["2.jpg", "3.jpg", "copy.jpg"])
    for _ in range(2):  # also where all is prepared
        assert prepared(folder, tmp_path / "to") == 0
        shown = capsys.readouterr().out
        assert "warning: 2 pictures for validation are also trained on, for example " in shown
        assert "--validation=none --val_share=0.1" in shown
    both_files(folder, names[:3], ["3.jpg"])
    assert prepared(folder, tmp_path / "other") == 0
    assert "trained on" not in capsys.readouterr().out


def test_a_picture_for_validation_that_is_supplied_later(tmp_path, capsys):
    folder, to = tmp_path / "own", tmp_path / "to"
    names = pictures(folder / "images", 3)
    both_files(folder, names[:2], ["2.jpg", "3.jpg"])
    assert prepared(folder, to) == 0 and len(content(to)["images"]) == 1
    assert prepared(folder, to) == 0
    pictures(folder / "images", 1, first=3)
    assert prepared(folder, to) == 2
    assert "pictures that were missing and exist now: 1 (3.jpg)" in capsys.readouterr().err
    assert prepared(folder, to, "--overwrite") == 0 and len(content(to)["images"]) == 2


def test_a_picture_for_validation_that_was_replaced(tmp_path, capsys):
    folder, to = tmp_path / "own", tmp_path / "to"
    both_files(folder, pictures(folder / "images", 2), pictures(folder / "images", 1, first=2))
    assert prepared(folder, to) == 0
    (folder / "images/2.jpg").write_bytes(jpeg(seed=77))
    assert prepared(folder, to) == 2
    assert "pictures that have changed: 1" in capsys.readouterr().err


def test_a_folder_that_was_moved_with_its_validation_set(tmp_path, capsys):
    folder = tmp_path / "own"
    both_files(folder, pictures(folder / "images", 2), pictures(folder / "images", 1, first=2))
    assert prepared(folder, folder / "to") == 0
    moved = folder.rename(tmp_path / "moved")
    assert prepared(moved, moved / "to") == 0
    assert "already prepared, 1 image for validation" in capsys.readouterr().out
