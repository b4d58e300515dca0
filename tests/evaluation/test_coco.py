import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco


def world(seed, images=8, categories=(0, 3, 4, 90), per_image=12):
    """Generate annotations with crowds, masks smaller than boxes and ties, and detections."""
    rng = np.random.default_rng(seed)
    content = {
        "images": [
            {"id": 7 * n, "height": 400, "width": 400, "file_name": f"{n}.jpg"}
            for n in rng.permutation(images).tolist()
        ],
        "categories": [{"id": c, "name": f"thing {c}"} for c in categories],
        "annotations": [],
    }
    detections = []
    for image in content["images"]:
        for _ in range(rng.integers(0, per_image)):
            x, y, w, h = (8 * rng.integers(1, (20, 20, 18, 18))).tolist()
            label = int(rng.choice(categories[:-1]))
            row = {"image_id": image["id"], "category_id": label, "bbox": [x, y, w, h]}
            row |= {"id": len(content["annotations"]) + 1, "iscrowd": int(rng.random() < 0.15)}
            content["annotations"].append(row | {"area": w * h * float(rng.choice([1, 0.5]))})
            for _ in range(rng.integers(0, 4)):
                box = np.array([x, y, x + w, y + h]) + 8.0 * rng.integers(-1, 2, 4)
                box[2:] = np.maximum(box[2:], box[:2] + 1)
                other = int(rng.choice(categories))
                label = row["category_id"] if rng.random() < 0.8 else other
                detections.append((image["id"], box, float(rng.integers(1, 12)) / 16, label))
    return content, detections


def ours(path, detections):
    evaluator = coco.CocoEvaluator(coco.load_coco(path))
    for image in dict.fromkeys(row[0] for row in detections):
        rows = [row for row in detections if row[0] == image]
        evaluator.add(image, *(np.array([row[k] for row in rows]) for k in (1, 2, 3)))
    return evaluator.result()


def theirs(path, detections):
    results = [
        {"image_id": i, "category_id": c, "bbox": [*b[:2], *(b[2:] - b[:2])], "score": s}
        for i, b, s, c in detections
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def save(tmp_path, content):
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("seed", range(4))
def test_twelve_metrics_equal_pycocotools(tmp_path, seed):
    content, detections = world(seed)
    path = save(tmp_path, content)
    found = ours(path, detections)
    wanted = theirs(path, detections)
    assert tuple(found) == coco.METRICS
    assert [-1 if v is None else v for v in found.values()] == pytest.approx(list(wanted), abs=1e-9)
    assert 0 < found["AP"] < 1


def test_more_than_a_hundred_boxes_per_image(tmp_path):
    content, detections = world(5, images=2, per_image=90)
    detections = [row for row in detections for _ in range(3)]
    path = save(tmp_path, content)
    wanted = theirs(path, detections)
    assert list(ours(path, detections).values()) == pytest.approx(list(wanted), abs=1e-9)


def test_nothing_detected_and_nothing_to_detect(tmp_path):
    content, detections = world(1)
    path = save(tmp_path, content)
    assert ours(path, [])["AP"] == 0
    content["annotations"] = []
    path = save(tmp_path, content)
    assert set(ours(path, detections).values()) == {None}
    assert set(ours(path, []).values()) == {None}


def test_area_falls_back_to_the_box(tmp_path):
    content, _ = world(2)
    for row in content["annotations"]:
        del row["area"], row["iscrowd"]
    truth = coco.load_coco(save(tmp_path, content))
    sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
    np.testing.assert_allclose(truth.areas, sides.prod(axis=1))


def test_boxes_of_image(tmp_path):
    content, _ = world(3)
    truth = coco.load_coco(save(tmp_path, content))
    for image in truth.images:
        wanted = [r["bbox"][:2] for r in content["annotations"] if r["image_id"] == image.id]
        np.testing.assert_array_equal(
            truth.boxes[truth.boxes_of_image[image.id], :2].tolist(), wanted
        )


@pytest.mark.parametrize(
    "place, value, named",
    [
        (("images", 0, "height"), 0, r"images\[0\]\.height is 0, not a positive number"),
        (("images", 0, "width"), float("nan"), r"images\[0\]\.width is NaN, not a whole number"),
        (("images", 0, "width"), "wide", r"images\[0\]\.width is \"wide\", not a whole number"),
        (("images", 1, "id"), 1.5, r"images\[1\]\.id is 1.5, not a whole number or a text"),
        (("annotations", 0, "category_id"), float("nan"), r"annotations\[0\]\.category_id is NaN"),
        (("annotations", 0, "image_id"), None, r"annotations\[0\]\.image_id is null"),
        (("annotations", 0, "iscrowd"), "maybe", r"annotations\[0\]\.iscrowd is \"maybe\", not 0"),
        (("annotations", 0, "area"), float("nan"), r"annotations\[0\]\.area is NaN, not a finite"),
        (("annotations", 0, "area"), "large", r"annotations\[0\]\.area is \"large\", not a finite"),
        (("annotations", 0, "area"), -4, r"annotations\[0\]\.area is -4, which is negative"),
        (("annotations", 0, "bbox"), [], r"annotations\[0\]\.bbox is \[\]; expected four"),
        (("annotations", 0, "bbox"), [1, 2, None, 4], r"annotations\[0\]\.bbox is \[1, 2, null, 4"),
        (("categories", 1, "name"), 5, r"categories\[1\]\.name is 5, not a text"),
        (("categories", 1, "name"), " ", r"categories\[1\]\.name is \" \", which is blank"),
        (("categories", 1, "name"), "_", r"categories\[1\]\.name is \"_\", which has no word"),
        (("categories", 1, "id"), "0", r"categories\[1\]\.id \"0\" occurs twice"),
        (("images", 1, "id"), True, r"images\[1\]\.id"),
        (("images", 1, "file_name"), "", r"images\[1\].*file_name"),
        (("annotations", 2, "bbox"), "1,2,3,4", r"annotations\[2\]\.bbox"),
        (("annotations", 2, "category_id"), 12, r"annotations\[2\]\.category_id 12"),
        (("categories", 1, "id"), 0, r"categories\[1\]\.id 0 occurs twice"),
    ],
)
def test_broken_entries_are_named(tmp_path, place, value, named):
    content, _ = world(0)
    content[place[0]][place[1]][place[2]] = value
    path = save(tmp_path, content)
    with pytest.raises(UserError, match=rf"coco\.json: .*{named}"):
        coco.load_coco(path)


def test_heights_may_be_strings(tmp_path):
    content, _ = world(0)
    content["images"][0]["height"] = "400"
    assert coco.load_coco(save(tmp_path, content)).images[0].height == 400


def test_unknown_and_repeated_images_are_refused(tmp_path):
    content, _ = world(0)
    evaluator = coco.CocoEvaluator(coco.load_coco(save(tmp_path, content)))
    arrays = (np.ones((1, 4)), np.ones(1), np.zeros(1, int))
    evaluator.add(7, *arrays)
    for image in (7, 8):
        with pytest.raises(ValueError, match=f"image {image}"):
            evaluator.add(image, *arrays)


def test_roboflows_root_is_no_class_and_ap_is_that_of_pycocotools(tmp_path):
    content, detections = world(3, categories=(1, 2, 9))
    root = {"id": 0, "name": "things", "supercategory": "none"}
    content["categories"] = [
        root,
        *({**c, "supercategory": "things"} for c in content["categories"]),
    ]
    path = tmp_path / "rooted.json"
    path.write_text(json.dumps(content))
    truth = coco.load_coco(path)
    assert [category.id for category in truth.categories] == [1, 2, 9]
    assert '"things"' in truth.left_out[0]
    found = ours(path, detections)
    np.testing.assert_allclose(list(found.values()), theirs(path, detections), atol=1e-12)
    content["annotations"].append(content["annotations"][0] | {"id": 999, "category_id": 0})
    path.write_text(json.dumps(content))  # a parent with a box of its own is a class
    assert len(coco.load_coco(path).categories) == 4
