"""Compiles a config's training steps for devices that are not here, and says what they would need.

    python scripts/compile_ahead.py --config=configs/pretrain.py:swin_t --topology=v5e:4x8
    python scripts/compile_ahead.py --config=configs/pretrain.py:nano --topology=cpu:8

A TPU's topology (v5e:4x8, v5p:4x4x4, v6e:4x8) is compiled for by the TPU's own compiler, on any
machine: `pip install "libtpu==0.0.42.*"`, for jax 0.10.2, is all it wants. cpu:N stands for N CPU
devices. For each (kind, canvas) it prints the memory a device needs and has, the step's arithmetic
by part (analytic) and as the compiler counts it, the bytes that are read and written, and what
travels between devices; --output writes the same as JSON. Any field of the config can be set behind
it. The full steps of swin_t take some minutes each on two cores.
"""

import collections
import dataclasses
import functools
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from detclipv2_jax.commands import run_with_config
from detclipv2_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's config.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices: v5e:4x8, v5p:4x4x4, v6e:4x8, cpu:8.")
_KIND = flags.DEFINE_string("kind", None, "Only steps of this kind; by default of all.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for the figures.")
flags.mark_flags_as_required(["config", "topology"])

# Memory of a chip in GiB: cloud.google.com/tpu/docs/v5e, …/v5p, …/v6e (16, 95 and 32 GB).
CHIP_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}
_ACCELERATORS = {"v5e": "v5litepod-8", "v5p": "v5p-8", "v6e": "v6e-8"}
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def devices(topology: str) -> list[Any]:
    """Devices to make a mesh of; they can be compiled for, not run on.

    Raises:
      UserError: no such topology, or its compiler is not installed.
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
            f"--topology={topology}: write CHIP:SHAPE as v5e:4x8, v5p:4x4x4 or v6e:4x8, or cpu:8."
        )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": _ACCELERATORS[chip],
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except Exception as error:  # whatever the plug-in says: not installed, or no such shape
        raise UserError(
            f"--topology={topology}: {str(error).splitlines()[0]}; the TPU compiler comes with "
            '`pip install "libtpu==0.0.42.*"`.'
        ) from None


def collectives(text: str) -> dict[str, dict[str, int]]:
    """What travels between devices in a compiled program: {"all-gather": {"count", "bytes"}, …}.

    Bytes are those of the results, on each device; what stands in a loop counts once.
    """
    found: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"count": 0, "bytes": 0})
    for shapes, name in _COLLECTIVE.findall(text):
        found[name]["count"] += 1
        found[name]["bytes"] += sum(
            _BYTES.get(kind, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in _ARRAY.findall(shapes)
        )
    return dict(sorted(found.items()))


def measure(config, program, mesh) -> dict[str, Any]:
    """Compiles the step of one (kind, canvas) for a mesh, from shapes alone."""
    import jax

    from detclipv2_jax import flops, optimizer, train
    from detclipv2_jax import state as state_lib
    from detclipv2_jax.models import detclip

    graphdef, params = detclip.abstract(config.model)
    rule = optimizer.create(config.optimizer, params, 1000)
    state = jax.eval_shape(functools.partial(state_lib.create, optimizer=rule), params)
    shardings = train.state_shardings(mesh, state)
    step_fn = train.step_function(config, graphdef, rule, mesh)
    began = time.monotonic()
    compiled = train.lower_program(step_fn, program, state, shardings, mesh, config).compile()
    kind, shape = program
    data, memory = config.data.kinds()[kind], compiled.memory_analysis()
    cost = compiled.cost_analysis()
    parts = flops.step(
        config.model, kind, shape, data.batch_size, data.table_size,
        proposals=config.loss.proposals.k, group=config.loss.proposals.group,
    )  # fmt: skip
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    extra = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "kind": kind,
        "shape": list(shape),
        "images_a_device": data.batch_size / mesh.size,
        "seconds_to_compile": round(time.monotonic() - began, 1),
        "argument_bytes": arguments,
        "temporary_bytes": temporary,
        "peak_bytes": arguments + temporary + max(extra, 0),
        "model_flops_a_device": {k: v / mesh.size for k, v in parts.items()},
        "compiler_flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "collectives": collectives(compiled.as_text()),
    }


def table(rows: list[dict[str, Any]], chip: str) -> str:
    """The figures for people, a block a program."""
    lines = []
    for row in rows:
        has = CHIP_GIB.get(chip)
        peak = row["peak_bytes"] / 2**30
        fits = "" if has is None else f" of {has}: {'fits' if peak < has else 'DOES NOT FIT'}"
        model = sum(row["model_flops_a_device"].values())
        lines += [
            f"{row['kind']}, {row['shape'][0]}×{row['shape'][1]}, {row['images_a_device']:g} "
            f"images a device ({row['seconds_to_compile']:.0f} s to compile)",
            f"  memory a device, GiB   {peak:.2f}{fits} "
            f"(state and batch {row['argument_bytes'] / 2**30:.2f}, "
            f"temporary {row['temporary_bytes'] / 2**30:.2f})",
            f"  TFLOP a device         {model / 1e12:.2f} by the model, "
            f"{row['compiler_flops'] / 1e12:.2f} as compiled",
            "    of these             "
            + ", ".join(f"{k} {v / model:.0%}" for k, v in row["model_flops_a_device"].items()),
            f"  GB read and written    {row['bytes_accessed'] / 1e9:.1f}",
        ]
        for name, found in row["collectives"].items():
            lines.append(f"  {name:<23}{found['count']} of {found['bytes'] / 1e6:.1f} MB in all")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Compiles, prints and writes."""
    found = devices(_TOPOLOGY.value)  # before anything initialises JAX's own devices

    from detclipv2_jax import config as config_lib
    from detclipv2_jax import sharding
    from detclipv2_jax.files import write_json

    config = config_lib.parse(_CONFIG.value.to_dict())
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, found)
    kinds = config.data.kinds()
    if _KIND.value is not None and _KIND.value not in kinds:
        raise UserError(f"--kind={_KIND.value}: the config has only {', '.join(kinds)}.")
    programs = [
        (kind, shape)
        for kind, data in kinds.items()
        for shape in data.shapes
        if _KIND.value in (None, kind)
    ]
    rows = []
    for program in programs:
        rows.append(measure(config, program, mesh))
        print(table(rows[-1:], _TOPOLOGY.value.partition(":")[0]), flush=True)
    if _OUTPUT.value:
        import jax

        about = {"topology": _TOPOLOGY.value, "devices": mesh.size, "jax": jax.__version__}
        about["mesh"] = dataclasses.asdict(config.mesh)
        write_json(_OUTPUT.value, about | {"programs": rows})


if __name__ == "__main__":
    run_with_config(main)
