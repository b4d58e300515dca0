"""A complete run that takes seconds: a few prepared scenes and a tiny variant of nano."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCENES = {"detection_scenes": 24, "grounding_scenes": 16, "image_text_scenes": 40, "val_scenes": 8}
OVERRIDES = {
    "model.swin.embed_dim": 8,
    "model.swin.depths": (1, 1, 1, 1),
    "model.swin.num_heads": (1, 1, 1, 1),
    "model.neck_channels": 8,
    "model.head.channels": 8,
    "model.head.convs": 1,
    "model.head.groups": 2,
    "model.head.embed_dim": 8,
    "model.text.width": 16,
    "model.text.layers": 1,
    "model.text.heads": 2,
    "model.text.embed_dim": 8,
    "data.detection.batch_size": 8,
    "data.grounding.batch_size": 8,
    "data.image_text.batch_size": 8,
    "data.image_text.table_size": 64,
    "loss.proposals.group": 4,
    "train.epochs": 2.0,
    "train.checkpoint_every": 4,
    "eval.batch_size": 8,
    "eval.pre_nms_top_k": 50,
    "eval.max_detections": 20,
    "eval.pictures": 2,
}


def environment():
    """Return the environment of a run: one device, this checkout's package and compile cache."""
    paths = (ROOT, ROOT / "tests", ROOT / "scripts", ROOT / "scripts/benchmarks")
    return os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }


def prepare(to):
    """Draw `symbols` at the size of `SCENES` and prepare it in the directory `to`."""
    command = [sys.executable, str(ROOT / "scripts/prepare_data.py"), "symbols", f"--to={to}"]
    command += [f"--option={name}={value}" for name, value in SCENES.items()]
    subprocess.run(command, check=True, env=environment(), capture_output=True)


def command(data, workdir, **overrides):
    """Return the command line of a tiny run; `overrides` are config fields."""
    fields = OVERRIDES | {"data_dir": str(data)} | overrides
    return [
        sys.executable,
        "-m",
        "detclipv2_jax.main",
        f"--config={ROOT}/configs/pretrain.py:nano",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def run(data, workdir, **overrides):
    """Run it to its end; return the finished process with its output as text."""
    line = command(data, workdir, **overrides)
    return subprocess.run(line, env=environment(), capture_output=True, text=True, cwd=ROOT)
