"""Images per second of the input pipeline, of JPEG decoding alone, and of PyTorch's DataLoader.

    python scripts/benchmarks/benchmark_data.py --output=DIR [--photos=FOLDER] [--full_size]

Three contestants do the work of `configs/pretrain.py:swin_t` on the same JPEGs, on all cores:
* `pipeline`, ours: from prepared records to batches.
* `decoding`, the ceiling: TensorFlow's decoder on the same bytes in memory, with the same reduction
  and threads, and nothing else.
* `dataloader`: PyTorch's DataLoader with OpenCV, one worker per core (imread with the same
  reduction, crop, resize, flip, stack).
There are three workloads: image-text at 320x320; the same from images stored with a long side of
448, as `prepare --store_side=448` does; detection at 800x1344. The contestants alternate in steady
state. Ratios are computed per round; the table shows medians. It also shows processor time, which
is more reliable than wall-clock time on a machine that other jobs use.

Without --photos, 256 photos of 640x480 are generated. --full_size adds start-up, planning and
memory on a generated index of the paper's size (full_size.py). Prints Markdown and writes
DIR/benchmark_data.json; the records stay in DIR.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import io
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import full_size
import numpy as np
from PIL import Image

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import index
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.config import KindConfig

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
STORE_SIDE = 448  # 1.4, the largest scale of image-text, times 320
# Workload -> kind of data, whether images are stored small, images per batch and per round.
WORKS = {
    "image-text 320x320": ("image_text", False, 64, 1536),
    "image-text 320x320, stored at 448": ("image_text", True, 64, 3072),
    "detection 800x1344": ("detection", False, 8, 320),
}
# Batches taken before a round's clock starts. A contestant prepares up to half as many ahead;
# taking them makes the unfinished work the same at the start and the end of a round.
AHEAD = 20
CONTESTANTS = ("pipeline", "decoding", "dataloader")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for the results and records"
    )
    parser.add_argument("--photos", type=Path, help="folder of JPEGs (default: generated photos)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--images", type=int, help="images per round (default: by workload)")
    parser.add_argument(
        "--work", action="append", choices=WORKS, help="only this workload; repeatable"
    )
    parser.add_argument(
        "--full_size", action="store_true", help="also measure an index of the paper's size"
    )
    args = parser.parse_args()
    try:
        figures = {"machine": machine(), "photos": str(args.photos or "generated"), "speed": {}}
        pictures = prepare(args.output, args.photos)
        for work in args.work or WORKS:
            paths = pictures[WORKS[work][1]]
            figures["speed"][work] = race(work, args.output, paths, args.rounds, args.images)
            write_json(args.output / "benchmark_data.json", figures)
            print(f"measured: {work}", flush=True)
        print("\n" + speed_table(figures["speed"]), flush=True)
        if args.full_size:
            full_size.write(args.output / "full_size")
            figures["full_size"] = full_size.measure(args.output / "full_size")
            write_json(args.output / "benchmark_data.json", figures)
            print("\n" + full_size.table(figures["full_size"]))
    except UserError as error:
        sys.exit(f"error: {error}")


def machine() -> dict[str, Any]:
    """Return the machine, versions and commit."""
    names = ("tensorflow-cpu", "jax", "numpy", "array_record", "torch", "opencv-python-headless")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()
    return {"cores": cores, "python": platform.python_version(), "load": load} | {
        "versions": versions,
        "commit": commit,
    }


# ---- Pictures and records.


def prepare(output: Path, photos: Path | None) -> dict[bool, list[Path]]:
    """Write sources of the photos, original and stored small; return {is small: files}."""
    output.mkdir(parents=True, exist_ok=True)
    if photos is None:
        photos = output / "photos"
        _draw_photos(photos, 256)
    originals = sorted(
        path for path in photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")
    )
    if not originals:
        raise UserError(f"{photos}: contains no JPEG files. Give a folder of JPEGs with --photos.")
    small = [_stored_small(path, output / "photos_small") for path in originals]
    for kind, is_small, paths in (
        ("image_text", False, originals),
        ("image_text", True, small),
        ("detection", False, originals),
    ):
        full_size.in_fresh_process(_write_source, str(output), kind, is_small, paths)
    return {False: originals, True: small}


def _draw_photos(folder: Path, count: int) -> None:
    """Draw images that take a decoder as long as photos: smooth with texture, about 150 kB."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        if path.exists():
            continue
        pixels = np.zeros((480, 640, 3))
        for cells, strength in ((4, 90), (16, 45), (80, 25), (320, 20)):
            coarse = rng.uniform(0, 255, (cells * 3 // 4, cells, 3)).astype(np.uint8)
            layer = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
            pixels += (np.asarray(layer, np.float32) - 127) * (strength / 127)
        Image.fromarray(np.clip(pixels + 127, 0, 255).astype(np.uint8)).save(path, quality=92)


def _stored_small(path: Path, folder: Path) -> Path:
    """Save the photo with a long side of at most `STORE_SIDE` pixels; return its file."""
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / path.name
    if not small.exists():
        with Image.open(path) as image:
            image.thumbnail((STORE_SIDE, STORE_SIDE), Image.Resampling.BICUBIC, reducing_gap=None)
            image.convert("RGB").save(small, quality=90)
    return small


def _source_name(kind: str, small: bool) -> str:
    return f"{kind}_{STORE_SIDE}" if small else kind


def _write_source(output: str, kind: str, small: bool, paths: list[Path]) -> None:
    """Write records of the images: a caption and three phrases, or fifteen boxes of five names."""
    from detclipv2_jax.data import records
    from detclipv2_jax.data.prepare import record_writer

    name, rng = _source_name(kind, small), np.random.default_rng(0)
    with record_writer.RecordWriter(Path(output) / name, name=name, kind=kind) as writer:
        for number, path in enumerate(paths):
            content = path.read_bytes()
            width, height = Image.open(io.BytesIO(content)).size
            count = 15 if kind == "detection" else 0
            low = rng.uniform(0, 0.6, (count, 2))
            corners = np.concatenate([low, low + rng.uniform(0.05, 0.4, low.shape)], axis=1)
            concepts = [f"thing {i}" for i in rng.choice(80, 5, replace=False)]
            if kind == "image_text":
                concepts = [f"a caption of picture {number}", *concepts[:3]]
            record = records.Record(
                image=content,
                height=height,
                width=width,
                image_id=path.stem,
                boxes=(corners * [width, height, width, height]).astype(np.float32),
                labels=np.arange(count, dtype=np.int32) % 5,
                concepts=tuple(concepts),
            )
            writer.write(record)
        writer.finish()


# ---- The race.


def race(
    work: str, output: Path, paths: list[Path], rounds: int, images: int | None = None
) -> dict[str, Any]:
    """Return the rounds of every contestant, and medians with the pipeline's ratios."""
    context = multiprocessing.get_context("spawn")
    kind, small, size, usual = WORKS[work]
    images = images or usual
    rivals, skipped = {}, {}
    for name in CONTESTANTS:
        if name == "dataloader" and (missing := _missing("torch", "cv2")):
            skipped[name] = f"{missing} is not installed"
            continue
        ours, theirs = context.Pipe()
        source = str(output / _source_name(kind, small))
        arguments = (theirs, name, kind, source, [str(path) for path in paths], size)
        process = context.Process(target=_contestant, args=arguments)
        process.start()
        rivals[name] = (process, ours)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in rivals}
    for number in range(rounds + 1):
        for name, (process, pipe) in rivals.items():
            pipe.send(max(images // size, 1))
            found = _answer(process, pipe, name)
            if number:  # the first round fills caches
                results[name].append(found)
            # Wait until it has read ahead again, so that this does not slow the next contestant.
            time.sleep(0.7 * AHEAD * size / found["images_per_second"])
    for process, pipe in rivals.values():
        pipe.send(0)
        process.join()
    return {"contestants": _summary(results), "skipped": skipped, "rounds": results}


def _missing(*modules: str) -> str | None:
    return next((m for m in modules if importlib.util.find_spec(m) is None), None)


def _answer(process: Any, pipe: Any, name: str) -> dict[str, float]:
    while not pipe.poll(1):
        if not process.is_alive():
            raise UserError(f"{name} ended without a result (exit status {process.exitcode}).")
    return pipe.recv()


def _summary(results: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return medians over the rounds, also of the pipeline's ratios to each contestant."""
    summary = {}
    for name, rounds in results.items():
        ours = results["pipeline"]
        median = lambda field, rounds=rounds: statistics.median(r[field] for r in rounds)
        ratio = lambda field, rounds=rounds, ours=ours: statistics.median(
            mine[field] / other[field] for mine, other in zip(ours, rounds)
        )
        summary[name] = {
            "images_per_second": median("images_per_second"),
            "images_per_cpu_second": median("images_per_cpu_second"),
            "peak_mb": median("peak_mb"),
            "pipeline_is": ratio("images_per_second"),
            "pipeline_is_by_cpu": ratio("images_per_cpu_second"),
        }
    return summary


def speed_table(speed: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| work | contestant | images/s | images per CPU second | pipeline ÷ it | by CPU time "
        "| MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for work, found in speed.items():
        for name, f in found["contestants"].items():
            lines.append(
                f"| {work} | {name} | {f['images_per_second']:.0f} | "
                f"{f['images_per_cpu_second']:.0f} | {f['pipeline_is']:.2f} | "
                f"{f['pipeline_is_by_cpu']:.2f} | {f['peak_mb']:,.0f} |"
            )
        lines += [f"| {work} | {name} | – {why} |" for name, why in found["skipped"].items()]
    return "\n".join(lines)


# ---- Contestants, each in its own process.


def _contestant(pipe: Any, name: str, kind: str, source: str, paths: list[str], size: int) -> None:
    """Time as many batches as the pipe asks for, until it asks for 0."""
    batches = {"pipeline": _pipeline, "decoding": _decoding, "dataloader": _dataloader}[name]
    feed = batches(kind, Path(source), paths, size)
    while count := pipe.recv():
        for _ in range(AHEAD):
            next(feed)
        began, cpu = time.perf_counter(), _cpu_seconds()
        images = sum(next(feed) for _ in range(count))
        seconds, used = time.perf_counter() - began, _cpu_seconds() - cpu
        figures = {
            "images_per_second": images / seconds,
            "images_per_cpu_second": images / max(used, 1e-9),
            "peak_mb": full_size.peak_mb(),
        }
        pipe.send(figures)
    feed.close()


def _recipe(kind: str) -> KindConfig:
    """Return the paper's recipe for a kind of data, with one canvas for all contestants."""
    from detclipv2_jax.training import config as config_lib
    from detclipv2_jax.training import recipes

    recipe = config_lib.parse(recipes.load("pretrain").swin_t().to_dict()).data.kinds()[kind]
    if kind == "image_text":
        return recipe
    # Short sides 480 to 800, as with the recipe's rungs.
    return dataclasses.replace(recipe, shapes=((800, 1344),), rungs=(1.0,), scales=(0.6, 1.0))


def _placements(kind: str, source: index.Source) -> transforms_lib.Placement:
    """Return the placement of each image in the first epoch, the same for all contestants."""
    config = _recipe(kind)
    chance = transforms_lib.seeds(0, 0, source.name, np.arange(len(source)))
    return transforms_lib.place(config, config.shapes[0], source.height, source.width, chance)


def _pipeline(kind: str, path: Path, paths: list[str], size: int) -> Iterator[int]:
    """Yield the number of images of each batch of our pipeline."""
    from detclipv2_jax.data import pipeline, plan, vocabulary

    source, recipe = index.Source.open(path), _recipe(kind)
    sources = {source.name: source}
    config = dataclasses.replace(
        recipe,
        sources=(source.name,),
        rehearsal=(),
        batch_size=size,
        shapes=recipe.shapes[:1],
        table_size=512,
        concepts_per_image=0,
        texts_per_image=8 if kind == "image_text" else 0,
        max_boxes=100 if kind == "detection" else 0,
    )
    planned = plan.Plan(sources, vocabulary.Vocabulary(sources), {kind: config}, 0)
    feed = pipeline.batches(planned, sources, start=0, stop=10**9)
    try:
        for _, batch in feed:
            yield int((batch.sizes[:, 0] > 0).sum())
    finally:
        feed.close()


def _decoding(kind: str, path: Path, paths: list[str], size: int) -> Iterator[int]:
    """Decode with the pipeline's reductions; yield the number of images per batch."""
    import tensorflow as tf

    from detclipv2_jax.data import decoding

    decoding.keep_freed_memory()  # the same conditions for both
    ratios = np.log2(_placements(kind, index.Source.open(path)).ratio).astype(np.int32)

    def decoder(jpeg: Any, ratio: int) -> Callable[[], Any]:
        return lambda: tf.io.decode_jpeg(
            jpeg, channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    def decode(jpeg: Any, ratio: Any) -> Any:
        return tf.size(tf.switch_case(ratio, [decoder(jpeg, r) for r in (1, 2, 4, 8)]))

    contents = tf.constant([Path(path).read_bytes() for path in paths])
    images = tf.data.Dataset.from_tensor_slices((contents, ratios)).repeat()
    images = images.map(decode, num_parallel_calls=len(os.sched_getaffinity(0)))
    for sizes in images.batch(size).prefetch(2).as_numpy_iterator():
        yield len(sizes)


class _Files:
    """The same work in OpenCV, as a map-style dataset for PyTorch."""

    def __init__(self, kind: str, path: Path, paths: list[str]):
        self._paths, self._shape = paths, _recipe(kind).shapes[0]
        self._placement = _placements(kind, index.Source.open(path))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, item: int) -> np.ndarray:
        import cv2

        placement = self._placement
        flags = {
            1: cv2.IMREAD_COLOR,
            2: cv2.IMREAD_REDUCED_COLOR_2,
            4: cv2.IMREAD_REDUCED_COLOR_4,
            8: cv2.IMREAD_REDUCED_COLOR_8,
        }[int(placement.ratio[item])]
        pixels = cv2.imread(self._paths[item], flags | cv2.IMREAD_IGNORE_ORIENTATION)
        y, x, height, width = placement.crop[item]
        pixels = pixels[y : y + height, x : x + width]
        height, width = (int(side) for side in placement.size[item])
        if pixels.shape[:2] != (height, width):
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        if placement.flip[item]:
            pixels = cv2.flip(pixels, 1)
        canvas = np.zeros((*self._shape, 3), np.uint8)
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=canvas[:height, :width])
        return canvas


def _one_thread(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)


def _dataloader(kind: str, path: Path, paths: list[str], size: int) -> Iterator[int]:
    """Yield the images per batch of PyTorch's loader, one worker per core, without end."""
    import torch

    class Forever(torch.utils.data.Sampler):
        def __iter__(self) -> Iterator[int]:
            rng = np.random.default_rng(0)
            while True:
                yield from rng.permutation(len(paths)).tolist()

    loader = torch.utils.data.DataLoader(
        _Files(kind, path, paths),
        batch_size=size,
        sampler=Forever(),
        num_workers=len(os.sched_getaffinity(0)),
        worker_init_fn=_one_thread,
    )
    for batch in loader:
        yield len(batch)


def _cpu_seconds() -> float:
    """Return the processor time of this process and its living children (Linux)."""
    ticks = os.sysconf("SC_CLK_TCK")
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = time.process_time()
    for child in own:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
