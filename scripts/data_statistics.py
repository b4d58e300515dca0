"""What is in prepared sources: sizes, boxes, concepts, tokens, pictures that occur twice.

    python scripts/data_statistics.py data/symbols/detection data/symbols/grounding --output=DIR
    python scripts/data_statistics.py data/objects365 data/cc15m --output=DIR --duplicates \\
        --evaluation=lvis_v1_val.json --images=coco

Prints a table for each source and writes statistics.json and statistics.png. `--duplicates` looks
at every picture (about a thousand a second a core) for those that look alike within a source and
across sources; with `--evaluation`, also for pictures of an evaluation set that leaked into
training.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from detclipv2_jax.common.atomic import (
    replacing,
    write_json,
)
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError

_PAIRS = 5  # leaked pictures that are named


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, one sentence each."""
    return exit_status(run, parser().parse_args(arguments))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("sources", nargs="+", metavar="SOURCE", help="directory of prepared data")
    result.add_argument("--output", required=True, metavar="DIR", help="where to write")
    result.add_argument(
        "--sample",
        type=int,
        default=20_000,
        help="records a source whose boxes are read, evenly spaced (default: %(default)s)",
    )
    result.add_argument("--duplicates", action="store_true", help="look for pictures that recur")
    result.add_argument(
        "--evaluation", metavar="JSON", help="COCO- or LVIS-format set that must not be trained on"
    )
    result.add_argument("--images", metavar="DIR", help="folder of the evaluation set's images")
    result.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    return result


def run(args: argparse.Namespace) -> None:
    """Prints and writes what the command line asks for."""
    from detclipv2_jax.data.index import Source

    if args.evaluation and not (args.images and args.duplicates):
        raise UserError("--evaluation needs --duplicates and --images=DIR, where its pictures are.")
    sources = {}
    for directory in args.sources:
        source = Source.open(directory)
        if source.name in sources:
            raise UserError(f"{directory}: another source is called {source.name!r} too; drop one.")
        sources[source.name] = source
    found = {name: describe(source, args.sample, args.jobs) for name, source in sources.items()}
    results: dict[str, Any] = {"sources": {name: figures for name, (figures, _) in found.items()}}
    for name, source in sources.items():
        print(table(name, source.kind, results["sources"][name]))
    if args.duplicates:
        results |= duplicates(sources, args)
    output = Path(args.output)
    write_json(output / "statistics.json", results)
    draw(sources, {name: sides for name, (_, sides) in found.items()}, output / "statistics.png")
    print(f"{output}/: statistics.json, statistics.png")


def describe(source, sample: int, jobs: int) -> tuple[dict[str, Any], np.ndarray]:
    """A source's figures, and the sides of the sampled boxes (root of the area, pixels)."""
    from detclipv2_jax.data.prepare import statistics

    figures = statistics.of_index(source)
    boxes = np.zeros((0, 4), np.float32)
    if source.kind != "image_text":
        parts = list(
            tqdm(
                statistics.sample_boxes(source, sample, jobs),
                desc=f"{source.name}: boxes",
                unit=" chunks",
                disable=None,
            )
        )
        counts = np.concatenate([np.zeros(0, np.int64), *(c for c, _ in parts)])
        boxes = np.concatenate([boxes, *(b for _, b in parts)])
        figures["boxes"] = statistics.of_boxes(counts, boxes)
    return figures, np.sqrt(np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 0))


def duplicates(sources, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures that recur within a source, across sources, and in the evaluation set."""
    from detclipv2_jax.data.prepare import statistics

    looks = {}
    for name, source in sources.items():
        chunks = []
        with tqdm(
            total=len(source), desc=f"{name}: pictures", unit=" pictures", disable=None
        ) as bar:
            for chunk in statistics.looks(source, args.jobs):
                chunks.append(chunk)
                bar.update(len(chunk))
        looks[name] = np.concatenate([np.zeros(0, np.uint64), *chunks])
    results: dict[str, Any] = {
        "repeated": {name: statistics.repeated(found) for name, found in looks.items()},
        "overlaps": {f"{a} | {b}": n for (a, b), n in statistics.overlaps(looks).items()},
    }
    print("pictures that look alike")
    for name, count in results["repeated"].items():
        print(f"  an earlier one of {name:<32}{count:>12,} of {len(looks[name]):,}")
    for pair, count in results["overlaps"].items():
        a, b = pair.split(" | ")
        print(f"  {a} like one of {b:<32}{count:>12,}")
    if args.evaluation:
        results["leaked"] = leaked(sources, looks, args)
    return results


def leaked(sources, looks, args: argparse.Namespace) -> dict[str, int]:
    """For each source, the pictures that look like one of the evaluation set."""
    from detclipv2_jax.common.json_stream import read_lists
    from detclipv2_jax.data.prepare import statistics
    from detclipv2_jax.data.prepare.examples import ImageFolder
    from detclipv2_jax.data.prepare.sources.entries import file_names

    folder, evaluation = ImageFolder(args.images), Path(args.evaluation)
    names, paths = [], []
    for _, number, entry in read_lists(evaluation, ("images",)):
        try:
            candidates = file_names(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{evaluation}: images[{number}] names no file") from None
        path = next((p for p in map(folder.find, candidates) if p is not None), None)
        if path is not None:
            names.append(candidates[0])
            paths.append(path)
    bar = tqdm(paths, desc="evaluation set: pictures", unit=" pictures", disable=None)
    theirs = np.array([statistics.look(path.read_bytes()) for path in bar], np.uint64)
    print(f"pictures of {args.evaluation} ({len(paths):,} found) that look like one trained on")
    counts = {}
    for source, ours in looks.items():
        pairs = statistics.alike(ours, theirs)
        counts[source] = len(np.unique(pairs[:, 1]))
        print(f"  in {source:<48}{counts[source]:>12,}")
        for record, image in itertools.islice(pairs.tolist(), _PAIRS):
            print(f"      record {record} and {names[image]}")
    return counts


def table(name: str, kind: str, figures: dict[str, Any]) -> str:
    """The figures of one source for people."""
    from detclipv2_jax.data.prepare.statistics import QUANTILES

    heads = ["least", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "most"]
    lines = [
        f"{name} ({kind}): {figures['records']:,} records, {figures['concepts']:,} concepts "
        f"({figures['captions']:,} captions, {figures['unused']:,} that no record has)",
        f"  {'':<26}" + "".join(f"{head:>9}" for head in heads),
    ]
    rows = {key: figures[key] for key in ("height", "width", "aspect", "concepts_a_record")}
    rows["tokens (16 at most)"] = figures["tokens"]
    boxes = figures.get("boxes", {})
    rows |= {f"{key} of boxes": boxes[key] for key in ("side",) if key in boxes}
    rows |= {key: boxes[key] for key in ("boxes_a_record",) if key in boxes}
    for label, values in rows.items():
        if values is not None:
            cells = "".join(f"{value:>9.4g}" for value in values)
            lines.append(f"  {label.replace('_', ' '):<26}{cells}")
    if figures["tokens_at_limit"] is not None:
        lines.append(f"  {figures['tokens_at_limit']:.1%} of the concepts fill all 16 tokens")
    if boxes.get("small") is not None:
        lines.append(
            f"  boxes: {boxes['small']:.1%} small, {boxes['medium']:.1%} medium, "
            f"{boxes['large']:.1%} large; {boxes['without_boxes']:.1%} of the records have none"
        )
    frequent = ", ".join(f"{n} {c:,}" for n, c in itertools.islice(figures["frequent"].items(), 10))
    return "\n".join([*lines, f"  most frequent: {frequent}"])


def draw(sources, sides: dict[str, np.ndarray], path: Path) -> None:
    """A row of panels for each source: sizes, concepts a record, frequency of names, boxes."""
    figure = Figure(figsize=(16, 3.4 * len(sources)), layout="constrained")
    rows = figure.subplots(len(sources), 4, squeeze=False)
    for panels, (name, source) in zip(rows, sources.items()):
        pick = slice(None, None, max(1, len(source) // 20_000))
        panels[0].scatter(source.width[pick], source.height[pick], s=4, alpha=0.3, linewidths=0)
        panels[0].set(title=f"{name}: pictures", xlabel="width, pixels", ylabel="height, pixels")
        counts = np.diff(source.positives_offsets)
        most = int(counts.max(initial=1))
        panels[1].hist(counts, bins=np.arange(0, most + 2, max(1, most // 50)) - 0.5)
        panels[1].set(title="concepts a record", xlabel="concepts", ylabel="records")
        uses = np.bincount(source.positives, minlength=len(source.keys))[source.vocabulary]
        uses = -np.sort(-uses[uses > 0])
        panels[2].plot(1 + np.arange(len(uses)), uses)
        panels[2].set(title="names and phrases", xlabel="rank", ylabel="records")
        panels[2].set(xscale="log", yscale="log")
        if len(sides[name]):
            panels[3].hist(sides[name], bins=np.geomspace(1, max(sides[name].max(), 2), 50))
            panels[3].set(title="boxes", xlabel="root of the area, pixels", ylabel="boxes")
            panels[3].set(xscale="log")
        else:
            panels[3].set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
