"""Annotations and predictions as other tools write them: the figures must not change.

pycocotools and lvis-api, which need plain numbers, say what the figures are.
"""

import copy
import gzip
import json

import numpy as np
import pytest
import worlds

from detclipv2_jax import evaluate
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, datasets, measure
from detclipv2_jax.evaluation.results_file import read_results
from detclipv2_jax.inference import detect_results

SPELLINGS = {
    "texts": str,
    "floats": float,
    "texts of floats": lambda value: f"{value}.0",
    "padded texts": lambda value: f" {value} ",
}
TEXT_IDS = {  # in the order of the numbers, by which equal scores rank
    "names": lambda value: f"image {value:012d}",
    "leading zeros": lambda value: f"0{value:012d}",
    "above int64": lambda value: 2**70 + value,
}


def spelled(rows, fields, spell):
    """The rows with some fields written another way."""
    return [row | {field: spell(row[field]) for field in fields if field in row} for row in rows]


def respelled(content, results, number, name):
    """A dataset and results whose ids are written by `name`, and whose numbers by `number`."""
    content, results = copy.deepcopy(content), copy.deepcopy(results)
    for rows in (content["annotations"], results):
        for row in rows:
            row["bbox"] = [number(value) for value in row["bbox"]]
    content["images"] = spelled(content["images"], ["id"], name)
    content["images"] = spelled(content["images"], ["height", "width"], number)
    content["categories"] = spelled(content["categories"], ["id"], name)
    for image in content["images"]:
        for field in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[field] = [name(value) for value in image[field]]
    rows = spelled(content["annotations"], ["image_id", "category_id"], name)
    content["annotations"] = spelled(rows, ["area"], number)
    results = spelled(results, ["image_id", "category_id"], name)
    return content, spelled(results, ["score"], number)


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def close(found, wanted):
    assert [-1 if v is None else v for v in found] == pytest.approx(list(wanted), abs=1e-9)


@pytest.mark.parametrize("spelling", [*SPELLINGS, *TEXT_IDS])
@pytest.mark.parametrize("seed", [3, 8, 11])
def test_ids_and_numbers_written_another_way(tmp_path, seed, spelling):
    content, results = worlds.world(seed)
    number = SPELLINGS.get(spelling, lambda value: value)
    if spelling in ("texts of floats", "padded texts"):
        number = lambda value: f" {float(value)!r} "
    name = SPELLINGS.get(spelling) or TEXT_IDS[spelling]
    other, other_results = respelled(content, results, number, name)
    predictions = write(tmp_path / "found.json", other_results)
    truth = datasets.load_ground_truth(write(tmp_path / "coco.json", other), "coco")
    found = measure.measure_results_file(predictions, truth)
    close(found["coco"].values(), worlds.pycocotools(content, results))
    federated = worlds.without_crowds(other)
    truth = datasets.load_ground_truth(write(tmp_path / "lvis.json", federated), "lvis")
    found = measure.measure_results_file(predictions, truth)
    wanted, _, _ = worlds.lvis_api(worlds.without_crowds(content), results, 300)
    close(found["standard"].values(), (wanted[metric] for metric in found["standard"]))


def test_what_is_written_has_the_ids_of_the_dataset(tmp_path):
    content, results = worlds.world(3)
    other, other_results = respelled(content, results, float, TEXT_IDS["names"])
    truth = datasets.load_ground_truth(write(tmp_path / "coco.json", other), "coco")
    assert {image.given_id for image in truth.images} == {row["id"] for row in other["images"]}
    assert {c.given_id for c in truth.categories} == {row["id"] for row in other["categories"]}
    found = measure.measure_results_file(write(tmp_path / "found.json", other_results), truth)
    # A number that is not an id of the file must not be taken for our number of a text.
    numbers = [row | {"image_id": truth.images[0].id} for row in other_results]
    lost = write(tmp_path / "lost.json", [*other_results, *numbers])
    again = measure.measure_results_file(lost, truth)
    assert again["coco"] == found["coco"]
    assert again["settings"]["unknown_images"] == len(numbers) > 0


def dataset(**changes):
    """Two pictures with a box each, and what a perfect detector answers."""
    content = {
        "images": [
            {"id": n, "height": 80, "width": 100, "file_name": f"cam{n}/0.jpg"} for n in (0, 1)
        ],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [10, 10, 20 + n, 30], "area": 600}
            for n in (0, 1)
        ],
        "categories": [{"id": 1, "name": "traffic_light", "supercategory": None}],
    }
    results = [row | {"score": 0.9} for row in content["annotations"]]
    return content | changes, results


def evaluated(tmp_path, capsys, content, results):
    """Exit status, AP and messages of the command; no picture exists."""
    truth, found = tmp_path / "val.json", tmp_path / "found.json"
    for path, what in ((truth, content), (found, results)):
        path.write_bytes(what if isinstance(what, bytes) else json.dumps(what).encode())
    out = tmp_path / "out"
    status = evaluate.main([f"--predictions={found}", f"--dataset={truth}", f"--output={out}"])
    results = out / "results.json"
    ap = json.loads(results.read_text())["coco"]["AP"] if results.exists() else None
    printed = capsys.readouterr()
    return status, ap, printed.out + printed.err


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "gzip"])
def test_encodings_of_dataset_and_predictions_and_no_pictures(tmp_path, capsys, encoding):
    files = [json.dumps(content) for content in dataset()]
    encode = lambda text: (
        gzip.compress(text.encode()) if encoding == "gzip" else text.encode(encoding)
    )
    assert evaluated(tmp_path, capsys, *map(encode, files))[:2] == (0, pytest.approx(1.0))


def test_an_invalid_entry_of_the_dataset_is_one_sentence(tmp_path, capsys):
    content, results = dataset()
    content["annotations"][0]["category_id"] = float("nan")
    status, _, messages = evaluated(tmp_path, capsys, content, results)
    sentence = "val.json: annotations[0].category_id is NaN, not a whole number or a text. Fix"
    assert status == 2 and sentence in messages and "Traceback" not in messages


def test_boxes_that_nothing_can_match_are_reported(tmp_path, capsys):
    content, results = dataset()
    for change in ([30, 40, -20, -30], [10, 10, 0, 30]):
        content["annotations"].append(content["annotations"][0] | {"bbox": change})
    status, ap, messages = evaluated(tmp_path, capsys, content, results)
    assert status == 0 and ap < 1  # as pycocotools counts them
    assert "1 of 4 annotations have a box with a negative width or height; no detection" in messages
    assert "for example annotations[2]" in messages
    assert "1 of 4 annotations have a box of width or height 0" in messages


def test_corners_where_width_and_height_belong_are_reported(tmp_path, capsys):
    content, results = dataset()
    for row in content["annotations"]:
        row["bbox"] = [60, 50, 90, 70]
    _, _, messages = evaluated(tmp_path, capsys, content, results)
    assert "most boxes leave their images, and all of them would fit as [x_min, y_min" in messages
    content["annotations"][0]["bbox"] = [60, 50, 120, 70]  # as corners it would leave, too
    assert "x_min" not in evaluated(tmp_path, capsys, content, results)[2]


def test_areas_and_sizes_that_are_not_given(tmp_path, capsys):
    content, results = dataset()
    del content["annotations"][0]["area"], content["images"][0]["height"]
    content["images"][1]["width"] = None
    status, ap, messages = evaluated(tmp_path, capsys, content, results)
    assert (status, ap) == (0, pytest.approx(1.0))
    assert "1 of 2 annotations have no area" in messages
    truth = coco.load_coco(tmp_path / "val.json")
    assert truth.areas.tolist() == [600, 600] and truth.images[0].height == 0


# ---- coco.json of detclip detect.


def detected(names, *entries):
    """What detect writes for (file, size, [(name, xyxy, score)])."""
    images = [
        {
            "image": file,
            "height": 80,
            "width": 100,
            "detections": [{"name": n, "box": b, "score": s} for n, b, s in found],
        }
        for file, found in entries
    ]
    return detect_results.to_coco(names, images, [])


def test_the_coco_json_of_detect_is_matched_by_names(tmp_path, capsys):
    content, _ = dataset()
    found = detected(
        ["dog", "Traffic light"],
        ("/photos/cam1/0.jpg", [("Traffic light", [10, 10, 31, 40], 0.9)]),
        ("/photos/cam0/0.jpg", [("Traffic light", [10, 10, 30, 40], 0.8), ("dog", [0] * 4, 0.1)]),
        ("/photos/more.jpg", [("Traffic light", [10, 10, 30, 40], 0.99)]),
    )
    status, ap, messages = evaluated(tmp_path, capsys, content, found)
    assert (status, ap) == (0, pytest.approx(1.0))
    assert "2 of the 3 images of the file are images of the dataset" in messages
    assert "1 of 4 entries have an image_id that is not in the dataset" in messages
    assert "1 of 4 entries have a category_id that is not in the dataset" in messages
    assert "not answered" not in messages


def test_what_was_not_answered_or_asked_is_told(tmp_path, capsys):
    content, _ = dataset()
    content["categories"].append({"id": 2, "name": "bus"})
    found = detected(["traffic light"], ("cam0/0.jpg", [("traffic light", [10, 10, 30, 40], 0.9)]))
    status, ap, messages = evaluated(tmp_path, capsys, content, found)
    assert status == 0 and ap == pytest.approx(0.5, abs=0.01)  # recall 51 / 101
    assert "1 of 2 images of the dataset were not answered (cam1/0.jpg); they count" in messages
    assert "1 of 2 categories of the dataset were not asked for (bus)" in messages
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert settings["images_not_answered"] == settings["categories_not_asked"] == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["0.jpg"], 'file name "0.jpg" fits 2 images of the dataset'),
        (["a/cam0/0.jpg", "b/cam0/0.jpg"], "fit the same image of"),
    ],
)
def test_file_names_that_do_not_decide_are_refused(tmp_path, capsys, files, message):
    content, _ = dataset()
    found = detected(["traffic light"], *((file, []) for file in files))
    status, _, messages = evaluated(tmp_path, capsys, content, found)
    assert status == 2 and message in messages


def test_an_object_that_is_no_prediction_is_refused(tmp_path, capsys):
    content, _ = dataset()
    status, _, messages = evaluated(tmp_path, capsys, content, content)  # the truth, no scores
    assert status == 2 and "found.json: annotations[0].score is missing" in messages
    status, _, messages = evaluated(tmp_path, capsys, content, {"images": [], "videos": []})
    assert status == 2 and 'no list "categories". Give a results file' in messages


def test_images_without_entries_are_told(tmp_path, capsys):
    content, results = dataset()
    _, _, messages = evaluated(tmp_path, capsys, content, results[:1])
    assert "1 images of the dataset have no entry" in messages


def test_minival_of_ids_as_texts(tmp_path):
    content, _ = worlds.world(8)
    other, _ = respelled(worlds.without_crowds(content), [], float, str)
    for number, image in enumerate(other["images"]):
        del image["file_name"]
        image["coco_url"] = f"http://a/{'val2017' if number % 2 else 'train2017'}/{number}.jpg"
    path = tmp_path / "annotations" / "lvis_v1_val.json"
    path.parent.mkdir()
    write(path, other)
    (one,) = datasets.load_sets("lvis_minival", tmp_path, find_images=False)
    kept = {int(image["id"]) for image in other["images"][1::2]}
    assert {image.id for image in one.truth.images} == kept
    boxes = sum(int(row["image_id"]) in kept for row in other["annotations"])
    assert len(one.truth.areas) == boxes > 0
    assert not np.isnan(one.truth.areas).any()
    with pytest.raises(UserError, match="Give their directory"):
        datasets.load_sets(str(path), tmp_path)


def test_turned_boxes_and_boxes_in_parts_of_the_image_are_told():
    images = [{"id": 1, "file_name": "1.jpg", "height": 48, "width": 64}]
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10], "area": 200}
    content = {
        "images": images,
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [row | {"attributes": {"rotation": 90.0}}],
    }
    truth = coco.from_content("gt.json", content)
    np.testing.assert_array_equal(truth.xywh, [[15, 5, 10, 20]])
    assert any("1 of 1 annotations are turned boxes" in note for note in truth.notes)
    content["annotations"] = [row | {"bbox": [0.2, 0.2, 0.5, 1.0]}]
    truth = coco.from_content("gt.json", content)
    assert any("numbers from 0 to 1, as if in parts" in note for note in truth.notes)
    content["annotations"] = [row]
    assert not coco.from_content("gt.json", content).notes


@pytest.mark.parametrize(
    ("bbox", "told"),
    [
        ([0.2, 0.2, 0.5, 0.25], "as if in parts of their images"),
        ([30, 20, 60, 40], "all of them would fit as [x_min, y_min, x_max, y_max]"),
        ([10, 10, 20, 10], None),
    ],
)
def test_results_in_another_format_are_told(tmp_path, bbox, told):
    content = {
        "images": [  # in another order than that of their ids
            {"id": 2, "file_name": "2.jpg", "height": 20, "width": 20},
            {"id": 1, "file_name": "1.jpg", "height": 48, "width": 64},
        ],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 10]}],
    }
    truth = coco.from_content("gt.json", content)
    entry = {"image_id": 1, "category_id": 1, "bbox": bbox, "score": 0.5}
    warnings = read_results(write(tmp_path / "results.json", [entry]), truth).warnings()
    assert len(warnings) == 1 + (told is not None) and (told is None or told in warnings[0])
