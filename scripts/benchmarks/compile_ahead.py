"""Compile a config's training steps for other devices; report the memory and work they need.

    python scripts/benchmarks/compile_ahead.py --config=configs/pretrain.py:swin_t \\
        --topology=v5e:4x8
    python scripts/benchmarks/compile_ahead.py --config=configs/pretrain.py:nano --topology=cpu:8

For a TPU topology (v5e:4x8, v5p:4x4x4, v6e:4x8), any machine can run the TPU's compiler:
`pip install "libtpu==0.0.42.*"`, for jax 0.10.2. cpu:N means N CPU devices. For each (kind, canvas)
it prints the parameters, the memory that a device needs and has, the FLOPs by part (by formula) and
as the compiler counts them, the bytes read and written, and the collectives between devices.

A full step of swin_t takes about ten minutes on two cores. --output therefore saves the results of
each step at once, as JSON and as a picture next to it; the same command resumes. Options such as
--config.data.detection.batch_size=64 set fields of the config.
"""

import collections
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training.flags import run_with_config

PACKAGE = Path(__file__).resolve().parents[2] / "detclipv2_jax"
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file of the run, with its size after a colon."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices: v5e:4x8, v5p:4x4x4, v6e:4x8, cpu:8.")
_KIND = flags.DEFINE_string("kind", None, "Only steps of this kind (default: all kinds).")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the results.")
flags.mark_flags_as_required(["config", "topology"])

# Memory per chip in GiB: cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e (16, 95 and 32 GB).
CHIP_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}
_ACCELERATORS = {"v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def devices(topology: str) -> list[Any]:
    """Return the devices of a topology, for a mesh. Programs can be compiled for them, not run.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    chip, _, shape = topology.partition(":")
    if chip == "cpu" and shape.isdigit():
        os.environ["XLA_FLAGS"] = (
            os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={shape}"
        )
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax

        return jax.devices()
    if chip not in CHIP_GIB or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology}: expected v5e:4x8, v5p:4x4x4, v6e:4x8 or cpu:8, in any shape."
        )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": _ACCELERATORS[chip],
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is used, so several may compile together
    }
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # of any type: not installed, or no such shape
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0]}. Install the TPU compiler with "
            '`pip install "libtpu==0.0.42.*"`.'
        ) from None


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Return the collectives of a compiled program: {"all-gather": {"count", "bytes"}, ...}.

    Bytes are those of the results, per device. A loop body counts as often as its trip count, if
    the program states it (on CPU it does, on TPU it does not), else once. Every branch counts.
    Sums in bfloat16 have a name of their own. (On CPU they are promoted to float32 in the end.)
    """
    bodies, entry = _computations(text)
    # On TPU, one collective is spread over many computations with the same channel. Two of a
    # shard_map may have one channel too, but other shapes.
    channels: dict[tuple[str, str, str], tuple[int, int]] = {}

    def walk(computation: str, times: int) -> None:
        for line in bodies[computation]:
            if collective := _COLLECTIVE.search(line):
                shapes, name, started = collective.groups()
                if "reduce" in name and ("bf16[" in shapes or "_promoted" in line):
                    name += " in bfloat16"
                channel = _CHANNEL.search(line)
                size = _result_bytes(shapes, name, bool(started))
                channels[name, shapes, channel[1] if channel else line] = times, times * size
                continue  # the computation it calls is its sum
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                for inner in re.findall(r"[\w.-]+", called):
                    if inner in bodies:
                        walk(inner, times * int(trips[1]) if trips else times)

    walk(entry, 1)
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for (name, *_), (times, size) in sorted(channels.items()):
        found[name]["count"] += times
        found[name]["bytes"] += size
    return dict(found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation that matter to `collectives`, and the entry's name.

    These are collectives and calls of other computations. Most computations are fusions, which
    contain neither.
    """
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif _COLLECTIVE.search(line) or _CALLED.search(line):
            bodies[name].append(line)
    return bodies, entry


def _result_bytes(shapes: str, name: str, started: bool) -> int:
    arrays = _ARRAY.findall(shapes)
    if started and name != "all-reduce":  # inputs, outputs and scalars
        arrays = [(kind, dims) for kind, dims in arrays if dims]
        arrays = arrays[len(arrays) // 2 :]
    return sum(
        _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in arrays
    )


def measure(
    config: Any, program: Any, mesh: Any, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compile the step of one (kind, canvas) for a mesh, from shapes alone; return its costs.

    Args:
      config: the run's config.
      program: (kind, canvas).
      mesh: of the devices.
      options: of the compiler.

    Returns:
      Memory, FLOPs, bytes and collectives. If the step does not fit into memory, `too_large` has
      the compiler's message instead.
    """
    import jax

    from detclipv2_jax.models import detclip, flops
    from detclipv2_jax.training import optimizer
    from detclipv2_jax.training import programs as programs_lib
    from detclipv2_jax.training import sharding as sharding_lib
    from detclipv2_jax.training import state as state_lib
    from detclipv2_jax.training.objective import regions_per_image

    graphdef, params = detclip.abstract(config.model)
    rule = optimizer.create(config.optimizer, params, 1000)
    state = jax.eval_shape(functools.partial(state_lib.create, optimizer=rule), params)
    shardings = sharding_lib.state_shardings(mesh, state)
    step_fn = programs_lib.step_function(config, graphdef, rule, mesh)
    kind, shape = program
    data = config.data.kinds()[kind]
    parts = flops.step(
        config.model, kind, shape, data.batch_size, data.table_size,
        proposals=regions_per_image(kind, config.loss), group=config.loss.proposals.group,
    )  # fmt: skip
    row = {
        "kind": kind,
        "shape": list(shape),
        "images_a_device": data.batch_size / mesh.size,
        "concepts": data.table_size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "model_flops_a_device": {k: v / mesh.size for k, v in parts.items()},
    }
    began = time.monotonic()
    lowered = programs_lib.lower_program(step_fn, program, state, shardings, mesh, config)
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"too_large": str(error)}
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return row | {
        "seconds_to_compile": round(time.monotonic() - began, 1),
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "peak_bytes": arguments + temporary + max(extra, 0),
        "compiler_flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "collectives": collectives(compiled.as_text()),
    }


def table(rows: Sequence[dict[str, Any]], chip: str) -> str:
    """Return the results as text, a block per program."""
    lines = []
    for row in rows:
        model = sum(row["model_flops_a_device"].values())
        lines += [
            f"{row['kind']}, {row['shape'][0]}×{row['shape'][1]}, {row['images_a_device']:g} "
            f"images per device, {row['concepts']} concepts, {row['parameters'] / 1e6:.1f} M "
            "parameters",
            f"  model TFLOP per device {model / 1e12:.2f}: "
            + ", ".join(f"{k} {v / model:.0%}" for k, v in row["model_flops_a_device"].items()),
        ]
        if "too_large" in row:
            lines.append(f"  DOES NOT FIT           {row['too_large']}")
            continue
        has = CHIP_GIB.get(chip)
        peak = row["peak_bytes"] / 2**30
        fits = "" if has is None else f" of {has}: {'fits' if peak < has else 'DOES NOT FIT'}"
        lines += [
            f"  memory per device, GiB {peak:.2f}{fits} "
            f"(state and batch {row['argument_bytes'] / 2**30:.2f}, "
            f"temporary {row['temporary_bytes'] / 2**30:.2f})",
            f"  TFLOP as compiled      {row['compiler_flops'] / 1e12:.2f} "
            f"(in {row['seconds_to_compile']:.0f} s)",
            f"  GB read and written    {row['bytes_accessed'] / 1e9:.1f}",
        ]
        for name, found in row["collectives"].items():
            lines.append(f"  {name:<23}{found['count']} of {found['bytes'] / 1e6:.1f} MB in all")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], chip: str, path: Path) -> None:
    """Draw a bar per program: the memory per device, and a line at the memory of a chip."""
    from matplotlib.figure import Figure

    from detclipv2_jax.common.atomic import replacing

    rows = [row for row in rows if "peak_bytes" in row]
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(rows)), layout="constrained")
    panel = figure.subplots()
    labels = [f"{row['kind']} {row['shape'][0]}×{row['shape'][1]}" for row in rows]
    left = [0.0] * len(rows)
    for name, label in (("argument_bytes", "state and batch"), ("temporary_bytes", "temporary")):
        sizes = [row[name] / 2**30 for row in rows]
        panel.barh(labels, sizes, left=left, label=label)
        left = [a + b for a, b in zip(left, sizes)]
    if chip in CHIP_GIB:
        panel.axvline(CHIP_GIB[chip], color="black", linestyle="--", label=f"one {chip} chip")
    panel.set(xlabel="GiB per device")
    panel.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _about(config: Any, mesh: Any) -> dict[str, Any]:
    """Return what the results depend on."""
    from detclipv2_jax.common import config_dict

    code = sorted(PACKAGE.rglob("*.py"))
    versions = {
        name: importlib.metadata.version(name)
        for name in ("jax", "libtpu")
        if name == "jax" or not _TOPOLOGY.value.startswith("cpu")
    }
    return {
        "topology": _TOPOLOGY.value,
        "devices": mesh.size,
        "versions": versions,
        "code": hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:16],
        "config": json.loads(json.dumps(config_dict.to_dict(config))),
    }


def main(argv: list[str]) -> None:
    """Run the command line."""
    found = devices(_TOPOLOGY.value)  # before anything initializes JAX's own devices

    from detclipv2_jax.common.atomic import write_json
    from detclipv2_jax.data import rungs
    from detclipv2_jax.training import config as config_lib
    from detclipv2_jax.training import sharding

    config = config_lib.parse(_CONFIG.value.to_dict())
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, found)
    kinds = config.data.kinds()
    if _KIND.value is not None and _KIND.value not in kinds:
        raise UserError(
            f"--kind={_KIND.value}: the config has only {', '.join(kinds)}. Choose one of these."
        )
    programs = [
        (kind, shape)
        for kind, data in kinds.items()
        for shape in rungs.canvases(data)
        if _KIND.value in (None, kind)
    ]
    chip, about, rows = _TOPOLOGY.value.partition(":")[0], _about(config, mesh), []
    output = Path(_OUTPUT.value) if _OUTPUT.value else None
    if output and output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        rows = before.pop("programs")
        if before != about:
            raise UserError(
                f"--output={output} is for another config, topology, version or code. Choose "
                "another file, or delete it."
            )
        print(table(rows, chip), flush=True)
    done = {(row["kind"], tuple(row["shape"])) for row in rows}
    for program in programs:
        if program in done:
            continue
        rows.append(measure(config, program, mesh))
        print(table(rows[-1:], chip), flush=True)
        if output:
            write_json(output, about | {"programs": rows})
            draw(rows, chip, output.with_suffix(".png"))


if __name__ == "__main__":
    run_with_config(main)
