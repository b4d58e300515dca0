"""The training loop, top to bottom: data, model, programs, loop, report."""

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from detclipv2_jax import (
    accumulate,
    drawing,
    fields,
    metrics,
    optimizer,
    processes,
    reports,
    sharding,
)
from detclipv2_jax import config as config_lib
from detclipv2_jax import state as state_lib
from detclipv2_jax.checkpoint import Checkpointer
from detclipv2_jax.config import RunConfig
from detclipv2_jax.data import pipeline
from detclipv2_jax.data.concepts import CONTEXT, Dictionary
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.lexicon import Lexicon
from detclipv2_jax.data.plan import KindPlan, Plan, StepPlan
from detclipv2_jax.data.transforms import TransformConfig
from detclipv2_jax.errors import UserError
from detclipv2_jax.files import only_said, write_json
from detclipv2_jax.interruption import Interrupted, StopRequest
from detclipv2_jax.models import detclip
from detclipv2_jax.objective import Losses
from detclipv2_jax.state import TrainState
from detclipv2_jax.step import train_step
from detclipv2_jax.structures import Batch
from detclipv2_jax.validation import BEFORE, ZERO_SHOT, Evaluator, compared, headline, scalars
from detclipv2_jax.weights import initialise

Program = tuple[str, tuple[int, int]]  # (kind, canvas): what one compiled step is for
_WHY_SKIPPED = "their loss or gradient was not finite, or far above the usual"


def train(config: RunConfig, workdir: Path, began: float | None = None) -> dict[str, Any] | None:
    """Trains as `config` says, going on from the newest checkpoint in `workdir` if there is one.

    `began`: when the process did, as time.monotonic() tells it; now if None.

    Returns:
      The results of the last evaluation; None if the config names no validation set.

    Raises:
      UserError: for anything the user can mend; nothing is lost, the next start goes on.
      Interrupted: by SIGTERM or Ctrl-C; the state is saved, the next start goes on.
    """
    first = jax.process_index() == 0  # the process that writes and shows; main.py mutes the others
    clock, earlier = metrics.Clock(began), {}

    # ---- Data: from here on, what each step sees is a function of (seed, step).
    plan, sources, names = open_data(config)
    total_steps = max(1, round(config.train.epochs * plan.steps_per_epoch))
    batches = ", ".join(f"{count} of {kind}" for kind, count in plan.batches.items())
    rehearsed = f"; of these {n} rehearse" if (n := plan.rehearsal_batches) else ""
    print(f"{total_steps} steps; an epoch is {plan.steps_per_epoch}: {batches}{rehearsed}")

    definitions = plan.dictionary.definitions("detection")
    if definitions:
        known = sum(name in definitions for name in names)
        print(f"{known} of {len(names)} detection names have a definition")

    # ---- Model, optimizer, state: restored if this workdir has a checkpoint.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    evaluator = Evaluator(config, definitions, workdir, mesh) if config.eval.dataset else None
    graphdef, params = detclip.create(config.model, config.seed)
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    print(f"{millions:.2f} M parameters on {mesh.size} device(s) ({jax.devices()[0].device_kind})")
    rule = optimizer.create(config.optimizer, params, total_steps)
    step_fn = step_function(config, graphdef, rule, mesh)
    checkpointer = Checkpointer(workdir, config.train.keep)
    if checkpointer.latest is None:
        params, origins = initialise.initialise(params, config.init)
        print(initialise.table(origins), end="\n" * bool(origins))
    state = state_lib.create(params, rule)
    shardings = state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    if checkpointer.latest is not None:
        state, meta = checkpointer.restore(jax.tree.map(_abstract, state, shardings))
        earlier = meta["seconds"]
        print(f"going on after step {int(state.step)}{_changes(meta['config'], config)}")
    if first:
        write_json(workdir / "config.json", fields.to_dict(config))
    start = int(state.step)

    # ---- The input pipeline starts now, so that it fills while the programs compile.
    feed = pipeline.batches(
        plan,
        sources,
        {
            kind: TransformConfig(flip=c.flip, scales=c.scales, crop=c.crop)
            for kind, c in config.data.kinds().items()
            if kind in plan.kinds
        },
        start=start,
        stop=total_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_broken_share=config.data.max_broken_share,
    )

    # ---- One program for every (kind, canvas), compiled before the first step.
    with clock("compile"):
        todo = plan.programs if start < total_steps else []
        programs = compile_programs(step_fn, todo, state, shardings, mesh, config)
        processes.meet()  # the first step waits for the others no longer than Gloo's 30 s

    # ---- The loop. A step's figures are read when the next one is under way.
    # Of a run that starts anew nothing is kept, not even what it measured at step 0.
    log = metrics.MetricsLog(workdir if first else None, start or -1)
    progress = metrics.Progress(total_steps, start, shown=first)
    recorder = Recorder(config, log, progress, clock, checkpointer)
    on_device = sharding.prefetch(feed, mesh)
    results, stop = None, StopRequest()
    clock.go_on(earlier, log.seconds)
    if evaluator and config.train.eval_first and start == 0:
        with clock("evaluate"):
            before = evaluator(graphdef, state)
            log.write(0, scalars(before))
            progress.say(f"before the first step: {headline(before):.4f} AP")
        if first:
            write_json(workdir / BEFORE, before)
    clock.enter("other")
    for step in range(start, total_steps):
        with clock("data"):
            planned, batch = next(on_device)
        # The batch is all that is sent: a transfer that nobody asked for is an error.
        with clock("train"), jax.transfer_guard("disallow"):
            state, values = programs[planned.kind, planned.shape](state, batch)
        clock.watch(values["skipped_in_row"])
        recorder.add(planned, values)
        stopping = stop.is_due(step + 1)
        last, score = step + 1 == total_steps, None
        due = _is_due(step + 1, config.train.eval_every) and not stopping
        if evaluator and (last or due):
            recorder.finish()
            with clock("evaluate"), only_said():
                results = evaluator(graphdef, state)
                score = headline(results)
                log.write(step + 1, scalars(results))
                progress.say(f"step {step + 1}: {score:.4f} AP")
        if last or stopping or _is_due(step + 1, config.train.checkpoint_every):
            recorder.finish()
            with clock("checkpoint"):
                meta = {"config": fields.to_dict(config), "names": names}
                meta |= {"definitions": definitions, "seconds": clock.totals()}
                meta |= {"total_steps": total_steps}  # for jobs that follow
                checkpointer.save(state, meta, score)
        if stopping and not last:
            checkpointer.wait()
            latest = checkpointer.latest
            saved = "is saved" if latest == step + 1 else f"is not saved: the last one is {latest}"
            raise Interrupted(
                f"stopped by {stop.signal.name} after step {step + 1}, which {saved}", stop.signal
            )
    progress.close()
    log.close()
    with clock("checkpoint"):
        checkpointer.close()

    # ---- What came of it.
    if evaluator and results is None:
        with clock("evaluate"):
            results = evaluator(graphdef, state)
    report(workdir if first else None, results, clock, int(state.skipped), feed)
    feed.close()
    return results


def open_data(config: RunConfig) -> tuple[Plan, dict[str, Source], list[str]]:
    """The plan, the open sources by name, and the names that detection data knows."""
    root, kinds = Path(config.data_dir), config.data.kinds()
    if config.data.skip_missing:
        kinds = {kind: without_missing(root, c) for kind, c in kinds.items()}
        kinds = {kind: c for kind, c in kinds.items() if c.sources or c.rehearsal}
    try:
        if not any(c.sources for c in kinds.values()):
            raise UserError(f"{root}: none of the config's prepared sources is there")
        sources = {
            name: Source.open(root / name)
            for c in kinds.values()
            for name in c.sources + c.rehearsal
        }
    except UserError as error:
        hint = f"; to make it: {config.data.prepare}" if config.data.prepare else ""
        raise UserError(f"{error}{hint}") from None
    own = sum(len(sources[name]) for c in kinds.values() for name in c.sources)
    plans = [
        KindPlan(
            kind=kind,
            sources=c.sources + c.rehearsal,
            rehearsal=c.rehearsal,
            rehearsal_records=round(c.rehearsal_share * own),
            batch_size=c.batch_size,
            shapes=c.shapes,
            table_size=c.table_size,
            negatives=c.negatives,
            max_boxes=c.max_boxes,
            texts_per_image=c.texts_per_image,
            begin=c.begin,
            mosaic=c.mosaic,
        )
        for kind, c in kinds.items()
    ]
    dictionary = Dictionary(
        sources,
        Lexicon.open(root / config.data.concepts) if config.data.concepts else None,
        defined=[kind for kind, c in kinds.items() if c.definitions],
        template=config.data.template,
    )
    names = dictionary.names(dictionary.pool("detection"))
    return Plan(sources, dictionary, plans, config.seed), sources, names


def without_missing(root: Path, config: config_lib.KindConfig) -> config_lib.KindConfig:
    """Without `sources` if one is not under `root`, and without those to rehearse that are not."""
    there = [name for name in config.rehearsal if (root / name).exists()]
    for name in set(config.rehearsal) - set(there):
        print(f"{root / name} is not there: it is not rehearsed")
    whole = all((root / name).exists() for name in config.sources)
    return dataclasses.replace(
        config, sources=config.sources if whole else (), rehearsal=tuple(there)
    )


def state_shardings(mesh: jax.sharding.Mesh, state: TrainState) -> TrainState:
    """Parameters by their rules, moments and average like their parameter, counters everywhere."""
    like_params = sharding.parameter_shardings(mesh, state.params)
    whole, structure = sharding.replicated(mesh), jax.tree.structure(state.params)

    def is_params(node: PyTree) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: like_params if is_params(node) else whole, state, is_leaf=is_params
    )


def abstract_batch(kind: str, shape: tuple[int, int], config: config_lib.KindConfig) -> Batch:
    """Shapes and types of one global batch."""
    array, images, boxes = jax.ShapeDtypeStruct, config.batch_size, config.max_boxes
    return Batch(
        images=array((images, *shape, 3), np.uint8),
        sizes=array((images, 2), np.int32),
        boxes=array((images, boxes, 4), np.float32),
        labels=array((images, boxes), np.int32),
        texts=array((images, config.texts_per_image), np.int32),
        tokens=array((config.table_size, CONTEXT), np.int32),
        token_mask=array((config.table_size,), np.bool_),
        kind=kind,
    )


def step_function(
    config: RunConfig, graphdef: Any, rule: optimizer.AdamW, mesh: jax.sharding.Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Losses]]:
    """The step of a run on a mesh, of state and batch alone.

    Raises:
      UserError: a batch that the devices, or its parts on them, do not divide.
    """
    kinds = config.data.kinds()
    for kind, c in kinds.items():
        accumulate.check(c.batch_size, mesh.size, c.accumulate, kind)
    return functools.partial(
        train_step,
        graphdef=graphdef,
        optimizer=rule,
        config=config.loss,
        seed=config.seed,
        parts={kind: c.accumulate for kind, c in kinds.items()},
        gathered=sharding.replicated(mesh),
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


class Recorder:
    """Shows and writes a step's figures once the next step is under way: no step is waited for."""

    def __init__(
        self,
        config: RunConfig,
        log: metrics.MetricsLog,
        progress: metrics.Progress,
        clock: metrics.Clock,
        checkpointer: Checkpointer,
    ):
        """Nothing is pending."""
        self._config, self._log, self._progress = config.train, log, progress
        self._clock, self._checkpointer = clock, checkpointer
        self._pending: tuple[StepPlan, Losses] | None = None

    def add(self, planned: StepPlan, values: Losses) -> None:
        """Takes the figures of the step just started; finishes with those of the one before."""
        done, self._pending = self._pending, (planned, values)
        if done is not None:
            self._write(*done)

    def finish(self) -> None:
        """Writes what is pending."""
        if self._pending is not None:
            self._write(*self._pending)
            self._pending = None

    def _write(self, planned: StepPlan, values: Losses) -> None:
        values = {name: float(value) for name, value in jax.device_get(values).items()}
        step = planned.step + 1
        self._progress.update(planned.kind, int((planned.records >= 0).sum()), values)
        if _is_due(step, self._config.log_every):
            line = {"kind": planned.kind, "epoch": planned.epoch} | values
            self._log.write(step, line, self._clock.figures())
        if values["skipped_in_row"] >= self._config.max_skipped:
            records = planned.records[planned.records >= 0][:4].tolist()
            raise UserError(
                f"the last {self._config.max_skipped} steps up to step {step} ({planned.kind}, "
                f"records {records} …) were skipped: {_WHY_SKIPPED}; the last good "
                f"checkpoint is {self._checkpointer.latest}: start again from it with a lower "
                "config.optimizer.learning_rate, or look at these records."
            )


def report(
    workdir: Path | None,
    results: dict[str, Any] | None,
    clock: metrics.Clock,
    skipped: int,
    feed: pipeline.Batches,
) -> None:
    """Prints the table, where the time went and what was left out; draws the loss curves.

    All processes call it, for each knows only what it left out itself; without a `workdir` nothing
    is drawn.
    """
    if workdir is not None:
        with only_said():
            drawing.loss_curves(workdir / "metrics.jsonl", workdir / "losses.png")
    if results is not None:
        print(reports.table(results))
        if ZERO_SHOT in results:
            print(reports.table(results[ZERO_SHOT]))
        if workdir is not None and (path := workdir / BEFORE).exists():
            print("\n" + compared(json.loads(path.read_text()), results))
    print(f"\n{clock.summary()}")
    for source, (count, read) in _over_processes(feed.broken, feed.read).items():
        if count:
            print(f"{source}: {count} of {read} records could not be read")
    if skipped:
        print(f"{skipped} updates were skipped: {_WHY_SKIPPED}")
    print(f"\n{workdir}/: detections/*.png, losses.png, results.json, metrics.jsonl, checkpoints/")


def _over_processes(*counts: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """The processes' counts by name, added up."""
    table = np.array([list(count.values()) for count in counts])
    if jax.process_count() > 1:
        table = multihost_utils.process_allgather(table).sum(axis=0)
    return {name: tuple(column.tolist()) for name, column in zip(counts[0], table.T)}


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _abstract(array: jax.Array, sharding_: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_)


def _changes(before: dict[str, Any], config: RunConfig) -> str:
    """The fields that differ from the config of the checkpoint, for the eye."""
    now = json.loads(json.dumps(fields.to_dict(config)))  # as the checkpoint's went through JSON
    old, new = _flat(before), _flat(now)
    changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    return f", with a changed config ({'; '.join(changed)})" if changed else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return result
