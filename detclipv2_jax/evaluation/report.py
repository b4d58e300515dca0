"""Results of an evaluation for people: tables and pictures. A column never mixes two protocols."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from PIL import Image

from detclipv2_jax.common import plots
from detclipv2_jax.common.printable import counted
from detclipv2_jax.evaluation import coco
from detclipv2_jax.evaluation.answers import annotated_image, annotated_scale
from detclipv2_jax.inference import drawing, images, threshold
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.ops.nms import nms

Metrics = Mapping[str, float | None]

#: Which detections LVIS's two protocols keep.
PROTOCOLS = {
    "standard": "best 300 detections of each image",
    "fixed": "best 10,000 detections of each category, no limit per image",
}


_PROBLEMS = {"missing": "missing", "unreadable": "unreadable", "other_size": "of another size"}


def readable_name(name: str) -> str:
    """Return a category's name as people write it: "traffic light" for LVIS's "traffic_light"."""
    return " ".join(name.replace("_", " ").split())


def results_table(results: Mapping[str, Any]) -> str:
    """Return a results.json as text: the source, the settings, and a table per protocol."""
    settings = results["settings"]
    source = results.get("predictions") or f"step {results['step']}"
    if "checkpoint" in results:
        source = f"{results['checkpoint']}, {source}"
    lines = [f"{results['dataset']}, {source}: {counted(settings['images'], 'image')}"]
    for problem in ("missing", "unreadable", "other_size"):
        if count := settings.get(f"images_{problem}"):
            lines[0] += f", {count} {_PROBLEMS[problem]}"
    lines += [f"category left out: {why}" for why in settings.get("categories_left_out", ())]
    if "max_detections" in settings:  # a results file of another tool does not say
        lines.append(", ".join(_settings(settings)))
    for title, rows in _tables(results).items():
        lines += ["", *_table_lines(title, rows)]
    if best := results.get("threshold"):
        lines += [
            "",
            f"score threshold with the best F1: {best['score_threshold']:g} (F1 {best['f1']:.3f}, "
            f"precision {best['precision']:.3f}, recall {best['recall']:.3f} at IoU "
            f"{best['iou']:g})",
        ]
        if "predictions" not in results:  # those of another tool need no advice on training
            lines += threshold.weak(best["f1"])
    if "notes" in results:
        lines += ["", *(f"note: {results['dataset']}: {note}." for note in results["notes"])]
    return "\n".join(lines)


def steps_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results of several checkpoints as text: a table per protocol, a row per step."""
    lines = [f"{results[0]['dataset']}: {len(results)} checkpoints"]
    for title, rows in _tables_by_step(results).items():
        lines += ["", *_table_lines(title, rows)]
    return "\n".join(lines)


def draw_steps(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Draw the AP of several checkpoints over steps as a PNG, a panel per protocol."""
    steps = [one["step"] for one in results]
    panels = {}
    for title, rows in _tables_by_step(results).items():
        names = [name for name in next(iter(rows.values())) if not name.startswith("AR")]
        panels[title.split(" (")[0]] = {
            name: [row.get(name) for row in rows.values()] for name in names
        }
    plots.plot_over_steps(steps, panels, path)


def draw_comparison(
    truth: coco.GroundTruth,
    paths: Sequence[pathlib.Path | None],
    samples: Mapping[int, ImageDetections],
) -> Image.Image:
    """Draw images with the ground truth on the left and the best detections on the right.

    Args:
      truth: the dataset.
      paths: the files of its images.
      samples: index of an image -> its detections.
    """
    names = {category.id: readable_name(category.name) for category in truth.categories}
    pictures, titles = [], []
    for number in sorted(samples):
        image, found = truth.images[number], samples[number]
        path = paths[number]
        if path is None:
            raise ValueError(f"image {number} has detections but no file")
        pixels = images.read(annotated_image(image, path))
        boxes = truth.boxes_of_image[image.id]
        scale = 1 / annotated_scale(image, found.size)
        labels = [names[int(key)] for key in truth.category_ids[boxes]]
        pictures.append(drawing.draw_boxes(pixels, truth.boxes[boxes] * scale, labels, side=480))
        drawn = counted(len(boxes), "box", "boxes")
        titles.append(f"{image.file_name or image.given_id}: ground truth, {drawn}")
        # As many as there are objects: readable for a bad model and for a good one.
        best = without_overlaps(found)[: max(len(boxes), 3)]
        answers = (found.boxes[best], [found.names[n] for n in best], found.scores[best])
        pictures.append(drawing.draw_boxes(pixels, *answers, side=480))
        titles.append(f"best {len(best)} detections")
    return drawing.grid(pictures, titles, columns=4)


def without_overlaps(found: ImageDetections) -> Int[np.ndarray, " k"]:
    """Return the indices of the best detections that overlap no better one, whatever the names.

    For pictures only: metrics count every name at a place.
    """
    boxes, scores = jnp.asarray(found.boxes[:200]), jnp.asarray(found.scores[:200])
    return np.flatnonzero(nms(boxes, scores, jnp.ones(len(scores), bool), 0.6))


def _tables(results: Mapping[str, Any]) -> dict[str, dict[str, Metrics]]:
    """Return title -> row name -> metrics: a table per protocol."""
    if "average" in results:
        return {"COCO": {"average": results["average"], **results["sets"]}}
    if "coco" in results:
        return {"COCO": {"all": results["coco"]}}
    return {
        f"{protocol} AP ({PROTOCOLS[protocol]})": {
            "all": results[protocol],
            **{name: group[protocol] for name, group in results["groups"].items()},
        }
        for protocol in ("fixed", "standard")
    }


def _tables_by_step(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Metrics]]:
    """Return title -> "step N" -> overall metrics and the AP of each group."""
    tables: dict[str, dict[str, Metrics]] = {}
    for one in results:
        for title, rows in _tables(one).items():
            overall, *groups = rows.items()
            metrics = dict(overall[1])
            if "average" not in one:
                metrics |= {name: group["AP"] for name, group in groups}
            tables.setdefault(title, {})[f"step {one['step']}"] = metrics
    return tables


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that must be equal for metrics to be comparable."""
    height, width = settings["canvas"]
    texts = [
        f"at most {settings['max_detections']} boxes per image",
        f"score above {settings['score_threshold']:g}",
        f"NMS IoU {settings['nms_iou']:g}",
        f"images scaled into {height}×{width}",
        f"ranked by {settings['score']}",
    ]
    if settings.get("prompts"):
        texts.append("prompts " + " | ".join(settings["prompts"]))
    elif settings.get("definitions"):
        texts.append(f"{settings['names_defined']} names with definitions")
    else:
        texts.append("names without definitions")
    if "parameters" in settings:
        texts.append(settings["parameters"])
    return texts + [f"{name} {value}" for name, value in settings.get("versions", {}).items()]


def _table_lines(title: str, rows: Mapping[str, Metrics]) -> list[str]:
    columns = list(next(iter(rows.values())))
    widths = {column: max(6, len(column)) for column in columns}
    first = max(map(len, rows))
    head = " ".join([" " * first, *(f"{column:>{widths[column]}}" for column in columns)])
    return [title, head] + [
        " ".join([f"{name:<{first}}", *(f"{_cell(row, c):>{widths[c]}}" for c in columns)]).rstrip()
        for name, row in rows.items()
    ]


def _cell(row: Metrics, key: str) -> str:
    """Return a metric as text: '-' without ground truth, blank if the row does not have it."""
    if key not in row:
        return ""
    return "-" if row[key] is None else f"{row[key]:.3f}"
