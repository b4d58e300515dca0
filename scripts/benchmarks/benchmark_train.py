"""Time of a training step and of its parts, and the share of the device's peak that it reaches.

    python scripts/benchmarks/benchmark_train.py --output=DIR
    python scripts/benchmarks/benchmark_train.py --output=DIR --parts --compare \
        --steps=detection:4x800x1344,image_text:64x320x320

Runs on the device that JAX finds, on random data, without TensorFlow. Each of `--steps` is compiled
as in training (`step.train_step`, with its state donated). A time is the median of `--rounds`
calls, each of which is waited for. `--forward_backward` also times loss and gradient without the
update. `--parts` times each part of the step by itself, forward and backward (step_parts.py).
`--compare` does the same with the model in PyTorch (comparison/torch_detclip.py) on the same
device; the two alternate.

MFU is the step's FLOPs (models/flops.py) per second, divided by the rate of a large matrix product
of the same dtype, which alternates with the step. Core seconds are the processor time of all
threads. A part that runs by itself moves its inputs and outputs through memory, so the parts do not
add up to the step. On a CPU that other jobs use, compare core seconds and set
OMP_WAIT_POLICY=PASSIVE; otherwise PyTorch's threads spend core seconds waiting for one another. On
an idle CPU leave it unset.

Writes train.json, train.md and train.png.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import step_parts
from matplotlib.figure import Figure

from detclipv2_jax.common.atomic import replacing, write_json, write_text
from detclipv2_jax.common.cli import exit_status
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models import detclip, flops
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.remat import Remat
from detclipv2_jax.training import accumulate, optimizer, prefetch, sharding
from detclipv2_jax.training import state as state_lib
from detclipv2_jax.training.objective import LossConfig
from detclipv2_jax.training.optimizer import OptimizerConfig
from detclipv2_jax.training.step import train_step

STEP, GRADIENT = "step", "forward + backward"
OURS, THEIRS = "ours", "PyTorch"
Work = Mapping[Any, Callable[[], None]]  # (who, what) -> a function to time
Times = dict[Any, np.ndarray]  # (who, what) -> (rounds, 2): wall-clock and core seconds


# ---- What is timed.


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function, the seconds it took to compile, and the compiler's memory analysis."""

    run: Callable[[], None]
    compile_seconds: float
    memory: Any


def compiled(function: Any, *arguments: Any) -> tuple[Any, float]:
    """Compile a jitted function for these arguments; return it and the seconds that took."""
    began = time.perf_counter()
    program = function.lower(*arguments).compile()
    return program, time.perf_counter() - began


class Ours:
    """Our training step on one device, and its parts."""

    def __init__(self, model: DetCLIPConfig, shape: step_parts.Shape, loss: LossConfig):
        self.model, self.shape, self.loss = model, shape, loss
        self.optimizer = OptimizerConfig(
            warmup_steps=0, learning_rate=1e-6
        )  # the batch is always the same
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        abstract = step_parts.abstract_batch(
            model, shape.kind, shape.canvas, shape.images, shape.concepts
        )
        self.batch = step_parts.random_batch(abstract, model.text.vocab)
        self._on_device = prefetch.put_batch(
            self.batch, sharding.batch_shardings(self.mesh, self.batch)
        )
        self.flops = flops.step(
            model, shape.kind, shape.canvas, shape.images, shape.concepts,
            proposals=loss.proposals.k, group=loss.proposals.group,
        )  # fmt: skip

    def step(self) -> "Program":
        """Return the whole step."""
        graphdef, params = detclip.create(self.model, 0)
        rule = optimizer.create(self.optimizer, params, 1000)
        whole = sharding.replicated(self.mesh)
        state = jax.device_put(state_lib.create(params, rule), whole)
        run = functools.partial(
            train_step, graphdef=graphdef, optimizer=rule, config=self.loss, seed=0,
            micro_batches={}, replicated=whole,
        )  # fmt: skip
        run = jax.jit(
            run,
            donate_argnums=0,
            in_shardings=(whole, sharding.batch_shardings(self.mesh, self.batch)),
            out_shardings=whole,
        )
        program, seconds = compiled(run, state, self._on_device)
        held = [state]
        del state, params

        def once() -> None:
            state, figures = program(held.pop(), self._on_device)
            held.append(jax.block_until_ready(state))
            if not np.isfinite(figures["loss"]):
                raise UserError(f"{self.shape}: the loss is not finite. Report this as a bug.")

        return Program(once, seconds, program.memory_analysis())

    def gradient(self) -> "Program":
        """Return loss and gradient without the update."""
        graphdef, params = detclip.create(self.model, 0)
        whole = sharding.replicated(self.mesh)

        @jax.jit
        def run(params: Any, batch: Batch) -> Any:
            return accumulate.loss_and_gradient(
                params, batch, jax.random.key(0), graphdef, self.loss, 1, whole
            )

        program, seconds = compiled(run, params, self._on_device)
        once = lambda: _wait(program(params, self._on_device))
        return Program(once, seconds, program.memory_analysis())

    def parts(self) -> dict[str, step_parts.Part]:
        """Return the parts of the step by name."""
        return step_parts.parts(
            self.model, self.loss, self.optimizer, self.shape.kind, self.shape.canvas,
            self.shape.images, self.shape.concepts,
        )  # fmt: skip

    def part(self, part: step_parts.Part) -> Callable[[], None]:
        """Return a function that runs one part."""
        learned, fixed = step_parts.concrete(part, self.batch)
        run = jax.jit(part.fn, donate_argnums=part.donate)
        held = [jax.device_put(learned, jax.devices()[0])]
        fixed = jax.device_put(fixed, jax.devices()[0])

        def once() -> None:
            if part.renews:
                held.append(jax.block_until_ready(run(held.pop(), fixed)))
            else:
                _wait(run(held[0], fixed))

        return once


@functools.cache
def ceiling(dtype: str) -> tuple[Callable[[], None], float]:
    """Return a function that multiplies large square matrices, and its FLOPs."""
    small = jax.default_backend() == "cpu"
    side, times = (2048, 1) if small else (8192, 8)
    kind = jnp.dtype(dtype)
    left = jnp.full((side, side), 1 / side, kind)
    chain = lambda x, y: jax.lax.fori_loop(0, times, lambda _, x: jnp.matmul(x, y), x)
    run = jax.jit(chain).lower(left, left).compile()
    return lambda: _wait(run(left, left)), 2.0 * times * side**3


def _wait(arrays: Any) -> None:
    jax.block_until_ready(arrays)


def in_turns(work: Work, rounds: int) -> Times:
    """Time every function once per round, right after a call that is not timed.

    In a training run, a step reuses the memory of the step before it. After another function ran,
    the system must allocate that memory again, hence the untimed call (docs/performance.md).
    """
    times: dict[Any, list[tuple[float, float]]] = {name: [] for name in work}
    for number in range(1, rounds + 1):
        for name, function in work.items():
            function()
            wall, cores = time.perf_counter(), time.process_time()
            function()
            spent = time.perf_counter() - wall, time.process_time() - cores
            times[name].append(spent)
            _log(f"  {number}/{rounds} {' '.join(name)}: {spent[0]:.4g} s, {spent[1]:.4g} of cores")
    return {name: np.asarray(values) for name, values in times.items()}


def measure(
    model: DetCLIPConfig, shape: step_parts.Shape, rounds: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the measurements of one step."""
    _log(f"{shape}: compiling")
    ours = Ours(model, shape, step_parts.loss_config(shape))
    row = dataclasses.asdict(shape) | {"model_flops": ours.flops}
    theirs = None
    if args.compare:
        from comparison import torch_detclip

        theirs = torch_detclip.Trainer(
            model, ours.loss, ours.optimizer, ours.batch,
            device=args.torch_device, compiled=args.torch_compile,
        )  # fmt: skip
    whole = [] if args.no_step else [STEP]
    whole += [GRADIENT] if args.forward_backward else []
    try:
        row["times"] = [_whole(ours, theirs, what, rounds) for what in whole]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"too_large": str(error).splitlines()[0]}
    gc.collect()
    if args.parts:
        row["parts"] = _parts(ours, theirs, rounds)
    return row


def _whole(ours: Ours, theirs: Any, what: str, rounds: int) -> dict[str, Any]:
    """Time the step or its gradient, alternating with the ceiling."""
    before = _device_peak()
    program = ours.step() if what == STEP else ours.gradient()
    work = {(OURS, what): program.run}
    if theirs is not None:
        work[THEIRS, what] = theirs.step if what == STEP else theirs.forward_backward
    found = {"what": what} | _timed(work, what, rounds, ours.model.dtype)
    return (
        found
        | {"images_per_second": ours.shape.images / found["seconds"]}
        | {"mfu": _of_ceiling(sum(ours.flops.values()), found)}
        | {"compile_seconds": program.compile_seconds}
        | peak_memory(program.memory, before, _device_peak())
    )


def _parts(ours: Ours, theirs: Any, rounds: int) -> list[dict[str, Any]]:
    other = {} if theirs is None else theirs.parts()
    rows = []
    for name, part in ours.parts().items():
        work = {(OURS, name): ours.part(part)}
        if name in other:
            work[THEIRS, name] = other[name]
        found = {"part": name} | _timed(work, name, rounds, ours.model.dtype)
        found |= {"flops": part.flops, "least_bytes": part.least_bytes}
        rows.append(found | {"of_ceiling": _of_ceiling(part.flops, found)})
        del work
        gc.collect()
    total = sum(row["seconds"] for row in rows)
    return [row | {"share": row["seconds"] / total} for row in rows]


def _timed(
    work: Mapping[Any, Callable[[], None]], what: str, rounds: int, dtype: str
) -> dict[str, float]:
    """Time functions that alternate with the ceiling; return medians."""
    product, operations = ceiling(dtype)
    times = in_turns({**work, ("ceiling",): product}, rounds)
    rate = float(operations / np.median(times["ceiling",][:, 0]))
    return figures(times, what) | {"ceiling_flops_per_second": rate}


def _of_ceiling(operations: float, found: Mapping[str, float]) -> float:
    return operations / found["seconds"] / found["ceiling_flops_per_second"]


def figures(times: Times, what: str) -> dict[str, float]:
    """Return our medians; with PyTorch, also theirs and the medians of the ratios per round."""
    seconds, cores = np.median(times[OURS, what], axis=0)
    found = {"seconds": float(seconds), "core_seconds": float(cores)}
    if (THEIRS, what) in times:
        seconds, cores = np.median(times[THEIRS, what], axis=0)
        ratios = times[THEIRS, what] / np.maximum(times[OURS, what], 1e-9)
        wall, by_cores = np.median(ratios, axis=0)
        found |= {"torch_seconds": float(seconds), "torch_core_seconds": float(cores)}
        found |= {"ours_is_faster_by": float(wall), "by_core_seconds": float(by_cores)}
    return found


def peak_memory(analysis: Any, before: int | None, after: int | None) -> dict[str, Any]:
    """Return the peak memory as the device reports it, else the compiler, else of the process.

    A device reports the peak since the process began, so it belongs to this step only if it rose.
    """
    if after is not None and after > (before or 0):
        return {"peak_bytes": after, "peak_from": "device"}
    if analysis is not None:
        held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
        held += max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
        return {"peak_bytes": held, "peak_from": "compiler"}
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_bytes": used * (1 if sys.platform == "darwin" else 1024), "peak_from": "process"}


def _device_peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None


# ---- Tables and pictures.


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return all measurements in Markdown."""
    lines = [
        "| step | | s | images/s | core s | MFU | compile s | peak GiB | PyTorch s | ours is "
        "faster by | by core s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "too_large" in row:
            lines.append(f"| {_name(row)} | does not fit | | | | | | | | | |")
            continue
        for times in row["times"]:
            cells = [_name(row), times["what"], f"{times['seconds']:.4g}"]
            cells += [f"{times['images_per_second']:.3g}", f"{times['core_seconds']:.4g}"]
            cells += [f"{times['mfu']:.1%}", f"{times['compile_seconds']:.0f}"]
            cells += [f"{times['peak_bytes'] / 2**30:.2f}", *_compared(times)]
            lines.append("| " + " | ".join(cells) + " |")
    for row in rows:
        lines += ["", *_parts_table(row)] if "parts" in row else []
    return "\n".join(lines)


def _parts_table(row: Mapping[str, Any]) -> list[str]:
    rate = np.median([part["ceiling_flops_per_second"] for part in row["parts"]])
    lines = [
        f"{_name(row)}, by part; the ceiling is {rate / 1e12:.3g} TFLOP/s:",
        "",
        "| part | s | share | TFLOP | of the ceiling | least GB | GB/s if no more | PyTorch s | "
        "ours is faster by | by core s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in row["parts"]:
        cells = [part["part"], f"{part['seconds']:.4g}", f"{part['share']:.0%}"]
        cells += (
            [f"{part['flops'] / 1e12:.3g}", f"{part['of_ceiling']:.0%}"]
            if part["flops"]
            else ["", ""]
        )
        cells += [f"{part['least_bytes'] / 1e9:.3g}"]
        cells += [f"{part['least_bytes'] / 1e9 / part['seconds']:.3g}", *_compared(part)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _compared(figures: Mapping[str, float]) -> list[str]:
    if "torch_seconds" not in figures:
        return ["", "", ""]
    return [
        f"{figures['torch_seconds']:.4g}",
        f"{figures['ours_is_faster_by']:.2f} ×",
        f"{figures['by_core_seconds']:.2f} ×",
    ]


def _name(row: Mapping[str, Any]) -> str:
    height, width = row["canvas"]
    return f"{row['kind']}, {row['images']} × {height}×{width}, {row['concepts']} concepts"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a bar per step and contestant: seconds per image of each part, or of the step."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        if "too_large" in row:
            continue
        parts = row.get("parts") or [times | {"part": times["what"]} for times in row["times"][:1]]
        for who, key in ((OURS, "seconds"), (THEIRS, "torch_seconds")):
            bar = {part["part"]: part[key] / row["images"] for part in parts if key in part}
            if bar:
                bars[f"{_name(row)}\n{who}"] = bar
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(bars)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(bars))
    for name in dict.fromkeys(name for bar in bars.values() for name in bar):
        widths = np.asarray([bar.get(name, 0.0) for bar in bars.values()])
        axes.barh(list(bars), widths, left=left, label=name)
        left += widths
    axes.set(xlabel="seconds per image")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def about(args: argparse.Namespace, model: DetCLIPConfig) -> dict[str, Any]:
    """Return what the measurements depend on."""
    packages = ["jax", "jaxlib", "flax", *(["torch", "transformers"] if args.compare else [])]
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "programs_from_cache": bool(jax.config.jax_compilation_cache_dir),
        "versions": versions,
        "rounds": args.rounds,
        "torch": args.compare
        and {
            "device": args.torch_device,
            "compiled": args.torch_compile,
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        },
        "model": model.to_dict(),
    }


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="directory for the results")
    add("--model", choices=step_parts.MODELS, default="swin_t", help="(default: %(default)s)")
    add("--steps", metavar="KIND:IMAGESxHEIGHTxWIDTH,…", help="(default: suits the device)")
    add("--concepts", type=int, default=0, help="rows of the concept table (default: the recipe's)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: float32 on CPU)")
    add("--remat", choices=get_args(Remat), default="none", help="(default: %(default)s)")
    add("--rounds", type=int, default=20, help="timed rounds (default: %(default)s)")
    add(
        "--forward_backward",
        action="store_true",
        help="also time loss and gradient without the update",
    )
    add("--no_step", action="store_true", help="leave the whole step out")
    add("--parts", action="store_true", help="also time each part by itself")
    add("--compare", action="store_true", help="also time the same model in PyTorch")
    add("--torch_compile", choices=("auto", "yes", "no"), default="auto",
        help="auto: on a GPU (default: %(default)s)")  # fmt: skip
    return parser.parse_args(argv)


def _settle(args: argparse.Namespace) -> DetCLIPConfig:
    """Set the options that depend on the device; return the model."""
    cpu = jax.default_backend() == "cpu"
    if args.rounds < 1:
        raise UserError("--rounds must be 1 or more.")
    if args.no_step and not (args.forward_backward or args.parts):
        raise UserError("--no_step leaves nothing to measure. Add --forward_backward or --parts.")
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    args.steps = args.steps or (
        "detection:1x320x320,image_text:4x320x320"
        if cpu
        else "detection:4x800x1344,grounding:4x800x1344,image_text:64x320x320"
    )
    args.torch_device = None
    if args.compare:
        try:
            import torch
            import transformers  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"--compare: {error.name} is not installed. Install it, or leave --compare out."
            ) from None
        args.torch_device = "cuda" if torch.cuda.is_available() else "cpu"
        if (args.torch_device == "cpu") != cpu:
            raise UserError(
                f"--compare: JAX runs on {jax.default_backend()}, PyTorch on {args.torch_device}. "
                "Install both for the same device, or set JAX_PLATFORMS."
            )
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    gpu = args.torch_device == "cuda"
    args.torch_compile = gpu if args.torch_compile == "auto" else args.torch_compile == "yes"
    return dataclasses.replace(step_parts.MODELS[args.model], dtype=args.dtype, remat=args.remat)


def run(argv: Sequence[str] | None = None, model: DetCLIPConfig | None = None) -> None:
    """Run the command line; `model` replaces that of --model."""
    args = _options(argv)
    model = _settle(args) if model is None else _settle(args) and model
    shapes, output, rows = step_parts.parse_steps(args.steps, args.concepts), Path(args.output), []
    context = about(args, model)
    for shape in shapes:
        rows.append(measure(model, shape, args.rounds, args))
        write_json(output / "train.json", context | {"rows": rows})
        write_text(output / "train.md", table(rows) + "\n")
        draw(rows, output / "train.png")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(exit_status(run))
