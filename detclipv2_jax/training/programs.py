"""The compiled programs of a run: one training step per (kind, canvas)."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from detclipv2_jax.common.printable import counted
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import Kind
from detclipv2_jax.training import accumulate, optimizer, sharding
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.inputs import abstract_batch
from detclipv2_jax.training.objective import Scalars
from detclipv2_jax.training.state import TrainState
from detclipv2_jax.training.step import train_step

Program = tuple[Kind, tuple[int, int]]  # the kind of data and the canvas (height, width) of a step


def step_function(
    config: RunConfig, graphdef: Any, rule: optimizer.AdamW, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Scalars]]:
    """Return the training step of a run as a function of state and batch.

    Raises:
        UserError: a kind's batch cannot be split equally over the devices and micro-batches.
    """
    kinds = config.data.kinds()
    for kind, data in kinds.items():
        accumulate.check(data.batch_size, mesh.size, data.micro_batches, kind)
    return functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=rule,
        config=config.loss,
        seed=config.seed,
        micro_batches={kind: data.micro_batches for kind, data in kinds.items()},
        replicated=sharding.replicated(mesh),
    )


def lower_program(
    step_fn: Any,
    program: Program,
    state: TrainState,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    config: RunConfig,
) -> jax.stages.Lowered:
    """Trace the step of one (kind, canvas) for a mesh; `state` may be abstract."""
    kind, canvas = program
    batch = abstract_batch(kind, canvas, config.data.kinds()[kind])
    run = jax.jit(
        step_fn,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_shardings(mesh, batch)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):  # kernels read the platform and the axes of the batch from it
        return run.lower(state, batch)


def compile_programs(
    step_fn: Any,
    programs: Sequence[Program],
    state: TrainState,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    config: RunConfig,
) -> dict[Program, Any]:
    """Compile the step of every (kind, canvas), several at a time, and print what each needs."""

    def compile_one(program: Program) -> Any:
        (kind, (height, width)), began = program, time.monotonic()
        compiled = lower_program(step_fn, program, state, shardings, mesh, config).compile()
        print(
            f"compiled {kind}, {config.data.kinds()[kind].batch_size} × {height}×{width}, in "
            f"{time.monotonic() - began:.0f} s{_needs(compiled)}",
            flush=True,
        )
        return compiled

    if programs:
        cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        print(
            f"compiling {counted(len(programs), 'program')}; the first time this takes minutes "
            "(XLA may call it very slow)"
            f"{f', later runs of as many steps find them in {cache}' if cache else ''}",
            flush=True,
        )
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(programs, pool.map(compile_one, programs)))


def _needs(compiled: jax.stages.Compiled) -> str:
    """Return a program's FLOPs and memory per device, as far as JAX reports them."""
    cost, memory, parts = compiled.cost_analysis(), compiled.memory_analysis(), []
    if cost is not None:
        parts.append(f"{cost.get('flops', 0) / 1e9:.1f} GFLOP")
    if memory is not None:
        parts.append(f"{memory.argument_size_in_bytes / 2**30:.2f} GiB for state and batch")
        parts.append(f"{memory.temp_size_in_bytes / 2**30:.2f} GiB temporary")
    return f". Per device: {', '.join(parts)}" if parts else ""
