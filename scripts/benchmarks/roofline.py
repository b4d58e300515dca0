"""Roofline of each part of a training step on a TPU, from the compiler alone (no TPU needed).

    python scripts/benchmarks/roofline.py --output=DIR --chip=v5e \
        --steps=detection:4x800x1344,image_text:64x320x320

Compiles each part of a step on one device (step_parts.py) with the TPU's compiler
(`pip install "libtpu==0.0.42.*"`, for jax 0.10.2), which reports bytes accessed and temporary
memory. The table also shows the model's FLOPs by formula, the program's FLOPs (which include
recomputation), the least bytes that the part's layers must move, whether FLOPs or bytes limit the
part on that chip, and the largest share of the chip's peak that the model's FLOPs can reach. The
compiler counts a loop body once, whatever its trip count; such bytes are in brackets. It counts
bytes that it prefetches to fast memory twice. --kernels=xla compiles the parts without our kernels.

Writes CHIP.json after each part, CHIP.md and CHIP.png. The same command resumes.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compile_ahead

HERE = Path(__file__).resolve().parent
# bfloat16 TFLOP/s and GB/s of a chip: cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e.
CHIPS = {"v5e": (197, 819), "v5p": (459, 2765), "v6e": (918, 1640)}
SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}  # smallest topology


def seconds(row: dict[str, Any], chip: str) -> tuple[float, float]:
    """Return the seconds of a part's FLOPs at the chip's peak and of its bytes at its bandwidth."""
    peak, bandwidth = CHIPS[chip]
    # The compiler may count less than the formula, because it counts a loop body once.
    flops = max(row["flops"], row["compiler_flops"])
    return flops / (peak * 1e12), row["bytes_accessed"] / (bandwidth * 1e9)


def bound(row: dict[str, Any], chip: str) -> float:
    """Return the largest share of the chip's peak that the model's FLOPs of a part can reach."""
    return row["flops"] / (CHIPS[chip][0] * 1e12) / max(seconds(row, chip)) if row["flops"] else 0.0


def measure(part: Any, device: Any) -> dict[str, Any]:
    """Return what the compiler reports about one part on one device."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    here = NamedSharding(mesh, PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
    inputs = jax.tree.map(place, part.inputs)
    began = time.monotonic()
    with jax.set_mesh(mesh):
        lowered = jax.jit(part.fn, donate_argnums=part.donate).lower(*inputs)
    compiled = lowered.compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "seconds_to_compile": round(time.monotonic() - began, 1),
        "flops": part.flops,
        "compiler_flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "least_bytes": part.least_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "loops": " while(" in compiled.as_text(),
    }


def table(rows: Sequence[dict[str, Any]], chip: str) -> str:
    """Return a Markdown table with a row per part."""
    peak, bandwidth = CHIPS[chip]
    lines = [
        f"{chip}: {peak} TFLOP/s, {bandwidth} GB/s",
        "",
        "| step | part | TFLOP | as compiled | GB | least GB | ms by FLOPs | ms by bytes | binds | "
        "at most of the peak | GiB, temporary |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        compute, memory = (1e3 * value for value in seconds(row, chip))
        share = f"{bound(row, chip):.0%}" if row["flops"] else "–"
        moved = f"{row['bytes_accessed'] / 1e9:.2f}"
        lines.append(
            f"| {row['step']} | {row['part']} | {row['flops'] / 1e12:.3f} | "
            f"{row['compiler_flops'] / 1e12:.3f} | {f'({moved})' if row['loops'] else moved} | "
            f"{row['least_bytes'] / 1e9:.2f} | {compute:.2f} | {memory:.2f} | "
            f"{'FLOPs' if compute > memory else 'bytes'} | {share} | "
            f"{row['temporary_bytes'] / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[dict[str, Any]], chip: str, path: Path) -> None:
    """Draw the times of each part by FLOPs, by bytes and by least bytes."""
    from matplotlib.figure import Figure

    from detclipv2_jax.common.atomic import replacing

    bandwidth = CHIPS[chip][1]
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    panel = figure.subplots()
    bars = (
        ("FLOPs at the peak", [1e3 * seconds(row, chip)[0] for row in rows], "#4477aa"),
        ("bytes accessed", [1e3 * seconds(row, chip)[1] for row in rows], "#ee6677"),
        ("least bytes", [row["least_bytes"] / bandwidth / 1e6 for row in rows], "#ccbb44"),
    )
    for number, (label, values, color) in enumerate(bars):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        panel.barh(places, values, height=0.25, label=label, color=color)
    panel.set_yticks(range(len(rows)), [f"{row['step']}, {row['part']}" for row in rows])
    panel.invert_yaxis()
    panel.set_xlabel(f"milliseconds on one {chip}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="directory for the results")
    parser.add_argument("--chip", required=True, choices=CHIPS, help="chip to compile for")
    parser.add_argument("--model", default="swin_t", choices=("swin_t", "swin_l", "nano"))
    parser.add_argument(
        "--steps", default="detection:4x800x1344,image_text:64x320x320",
        help="steps of one device: KIND:IMAGESxHEIGHTxWIDTH,...",
    )  # fmt: skip
    parser.add_argument("--concepts", default=384, type=int, help="rows of the concept table")
    parser.add_argument("--parts", default="", help="only these parts, separated by commas")
    parser.add_argument("--kernels", default="auto", choices=("auto", "xla"), help="model.kernels")
    parser.add_argument("--remat", default=None, help="model.remat (default: the model's)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    asked = options(argv)
    device = compile_ahead.devices(SMALLEST[asked.chip])[0]

    import step_parts

    from detclipv2_jax.common.atomic import write_json, write_text
    from detclipv2_jax.common.errors import UserError
    from detclipv2_jax.training.optimizer import OptimizerConfig

    shapes = step_parts.parse_steps(asked.steps, asked.concepts)
    model = dataclasses.replace(step_parts.MODELS[asked.model], kernels=asked.kernels)
    if asked.remat is not None:
        model = dataclasses.replace(model, remat=asked.remat)
    code = sorted([*compile_ahead.PACKAGE.rglob("*.py"), HERE / "step_parts.py"])
    about = {
        "chip": asked.chip,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:16],
        "model": json.loads(json.dumps(model.to_dict())),
        "concepts": asked.concepts,
    }
    output, rows = asked.output / f"{asked.chip}.json", []
    if output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        rows = before.pop("parts")
        if before != about:
            raise UserError(
                f"{output} is for another model, version or code. Choose another --output."
            )
    asked.output.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in asked.parts.split(",") if name]
    for shape in shapes:
        step = f"{shape.kind}, {shape.images} × {shape.canvas[0]}×{shape.canvas[1]}"
        parts = step_parts.parts(
            model, step_parts.loss_config(shape), OptimizerConfig(), shape.kind, shape.canvas,
            shape.images, shape.concepts,
        )  # fmt: skip
        for name, part in parts.items():
            done = any(row["step"] == step and row["part"] == name for row in rows)
            if done or (wanted and name not in wanted):
                continue
            print(f"{step}: {name} …", file=sys.stderr, flush=True)
            rows.append({"step": step, "part": name} | measure(part, device))
            write_json(output, about | {"parts": rows})
    text = table(rows, asked.chip)
    print(text)
    write_text(output.with_suffix(".md"), text)
    draw(rows, asked.chip, output.with_suffix(".png"))


if __name__ == "__main__":
    from detclipv2_jax.common.cli import exit_status

    sys.exit(exit_status(main))
