"""Compare groups of runs, as in an ablation: one table and one figure that show every run.

    python scripts/compare_runs.py with=runs/with_0,runs/with_1 without=runs/without_0 \\
        --picture=comparison.png

A run is the --workdir of a training or the --output of an evaluation. The table has the mean of
each group, followed by its lowest and highest run.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded

Values = dict[str, float]  # 'all', 'base', 'novel': AP as a fraction of one


def read_run(directory: str) -> tuple[str, Values]:
    """Return the metric ("fixed AP" or "coco AP") and its value for all and each group of names.

    Raises:
      UserError: results.json does not exist or has no such value.
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
            f"{path}: not the results of an evaluation ({error!r}). Give the directory of a "
            "finished run."
        ) from None


def read_groups(arguments: Sequence[str]) -> tuple[str, dict[str, list[Values]]]:
    """Return the metric and, for each NAME=DIR,DIR,…, the values of its runs.

    Raises:
      UserError: an argument is not a group, a run has no results, or two runs differ in the metric.
    """
    metric, groups = "", {}
    for argument in arguments:
        name, _, directories = argument.partition("=")
        runs = [directory for directory in directories.split(",") if directory]
        if not name or not runs:
            raise UserError(f"{argument}: not a group of runs. Write NAME=DIR,DIR,….")
        for directory in runs:
            here, values = read_run(directory)
            if metric not in ("", here):
                raise UserError(
                    f"{directory}: its metric is {here}, that of the runs before it is {metric}. "
                    "Compare runs of one metric."
                )
            metric = here
            groups.setdefault(name, []).append(values)
    return metric, groups


def columns(groups: Mapping[str, Sequence[Values]]) -> list[str]:
    """Return the names of the values that any run has, in order of first appearance."""
    return list(dict.fromkeys(key for runs in groups.values() for run in runs for key in run))


def table(metric: str, groups: Mapping[str, Sequence[Values]]) -> str:
    """Return a Markdown table: a row per group, a column per value, "–" where it is missing."""
    names = columns(groups)
    lines = [f"| {metric} | runs | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for group, runs in groups.items():
        cells = [_cell([run[name] for run in runs if run.get(name) is not None]) for name in names]
        lines.append(f"| {group} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}–{max(values):.3f})"


def draw(metric: str, groups: Mapping[str, Sequence[Values]], picture: Path) -> None:
    """Write a PNG with a panel per value: a bar for the mean of each group, a dot for each run."""
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
    figure.axes[0].set_ylabel(metric)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status; 2 after an error that the user can fix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", nargs="+", metavar="NAME=DIR,DIR", help="a group of runs")
    parser.add_argument("--picture", type=Path, help="PNG file to write (default: none)")
    return exit_status(run, parser.parse_args(arguments))


def run(args: argparse.Namespace) -> None:
    """Print the table, and draw the figure if a file is named."""
    if args.picture:
        OutputFolder(args.picture.parent, "--picture").check([args.picture.name])
    metric, groups = read_groups(args.groups)
    print(table(metric, groups))
    if args.picture:
        with guarded(OutputFolder(args.picture.parent, "--picture")):
            draw(metric, groups, args.picture)


if __name__ == "__main__":
    sys.exit(main())
