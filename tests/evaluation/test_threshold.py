"""The fitted score threshold against a plain loop, and its way from an evaluation to a detector."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_model
from worlds import without_crowds, world

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, lvis, threshold
from detclipv2_jax.inference import threshold as stored
from detclipv2_jax.inference.detector import Detector


def overlap(found, box, crowd):
    """The IoU of two boxes [x, y, width, height]; of a crowd, the share of the first in it."""
    across = min(found[0] + found[2], box[0] + box[2]) - max(found[0], box[0])
    down = min(found[1] + found[3], box[1] + box[3]) - max(found[1], box[1])
    if across <= 0 or down <= 0:
        return 0.0
    area = found[2] * found[3]
    return across * down / (area if crowd else area + box[2] * box[3] - across * down)


def slow_f1(content, results, limit, federated):
    """F1 of the detections that score above `limit`, one image and category after another."""
    right = wrong = 0
    annotations = [row for row in content["annotations"] if row["area"] > 0 or not federated]
    for image in content["images"]:
        for category in content["categories"]:
            here = {"image_id": image["id"], "category_id": category["id"]}
            mine = lambda rows: [r for r in rows if all(r[k] == v for k, v in here.items())]  # noqa: B023
            truth = mine(annotations)
            is_absent = category["id"] in image["neg_category_ids"]
            if federated and not truth and not is_absent:
                continue
            found = sorted(
                [row for row in mine(results) if row["score"] > limit], key=lambda r: -r["score"]
            )
            free = dict(enumerate(truth))
            for row in found:
                if federated and row["bbox"][2] * row["bbox"][3] <= 0:
                    continue
                fits = {
                    n: (not box["iscrowd"], overlap(row["bbox"], box["bbox"], box["iscrowd"]), n)
                    for n, box in free.items()
                }
                fits = {n: rank for n, rank in fits.items() if rank[1] >= 0.5}
                taken = max(fits, key=lambda n: fits[n], default=None)
                if taken is None:
                    ignored = category["id"] in image["not_exhaustive_category_ids"]
                    wrong += not (federated and ignored)
                elif not free[taken]["iscrowd"]:
                    right += 1
                    del free[taken]
    boxes = sum(not row["iscrowd"] for row in annotations)
    return 2 * right / max(right + wrong + boxes, 1)


def evaluator_of(content, results, federated):
    module, kind = (lvis, lvis.LvisEvaluator) if federated else (coco, coco.CocoEvaluator)
    truth = module.from_content("val.json", content)
    evaluator = kind(truth)
    for image in {row["image_id"] for row in results}:
        rows = [row for row in results if row["image_id"] == image]
        boxes = np.array([row["bbox"] for row in rows], float)
        boxes[:, 2:] += boxes[:, :2]
        scores = [row["score"] for row in rows]
        evaluator.add(image, boxes, scores, [row["category_id"] for row in rows])
    return evaluator, truth


@pytest.mark.parametrize("federated", [False, True])
def test_the_threshold_is_that_of_the_best_f1(federated):
    tried = 0
    for seed in range(40):
        content, results = world(seed)
        counts = np.unique([row["image_id"] for row in results], return_counts=True)[1]
        if max(counts, default=0) > 100:  # COCO measures at most 100 of an image and name
            continue
        content = without_crowds(content) if federated else content
        found = threshold.fitted(*evaluator_of(content, results, federated))
        limits = [0.0, *{row["score"] for row in results}]
        f1 = {limit: slow_f1(content, results, limit, federated) for limit in limits}
        if found is None:
            assert max(f1.values()) == 0
            continue
        tried += 1
        assert found["f1"] == round(max(f1.values()), 4)
        at = slow_f1(content, results, found["score_threshold"], federated)
        assert at == max(f1.values()), "detections above the threshold have the best F1"
    assert tried > 20


def test_precision_recall_and_few_digits():
    # Of four boxes, the three best detections find two; the others find none.
    scores = np.array([0.9, 0.8123, 0.8, 0.3, 0.2, 0.1])
    is_right = np.array([True, False, True, False, False, False])
    found = threshold.best_threshold(scores, is_right, boxes=4)
    assert found == {"score_threshold": 0.6, "f1": 0.5714, "precision": 0.6667, "recall": 0.5}
    assert threshold.best_threshold(scores, is_right * False, 4) is None
    assert threshold.best_threshold(scores[:0], is_right[:0], 4) is None


def test_a_threshold_tells_two_close_scores_apart_in_float32():
    close = np.nextafter(np.float32(0.25), np.float32(1), dtype=np.float32)
    scores = np.array([close, 0.25], np.float64)
    found = threshold.best_threshold(scores, np.array([True, False]), boxes=1)
    assert np.float32(found["score_threshold"]) == 0.25  # `close` is above, 0.25 is not


FIT = {"score_threshold": 0.07, "f1": 0.4512, "precision": 0.5, "recall": 0.4, "iou": 0.5}
FIT |= {"dataset": "val.json", "images": 9, "boxes": 20}


def test_the_given_threshold_comes_first_then_the_fitted_then_the_fallback():
    assert stored.threshold(0.5, FIT).score_threshold == 0.5
    assert str(stored.threshold(0.5, FIT)) == "score threshold 0.5 (as given)"
    own = stored.threshold(None, FIT | {"step": 400})
    assert str(own) == ("score threshold 0.07 (fitted on val.json at step 400: F1 0.45 at IoU 0.5)")
    assert own.to_json() == {
        "score_threshold": 0.07,
        "score_threshold_from": "fitted on val.json at step 400: F1 0.45 at IoU 0.5",
    }
    weak = str(stored.threshold(None, FIT | {"f1": 0.07})).splitlines()
    assert len(weak) == 2 and weak[1].startswith("warning: at F1 0.07 most boxes are wrong, or")
    fallback = stored.threshold(None, None)
    assert fallback.score_threshold == stored.FALLBACK and "fallback" in fallback.source


def test_what_evaluate_stores_comes_before_what_training_stored(tmp_path):
    assert stored.stored(tmp_path, 7, {}) is None
    assert stored.stored(tmp_path, 7, {"threshold": FIT}) == FIT
    stored.store(tmp_path, 7, FIT | {"score_threshold": 0.2})
    stored.store(tmp_path, 9, FIT)
    assert stored.stored(tmp_path, 7, {"threshold": FIT})["score_threshold"] == 0.2
    assert stored.stored(tmp_path, 9, {}) == FIT | {"step": 9}
    assert stored.stored(tmp_path, 8, {}) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"7": {}}', '{"7": 3}', "\x00"])
def test_a_damaged_file_is_reported(tmp_path, content):
    (tmp_path / stored.FILE).write_text(content)
    with pytest.raises(UserError, match=r"thresholds\.json: (is not|cannot be read)"):
        stored.stored(tmp_path, 7, {})


def test_an_invalid_number_is_reported(tmp_path):
    for value in ("0.3", None, True, 1.0, -0.1, float("nan")):
        text = json.dumps({"7": FIT | {"score_threshold": value}})
        (tmp_path / stored.FILE).write_text(text)
        with pytest.raises(UserError, match="is not thresholds by step"):
            stored.stored(tmp_path, 7, {})


def test_a_detector_uses_the_threshold_of_its_checkpoint():
    fit = FIT | {"score_threshold": 0.31, "step": 7}
    loaded = dataclasses.replace(tiny_model.loaded(), threshold=fit)
    assert Detector(loaded).predictor.config.score_threshold == 0.31
    assert Detector(loaded, score_threshold=0.5).predictor.config.score_threshold == 0.5
    without = Detector(tiny_model.loaded())
    assert without.predictor.config.score_threshold == stored.FALLBACK
    assert without.threshold.source.startswith("a fallback")
