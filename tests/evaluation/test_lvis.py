import json

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import lvis

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = [(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)]


def overlap(a, b):
    """Return the IoU of two xyxy boxes in float64."""
    sides = [min(a[2 + k], b[2 + k]) - max(a[k], b[k]) for k in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    part = sides[0] * sides[1]
    size = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return part / (size(a) + size(b) - part)


def match(truths, answers, threshold, low, high, exhaustive):
    """Match one image and category: [(score, is right)], and how many ground truths count."""
    ignored = [not low <= area <= high for _, area in truths]
    order = sorted(range(len(truths)), key=lambda g: ignored[g])
    taken, outcome = set(), []
    for box, score in sorted(answers, key=lambda answer: -answer[1]):
        best, best_iou = None, min(threshold, 1 - 1e-10)
        for g in order:
            if g in taken:
                continue
            if best is not None and not ignored[best] and ignored[g]:
                break
            iou = overlap(box, truths[g][0])
            if iou >= best_iou:
                best, best_iou = g, iou
        area = (box[2] - box[0]) * (box[3] - box[1])
        if best is not None:
            taken.add(best)
            if not ignored[best]:
                outcome.append((score, True))
        elif low <= area <= high and exhaustive:
            outcome.append((score, False))
    return outcome, ignored.count(False)


def average_precision(outcomes, positives):
    """Return the 101-point AP of [(score, is right)]; ties rank as given."""
    ranked = sorted(outcomes, key=lambda outcome: -outcome[0])
    right = np.cumsum([r for _, r in ranked])
    precision = right / (np.arange(len(ranked)) + 1) if ranked else np.zeros(0)
    total = 0.0
    for recall in RECALLS:
        reached = [p for p, r in zip(precision, right) if r / positives >= recall]
        total += max(reached, default=0.0)
    return total / len(RECALLS)


def reference(content, detections, max_per_category=None, max_per_image=None):
    """Return (category, threshold, area) -> AP for categories with ground truth."""
    rows = list(detections)
    for limit, column in ((max_per_image, 0), (max_per_category, 3)):
        if limit is not None:
            kept = []
            for value in {row[column] for row in rows}:
                mine = [n for n, row in enumerate(rows) if row[column] == value]
                kept += sorted(mine, key=lambda n: -rows[n][2])[:limit]
            rows = [rows[n] for n in sorted(kept)]
    table = {}
    for category in content["categories"]:
        c = category["id"]
        for a, (low, high) in enumerate(AREAS):
            for t, threshold in enumerate(THRESHOLDS):
                outcomes, positives = [], 0
                for image in sorted(content["images"], key=lambda i: i["id"]):
                    truths = [
                        ((x, y, x + w, y + h), row["area"])
                        for row in content["annotations"]
                        if row["image_id"] == image["id"] and row["category_id"] == c
                        for x, y, w, h in [row["bbox"]]
                    ]
                    if not truths and c not in image["neg_category_ids"]:
                        continue
                    answers = [(b, s) for i, b, s, k in rows if i == image["id"] and k == c]
                    exhaustive = c not in image["not_exhaustive_category_ids"]
                    found, count = match(truths, answers, threshold, low, high, exhaustive)
                    outcomes += found
                    positives += count
                if positives:
                    table[c, t, a] = average_precision(outcomes, positives)
    return table


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else None


def figures(table, content):
    frequency = {row["id"]: row["frequency"] for row in content["categories"]}
    pick = lambda areas, ts=range(10), f="rcf": mean(
        v for (c, t, a), v in table.items() if a in areas and t in ts and frequency[c] in f
    )
    return {
        "AP": pick([0]),
        "AP50": pick([0], [0]),
        "AP75": pick([0], [5]),
        "APs": pick([1]),
        "APm": pick([2]),
        "APl": pick([3]),
        **{f"AP{f}": pick([0], f=f) for f in "rcf"},
    }


def world(seed, images=9, categories=(0, 1, 2, 5, 7, 9), grid=8):
    """Generate annotations and detections on a coarse grid, so that overlaps and scores tie.

    The last category has no ground truth; the one before counts on no image.
    """
    rng = np.random.default_rng(seed)
    named = [
        {
            "id": c,
            "name": f"thing_{c}",
            "frequency": "rcf"[n % 3],
            "group": ("base", "novel")[n % 2],
        }
        for n, c in enumerate(categories)
    ]
    content = {"images": [], "annotations": [], "categories": named}
    detections = []
    order = rng.permutation(images)
    for number in order.tolist():
        image = 10 * number
        present = rng.choice(categories[:-2], rng.integers(0, 4), replace=False).tolist()
        absent = [c for c in (*categories[:-2], categories[-1]) if c not in present]
        entry = {"id": image, "height": 400, "width": 400, "file_name": f"{image}.jpg"}
        entry["neg_category_ids"] = rng.choice(absent, min(2, len(absent)), replace=False).tolist()
        entry["not_exhaustive_category_ids"] = present[:1] if rng.random() < 0.5 else []
        content["images"].append(entry)
        for c in present:
            for _ in range(rng.integers(1, 4)):
                x, y, w, h = (grid * rng.integers(1, (20, 20, 18, 18))).tolist()
                row = {"id": len(content["annotations"]), "image_id": image, "category_id": c}
                area = w * h * float(rng.choice([1.0, 0.6]))  # of a mask: smaller than the box
                content["annotations"].append({**row, "bbox": [x, y, w, h], "area": area})
        for row in [r for r in content["annotations"] if r["image_id"] == image]:
            x, y, w, h = row["bbox"]
            for _ in range(rng.integers(0, 4)):
                shift = grid * rng.integers(-1, 2, 4)
                box = np.array([x, y, x + w, y + h]) + shift * (rng.random() < 0.7)
                box[2:] = np.maximum(box[2:], box[:2] + 1)
                score = float(rng.integers(1, 10)) / 16
                other = int(rng.choice(categories))
                label = row["category_id"] if rng.random() < 0.8 else other
                detections.append((image, tuple(map(float, box)), score, label))
    return content, detections


def evaluate(tmp_path, content, detections, **limits):
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    evaluator = lvis.LvisEvaluator(lvis.load_lvis(path), **limits)
    for image in dict.fromkeys(row[0] for row in detections):
        rows = [row for row in detections if row[0] == image]
        evaluator.add(
            image,
            np.array([row[1] for row in rows], np.float32).reshape(-1, 4),
            np.array([row[2] for row in rows], np.float32),
            np.array([row[3] for row in rows], np.int32),
        )
    return evaluator.result()


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert found[name] == pytest.approx(value, abs=1e-9), name


def precisions(figures):
    """Return the AP metrics; recall is compared with lvis-api (test_references.py)."""
    return {name: value for name, value in figures.items() if name.startswith("AP")}


@pytest.mark.parametrize("seed", range(4))
def test_both_protocols_equal_a_direct_implementation(tmp_path, seed):
    content, detections = world(seed)
    limits = {"max_per_image": 5, "max_per_category": 7}
    scores = evaluate(tmp_path, content, detections, **limits)
    standard = reference(content, detections, max_per_image=5)
    fixed = reference(content, detections, max_per_category=7)
    assert_close(precisions(scores.standard), figures(standard, content))
    assert_close(precisions(scores.fixed), figures(fixed, content))
    assert scores.standard != scores.fixed  # the limits drop detections, so the two must differ
    for group in ("base", "novel"):
        members = {row["id"] for row in content["categories"] if row["group"] == group}
        part = {key: value for key, value in fixed.items() if key[0] in members}
        wanted = figures(part, content)
        found = precisions(scores.groups[group]["fixed"])
        assert_close(found, {k: wanted[k] for k in list(wanted)[:6]})
    for row in scores.categories:
        mine = [v for (c, _, a), v in standard.items() if c == row["id"] and a == 0]
        assert_close({"AP": row["standard_AP"]}, {"AP": mean(mine)})


def test_both_protocols_agree_below_the_limits(tmp_path):
    scores = evaluate(tmp_path, *world(11))
    assert scores.standard == scores.fixed


def test_category_without_ground_truth_is_left_out(tmp_path):
    content, detections = world(3)
    scores = evaluate(tmp_path, content, detections)
    nowhere = {row["category_id"] for row in content["annotations"]}
    for row in scores.categories:
        assert (row["fixed_AP"] is None) == (row["id"] not in nowhere)
    defined = [row["fixed_AP"] for row in scores.categories if row["fixed_AP"] is not None]
    assert scores.fixed["AP"] == pytest.approx(np.mean(defined))


def test_perfect_detections_score_one_and_none_score_zero(tmp_path):
    content, _ = world(5)
    perfect = [
        (row["image_id"], (x, y, x + w, y + h), 0.5, row["category_id"])
        for row in content["annotations"]
        for x, y, w, h in [row["bbox"]]
    ]
    scores = evaluate(tmp_path, content, perfect)
    assert scores.fixed["AP"] == pytest.approx(1) and scores.standard["APr"] == pytest.approx(1)
    nothing = evaluate(tmp_path, content, [])
    assert nothing.fixed["AP"] == 0 and nothing.standard["AP50"] == 0


def test_no_ground_truth_at_all_is_null_not_nan(tmp_path):
    content, detections = world(6)
    content["annotations"] = []
    scores = evaluate(tmp_path, content, detections)
    assert set(scores.fixed.values()) == {None} == set(scores.groups["novel"]["standard"].values())
    assert "NaN" not in json.dumps([scores.fixed, scores.groups, scores.categories])


def test_the_limit_of_fixed_ap_precedes_the_federated_filter(tmp_path):
    """Detections on images where the category does not count use up its 10,000."""
    category = [{"id": 1, "name": "cup", "frequency": "f"}]
    blank = {"height": 99, "width": 99, "neg_category_ids": [], "not_exhaustive_category_ids": []}
    images = [{"id": n, "file_name": f"{n}.jpg", **blank} for n in (1, 2)]
    box = {"id": 1, "image_id": 2, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81}
    content = {"images": images, "annotations": [box], "categories": category}
    detections = [(1, (0, 0, 9, 9), 0.9, 1), (2, (0, 0, 9, 9), 0.8, 1)]
    assert evaluate(tmp_path, content, detections, max_per_category=1).fixed["AP"] == 0
    assert evaluate(tmp_path, content, detections, max_per_category=2).fixed["AP"] == 1
    assert evaluate(tmp_path, content, detections, max_per_category=1).standard["AP"] == 1


@pytest.mark.parametrize("buffer", [0, 3, 50])
def test_memory_is_bounded_without_changing_metrics(tmp_path, monkeypatch, buffer):
    """Later detections that score less than the kept ones are dropped at once."""
    content, _ = world(8, images=60)
    labels, limit, count = [0, 1, 2, 5, 7, 9], 40, 100
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    truth = lvis.load_lvis(path)

    def fill(buffer):
        rng = np.random.default_rng(3)
        monkeypatch.setattr(lvis, "_BUFFER", buffer)
        evaluator = lvis.LvisEvaluator(truth, max_per_category=limit, max_per_image=7)
        most = 0
        for image in truth.images:
            boxes = np.array([0, 0, 40, 40]) + rng.integers(0, 200, (count, 1)) + np.zeros(4)
            boxes[:20] = truth.boxes[rng.integers(0, len(truth.boxes), 20)]
            evaluator.add(image.id, boxes, rng.integers(0, 99, count), rng.choice(labels, count))
            most = max(most, len(evaluator._fixed))
            assert len(evaluator._standard) <= 7 * len(truth.images)
        return evaluator.result(), most

    whole, everything = fill(10**6)
    assert everything == count * len(truth.images)
    found, most = fill(buffer)
    assert most <= len(labels) * limit * 5 // 4 + buffer + 1
    assert found == whole
    assert found.fixed["AP"] > 0


def test_a_group_of_all_categories_has_the_overall_metrics(tmp_path):
    content, detections = world(9)
    for row in content["categories"]:
        row["group"] = "all"
    scores = evaluate(tmp_path, content, detections)
    assert scores.groups["all"]["fixed"]["AP"] == scores.fixed["AP"]
    unknown = [row for row in content["categories"] if row["id"] == 9]  # without ground truth
    unknown[0]["group"] = "unknown"
    scores = evaluate(tmp_path, content, detections)
    assert scores.groups["unknown"]["fixed"]["AP"] is None
    for row in content["categories"]:
        del row["group"]
    assert evaluate(tmp_path, content, detections).groups == {}


def test_wrong_calls_are_refused(tmp_path):
    content, _ = world(1)
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    evaluator = lvis.LvisEvaluator(lvis.load_lvis(path))
    box, score, label = np.ones((1, 4)), np.ones(1), np.zeros(1, int)
    evaluator.add(10, box, score, label)
    for image, arrays in [
        (10, (box, score, label)),
        (12345, (box, score, label)),
        (20, (box, score * np.nan, label)),
        (20, (box, score, label + 77)),
        (20, (box[:, :3], score, label)),
    ]:
        with pytest.raises(ValueError, match=f"image {image}"):
            evaluator.add(image, *arrays)


@pytest.mark.parametrize(
    "place, value, named",
    [
        (("images", 0, "neg_category_ids"), None, r"images\[0\]\.neg_category_ids"),
        (("images", 1, "not_exhaustive_category_ids"), [99], r"images\[1\]\.not_exhaustive.*99"),
        (("images", 1, "id"), True, r"images\[1\]\.id"),
        (("categories", 2, "frequency"), "often", r"categories\[2\]\.frequency"),
        (("categories", 2, "name"), "", r"categories\[2\]\.name"),
        (("categories", 2, "group"), 3, r"categories\[2\]\.group"),
        (("annotations", 3, "category_id"), 4321, r"annotations\[3\]\.category_id 4321"),
        (("annotations", 3, "image_id"), 4321, r"annotations\[3\]\.image_id 4321"),
        (("annotations", 3, "bbox"), [1, 2, 3], r"annotations\[3\]\.bbox"),
        (("annotations", 3, "bbox"), [1, 2, 3, float("nan")], r"annotations\[3\]\.bbox"),
        (("annotations", 3, "area"), "big", r"annotations\[3\]\.area"),
    ],
)
def test_invalid_entries_are_named(tmp_path, place, value, named):
    content, _ = world(2)
    entry = content[place[0]][place[1]]
    entry[place[2]] = value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"broken\.json: .*{named}"):
        lvis.load_lvis(path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"images": []}', '{"images": 3}'])
def test_invalid_files_are_refused(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.json"):
        lvis.load_lvis(path)
    with pytest.raises(UserError, match="no such file"):
        lvis.load_lvis(tmp_path / "missing.json")
