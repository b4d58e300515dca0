"""Writes the collectives between 8 devices in a tiny step of each kind, as JSON.

    PYTHONPATH=tests:scripts/benchmarks python tests/training/measure_collectives.py \\
        tests/training/collectives.json

test_collectives.py compares the code with that file. Update it after an intended change.
"""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor

import compile_ahead
import tiny_model

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.data.config import DataConfig, KindConfig
from detclipv2_jax.data.index import KINDS
from detclipv2_jax.training import sharding
from detclipv2_jax.training.config import MeshConfig, RunConfig
from detclipv2_jax.training.objective import LossConfig, ProposalConfig

CANVAS = (64, 64)
# (kind, data, fsdp, micro-batches); grounding is detection without the box losses.
PROGRAMS = (
    ("detection", 8, 1, 1),
    ("grounding", 8, 1, 1),
    ("image_text", 8, 1, 1),
    ("detection", 4, 2, 1),
    ("image_text", 4, 2, 2),
)


def tiny_config(fsdp, micro_batches):
    kind = {"sources": ("none",), "batch_size": 16, "shapes": (CANVAS,), "table_size": 32}
    boxes = {"max_boxes": 4}
    texts = {"max_boxes": 0, "texts_per_image": 4, "micro_batches": micro_batches}
    more = {"image_text": texts, "classification": texts | {"texts_per_image": 1}}
    kinds = {k: KindConfig(**kind, **more.get(k, boxes)) for k in KINDS}
    return RunConfig(
        model=dataclasses.replace(tiny_model.CONFIG, dtype="bfloat16"),
        data=DataConfig(**kinds),
        loss=LossConfig(proposals=ProposalConfig(group=4, k=8)),
        mesh=MeshConfig(fsdp=fsdp),
    )


def measure(devices, kind, data, fsdp, micro_batches):
    # Without LLVM optimization: it takes longest, and the collectives are chosen before it.
    options = {"xla_backend_optimization_level": 0}
    mesh = sharding.make_mesh(data, fsdp, devices)
    program = (kind, CANVAS)
    config = tiny_config(fsdp, micro_batches)
    return compile_ahead.measure(config, program, mesh, options)["collectives"]


def main(path):
    devices = compile_ahead.devices("cpu:8")
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda program: measure(devices, *program), PROGRAMS))
    names = [f"{k}, data {d} × fsdp {f}, {n} micro-batch(es)" for k, d, f, n in PROGRAMS]
    write_json(path, dict(zip(names, found)))


if __name__ == "__main__":
    main(sys.argv[1])
