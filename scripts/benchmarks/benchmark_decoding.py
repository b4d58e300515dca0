"""Time of decoding alone: from the head's outputs to boxes, by how many anchors take part.

    python scripts/benchmarks/benchmark_decoding.py [--names=80,1203,20000] [--boxes=300,10000]
        [--rounds=4] [--canvas=800x1344] [--output=FILE.json]

One image, outputs in the shapes of Swin-T's head, two kinds of scores: "random", where every name
scores alike everywhere, and "trained", with 60 objects of 12 names, 40 of them of one name, on a
smooth background, and names that resemble each other. `pre_nms_top_k` is 100 or 0 (all anchors).
The variants take turns in one process; the least processor time of the rounds counts. Divide by
the processor time of the whole model, which `benchmark_detect.py` measures.
"""

import argparse
import functools
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import Detections
from detclipv2_jax.inference.predict import predict
from detclipv2_jax.inference.predictor import padded_count
from detclipv2_jax.models.atss_head import RegionOutputs
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops import boxes as box_ops
from detclipv2_jax.ops.assign import atss_assign

WIDTH = 256  # of an embedding
ANCHORS = box_ops.AnchorConfig()
OBJECTS, CROWD, NAMES_PRESENT = 60, 40, 12
KINDS = {"random": (10.0, -4.6), "trained": (20.0, -11.0)}  # scale and bias of the logits
TOP_K = (100, 0)


class FixedHead:
    """A model with given outputs of its head."""

    logits = DetCLIP.logits

    def __init__(self, regions: RegionOutputs, scale: float, bias: float):
        self.cfg = SimpleNamespace(anchors=ANCHORS)
        self.logit_bias = jnp.full(1, bias)
        self.scale = lambda: scale
        self.encode_image = lambda *_, **__: regions


def unit(rows: np.ndarray) -> np.ndarray:
    """Return the rows scaled to unit length, as float32."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def texts(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return embeddings (count, D) of names, of which about five each resemble one another."""
    centers = rng.normal(size=(max(1, count // 5), WIDTH))
    return unit(
        centers[rng.integers(0, len(centers), count)] + 0.8 * rng.normal(size=(count, WIDTH))
    )


def smooth(canvas: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return embeddings (K, D) that are equal for 3×3 neighboring anchors of a level."""
    levels = []
    for stride in ANCHORS.strides:
        rows, columns = (-(-side // stride) for side in canvas)
        coarse = rng.normal(size=(-(-rows // 3), -(-columns // 3), WIDTH))
        level = coarse.repeat(3, axis=0).repeat(3, axis=1)[:rows, :columns]
        levels.append(level.reshape(-1, WIDTH))
    return np.concatenate(levels)


def random_regions(canvas: tuple[int, int], rng: np.random.Generator) -> RegionOutputs:
    """Return outputs (1, K, ...) without any object."""
    count = len(box_ops.anchor_grid(*canvas, ANCHORS))
    return RegionOutputs(
        unit(rng.normal(size=(count, WIDTH)))[None],
        rng.normal(0, 0.3, (1, count, 4)).astype(np.float32),
        rng.normal(0, 1, (1, count)).astype(np.float32),
    )


def trained_regions(
    canvas: tuple[int, int], names: np.ndarray, rng: np.random.Generator
) -> RegionOutputs:
    """Return outputs (1, K, ...) of a detector that sees a crowd and some other objects."""
    present = rng.integers(0, min(len(names), NAMES_PRESENT), OBJECTS)
    present[:CROWD] = 0
    size = np.array(canvas[::-1])
    centers = rng.uniform(0.05, 0.95, (OBJECTS, 2)) * size
    sides = rng.uniform(0.04, 0.15, (OBJECTS, 2)) * size.max()
    objects = np.concatenate([centers - sides / 2, centers + sides / 2], 1).astype(np.float32)
    anchors = box_ops.anchor_grid(*canvas, ANCHORS)
    levels = box_ops.level_sizes(*canvas, ANCHORS)
    exists = [np.ones(n, bool) for n in (len(anchors), OBJECTS)]
    match = np.asarray(atss_assign(anchors, exists[0], levels, objects, exists[1]))
    fires, target = match >= 0, objects[np.maximum(match, 0)]
    centerness = np.clip(box_ops.centerness_targets(anchors, target), 0.01, 0.99)
    noise = lambda *shape: rng.normal(size=(len(anchors), *shape))
    background = unit(smooth(canvas, rng) + 0.5 * noise(WIDTH))
    named = names[present[np.maximum(match, 0)]] * rng.uniform(0.5, 1.2, (len(anchors), 1))
    embeddings = np.where(fires[:, None], unit(named + 0.6 * unit(noise(WIDTH))), background)
    deltas = np.where(fires[:, None], box_ops.encode_deltas(anchors, target), 0) + 0.15 * noise(4)
    logits = np.where(fires, np.log(centerness / (1 - centerness)), noise() - 2)
    return RegionOutputs(*(np.float32(x)[None] for x in (embeddings, deltas, logits)))


def measure(
    count: int, kind: str, canvas: tuple[int, int], limits: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Return a row per variant: names, scores, limits, milliseconds and what was found."""
    rng = np.random.default_rng(0)
    names = texts(count, rng)
    regions = random_regions(canvas, rng)
    if kind == "trained":
        regions = trained_regions(canvas, names, rng)
    rows = np.pad(names, ((0, padded_count(count) - count), (0, 0)))
    pixels, sizes = np.zeros((1, *canvas, 3), np.uint8), np.array([canvas])

    def decode(config: DecodeConfig, regions: RegionOutputs, rows: np.ndarray) -> Detections:
        model = FixedHead(regions, *KINDS[kind])
        mask = np.arange(len(rows)) < count
        return predict(model, pixels, sizes, rows, mask, config=config)

    configs = [
        DecodeConfig(pre_nms_top_k=top_k, max_detections=limit)
        for limit, top_k in itertools.product(limits, TOP_K)
    ]
    programs = [jax.jit(functools.partial(decode, config)) for config in configs]
    inputs = jax.device_put((regions, rows))
    found = [jax.block_until_ready(program(*inputs)) for program in programs]  # compiles
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, spent in zip(programs, times):
            start = time.process_time()
            jax.block_until_ready(program(*inputs))
            spent.append(time.process_time() - start)
    return [
        {
            "names": count,
            "scores": kind,
            "max_detections": config.max_detections,
            "pre_nms_top_k": config.pre_nms_top_k,
            "milliseconds": round(1e3 * min(spent)),
            "boxes": int(one.mask.sum()),
            "most_of_a_name": int(np.bincount(one.labels[one.mask], minlength=1).max()),
        }
        for config, one, spent in zip(configs, map(jax.device_get, found), times)
    ]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--names", default="80,1203,20000", help="numbers of names (default: %(default)s)")
    add("--boxes", default="300,10000", help="values of max_detections (default: %(default)s)")
    add("--rounds", type=int, default=4, help="timed rounds (default: %(default)s)")
    add("--canvas", default="800x1344", help="height x width (default: %(default)s)")
    add("--output", type=Path, metavar="FILE", help="also write the rows as JSON")
    args = parser.parse_args()
    height, width = map(int, args.canvas.split("x"))
    limits = [int(limit) for limit in args.boxes.split(",")]
    rows = []
    for count, kind in itertools.product(map(int, args.names.split(",")), KINDS):
        for row in measure(count, kind, (height, width), limits, args.rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
    if args.output:
        write_json(args.output, {"device": jax.devices()[0].device_kind, "rows": rows})


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    raise SystemExit(exit_status(main))
