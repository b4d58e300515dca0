"""Generated datasets that are hard for an evaluator; lvis-api and pycocotools run on them."""

import contextlib
import copy
import io
import logging
from unittest import mock

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def world(seed: int) -> tuple[dict, list[dict]]:
    """Return a federated annotation file, with crowds for COCO, and a results list for it.

    The seed decides the numbers of images, categories and boxes, the ids, whether coordinates lie
    on a grid (so that overlaps tie), whether scores tie, whether an image is crowded, and whether
    there are any annotations or detections.
    """
    rng = np.random.default_rng(seed)
    grid = float(rng.choice([16, 8, 1, 0.01, 0]))
    levels = int(rng.choice([1, 4, 30, 0]))
    first = int(rng.integers(0, 2))
    ids = first + np.cumsum(rng.integers(1, 4, rng.integers(1, 9))) - 1
    images = rng.permutation(int(rng.integers(1, 13))) * int(rng.choice([1, 7, 10**9]))
    crowded = images[0] if rng.random() < 0.1 else None
    content = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": int(key), "name": f"thing {key}", "frequency": str(rng.choice(list("rcf")))}
            for key in rng.permutation(ids)
        ],
    }
    results: list[dict] = []
    for image in images.tolist():
        crowd = image == crowded
        count = int(rng.integers(200, 350)) if crowd else int(rng.choice([0, 1, 3, 12]))
        labels = rng.choice(ids[: 1 + len(ids) * 2 // 3], count)
        if crowd:
            labels[:] = ids[0]
        content["images"].append(_image(rng, image, ids, labels))
        boxes = _boxes(rng, count, grid)
        if count > 2 and rng.random() < 0.3:
            boxes[1], labels[1] = boxes[0], labels[0]  # two equal boxes: every overlap ties
        for box, label in zip(boxes.tolist(), labels.tolist()):
            content["annotations"].append(_annotation(rng, content, image, label, box))
        found = np.concatenate(
            [_near(rng, boxes, grid), _boxes(rng, int(rng.integers(0, 9)), grid)]
        )
        right = np.concatenate([np.repeat(labels, len(found) and 2), rng.choice(ids, len(found))])
        wrong = rng.random(len(found)) < 0.3
        classes = np.where(wrong, rng.choice(ids, len(found)), right[: len(found)])
        scores = rng.integers(1, levels + 1, len(found)) / 32 if levels else rng.random(len(found))
        for box, label, score in zip(found.tolist(), classes.tolist(), scores.tolist()):
            row = {"image_id": image, "category_id": label, "bbox": box, "score": float(score)}
            results.append(row)
    if rng.random() < 0.3:  # entries of an image need not be consecutive
        results = [results[n] for n in rng.permutation(len(results))]
    nothing = rng.random()
    if nothing < 0.04:
        results = []
    elif nothing < 0.08:
        content["annotations"] = []
    return content, results


def _image(rng, image: int, ids: np.ndarray, labels: np.ndarray) -> dict:
    shown = np.unique(labels)
    # A category may be both present and listed as absent, or absent and listed as not exhaustive.
    absent = ids[rng.random(len(ids)) < 0.4]
    unmarked = np.union1d(shown[rng.random(len(shown)) < 0.3], ids[rng.random(len(ids)) < 0.05])
    return {
        "id": image,
        "height": 480,
        "width": 640,
        "file_name": f"{image}.jpg",
        "neg_category_ids": absent.tolist(),
        "not_exhaustive_category_ids": unmarked.tolist(),
    }


def _boxes(rng, count: int, grid: float) -> np.ndarray:
    sizes = np.exp(rng.uniform(np.log(4), np.log(300), (count, 2)))
    sizes[rng.random(count) < 0.1] = rng.choice([32, 96])  # areas at the edge of a range
    boxes = np.concatenate([rng.uniform(0, 300, (count, 2)), sizes], axis=1)
    if grid:
        boxes = np.round(np.round(boxes / grid) * grid, 6)
    boxes[:, 2:][rng.random((count, 2)) < 0.03] = 0  # a box without area
    return boxes


def _near(rng, boxes: np.ndarray, grid: float) -> np.ndarray:
    """Return two detections near each box: exact, shifted by about a step, or half the size."""
    found = np.repeat(boxes, 2, axis=0)
    step = grid if grid >= 1 else 3.7
    moved = rng.random(len(found)) < 0.6
    found[moved] += step * rng.integers(-1, 2, (moved.sum(), 4))
    halved = rng.random(len(found)) < 0.1
    found[halved, 2] /= 2  # an overlap of one half, to the digit
    found[:, 2:] = np.maximum(found[:, 2:], 0)
    return found


def _annotation(rng, content: dict, image: int, label: int, box: list[float]) -> dict:
    edge = rng.random() < 0.1
    area = float(rng.choice([32**2, 96**2])) if edge else box[2] * box[3] * rng.choice([1, 0.6])
    return {
        "id": len(content["annotations"]) + 1,
        "image_id": image,
        "category_id": label,
        "bbox": box,
        "area": float(area),
        "iscrowd": int(rng.random() < 0.1),
    }


def without_crowds(content: dict) -> dict:
    """Return the same as an LVIS file, which has no crowds."""
    rows = [row | {"iscrowd": 0} for row in content["annotations"]]
    return content | {"annotations": rows}


def cut(results: list[dict], limit: int) -> list[dict]:
    """Return the best `limit` of each category, of equal scores the first, in their order."""
    kept = []
    for category in {row["category_id"] for row in results}:
        mine = [n for n, row in enumerate(results) if row["category_id"] == category]
        kept += sorted(mine, key=lambda n: -results[n]["score"])[:limit]
    return [results[n] for n in sorted(kept)]


def lvis_api(content: dict, results: list[dict], max_per_image: int):
    """Return (metrics, precision (T, R, K, A), recall (T, K, A)) of LVISEval; -1: no truth.

    `max_per_image` -1: no limit. Categories by id.
    """
    from lvis import LVIS, LVISEval, LVISResults

    logging.getLogger("lvis").setLevel(logging.ERROR)
    logging.getLogger("lvis.results").setLevel(logging.ERROR)
    truth = LVIS.__new__(LVIS)  # its constructor takes only a file
    truth.logger, truth.dataset = logging.getLogger("lvis"), copy.deepcopy(content)
    truth._create_index()
    if not results:  # it needs one, but ignores boxes without an area
        image, category = content["images"][0]["id"], content["categories"][0]["id"]
        box = {"bbox": [0, 0, 0, 0], "score": 1.0}
        results = [{"image_id": image, "category_id": category, **box}]
    evaluation = LVISEval(truth, LVISResults(truth, copy.deepcopy(results), max_per_image), "bbox")
    with mock.patch.object(np, "float", float, create=True):  # lvis 0.5.3 is written for NumPy 1
        evaluation.run()
    found = {name.split("@")[0]: float(v) for name, v in evaluation.get_results().items()}
    return found, evaluation.eval["precision"], evaluation.eval["recall"]


def pycocotools(content: dict, results: list[dict]) -> list[float]:
    """Return the twelve metrics of COCOeval; -1: no ground truth."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, found = COCO(), COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        if results:
            found = truth.loadRes(copy.deepcopy(results))
        else:
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()
