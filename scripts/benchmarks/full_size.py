"""Start-up, memory and planning at the paper's size, on a generated index without images.

    python scripts/benchmarks/full_size.py --to=DIR

It writes the indexes of `objects365`, `goldg` and `cc15m` (0.66, 0.77 and 13 M records; 1.2 GB, one
minute) to DIR unless they exist, and measures in new processes: the seconds from start-up to the
plan of step 0 and of step 150,000, the seconds of a step's plan for each kind at the paper's batch
sizes, the seconds of the first step of an epoch, and the peak memory. Generated are image sizes,
names (365, about 15 boxes per image), phrases (300,000, about five per image), captions (one per
image) and their phrases (a million, about three per image), by Zipf's law.

`scripts/choose_shapes.py` with `--config.data_dir=DIR --config.data.dictionary=
--config.data.detection.definitions=False` shows the table sizes that these concepts need.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.data import index
from detclipv2_jax.data.prepare import index_writer
from detclipv2_jax.data.transforms import seeds
from detclipv2_jax.text.tokenizer import END, START

LATE = 150_000  # a step near the end of the paper's run
_CHUNK = 1_000_000  # records drawn together
# (height, width) and share of the generated images; up to 39 pixels are added at random
_SIZES = ((427, 640, 0.45), (480, 640, 0.25), (640, 480, 0.15), (640, 427, 0.1), (600, 600, 0.05))


def write(to: Path, scale: float = 1.0) -> None:
    """Write the three generated sources, `scale` times as large as the paper's, to `to`."""
    size = lambda count: max(1, round(count * scale))
    plan = (
        ("objects365", "detection", size(660_000), 365, 15.0),
        ("goldg", "grounding", size(770_000), size(300_000), 5.0),
        ("cc15m", "image_text", size(13_000_000), size(1_000_000), 3.0),
    )
    for name, kind, records, vocabulary, mean in plan:
        if not (to / name / "info.json").exists():
            _write_source(to / name, name, kind, records, vocabulary, mean)


def _write_source(
    directory: Path, name: str, kind: str, records: int, vocabulary: int, mean: float
) -> None:
    """Write one source: `vocabulary` names, then, for captions, one text per record."""
    (directory / "index").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    captions = records if kind == "image_text" else 0
    concepts = vocabulary + captions
    chosen = rng.choice(len(_SIZES), records, p=[share for *_, share in _SIZES])
    table = np.array([size[:2] for size in _SIZES], np.uint16)[chosen]
    table += rng.integers(0, 40, table.shape, dtype=np.uint16)
    counts, parts = [], []
    for start in range(0, records, _CHUNK):
        count, part = _draw_concepts(rng, min(_CHUNK, records - start), vocabulary, mean)
        if captions:  # each caption precedes its record's phrases
            places = np.cumsum(count) - count
            part = np.insert(part, places, vocabulary + start + np.arange(len(count)))
            count = count + 1
        counts.append(count)
        parts.append(part.astype(np.int32))
    arrays = {
        "height": table[:, 0],
        "width": table[:, 1],
        "positives_offsets": np.cumsum(np.concatenate([[0], *counts])).astype(np.int64),
        "positives": np.concatenate(parts),
        # Phrases have the same keys in every source, as equal texts would.
        "keys": np.concatenate(
            [
                seeds(0, 0, "names" if kind == "detection" else "phrases", np.arange(vocabulary)),
                seeds(0, 0, "captions", np.arange(captions)),
            ]
        ),
        "vocabulary": np.arange(concepts) < vocabulary,
        "tokens": rng.integers(1, 49_406, (concepts, 16), dtype=np.uint16),
    }
    arrays["tokens"][:, 0], arrays["tokens"][:, -1] = START, END
    for field, values in arrays.items():
        np.save(directory / index.ARRAYS[field], values, allow_pickle=False)
    with open(directory / "concepts.jsonl", "w", encoding="utf-8") as lines:
        for number in range(vocabulary if kind == "detection" else 0):
            row = {"name": f"name {number}", "definition": None, "count": 1, "vocabulary": True}
            lines.write(json.dumps(row) + "\n")
    _write_info(directory, name, kind, records)


def _draw_concepts(
    rng: np.random.Generator, records: int, vocabulary: int, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of concepts of each record, and the concepts, record by record."""
    draws = np.minimum(rng.poisson(mean, records), int(3 * mean))
    owner = np.repeat(np.arange(records), draws)
    # The inverse of Zipf's law with exponent one: the logarithm of the rank is uniform.
    rank = np.minimum((vocabulary + 1.0) ** rng.random(len(owner)) - 1, vocabulary - 1)
    pairs = np.unique(owner * np.int64(vocabulary) + rank.astype(np.int64))
    return np.bincount(pairs // vocabulary, minlength=records), pairs % vocabulary


def _write_info(directory: Path, name: str, kind: str, records: int) -> None:
    """Write info.json and empty shards of 16,384 records; nothing here reads an image."""
    shards = [min(16_384, records - start) for start in range(0, records, 16_384)]
    files = [index.shard_name(name, number, len(shards)) for number in range(len(shards))]
    for file in files:
        (directory / file).touch()
    info = {
        "format": index.FORMAT,
        "name": name,
        "kind": kind,
        "records": records,
        "files": files,
        "shards": shards,
        "shard_bytes": [0] * len(shards),
    }
    write_json(directory / "info.json", index_writer.with_digests(directory, info))


def measure(data: Path, rounds: int = 3) -> dict[str, Any]:
    """Return the measurements listed above, medians of `rounds` new processes each."""
    starts: dict[int, list[dict[str, Any]]] = {0: [], LATE: []}
    for _ in range(rounds):
        for step, found in starts.items():
            found.append(in_fresh_process(_start_up, str(data), step))
    median = lambda found, field: statistics.median(figures[field] for figures in found)
    return {
        "records": starts[0][0]["records"],
        "concepts": starts[0][0]["concepts"],
        **{
            f"start_up_{field}": {str(step): median(found, field) for step, found in starts.items()}
            for field in ("seconds", "cpu_seconds")
        },
        "start_up_peak_mb": max(f["peak_mb"] for found in starts.values() for f in found),
        **in_fresh_process(_plan_steps, str(data)),
    }


def table(figures: dict[str, Any]) -> str:
    """Return the measurements as a Markdown table."""
    start = lambda step: " s, of a core ".join(
        f"{figures[f'start_up_{field}'][str(step)]:.2f}" for field in ("seconds", "cpu_seconds")
    )
    rows = [
        ("records, concepts", f"{figures['records']:,}, {figures['concepts']:,}"),
        ("start-up to the plan of step 0", f"{start(0)} s"),
        (f"start-up to the plan of step {LATE:,}", f"{start(LATE)} s"),
        *((f"a step's plan, {k}", f"{1e3 * s:.1f} ms") for k, s in figures["plan_seconds"].items()),
        ("the first steps of an epoch, beyond that", f"{figures['border_seconds']:.2f} s"),
        ("peak memory of the process, start-up", f"{figures['start_up_peak_mb']:,} MB"),
        ("peak memory of the process, two epochs' orders", f"{figures['peak_mb']:,} MB"),
        ("of it before the index was opened", f"{figures['imports_mb']:,} MB"),
    ]
    return "\n".join(["| full size | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])


def in_fresh_process(function: Any, *arguments: Any) -> Any:
    """Call `function(*arguments)` in a new Python process; return its result."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _open(data: str) -> Any:
    from detclipv2_jax.training import config, recipes

    recipe = recipes.load("pretrain").swin_t()
    recipe.data_dir = data
    recipe.data.dictionary = ""  # no dictionary is generated
    # One rung, so that each canvas has one order of its own, which its first step makes.
    recipe.data.detection.rungs = recipe.data.grounding.rungs = (1.0,)
    recipe.data.detection.definitions = False
    return config.parse(recipe.to_dict())


def _start_up(data: str, step: int) -> dict[str, Any]:
    from detclipv2_jax.training import inputs

    parsed = _open(data)
    began, cpu = time.perf_counter(), time.process_time()
    plan, sources, _ = inputs.open_data(parsed)
    plan.plan(step)
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mb": peak_mb(),
        "records": sum(map(len, sources.values())),
        "concepts": len(plan.vocabulary),
    }


def _plan_steps(data: str, count: int = 20) -> dict[str, Any]:
    """Return the seconds of a step per kind, and the extra seconds of an epoch's first steps."""
    from detclipv2_jax.training import inputs

    parsed = _open(data)
    imports = peak_mb()
    plan, _, _ = inputs.open_data(parsed)
    seconds: dict[str, list[float]] = {kind: [] for kind in plan.kinds}
    border, epoch = 0.0, plan.steps_per_epoch
    for first in (0, epoch):
        seen = set()
        for step in range(first, first + epoch):
            began = time.perf_counter()
            planned = plan.plan(step)
            took = time.perf_counter() - began
            program = planned.kind, planned.shape
            if program in seen:
                seconds[planned.kind].append(took)
            elif first:
                border += took
            seen.add(program)
            done = min(len(found) for found in seconds.values()) >= count * (1 + (first > 0))
            if done and len(seen) == len(plan.programs):
                break
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    usual = sum(medians[kind] for kind, _ in plan.programs)
    return {
        "plan_seconds": medians,
        "border_seconds": max(border - usual, 0.0),
        "peak_mb": peak_mb(),
        "imports_mb": imports,
    }


def peak_mb() -> int:
    """Return the peak memory of this process in MB, including mapped files (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 // 10**6
    return 0


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, required=True, help="directory of the generated indexes")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="1 is the paper's size (default: %(default)s)"
    )
    args = parser.parse_args()
    write(args.to, args.scale)
    print(table(measure(args.to)))


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
