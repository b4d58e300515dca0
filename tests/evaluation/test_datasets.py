import json

import pytest
from PIL import Image
from test_evaluate import make_set

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare.sources import odinw
from detclipv2_jax.evaluation import datasets
from detclipv2_jax.evaluation.lvis import LvisGroundTruth


def make_lvis(folder):
    """Write LVIS val as in its archive: four images, 1 and 3 of COCO's val2017."""
    path = make_set(folder, images=4)
    content = json.loads(path.read_text())
    for image in content["images"]:
        split = "val2017" if image["id"] % 2 else "train2017"
        name = f"{image['id']:012d}.png"
        (folder / split).mkdir(exist_ok=True)
        (folder / "images" / image.pop("file_name")).rename(folder / split / name)
        image["coco_url"] = f"http://images.cocodataset.org/{split}/{name}"
    path.unlink()
    path.with_name("lvis_v1_val.json").write_text(json.dumps(content))
    return path.with_name("lvis_v1_val.json")


def make_odinw(root):
    """Write the 13 datasets with one image each and the names of the exporter."""
    for one in odinw.SETS:
        path = root / one.directory / one.evaluation
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24)).save(path.parent / "0.png")
        names = list(one.names) or ["thing"]
        content = {
            "images": [{"id": 1, "height": 24, "width": 32, "file_name": "0.png"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}],
            "categories": [{"id": n, "name": name} for n, name in enumerate(names, start=1)],
        }
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("folder", ["coco", "lvis", "."])
def test_lvis_val_and_minival_from_it(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    path = make_lvis(tmp_path / folder)
    (val,) = datasets.load_sets("lvis_val", tmp_path)
    assert len(val.truth.images) == 4 and val.truth.path == str(path)
    (minival,) = datasets.load_sets("lvis_minival", tmp_path)
    assert [image.id for image in minival.truth.images] == [1, 3]
    assert isinstance(minival.truth, LvisGroundTruth) and "val2017" in minival.truth.path
    assert len(minival.truth.image_ids) == len(val.truth.image_ids) // 2
    for one in (val, minival):
        assert all(datasets.find_images(one.truth, one.images))


def test_an_existing_minival_is_used(tmp_path):
    (tmp_path / "coco").mkdir()
    path = make_lvis(tmp_path / "coco")
    content = json.loads(path.read_text())
    keep = [image for image in content["images"] if image["id"] == 3]
    rows = [row for row in content["annotations"] if row["image_id"] == 3]
    minival = path.with_name("lvis_v1_minival.json")
    minival.write_text(json.dumps(content | {"images": keep, "annotations": rows}))
    (one,) = datasets.load_sets("lvis_minival", tmp_path)
    assert one.truth.path == str(minival) and len(one.truth.images) == 1


def test_coco_by_name(tmp_path):
    (tmp_path / "coco").mkdir()
    path = make_set(tmp_path / "coco", federated=False, folder="val2017")
    path.rename(path.with_name("instances_val2017.json"))
    (one,) = datasets.load_sets("coco", tmp_path, tmp_path / "coco" / "val2017")
    assert len(one.truth.images) == 6


def test_odinw_has_the_names_and_splits_of_the_benchmark(tmp_path):
    make_odinw(tmp_path / "odinw")
    sets = {one.name: one for one in datasets.load_sets("odinw13", tmp_path)}
    assert list(sets) == [one.name for one in odinw.SETS]
    names = [category.name for category in sets["NorthAmericaMushrooms"].truth.categories]
    assert names == ["flat mushroom", "yellow mushroom"]
    assert "mini_val" in sets["EgoHands"].truth.path
    assert all(datasets.find_images(s.truth, s.images)[0] for s in sets.values())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lvis_val", "coco/annotations/lvis_v1_val.json does not exist. Get .*lvisdataset.org"),
        ("lvis_minival", "lvis_v1_val.json does not exist. Get .*lvisdataset.org"),
        ("coco", "coco/annotations/instances_val2017.json does not exist. Get .*cocodataset.org"),
        (
            "odinw13",
            "AerialMaritimeDrone, Aquarium, .* not found under .*github.com/microsoft/GLIP",
        ),
        ("lvis", "no such file or folder. The datasets known by name are lvis_val, lvis_minival"),
    ],
)
def test_the_error_of_a_missing_dataset_says_how_to_get_it(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        datasets.load_sets(name, tmp_path)


def test_one_missing_odinw_dataset_is_an_error(tmp_path):
    make_odinw(tmp_path)
    (tmp_path / "pothole/valid/annotations_without_background.json").unlink()
    with pytest.raises(UserError, match="^odinw13: pothole not found under"):
        datasets.load_sets("odinw13", tmp_path)


def test_find_annotations_chooses_a_file_for_evaluation(tmp_path):
    path = make_set(tmp_path, federated=False)
    assert datasets.find_annotations(tmp_path) == path  # the only one
    train = path.with_name("instances_train.json")
    path.rename(train)
    assert datasets.find_annotations(tmp_path) == train
    val = path.with_name("instances_val2017.json")
    val.write_text(train.read_text())
    (path.parent / "captions_val2017.json").write_text('{"annotations": [{"caption": "a cat"}]}')
    assert datasets.find_annotations(tmp_path) == val
    (one,) = datasets.load_sets(str(tmp_path))
    assert one.images == tmp_path / "images"
    path.with_name("instances_test2017.json").write_text(train.read_text())
    assert datasets.find_annotations(tmp_path) == val  # before test
    path.with_name("more_val.json").write_text(train.read_text())
    with pytest.raises(UserError, match="instances_val2017.json, annotations/more_val.json. Give"):
        datasets.find_annotations(tmp_path)


def test_find_annotations_in_roboflow_exports(tmp_path):
    content = make_set(tmp_path / "set").read_text()
    for split in ("train", "valid", "test"):
        (tmp_path / "export" / split).mkdir(parents=True)
        (tmp_path / "export" / split / "_annotations.coco.json").write_text(content)
    found = datasets.find_annotations(tmp_path / "export")
    assert found == tmp_path / "export/valid/_annotations.coco.json"


def test_a_folder_without_annotations(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match="no annotations in COCO's or LVIS's format"):
        datasets.find_annotations(tmp_path)
