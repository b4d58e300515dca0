"""What an evaluation found, for people: tables in which no column mixes two protocols, pictures."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from detclipv2_jax.common import plots
from detclipv2_jax.evaluation import coco
from detclipv2_jax.inference import drawing, images
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.ops.nms import nms

Figures = Mapping[str, float | None]

#: How LVIS's two protocols choose the detections that are measured.
PROTOCOLS = {
    "standard": "best 300 detections of each image",
    "fixed": "best 10,000 detections of each category, no limit an image",
}


def readable(name: str) -> str:
    """A category's name as people write it: LVIS spells 'traffic_light'."""
    return " ".join(name.replace("_", " ").split())


def table(results: Mapping[str, Any]) -> str:
    """The results for people: a block for each protocol, so that no column mixes two."""
    settings = results["settings"]
    source = results.get("predictions") or f"step {results['step']}"
    if "checkpoint" in results:
        source = f"{results['checkpoint']}, {source}"
    lines = [f"{results['dataset']}, {source}: {settings['images']} images"]
    for problem in ("missing", "unreadable", "other_size"):
        if count := settings.get(f"images_{problem}"):
            lines[0] += f", {count} {problem.replace('_', ' ')}"
    lines += [", ".join(told)] if (told := _told(settings)) else []
    for title, rows in blocks(results).items():
        lines += ["", *_block(title, rows)]
    return "\n".join(lines)


def blocks(results: Mapping[str, Any]) -> dict[str, dict[str, Figures]]:
    """Title of a block → its rows by name: the figures of one protocol."""
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


def by_step(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Figures]]:
    """As `blocks`, but a row a step: of its overall figures, and the AP of groups beside them."""
    found: dict[str, dict[str, Figures]] = {}
    for one in results:
        for title, (row, *groups) in ((t, rows.items()) for t, rows in blocks(one).items()):
            figures = dict(row[1])
            if "average" not in one:
                figures |= {name: group["AP"] for name, group in groups}
            found.setdefault(title, {})[f"step {one['step']}"] = figures
    return found


def steps_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Several checkpoints of a run, a row each, a block for each protocol."""
    lines = [f"{results[0]['dataset']}: {len(results)} checkpoints"]
    for title, rows in by_step(results).items():
        lines += ["", *_block(title, rows)]
    return "\n".join(lines)


def draw_steps(results: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """AP over steps as a PNG, a panel for each protocol."""
    steps = [one["step"] for one in results]
    panels = {}
    for title, rows in by_step(results).items():
        names = [name for name in next(iter(rows.values())) if not name.startswith("AR")]
        panels[title.split(" (")[0]] = {
            name: [row.get(name) for row in rows.values()] for name in names
        }
    plots.plot_over_steps(steps, panels, path)


def compare(
    truth: coco.GroundTruth,
    paths: Sequence[pathlib.Path | None],
    samples: Mapping[int, ImageDetections],
) -> Image.Image:
    """A sheet with ground truth on the left and the best detections on the right of each image."""
    names = {category.id: readable(category.name) for category in truth.categories}
    sheets, titles = [], []
    for number in sorted(samples):
        image, found = truth.images[number], samples[number]
        pixels, rows = images.read(paths[number]), truth.rows[image.id]
        scale = np.tile([found.size[1] / image.width, found.size[0] / image.height], 2)
        labels = [names[int(key)] for key in truth.category_ids[rows]]
        sheets.append(drawing.draw_boxes(pixels, truth.boxes[rows] * scale, labels, side=480))
        titles.append(f"{image.file_name or image.id}: truth, {len(rows)} boxes")
        # As many as there is to find: readable for a young model and for a good one.
        best = best_names(found)[: max(len(rows), 3)]
        answers = (found.boxes[best], [found.names[n] for n in best], found.scores[best])
        sheets.append(drawing.draw_boxes(pixels, *answers, side=480))
        titles.append(f"the best {len(best)} detections")
    return drawing.grid(sheets, titles, columns=4)


def best_names(found: ImageDetections) -> Int[np.ndarray, " k"]:
    """Of the best detections, those that no better one overlaps, whatever the names: one a place.

    For pictures only; what is measured keeps every name of a place.
    """
    count = min(len(found), 200)
    everything = np.ones(count, bool)
    return np.flatnonzero(nms(found.boxes[:count], found.scores[:count], everything, 0.6))


def _told(settings: Mapping[str, Any]) -> list[str]:
    """The settings without which a figure cannot be compared with another."""
    if "max_detections" not in settings:  # the results file of another tool tells none
        return []
    height, width = settings["canvas"]
    told = [
        f"{settings['max_detections']} boxes an image",
        f"score above {settings['score_threshold']:g}",
        f"NMS IoU {settings['nms_iou']:g}",
        f"images within {height}×{width}",
        f"ranked by {settings['score']}",
    ]
    if settings.get("prompts"):
        told.append("asked as " + " | ".join(settings["prompts"]))
    elif settings.get("definitions"):
        told.append(f"{settings['names_defined']} names with definitions")
    else:
        told.append("bare names")
    if "parameters" in settings:
        told.append(settings["parameters"])
    told += [f"{name} {version}" for name, version in settings.get("versions", {}).items()]
    return told


def _block(title: str, rows: Mapping[str, Figures]) -> list[str]:
    columns = list(next(iter(rows.values())))
    wide = {column: max(6, len(column)) for column in columns}
    width = max(map(len, rows))
    head = " ".join([" " * width, *(f"{column:>{wide[column]}}" for column in columns)])
    return [title, head] + [
        " ".join([f"{name:<{width}}", *(f"{_cell(row, c):>{wide[c]}}" for c in columns)]).rstrip()
        for name, row in rows.items()
    ]


def _cell(row: Figures, key: str) -> str:
    """A figure; '-' where there was no ground truth, blank where the row has no such figure."""
    if key not in row:
        return ""
    return "-" if row[key] is None else f"{row[key]:.3f}"
