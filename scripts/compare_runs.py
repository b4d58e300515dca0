"""Compares groups of runs, as an ablation needs: one table, one picture, each seed visible.

    python scripts/compare_runs.py with=runs/with_0,runs/with_1 without=runs/without_0 \\
        --picture=comparison.png

A run is the directory of an evaluation: a training's --workdir, or `evaluate`'s --output. A group
is shown by the mean of its runs, with the lowest and the highest behind it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError

Figures = dict[str, float]  # 'all', 'base', 'novel': AP as a fraction of one


def read_run(directory: str) -> tuple[str, Figures]:
    """What is measured ('fixed AP'; 'coco AP' on a COCO-format set), of all and of each group.

    Raises:
      UserError: there is no results.json, or it holds no such figure.
    """
    path = Path(directory) / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        protocol = "fixed" if "fixed" in results else "coco"
        groups = results.get("groups", {})
        return f"{protocol} AP", {
            "all": results[protocol]["AP"],
            **{name: group[protocol]["AP"] for name, group in groups.items()},
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: no results of an evaluation ({error!r}); give the workdir of a finished run."
        ) from None


def read_groups(arguments: Sequence[str]) -> tuple[str, dict[str, list[Figures]]]:
    """What is measured, and the figures of each run of each NAME=DIR,DIR,…

    Raises:
      UserError: an argument is no group, a run has no results, or two measure different things.
    """
    measured, groups = "", {}
    for argument in arguments:
        name, _, directories = argument.partition("=")
        runs = [directory for directory in directories.split(",") if directory]
        if not name or not runs:
            raise UserError(f"{argument}: write a group as NAME=DIR,DIR,…")
        for directory in runs:
            here, figures = read_run(directory)
            if measured not in ("", here):
                raise UserError(f"{directory}: holds {here}, the runs before it {measured}.")
            measured = here
            groups.setdefault(name, []).append(figures)
    return measured, groups


def columns(groups: Mapping[str, Sequence[Figures]]) -> list[str]:
    """The figures that any run has, in the order of the first that has them."""
    return list(dict.fromkeys(key for runs in groups.values() for run in runs for key in run))


def table(measured: str, groups: Mapping[str, Sequence[Figures]]) -> str:
    """Markdown: a row a group, a column a figure; '–' where no run of the group has it."""
    names = columns(groups)
    lines = [f"| {measured} | runs | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for group, runs in groups.items():
        cells = [_cell([run[name] for run in runs if run.get(name) is not None]) for name in names]
        lines.append(f"| {group} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def draw(measured: str, groups: Mapping[str, Sequence[Figures]], picture: Path) -> None:
    """A panel a figure: each group's mean as a bar, each run as a dot. Writes a PNG, atomically."""
    names = columns(groups)
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False, sharey=True)[0], names):
        for place, runs in enumerate(groups.values()):
            values = [run[name] for run in runs if run.get(name) is not None]
            if values:
                panel.bar(place, sum(values) / len(values), width=0.6, alpha=0.5)
                panel.plot([place] * len(values), values, "o", color="black", markersize=4)
        panel.set(title=name, xticks=range(len(groups)), xticklabels=list(groups))
        panel.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel(measured)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Prints the table; draws the picture if one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", metavar="NAME=DIR,DIR", help="a group of runs")
    parser.add_argument("--picture", type=Path, help="PNG to draw (default: none)")
    args = parser.parse_args()
    try:
        measured, groups = read_groups(args.groups)
        print(table(measured, groups))
        if args.picture:
            draw(measured, groups, args.picture)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
