"""The evaluation of one checkpoint, or of all of a run as it writes them, as a job of its own.

Devices and processes share the images; their answers are kept on disk (predictions.py), so that a
killed job goes on. The first process measures, writes and prints.

    OUTPUT/[step_00001000/][SET/]results.json …    predictions/
    OUTPUT/summary.json  steps.png                 of several checkpoints
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detclipv2_jax.common import distributed
from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.interruption import Interrupted
from detclipv2_jax.evaluation import coco, datasets, measure
from detclipv2_jax.evaluation.answers import Predictions, parameters_digest
from detclipv2_jax.evaluation.datasets import EvaluationSet
from detclipv2_jax.evaluation.report import draw_steps, steps_table, table
from detclipv2_jax.inference import checkpoint
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.inference.prompts import Prompter

_PAUSE = 2.0  # seconds between two looks for a new checkpoint


def run(args: argparse.Namespace, output: pathlib.Path) -> None:
    """The job that the command line of `evaluate` asks for.

    Raises:
      UserError: for anything the user can mend; the same command goes on.
      Interrupted: by SIGTERM; so it does then.
    """
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    with contextlib.ExitStack() as stack:
        if jax.process_index():  # one voice; what goes wrong is said by each on stderr
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(_ended_by_sigterm())
        sets = datasets.load(args.dataset, args.data_dir, args.images, args.format)
        several = args.follow or args.step == "all" or isinstance(args.step, list)
        for step in _steps(args, output):
            folder = output / f"step_{step:08d}" if several else output
            results = _evaluate_checkpoint(args, sets, step, folder)
            if results and several and jax.process_index() == 0:
                _summarize(output, results)


def _evaluate_checkpoint(
    args: argparse.Namespace, sets: Sequence[EvaluationSet], step: int, output: pathlib.Path
) -> dict[str, Any] | None:
    """The results of one checkpoint on all sets; None where training deleted it meanwhile."""
    try:
        model = _Model(args, step)
    except Exception:
        if jax.process_count() > 1 or step in checkpoint.steps(args.checkpoint):
            raise
        print(f"the checkpoint of step {step} was deleted before its turn came", file=sys.stderr)
        return None
    found = {
        one.name: _evaluate_set(model, one, output / one.name, args.results_json) for one in sets
    }
    results = found[""] if "" in found else _average(args.dataset, model.about, found)
    if "" not in found and jax.process_index() == 0:
        write_json(output / "results.json", results)
    inside = "results.json" if "" in found else "results.json, and in a folder a set"
    print(f"{table(results)}\n\nwritten to {output}: {inside}, detections/*.png", flush=True)
    return results


class _Model:
    """A checkpoint on every device of this process, and all that tells how it is asked."""

    def __init__(self, args: argparse.Namespace, step: int):
        loaded = checkpoint.load_model(args.checkpoint, step)
        self.predictors = [  # each answers with the same program
            Predictor(
                loaded.graphdef,
                jax.device_put(loaded.params, device),
                canvas=loaded.detect.canvas,
                config=loaded.detect.decoding,
                batch_size=args.batch_size or loaded.detect.batch_size,
            )
            for device in jax.local_devices()
        ]
        first = self.predictors[0]
        self.prompts = Prompter.for_model(
            loaded.detect, loaded.definitions, loaded.template, args.definitions, args.prompts
        )
        self.about = {"checkpoint": str(args.checkpoint), "step": step}
        self.settings = {
            **dataclasses.asdict(first.config),
            "canvas": list(first.canvas),
            "batch_size": first.batch_size,
            "parameters": "averaged parameters (EMA)",
            "versions": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        }
        self.identity = {"step": step, "parameters": parameters_digest(loaded.params)}


def _evaluate_set(
    model: _Model, one: EvaluationSet, output: pathlib.Path, results_json: bool
) -> dict[str, Any]:
    """Each process answers its share of what is not there yet; the first measures all of it."""
    texts = measure.encode_names(model.predictors[0], one.truth, model.prompts)
    paths = [datasets.find_image(image, one.images) for image in one.truth.images]
    settings = {**model.settings, **model.prompts.settings(texts)}
    kept = Predictions(output / "predictions", one.truth.images, paths, model.predictors[0], texts)
    identity = kept.identity({**model.identity, "settings": settings})
    todo = distributed.run_on_first_process(lambda: kept.begin(identity), output / ".todo.json")
    if len(todo) < len(kept):
        print(f"{len(kept) - len(todo)} of {len(kept)} parts were answered before", flush=True)
    mine = todo[jax.process_index() :: jax.process_count()]
    kept.complete(model.predictors, mine, _title(model, one, mine, todo))
    distributed.barrier()

    def measured() -> dict[str, Any]:
        return measure.measure_answers(
            one.truth,
            one.images,
            paths,
            kept.answers(),
            model.about,
            settings,
            output=output,
            results_json=results_json,
        )

    return distributed.run_on_first_process(measured, output / ".measured.json")


def _title(
    model: _Model, one: EvaluationSet, mine: Sequence[int], todo: Sequence[int]
) -> str | None:
    """What stands before the bar of the first process, which shows its own share."""
    if jax.process_index():
        return None
    share = f" ({len(mine)} of {len(todo)} parts)" if len(mine) < len(todo) else ""
    return f"step {model.about['step']}{' ' * bool(one.name)}{one.name}{share}"


def _average(
    dataset: str, about: Mapping[str, Any], found: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """The results of several COCO-format sets as one: the mean of each figure over the sets."""
    rows = {name: results["coco"] for name, results in found.items()}
    average = {}
    for figure in coco.FIGURES:
        values = [row[figure] for row in rows.values() if row[figure] is not None]
        average[figure] = float(np.mean(values)) if values else None
    every = [results["settings"] for results in found.values()]
    settings = {k: v for k, v in every[0].items() if all(other.get(k) == v for other in every)}
    for key in every[0]:
        if key.startswith("images") or key == "names_defined":
            settings[key] = sum(other[key] for other in every)
    return {"dataset": dataset, **about, "average": average, "sets": rows, "settings": settings}


def _summarize(output: pathlib.Path, latest: dict[str, Any]) -> None:
    """Writes and prints what is known of all steps, those of earlier starts of the job included."""
    every = []
    for path in sorted(output.glob("step_*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if _comparable(results) == _comparable(latest):
            every.append(results)
        else:
            print(f"warning: {path} is of other settings; the summary leaves it out")
    every.sort(key=lambda results: results["step"])
    kept = ("step", "standard", "fixed", "groups", "coco", "average", "sets")
    summary = {
        "dataset": latest["dataset"],
        "checkpoint": latest["checkpoint"],
        "steps": [{key: one[key] for key in kept if key in one} for one in every],
        "settings": latest["settings"],
    }
    write_json(output / "summary.json", summary)
    draw_steps(every, output / "steps.png")
    print(f"{steps_table(every)}\n\nwritten to {output}/: summary.json, steps.png\n", flush=True)


def _comparable(results: Mapping[str, Any]) -> Any:
    """What has to be equal for the figures of two steps to stand in one table."""
    passing = ("images", "names_defined", "versions")
    settings = {k: v for k, v in results["settings"].items() if not k.startswith(passing)}
    return json.loads(json.dumps([results["dataset"], results["checkpoint"], settings]))


def _steps(args: argparse.Namespace, output: pathlib.Path) -> Iterator[int]:
    """The steps to evaluate, one after another; of a run that goes on, as they are written."""
    if not args.follow:
        yield from distributed.run_on_first_process(lambda: _chosen(args), output / ".steps.json")
        return
    done: list[int] = []

    def next_one() -> int | None:
        told = False
        while True:
            waiting = [step for step in checkpoint.steps(args.checkpoint) if step not in done]
            if waiting:
                return waiting[0]
            if done and checkpoint.is_finished(args.checkpoint):
                return None
            if not told:
                after = f" after step {done[-1]}" if done else ""
                print(f"waiting for a checkpoint{after} in {args.checkpoint} …", flush=True)
                told = True
            time.sleep(_PAUSE)

    while (step := distributed.run_on_first_process(next_one, output / ".steps.json")) is not None:
        yield step
        done.append(step)


def _chosen(args: argparse.Namespace) -> list[int]:
    if args.step == "best":
        return [checkpoint.best_step(args.checkpoint)]
    known = checkpoint.require_steps(args.checkpoint)
    if args.step in ("newest", "all"):
        return known if args.step == "all" else known[-1:]
    asked = args.step if isinstance(args.step, list) else [args.step]
    if gone := [step for step in asked if step not in known]:
        raise UserError(
            f"{args.checkpoint} has no checkpoint of step {gone[0]}: it has "
            f"{', '.join(map(str, known))}."
        )
    return asked


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, by an exception: what is being written is whole."""

    def end(*_: Any) -> None:
        raise Interrupted("stopped by SIGTERM", signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
