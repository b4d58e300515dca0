#!/usr/bin/env python
"""Time and memory of the evaluators, lvis-api and pycocotools on generated datasets.

    benchmark_eval.py --output=DIR [--shares=0.05,0.1,0.2,0.4] [--rounds=1]

One dataset has the size of LVIS v1 val, the other that of COCO val2017; the detections are those of
a mediocre detector. Each contestant runs in its own process on the same detections. Ours takes
arrays image by image; lvis-api, pycocotools and faster-coco-eval take lists of dictionaries, and
the time to make these is not counted. Seconds are processor time, which other jobs on the machine
hardly change. Memory is the peak of the process: interpreter, annotations and evaluator.

lvis-api runs only on `--shares` of the images, and for fixed AP only on the first share: its memory
grows with images times categories and exceeds that of many machines. faster-coco-eval is not in the
requirements; it is skipped if it is not installed.

Writes DIR/benchmark_eval.json and .png; prints the rows and the largest difference of any metric.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import logging
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np

from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.evaluation import coco, lvis


@dataclasses.dataclass(frozen=True)
class Shape:
    """The size of a generated dataset; means per image unless noted."""

    images: int
    categories: int
    boxes: float
    present: float  # categories in an image
    negatives: float  # categories known to be absent
    detections: int  # exactly this many per image


# LVIS v1 val: 19,809 images, 1,203 categories (337 r, 461 c, 405 f), 244,707 boxes.
LVIS_VAL = Shape(19_809, 1_203, 244_707 / 19_809, 3.6, 7.0, 300)
LVIS_VAL_FIXED = dataclasses.replace(LVIS_VAL, detections=1000)
# COCO val2017: 5,000 images, 80 categories, 36,781 boxes.
COCO_VAL = Shape(5_000, 80, 36_781 / 5_000, 2.9, 0.0, 100)


def content(shape: Shape, seed: int = 0) -> dict:
    """Return annotations of this size: Zipf-like categories, boxes of 8 to 500 pixels."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, shape.categories + 1)
    weights /= weights.sum()
    ids = rng.permutation(shape.categories) + 1
    letters = np.repeat(["f", "c", "r"], [405, 461, 337])
    categories = [
        {"id": int(key), "name": f"thing {key}", "frequency": str(letters[rank % len(letters)])}
        for rank, key in enumerate(ids)
    ]
    images, annotations = [], []
    for number in range(1, shape.images + 1):
        count = max(1, rng.poisson(shape.present))
        shown = np.unique(rng.choice(ids, count, p=weights))
        others = np.setdiff1d(np.unique(rng.choice(ids, rng.poisson(shape.negatives))), shown)
        unmarked = shown[rng.random(len(shown)) < 0.15]
        images.append(
            {
                "id": number,
                "height": 480,
                "width": 640,
                "file_name": f"{number:012d}.jpg",
                "neg_category_ids": others.tolist(),
                "not_exhaustive_category_ids": unmarked.tolist(),
            }
        )
        boxes = random_boxes(rng, max(len(shown), rng.poisson(shape.boxes)))
        labels = np.concatenate([shown, rng.choice(shown, len(boxes) - len(shown))])
        for box, label in zip(boxes.tolist(), labels.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * 0.7,
                    "iscrowd": 0,
                }
            )
    return {"images": images, "categories": categories, "annotations": annotations}


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Return (count, 4) boxes [x, y, width, height] within 640×480, in hundredths of a pixel."""
    sizes = np.exp(rng.uniform(np.log(8), np.log(470), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * (np.array([640, 480]) - sizes)
    return np.round(np.concatenate([corners, sizes], axis=1), 2)


def detections(truth: coco.GroundTruth, count: int, seed: int = 1) -> Iterator[tuple]:
    """Yield (image id, xyxy boxes, scores, category ids) of each image.

    Two boxes are near each object, three in four with its category. The others are anywhere, one in
    three with a category of the image.
    """
    rng = np.random.default_rng(seed)
    ids = np.asarray([category.id for category in truth.categories])
    for image in truth.images:
        rows = truth.boxes_of_image[image.id]
        near = np.repeat(rows, 2)[:count]
        boxes = truth.boxes[near] + rng.normal(0, 0.06, (len(near), 4)) * np.tile(
            truth.boxes[near, 2:] - truth.boxes[near, :2], 2
        )
        labels = truth.category_ids[near].copy()
        wrong = rng.random(len(near)) < 0.25
        labels[wrong] = rng.choice(ids, wrong.sum())
        rest = random_boxes(rng, count - len(near))
        rest[:, 2:] += rest[:, :2]
        other = rng.choice(ids, len(rest))
        seen = rng.random(len(rest)) < 1 / 3
        if len(rows):
            other[seen] = rng.choice(truth.category_ids[rows], seen.sum())
        boxes = np.concatenate([boxes, rest])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = np.concatenate([rng.beta(3, 3, len(near)), rng.beta(1, 6, len(rest))])
        labels = np.concatenate([labels, other])
        yield image.id, boxes.astype(np.float32), scores.astype(np.float32), labels


def entries(truth: coco.GroundTruth, count: int) -> list[dict]:
    """Return all detections as the list of dictionaries that lvis-api and pycocotools take."""
    rows = []
    for image, boxes, scores, labels in detections(truth, count):
        boxes = boxes.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        columns = zip(boxes.tolist(), scores.tolist(), labels.tolist())
        rows += [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for box, score, label in columns
        ]
    return rows


@contextlib.contextmanager
def timing(spent: dict) -> Iterator[None]:
    """Add the processor seconds of the block to `spent`."""
    start = time.process_time()
    yield
    spent["seconds"] += time.process_time() - start


def ours(made: dict, federated: bool, count: int, spent: dict) -> dict:
    """Return our metrics: standard and fixed AP of LVIS, or COCO's twelve."""
    kind = lvis if federated else coco
    truth = kind.from_content("generated", made)
    evaluator = (lvis.LvisEvaluator if federated else coco.CocoEvaluator)(truth)
    for answer in detections(truth, count):
        with timing(spent):
            evaluator.add(*answer)
    with timing(spent):
        found = evaluator.result()
    return (
        {f"standard {k}": v for k, v in found.standard.items()}
        | {f"fixed {k}": v for k, v in found.fixed.items()}
        if federated
        else found
    )


def lvis_api(made: dict, federated: bool, count: int, spent: dict, fixed: bool = False) -> dict:
    """Return standard AP of LVISEval, or fixed AP from the 10,000 best of each category."""
    np.float = float  # lvis 0.5.3 is written for NumPy 1
    from lvis import LVIS, LVISEval, LVISResults

    logging.getLogger("lvis.results").setLevel(logging.ERROR)
    rows = entries(lvis.from_content("generated", made), count)
    truth = LVIS.__new__(LVIS)  # its constructor reads a file
    truth.logger, truth.dataset = logging.getLogger("lvis"), made
    truth._create_index()
    with timing(spent):
        if fixed:
            rows = best_of_categories(rows)
        evaluation = LVISEval(truth, LVISResults(truth, rows, -1 if fixed else 300), "bbox")
        evaluation.run()
    name = "fixed" if fixed else "standard"
    return {f"{name} {k.split('@')[0]}": float(v) for k, v in evaluation.results.items()}


def lvis_api_fixed(*arguments) -> dict:
    """Return fixed AP of LVISEval."""
    return lvis_api(*arguments, fixed=True)


def best_of_categories(rows: list[dict]) -> list[dict]:
    """Return the 10,000 best detections of each category."""
    by_category: dict[int, list[dict]] = {}
    for row in rows:
        by_category.setdefault(row["category_id"], []).append(row)
    kept = [sorted(mine, key=lambda row: -row["score"])[:10_000] for mine in by_category.values()]
    return [row for mine in kept for row in mine]


def pycocotools(made: dict, federated: bool, count: int, spent: dict) -> dict:
    """Return the twelve metrics of COCOeval."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return _as_coco(COCO, COCOeval, made, count, spent)


def faster_coco_eval(made: dict, federated: bool, count: int, spent: dict) -> dict:
    """Return the twelve metrics of faster-coco-eval."""
    from faster_coco_eval import COCO, COCOeval_faster

    return _as_coco(COCO, COCOeval_faster, made, count, spent)


def _as_coco(sets, evaluator, made: dict, count: int, spent: dict) -> dict:
    rows = entries(coco.from_content("generated", copy.deepcopy(made)), count)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = sets()
        truth.dataset = made
        truth.createIndex()
        with timing(spent):
            evaluation = evaluator(truth, truth.loadRes(rows), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
    return dict(zip(coco.METRICS, map(float, evaluation.stats)))


CONTESTANTS = {
    function.__name__: function
    for function in (ours, lvis_api, lvis_api_fixed, pycocotools, faster_coco_eval)
}


def contest(name: str, shape: Shape, federated: bool) -> dict:
    """Run one contestant in this process; return its seconds, peak memory and metrics."""
    spent = {"seconds": 0.0}
    figures = CONTESTANTS[name](content(shape), federated, shape.detections, spent)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {key: -1.0 if value is None else value for key, value in figures.items()}
    return {"seconds": spent["seconds"], "mebibytes": peak, "figures": figures}


def measure(name: str, set_name: str, shape: Shape, rounds: int) -> dict | None:
    """Return medians of some rounds, each in a new process; None if a package is missing."""
    runs = []
    for _ in range(rounds):
        given = json.dumps([name, dataclasses.asdict(shape), set_name == "lvis"])
        done = subprocess.run(
            [sys.executable, __file__, "--one", given], capture_output=True, text=True
        )
        if "ModuleNotFoundError" in done.stderr:
            return None
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    row = {
        "set": set_name,
        "contestant": name,
        **dataclasses.asdict(shape),
        "rounds": rounds,
        "seconds": statistics.median(run["seconds"] for run in runs),
        "spread": [min(run["seconds"] for run in runs), max(run["seconds"] for run in runs)],
        "mebibytes": max(run["mebibytes"] for run in runs),
        "figures": runs[0]["figures"],
    }
    measured = f"{row['seconds']:8.2f} s  {row['mebibytes']:8.0f} MiB"
    sizes = f"{shape.images:6d} images x {shape.categories} x {shape.detections}"
    print(f"{set_name:5} {name:17} {sizes:28} {measured}", flush=True)
    return row


def differences(rows: list[dict]) -> dict[str, float]:
    """Return contestant -> largest difference of a metric to ours on the same data."""
    found: dict[str, float] = {}
    for ours_row in (row for row in rows if row["contestant"] == "ours"):
        for row in rows:
            same = all(row[k] == ours_row[k] for k in ("set", "images", "detections"))
            if same and row is not ours_row:
                mine = ours_row["figures"]
                gap = max(abs(value - mine[key]) for key, value in row["figures"].items())
                found[row["contestant"]] = max(gap, found.get(row["contestant"], 0.0))
    return found


def picture(rows: list[dict], path: pathlib.Path) -> None:
    """Draw time and memory over the images of LVIS val, all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    labels = {
        ("ours", 300): "ours: standard and fixed, 300 per image",
        ("ours", 1000): "ours: standard and fixed, 1,000 per image",
        ("lvis_api", 300): "lvis-api: standard, 300 per image",
        ("lvis_api_fixed", 300): "lvis-api: fixed, 300 per image",
    }
    for (name, count), label in labels.items():
        mine = [
            row
            for row in rows
            if row["set"] == "lvis" and (row["contestant"], row["detections"]) == (name, count)
        ]
        for panel, key in zip(panels, ("seconds", "mebibytes")):
            panel.plot([r["images"] for r in mine], [r[key] for r in mine], "o-", label=label)
    for panel, label in zip(panels, ("processor seconds", "peak memory, MiB")):
        panel.set(xscale="log", yscale="log", xlabel="images (LVIS val: 19,809)", ylabel=label)
        panel.axvline(LVIS_VAL.images, color="0.8", zorder=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Run all contestants, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, metavar="DIR")
    parser.add_argument(
        "--shares",
        default="0.05,0.1,0.2,0.4",
        help="shares of the images for lvis-api (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, help="runs of each contestant (default: %(default)s)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, shape, federated = json.loads(args.one)
        print(json.dumps(contest(name, Shape(**shape), federated)))
        return
    if args.output is None:
        parser.error("--output is required")
    shares = [float(share) for share in args.shares.split(",")]
    sizes = [dataclasses.replace(LVIS_VAL, images=round(s * LVIS_VAL.images)) for s in shares]
    work = [("lvis", name, size) for size in sizes for name in ("ours", "lvis_api")]
    work += [("lvis", "lvis_api_fixed", sizes[0])]
    work += [("lvis", "ours", LVIS_VAL), ("lvis", "ours", LVIS_VAL_FIXED)]
    work += [("coco", name, COCO_VAL) for name in ("ours", "pycocotools", "faster_coco_eval")]
    rows = [row for job in work if (row := measure(job[1], job[0], job[2], args.rounds))]
    gaps = differences(rows)
    for name, gap in gaps.items():
        print(f"largest difference of a metric to {name}: {gap:.1e}")
    write_json(args.output / "benchmark_eval.json", {"rows": rows, "differences": gaps})
    picture(rows, args.output / "benchmark_eval.png")


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
