"""The training loop, top to bottom: data, model, programs, loop, report."""

import json
from pathlib import Path
from typing import Any

import jax

from detclipv2_jax.common import config_dict, distributed
from detclipv2_jax.common.atomic import write_errors_are_warnings, write_json
from detclipv2_jax.common.interruption import Interrupted, StopRequest
from detclipv2_jax.data import pipeline
from detclipv2_jax.data.transforms import TransformConfig
from detclipv2_jax.models import detclip
from detclipv2_jax.training import clock as clock_lib
from detclipv2_jax.training import initialize, metrics, optimizer, prefetch, sharding
from detclipv2_jax.training import state as state_lib
from detclipv2_jax.training.checkpointer import Checkpointer
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.inputs import open_data
from detclipv2_jax.training.programs import compile_programs, step_function
from detclipv2_jax.training.recorder import Recorder, is_due, report
from detclipv2_jax.training.sharding import state_shardings
from detclipv2_jax.training.validation import BEFORE, Validator, headline, scalars


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
    clock, earlier = clock_lib.Clock(began), {}

    # ---- Data: from here on, what each step sees is a function of (seed, step).
    plan, sources, names = open_data(config)
    total_steps = max(1, round(config.train.epochs * plan.steps_per_epoch))
    batches = ", ".join(f"{count} of {kind}" for kind, count in plan.batches.items())
    rehearsed = f"; of these {n} rehearse" if (n := plan.rehearsal_batches) else ""
    print(f"{total_steps} steps; an epoch is {plan.steps_per_epoch}: {batches}{rehearsed}")

    definitions = plan.vocabulary.definitions("detection")
    if definitions:
        known = sum(name in definitions for name in names)
        print(f"{known} of {len(names)} detection names have a definition")

    # ---- Model, optimizer, state: restored if this workdir has a checkpoint.
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    validator = Validator(config, definitions, workdir, mesh) if config.eval.dataset else None
    graphdef, params = detclip.create(config.model, config.seed)
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    print(f"{millions:.2f} M parameters on {mesh.size} device(s) ({jax.devices()[0].device_kind})")
    rule = optimizer.create(config.optimizer, params, total_steps)
    step_fn = step_function(config, graphdef, rule, mesh)
    checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
    if checkpointer.latest is None:
        params, origins = initialize.initialize(params, config.init)
        print(initialize.table(origins), end="\n" * bool(origins))
    state = state_lib.create(params, rule)
    shardings = state_shardings(mesh, state)
    state = jax.device_put(state, shardings)
    if checkpointer.latest is not None:
        state, meta = checkpointer.restore(jax.tree.map(_abstract, state, shardings))
        earlier = meta["seconds"]
        print(f"going on after step {int(state.step)}{_changes(meta['config'], config)}")
    if first:
        write_json(workdir / "config.json", config_dict.to_dict(config))
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
        distributed.barrier()  # the first step waits for the others no longer than Gloo's 30 s

    # ---- The loop. A step's figures are read when the next one is under way.
    # Of a run that starts anew nothing is kept, not even what it measured at step 0.
    log = metrics.MetricsLog(workdir if first else None, start or -1)
    progress = metrics.Progress(total_steps, start, shown=first)
    recorder = Recorder(config, log, progress, clock, checkpointer)
    on_device = prefetch.prefetch(feed, mesh)
    results, stop = None, StopRequest()
    clock.go_on(earlier, log.seconds)
    if validator and config.train.eval_first and start == 0:
        with clock("evaluate"):
            before = validator(graphdef, state)
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
        due = is_due(step + 1, config.train.eval_every) and not stopping
        if validator and (last or due):
            recorder.finish()
            with clock("evaluate"), write_errors_are_warnings():
                results = validator(graphdef, state)
                score = headline(results)
                log.write(step + 1, scalars(results))
                progress.say(f"step {step + 1}: {score:.4f} AP")
        if last or stopping or is_due(step + 1, config.train.checkpoint_every):
            recorder.finish()
            with clock("checkpoint"):
                meta = {"config": config_dict.to_dict(config), "names": names}
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
    if validator and results is None:
        with clock("evaluate"):
            results = validator(graphdef, state)
    report(workdir if first else None, results, clock, int(state.skipped), feed)
    feed.close()
    return results


def _abstract(array: jax.Array, sharding_: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding_)


def _changes(before: dict[str, Any], config: RunConfig) -> str:
    """The fields that differ from the config of the checkpoint, for the eye."""
    now = json.loads(
        json.dumps(config_dict.to_dict(config))
    )  # as the checkpoint's went through JSON
    old, new = _flat(config_dict.with_current_names(RunConfig, before)), _flat(now)
    changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in old | new if old.get(k) != new.get(k)]
    return f", with a changed config ({'; '.join(changed)})" if changed else ""


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return result
