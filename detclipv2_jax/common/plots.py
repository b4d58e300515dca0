"""Plots of losses and metrics over training steps."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError

# Metrics of an evaluation; the second validation set has its folder's name before them.
_SCORES = ("coco/AP", "coco/AP50", "fixed/AP", "zero_shot/coco/AP", "zero_shot/fixed/AP")
_LOSSES = ("loss", "align", "box", "centerness", "contrastive")  # the total and its terms


def plot_losses(metrics: str | os.PathLike, picture: str | os.PathLike) -> None:
    """Plot the losses of a run over its steps, one panel per kind of data, and its validation.

    Each loss is drawn in pale color with its running mean on top. The last panel has the AP of each
    evaluation. Values that are not finite are skipped.

    Args:
      metrics: the run's `metrics.jsonl`.
      picture: the PNG file to write.

    Raises:
      UserError: the file is missing, or a line is not a JSON object with a step.
    """
    rows = _rows(pathlib.Path(metrics))
    curves, scores = _losses(rows), _scores(rows)
    count = max(len(curves) + bool(scores), 1)
    figure = Figure(figsize=(5.2 * count, 3.8), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel, (kind, losses) in zip(panels, sorted(curves.items())):
        for name, points in losses.items():
            steps, values = np.asarray(points, np.float64).T
            (line,) = panel.plot(steps, _running_mean(values), label=name, linewidth=1.8)
            panel.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8)
        panel.set(title=kind.replace("_", "-"), xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
    if curves:
        panels[0].set_ylabel("loss")
    if scores:
        for name, points in scores.items():
            panels[-1].plot(*zip(*points), label=name, linewidth=1.8, marker="o", markersize=3)
        panels[-1].set(title="validation", xlabel="step", ylim=(0, None))
        panels[-1].grid(alpha=0.3)
        panels[-1].legend(frameon=False, fontsize="small")
    elif not curves:
        panels[0].text(0.5, 0.5, "no losses yet", ha="center", transform=panels[0].transAxes)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def plot_over_steps(
    steps: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[float | None]]],
    picture: str | os.PathLike,
) -> None:
    """Plot metrics of a run over its steps.

    Args:
      steps: the steps at which the metrics were measured.
      panels: title of a panel -> label of a line -> a value for each step, None where missing.
      picture: the PNG file to write.
    """
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for panel, (title, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        for name, values in lines.items():
            values = np.array([np.nan if value is None else value for value in values], np.float64)
            if np.isfinite(values).any():
                panel.plot(steps, values, label=name, linewidth=1.8, marker="o", markersize=3)
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(frameon=False, fontsize="small")
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _rows(metrics: pathlib.Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl; a last line that is incomplete is skipped."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{metrics}: no such file. Give the metrics.jsonl of a workdir.") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append(row | {"step": int(row["step"])})
        except (json.JSONDecodeError, KeyError, TypeError, ValueError):
            if number == len(lines):  # a run that was killed may leave an incomplete line
                continue
            raise UserError(
                f"{metrics}, line {number}: not a JSON object with a 'step'. Remove the line."
            ) from None
    return rows


def _losses(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return kind -> name of a loss -> its finite values as (step, value)."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in rows:
        for name, value in row.items():
            if name in _LOSSES and _is_finite(value) and isinstance(row.get("kind"), str):
                of_kind = curves.setdefault(row["kind"], {})
                of_kind.setdefault(name, []).append((row["step"], value))
    return curves


def _scores(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return name of a metric of `_SCORES` -> its finite values as (step, value)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name in _SCORES:
            if _is_finite(value := row.get(name)):
                curves.setdefault(name, []).append((row["step"], value))
    return curves


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _running_mean(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the mean of each value and its neighbors, over about a thirtieth of the curve."""
    reach = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - reach, 0)
    high = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
