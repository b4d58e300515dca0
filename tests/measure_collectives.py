"""What travels between 8 devices in a tiny step of each kind, as JSON.

    python tests/measure_collectives.py tests/collectives.json

tests/test_collectives.py holds the code to that file: whoever changes it on purpose writes it anew.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import compile_ahead
import tiny_model

from detclipv2_jax import sharding
from detclipv2_jax.config import DataConfig, KindConfig, MeshConfig, RunConfig
from detclipv2_jax.files import write_json
from detclipv2_jax.step import LossConfig, ProposalConfig
from detclipv2_jax.structures import KINDS

MESHES = ((8, 1), (4, 2))
CANVAS = (64, 64)


def tiny_config(fsdp):
    kind = {"sources": ("none",), "batch_size": 16, "shapes": (CANVAS,), "table_size": 32}
    boxes, texts = {"max_boxes": 4}, {"max_boxes": 0, "texts_per_image": 4}
    kinds = {k: KindConfig(**kind, **(texts if k == "image_text" else boxes)) for k in KINDS}
    return RunConfig(
        model=tiny_model.CONFIG,
        data=DataConfig(**kinds),
        loss=LossConfig(proposals=ProposalConfig(group=4, k=8)),
        mesh=MeshConfig(fsdp=fsdp),
    )


def measure(devices, mesh, kind):
    # Without LLVM's optimisation: it takes longest, and what travels is settled before it.
    options = {"xla_backend_optimization_level": 0}
    grid = sharding.make_mesh(*mesh, devices)
    row = compile_ahead.measure(tiny_config(mesh[1]), (kind, CANVAS), grid, options)
    return row["collectives"]


def main(path):
    devices = compile_ahead.devices("cpu:8")
    programs = [(mesh, kind) for mesh in MESHES for kind in KINDS]
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda p: measure(devices, *p), programs))
    names = [f"{kind}, data {mesh[0]} × fsdp {mesh[1]}" for mesh, kind in programs]
    write_json(path, dict(zip(names, found)))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1])
