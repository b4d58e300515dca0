"""One compiled step per (kind, canvas) of a run."""

import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training import accumulate, optimizer, sharding
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.inputs import abstract_batch
from detclipv2_jax.training.objective import Losses
from detclipv2_jax.training.state import TrainState
from detclipv2_jax.training.step import train_step

Program = tuple[str, tuple[int, int]]  # (kind, canvas): what one compiled step is for


def step_function(
    config: RunConfig, graphdef: Any, rule: optimizer.AdamW, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Losses]]:
    """The step of a run on a mesh, of state and batch alone.

    Raises:
      UserError: a batch that the devices, or its parts on them, do not divide.
    """
    kinds = config.data.kinds()
    for kind, c in kinds.items():
        accumulate.check(c.batch_size, mesh.size, c.micro_batches, kind)
    return functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=rule,
        config=config.loss,
        seed=config.seed,
        micro_batches={kind: c.micro_batches for kind, c in kinds.items()},
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
    """The step of one (kind, canvas), traced for a mesh; `state` may be abstract."""
    kind, shape = program
    batch = abstract_batch(kind, shape, config.data.kinds()[kind])
    run = jax.jit(
        step_fn,
        donate_argnums=0,
        in_shardings=(shardings, sharding.batch_shardings(mesh, batch)),
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):  # tells kernels what they are for, and which devices share the images
        return run.lower(state, batch)


def compile_programs(
    step_fn: Any,
    programs: Sequence[Program],
    state: TrainState,
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    config: RunConfig,
) -> dict[Program, Any]:
    """The compiled step of every (kind, canvas), several at a time; prints what each costs."""

    def compile_one(program: Program) -> Any:
        (kind, shape), began = program, time.monotonic()
        compiled = lower_program(step_fn, program, state, shardings, mesh, config).compile()
        memory, seconds = compiled.memory_analysis(), time.monotonic() - began
        print(
            f"compiled {kind}, {config.data.kinds()[kind].batch_size} × {shape[0]}×{shape[1]}: "
            f"{seconds:.0f} s, {compiled.cost_analysis().get('flops', 0) / 1e9:.1f} GFLOP a "
            f"device, {memory.temp_size_in_bytes / 2**30:.2f} GiB beside the state's "
            f"{memory.argument_size_in_bytes / 2**30:.2f}",
            flush=True,
        )
        return compiled

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(programs, pool.map(compile_one, programs)))
