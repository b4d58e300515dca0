"""Report statistics of prepared sources: sizes, boxes, concepts, tokens, duplicate images.

    python scripts/data_statistics.py data/symbols/detection data/symbols/grounding --output=DIR
    python scripts/data_statistics.py data/objects365 data/cc15m --output=DIR --duplicates \\
        --evaluation=lvis_v1_val.json --images=coco

Prints a table for each source and writes statistics.json and statistics.png. With `--duplicates` it
reads every image (about a thousand per second and core) and reports near-duplicates within a source
and between sources; with `--evaluation` also images of an evaluation set that are in the training
data.
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

from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded

_SHOWN_PAIRS = 5  # pairs of a training and an evaluation image that are printed


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit status; 2 after an error that the user can fix."""
    return exit_status(run, build_parser().parse_args(arguments))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("sources", nargs="+", metavar="SOURCE", help="directory of a source")
    result.add_argument("--output", required=True, metavar="DIR", help="directory to write")
    result.add_argument(
        "--sample",
        type=int,
        default=20_000,
        help="evenly spaced records per source whose boxes are read (default: %(default)s)",
    )
    result.add_argument("--duplicates", action="store_true", help="report near-duplicate images")
    result.add_argument(
        "--evaluation",
        metavar="JSON",
        help="COCO- or LVIS-format set that training must not contain",
    )
    result.add_argument("--images", metavar="DIR", help="folder of the evaluation set's images")
    result.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: cores)"
    )
    return result


def run(args: argparse.Namespace) -> None:
    """Print and write the statistics that the command line asks for."""
    from detclipv2_jax.data.index import Source

    output = OutputFolder(args.output)
    output.check(("statistics.json", "statistics.png"))
    if args.evaluation and not (args.images and args.duplicates):
        raise UserError("--evaluation needs --duplicates and --images=DIR. Add both flags.")
    sources = {}
    for directory in args.sources:
        source = Source.open(directory)
        if source.name in sources:
            raise UserError(
                f"{directory}: another source is called {source.name!r} too. Name only one of them."
            )
        sources[source.name] = source
    found = {name: describe(source, args.sample, args.jobs) for name, source in sources.items()}
    results: dict[str, Any] = {"sources": {name: values for name, (values, _) in found.items()}}
    for name, source in sources.items():
        print(table(source, results["sources"][name], f"{args.output}/statistics.json"))
    if args.duplicates:
        results |= find_duplicates(sources, args)
    folder = output.path
    with guarded(output):
        write_json(folder / "statistics.json", results)
        sides = {name: sides for name, (_, sides) in found.items()}
        draw(sources, sides, folder / "statistics.png")
    print(f"{folder}/: statistics.json, statistics.png")


def describe(source, sample: int, jobs: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return the statistics of a source and the sides of the sampled boxes.

    A side is the square root of the area, in pixels.
    """
    from detclipv2_jax.data.prepare import statistics

    values = statistics.index_statistics(source)
    boxes = np.zeros((0, 4), np.float32)
    if source.kind != "image_text":
        chunks = list(
            tqdm(
                statistics.sample_boxes(source, sample, jobs),
                desc=f"{source.name}: boxes",
                unit=" chunks",
                disable=None,
            )
        )
        counts = np.concatenate([np.zeros(0, np.int64), *(c for c, _ in chunks)])
        boxes = np.concatenate([boxes, *(b for _, b in chunks)])
        values["boxes"] = statistics.box_statistics(counts, boxes)
    return values, np.sqrt(np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(axis=1), 0))


def find_duplicates(sources, args: argparse.Namespace) -> dict[str, Any]:
    """Count images that recur within a source, between sources and in the evaluation set."""
    from detclipv2_jax.data.prepare import statistics

    hashes = {}
    for name, source in sources.items():
        chunks = []
        with tqdm(total=len(source), desc=f"{name}: images", unit=" images", disable=None) as bar:
            for chunk in statistics.image_hashes(source, args.jobs):
                chunks.append(chunk)
                bar.update(len(chunk))
        hashes[name] = np.concatenate([np.zeros(0, np.uint64), *chunks])
    results: dict[str, Any] = {
        "repeated": {name: statistics.count_repeated(some) for name, some in hashes.items()},
        "overlaps": {f"{a} | {b}": n for (a, b), n in statistics.count_overlaps(hashes).items()},
    }
    print("near-duplicate images")
    for name, count in results["repeated"].items():
        print(f"  within {name:<43}{count:>12,} of {len(hashes[name]):,}")
    for pair, count in results["overlaps"].items():
        a, b = pair.split(" | ")
        print(f"  of {a}, in {b:<32}{count:>12,}")
    if args.evaluation:
        results["leaked"] = find_leaked(hashes, args)
    return results


def find_leaked(hashes: dict[str, np.ndarray], args: argparse.Namespace) -> dict[str, int]:
    """Count, for each source, the evaluation images that have a near-duplicate in it."""
    from detclipv2_jax.common.json_file import read_lists
    from detclipv2_jax.data.prepare import statistics
    from detclipv2_jax.data.prepare.examples import ImageFolder
    from detclipv2_jax.data.prepare.sources.entries import file_names

    folder, evaluation = ImageFolder(args.images), Path(args.evaluation)
    names, paths = [], []
    for _, number, entry in read_lists(evaluation, ("images",)):
        try:
            candidates = file_names(entry)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{evaluation}: images[{number}] has no file name. Give a COCO or LVIS file."
            ) from None
        path = folder.find(*candidates).path
        if path is not None:
            names.append(candidates[0])
            paths.append(path)
    bar = tqdm(paths, desc="evaluation set: images", unit=" images", disable=None)
    theirs = np.array([statistics.image_hash(path.read_bytes()) for path in bar], np.uint64)
    print(f"images of {args.evaluation} ({len(paths):,} found) with a near-duplicate in a source")
    counts = {}
    for source, ours in hashes.items():
        pairs = statistics.match_hashes(ours, theirs)
        counts[source] = len(np.unique(pairs[:, 1]))
        print(f"  in {source:<48}{counts[source]:>12,}")
        for record, image in itertools.islice(pairs.tolist(), _SHOWN_PAIRS):
            print(f"      record {record} and {names[image]}")
    return counts


def table(source, values: dict[str, Any], file: str) -> str:
    """Return the statistics of one source as a table; `file` will have all of them."""
    from detclipv2_jax.data.prepare.report import class_lines
    from detclipv2_jax.data.prepare.statistics import QUANTILES

    heads = ["min", *(f"{q:.0%}" for q in QUANTILES[1:-1]), "max"]
    lines = [
        f"{source.name} ({source.kind}): {values['records']:,} records, "
        f"{values['concepts']:,} concepts ({values['captions']:,} captions, "
        f"{values['unused']:,} that no record has)",
        f"  {'':<26}" + "".join(f"{head:>9}" for head in heads),
    ]
    boxes = values.get("boxes", {})
    rows = {
        "height": values["height"],
        "width": values["width"],
        "aspect": values["aspect"],
        "concepts per record": values["concepts_a_record"],
        "tokens (at most 16)": values["tokens"],
        "side of boxes": boxes.get("side"),
        "boxes per record": boxes.get("boxes_a_record"),
    }
    for label, row in rows.items():
        if row is not None:
            lines.append(f"  {label:<26}" + "".join(f"{value:>9.4g}" for value in row))
    if values["tokens_at_limit"] is not None:
        lines.append(f"  {values['tokens_at_limit']:.1%} of the concepts fill all 16 tokens")
    if boxes.get("small") is not None:
        lines.append(
            f"  boxes: {boxes['small']:.1%} small, {boxes['medium']:.1%} medium, "
            f"{boxes['large']:.1%} large; {boxes['without_boxes']:.1%} of the records have none"
        )
    if values["all_boxes"] is not None:
        counted = f"  all boxes: {values['all_boxes']:,}"
        if "images_without_boxes" in values:
            counted += f"; images without boxes: {values['images_without_boxes']:,}"
        lines += [counted, *class_lines(source, file)]
    frequent = ", ".join(f"{n} {c:,}" for n, c in itertools.islice(values["frequent"].items(), 10))
    return "\n".join([*lines, f"  most records: {frequent}"])


def draw(sources, sides: dict[str, np.ndarray], path: Path) -> None:
    """Draw a row of panels per source: sizes, concepts per record, name frequencies, box sizes."""
    figure = Figure(figsize=(16, 3.4 * len(sources)), layout="constrained")
    rows = figure.subplots(len(sources), 4, squeeze=False)
    for panels, (name, source) in zip(rows, sources.items()):
        pick = slice(None, None, max(1, len(source) // 20_000))
        panels[0].scatter(source.width[pick], source.height[pick], s=4, alpha=0.3, linewidths=0)
        panels[0].set(title=f"{name}: images", xlabel="width, pixels", ylabel="height, pixels")
        counts = np.diff(source.positives_offsets)
        most = int(counts.max(initial=1))
        panels[1].hist(counts, bins=np.arange(0, most + 2, max(1, most // 50)) - 0.5)
        panels[1].set(title="concepts per record", xlabel="concepts", ylabel="records")
        uses = np.bincount(source.positives, minlength=len(source.keys))[source.vocabulary]
        uses = -np.sort(-uses[uses > 0])
        panels[2].plot(1 + np.arange(len(uses)), uses)
        panels[2].set(title="names and phrases", xlabel="rank", ylabel="records")
        panels[2].set(xscale="log", yscale="log")
        if len(sides[name]):
            panels[3].hist(sides[name], bins=np.geomspace(1, max(sides[name].max(), 2), 50))
            panels[3].set(title="boxes", xlabel="square root of the area, pixels", ylabel="boxes")
            panels[3].set(xscale="log")
        else:
            panels[3].set_axis_off()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


if __name__ == "__main__":
    sys.exit(main())
