"""The training loop of a run, from top to bottom: data, model, state, programs, loop, report.

Start reading here. What a step computes is in step.py and objective.py; what it sees is decided by
data/plan.py; how its arrays are laid out on the devices is in sharding.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from detclipv2_jax.common import config_dict, distributed
from detclipv2_jax.common.atomic import write_errors_are_warnings, write_json
from detclipv2_jax.common.interruption import Interrupted, StopRequest
from detclipv2_jax.common.printable import counted
from detclipv2_jax.data import pipeline
from detclipv2_jax.models import detclip
from detclipv2_jax.training import check, optimizer, sharding
from detclipv2_jax.training.checkpointer import Checkpointer
from detclipv2_jax.training.clock import Clock
from detclipv2_jax.training.config import EACH_EPOCH, RunConfig
from detclipv2_jax.training.inputs import open_data, with_classes
from detclipv2_jax.training.metrics import MetricsLog, Progress
from detclipv2_jax.training.prefetch import prefetch
from detclipv2_jax.training.profiling import Profiler, parse_steps
from detclipv2_jax.training.programs import compile_programs, step_function
from detclipv2_jax.training.recorder import Recorder, is_due, report
from detclipv2_jax.training.resume import new_or_resumed
from detclipv2_jax.training.utilization import Utilization
from detclipv2_jax.training.validation import BEFORE, Validator, headline, with_validation_sets
from detclipv2_jax.training.workdir import CONFIG


# Longer than a screen on purpose: it is the story of a run, and each section uses what the sections
# before it made.
def train(
    config: RunConfig, workdir: Path, *, began: float | None = None, profile: str = ""
) -> dict[str, Any] | None:
    """Train as `config` says; resume from the newest checkpoint in `workdir` if there is one.

    Args:
        config: of the run.
        workdir: where the run writes.
        began: time.monotonic() when the process started, so that its imports count; None: now.
        profile: steps to trace, FIRST:LAST without LAST (profiling.py); "" for none.

    Returns:
        The results of the last evaluation; None if the config names no validation set.

    Raises:
        UserError: something that the user can fix. Saved work is kept; the same command resumes.
        Interrupted: SIGTERM or Ctrl-C. The state is saved; the same command resumes.
    """
    is_first = jax.process_index() == 0  # the process that writes and prints; others are muted
    clock = Clock(began)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    check.check_devices(config, mesh.size)
    check.check_start(config, workdir)

    # ---- Data. From here on, what a step sees is a function of (seed, step).
    data = open_data(config)
    config = with_validation_sets(with_classes(config, data.names))
    total_steps = max(1, round(config.train.epochs * data.plan.steps_per_epoch))
    steps_to_profile = parse_steps(profile, total_steps)
    definitions = data.plan.vocabulary.definitions("detection")
    print(data.summary(total_steps))

    # ---- Model and optimizer.
    captioned = data.sources_of("image_text")
    validator = (
        Validator(config, definitions, workdir, mesh, captioned) if config.eval.dataset else None
    )
    graphdef, params = detclip.create(config.model, config.seed)
    millions = sum(p.size for p in jax.tree.leaves(params)) / 1e6
    devices = counted(mesh.size, "device")
    print(f"{millions:.2f} M parameters on {devices} ({jax.devices()[0].device_kind})")
    rule = optimizer.create(config.optimizer, params, total_steps)
    step_fn = step_function(config, graphdef, rule, mesh)

    # ---- State: that of the newest checkpoint, or a new one.
    checkpointer = Checkpointer(workdir, config.train.keep_checkpoints)
    state, shardings, earlier_seconds, auto_step, threshold = new_or_resumed(
        config, params, rule, mesh, checkpointer, total_steps
    )
    start = int(state.step)
    if auto_step and auto_step.is_over:
        total_steps = start
    if is_first:
        write_json(workdir / CONFIG, config_dict.to_dict(config))

    # ---- Programs: one per (kind, canvas), compiled before the first step. The input pipeline
    # starts before them and fills meanwhile.
    utilization = Utilization(config, mesh)
    feed = pipeline.batches(
        data.plan,
        data.sources,
        start=start,
        stop=total_steps,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        max_broken_share=config.data.max_broken_share,
    )
    with clock("compile"):
        needed = data.plan.programs if start < total_steps else []
        programs = compile_programs(step_fn, needed, state, shardings, mesh, config)
        # Gloo, which connects the processes in the first step, waits only 30 s for the slowest.
        distributed.barrier()

    # ---- What the loop reports to.
    # A new run keeps no line of an older log, not even that of an evaluation at step 0.
    log = MetricsLog(workdir if is_first else None, resumed_at=start or -1)
    progress = Progress(total_steps, start, shown=is_first)
    recorder = Recorder(
        config.train,
        log,
        progress,
        clock,
        utilization,
        feed.counters,
        checkpointer.fall_back_before,
    )
    clock.resume(earlier_seconds, log.seconds)
    meta = {  # of every checkpoint: all that is needed to use the model without the run
        "config": config_dict.to_dict(config),
        "names": data.names,
        "definitions": definitions,
        "sources": data.trained_on(),
        "seconds": {},
        "total_steps": total_steps,
    }
    if auto_step:
        meta |= {"auto_step": dataclasses.asdict(auto_step)}
    if threshold:  # until the next evaluation
        meta |= {"threshold": threshold}
    results = None
    if validator and config.train.eval_first and start == 0:
        with clock("evaluate"):
            before = validator(graphdef, state)
            recorder.add_evaluation(0, before)
        if is_first:
            write_json(workdir / BEFORE, before)

    # ---- The loop. The metrics of a step are read while the next step runs: see Recorder.
    batches, stop, values = prefetch(feed, mesh), StopRequest(), None
    is_save_due = False  # a checkpoint waits while updates are skipped
    clock.enter("other")
    with Profiler(steps_to_profile, workdir, start) as profiler:
        for step in range(start + 1, total_steps + 1):  # numbered as in metrics.jsonl
            with profiler.step(step, values):
                with clock("data"):
                    planned, batch = next(batches)
                # The batch is on the devices. Any other transfer would be a mistake: an error.
                with clock("train"), jax.transfer_guard("disallow"):
                    state, values = programs[planned.kind, planned.shape](state, batch)
            recorder.add(planned, values, clock.watch(values["skipped_in_row"]))
            profiler.step_dispatched(step, values)
            is_last, is_stopping, score = step == total_steps, stop.is_due(step), None

            is_each_epoch = auto_step or config.train.eval_every == EACH_EPOCH
            eval_every = data.plan.steps_per_epoch if is_each_epoch else config.train.eval_every
            is_eval_due = is_due(step, eval_every) and not is_stopping
            if validator and (is_last or is_eval_due):
                recorder.flush()
                with clock("evaluate"), write_errors_are_warnings():
                    results = validator(graphdef, state)
                    score = headline(results)
                    if results["threshold"]:  # that of the last evaluation belongs to the model
                        meta["threshold"] = {**results["threshold"], "step": step}
                    recorder.add_evaluation(step, results)
                if auto_step:
                    auto_step = auto_step.after(score, config.optimizer)
                    state = auto_step.applied(state)
                    meta |= {"auto_step": dataclasses.asdict(auto_step)}
                    is_last |= auto_step.is_over

            is_save_due |= is_due(step, config.train.checkpoint_every)
            is_save_due |= checkpointer.is_best(score)
            if is_last or is_stopping or is_save_due:
                recorder.flush()
                with clock("checkpoint"):
                    is_save_due = not checkpointer.save(
                        state, meta | {"seconds": clock.totals()}, score, is_last=is_last
                    )
            if is_stopping and not is_last:
                progress.close()  # what is said of the stop gets a line of its own
                raise _interrupted(step, stop, checkpointer)
            if is_last:
                break

    progress.close()
    log.close()
    with clock("checkpoint"):
        checkpointer.close()

    # ---- Report.
    if validator and results is None:  # a finished run, started again
        with clock("evaluate"):
            results = validator(graphdef, state)
    report(workdir if is_first else None, results, clock, int(state.skipped), feed.counters())
    feed.close()
    return results


def _interrupted(step: int, stop: StopRequest, checkpointer: Checkpointer) -> Interrupted:
    """Wait for the checkpoint of `step` and return the exception that ends the run."""
    checkpointer.wait()
    latest = checkpointer.latest
    saved = "which is saved" if latest == step else f"which is not saved (the newest is {latest})"
    return Interrupted(f"stopped by {stop.signal.name} after step {step}, {saved}", stop.signal)
