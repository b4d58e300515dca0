"""Every metric compared with lvis-api's LVISEval and pycocotools' COCOeval, on hard data."""

import importlib.util
import json

import numpy as np
import pytest
import worlds

from detclipv2_jax.evaluation import coco, lvis, results_file

FAST, ALL = 30, 500
# From lvis-api.
pytestmark = pytest.mark.filterwarnings("ignore:The 'warn' method:DeprecationWarning")
needs_lvis = pytest.mark.skipif(
    importlib.util.find_spec("lvis") is None, reason="lvis is not installed"
)


def read(tmp_path, truth, entries):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    return results_file.read_results(path, truth)


def compare_lvis(tmp_path, content, entries, max_per_image=300, max_per_category=10_000):
    """Compare all metrics of standard and fixed AP, and the curves of each category."""
    content = worlds.without_crowds(content)
    truth = lvis.from_content("lvis.json", content)
    evaluator = lvis.LvisEvaluator(
        truth, max_per_image=max_per_image, max_per_category=max_per_category
    )
    evaluator.add_rows(read(tmp_path, truth, entries).rows)
    scores = evaluator.result()
    fixed = worlds.cut(entries, max_per_category)
    for name, kept, limit, found in (
        ("standard", entries, max_per_image, scores.standard),
        ("fixed", fixed, -1, scores.fixed),
    ):
        figures, precision, recall = worlds.lvis_api(content, kept, limit)
        assert list(found) == list(lvis.METRICS) == list(figures)
        assert_equal(found, figures)
        curves = evaluator.curves()[name]
        np.testing.assert_allclose(curves.precision, precision, rtol=0, atol=1e-9)
        np.testing.assert_allclose(curves.recall, recall, rtol=0, atol=1e-9)
        order = np.argsort([row["id"] for row in scores.categories])
        for number, row in enumerate(np.asarray(scores.categories)[order]):
            mine = {key: row[f"{name}_{key}"] for key in ("AP", "AP50", "AP75", "AR")}
            part = precision[:, :, number, 0]
            wanted = {"AP": part, "AP50": part[0], "AP75": part[5], "AR": recall[:, number, 0]}
            assert_equal(mine, {key: defined_mean(values) for key, values in wanted.items()})
    return scores


def compare_coco(tmp_path, content, entries):
    truth = coco.from_content("coco.json", content)
    evaluator = coco.CocoEvaluator(truth)
    evaluator.add_rows(read(tmp_path, truth, entries).rows)
    found = evaluator.result()
    assert list(found) == list(coco.METRICS)
    assert_equal(found, dict(zip(coco.METRICS, worlds.pycocotools(content, entries))))
    return found


def defined_mean(values):
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def assert_equal(found, wanted):
    for name, value in wanted.items():
        mine = -1 if found[name] is None else found[name]
        assert mine == pytest.approx(value, abs=1e-9, rel=0), name


LIMITS = ((300, 10_000), (5, 7), (1, 1))  # detections per image, per category


@needs_lvis
@pytest.mark.parametrize("seed", range(FAST))
def test_equal_to_lvis_api(tmp_path, seed):
    compare_lvis(tmp_path, *worlds.world(seed), *LIMITS[seed % 3])


@pytest.mark.parametrize("seed", range(FAST))
def test_equal_to_pycocotools(tmp_path, seed):
    compare_coco(tmp_path, *worlds.world(seed))


@pytest.mark.slow
@needs_lvis
@pytest.mark.parametrize("seed", range(FAST, ALL))
def test_equal_on_more_datasets(tmp_path, seed):
    compare_lvis(tmp_path, *worlds.world(seed), *LIMITS[seed % 3])
    compare_coco(tmp_path, *worlds.world(seed))


def blank_image(number):
    lists = {"neg_category_ids": [], "not_exhaustive_category_ids": []}
    return {"id": number, "height": 480, "width": 640, "file_name": f"{number}.jpg", **lists}


@needs_lvis
@pytest.mark.parametrize("first", [0, 1])
def test_more_than_ten_thousand_of_a_category(tmp_path, first):
    """The limit keeps detections that the federated filter drops; it falls into a tie."""
    rng = np.random.default_rng(first)
    images = [blank_image(number) for number in range(36)]
    categories = [
        {"id": first + number, "name": f"thing {number}", "frequency": "rcf"[number]}
        for number in range(3)
    ]
    annotations, entries = [], []
    for image in images:
        known = image["id"] % 3 != 0
        for number in range(3 if known else 0):
            box = [100.0 * number, 50.0, 60.0, 60.0]
            row = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": first}
            annotations.append(row | {"bbox": box, "area": 2500.0, "iscrowd": 0})
        for _ in range(310):
            box = [100.0 * rng.integers(0, 3), 50.0, *(60.0 + rng.integers(-9, 10, 2))]
            row = {"image_id": image["id"], "category_id": first, "bbox": list(map(float, box))}
            score = float(rng.integers(2, 20)) / 20 if image["id"] < 30 else 0.05
            entries.append(row | {"score": score})
    content = {"images": images, "categories": categories, "annotations": annotations}
    scores = compare_lvis(tmp_path, content, entries)
    assert len(entries) > 10_000 and scores.standard["AP"] != scores.fixed["AP"]


@needs_lvis
@pytest.mark.parametrize("marked", [True, False])
def test_crowded_image(tmp_path, marked):
    """Hundreds of boxes of a category in an image, more detections than standard AP keeps."""
    rng = np.random.default_rng(7)
    image = blank_image(0)
    image["not_exhaustive_category_ids"] = [] if marked else [0]
    corners = 12.0 * rng.integers(0, 30, (200, 2))
    boxes = np.concatenate([corners, np.full((200, 2), 24.0)], axis=1)
    near = np.repeat(boxes, 2, axis=0) + 6.0 * rng.integers(0, 2, (400, 4))
    row = {"image_id": 0, "category_id": 0}
    content = {
        "images": [image, blank_image(3)],
        "categories": [{"id": 0, "name": "sheep", "frequency": "f"}],
        "annotations": [
            row | {"id": n, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for n, box in enumerate(boxes.tolist(), start=1)
        ],
    }
    entries = [row | {"bbox": b, "score": float(rng.integers(1, 9)) / 8} for b in near.tolist()]
    compare_lvis(tmp_path, content, entries)
    compare_coco(tmp_path, content, entries)
