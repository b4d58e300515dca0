"""The evaluation job: measure a results file, a checkpoint, or all checkpoints of a run.

Devices and processes share the images. Their answers are stored (answers.py), so that a killed job
can resume. The first process computes the metrics, writes and prints them.

    OUTPUT/[step_00001000/][SET/]results.json ...    predictions/
    OUTPUT/summary.json  steps.png                   of several checkpoints
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from detclipv2_jax.common import config_dict, distributed
from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.interruption import stops
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.evaluation import coco, datasets, measure
from detclipv2_jax.evaluation.answers import AnswerStore, parameters_digest
from detclipv2_jax.evaluation.datasets import EvaluationSet
from detclipv2_jax.evaluation.report import draw_steps, results_table, steps_table
from detclipv2_jax.inference import checkpoint, checkpoint_files, threshold
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.inference.prompts import Prompter

_POLL_SECONDS = 2.0  # between two looks for a new checkpoint


def run(args: argparse.Namespace) -> None:
    """Run the job that the command line of `evaluate` asks for.

    Raises:
      UserError: for anything the user can fix; the same command then resumes.
      Stopped: by a signal; the same command resumes.
    """
    _check_flags(args)
    if args.predictions:
        _evaluate_results_file(args)
    else:
        _evaluate_checkpoints(args)


def _check_flags(args: argparse.Namespace) -> None:
    if args.follow and args.step != "auto":
        raise UserError("--follow evaluates every checkpoint of the run. Leave --step out.")
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: must be at least 1.")
    if args.predictions and (
        args.follow or args.step != "auto" or args.results_json or args.store_threshold
    ):
        raise UserError(
            "--predictions measures a results file, without a checkpoint. Leave --step, --follow, "
            "--results_json and --store_threshold out."
        )


def _output_folder(args: argparse.Namespace) -> OutputFolder:
    """Return the output folder; `UserError` if results would replace a file of the user's.

    The answers in predictions/ have their own check (answers.py).
    """
    folder = OutputFolder(args.output, free=("predictions",))
    folder.check(["results.json", "categories.json", "predictions.json", "summary.json"])
    return folder


def _evaluate_results_file(args: argparse.Namespace) -> None:
    output_folder = _output_folder(args)
    output = output_folder.path
    sets = datasets.load_sets(
        args.dataset, args.data_dir, args.images, args.format, find_images=False
    )
    if len(sets) > 1:
        raise UserError(
            f"--dataset={args.dataset} is {len(sets)} datasets, but a results file belongs to one. "
            "Give the annotation file of that dataset."
        )
    with guarded(output_folder):
        results = measure.measure_results_file(args.predictions, sets[0].truth, output=output)
    print(f"{results_table(results)}\n\nwritten to {output}: results.json")


def _evaluate_checkpoints(args: argparse.Namespace) -> None:
    folder = _output_folder(args)
    output = folder.path
    distributed.start(args.coordinator_address, args.num_processes, args.process_id)
    with contextlib.ExitStack() as stack:
        if jax.process_index():  # only the first process prints; all report errors on stderr
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        # Again: JAX's start of several processes takes SIGTERM for itself.
        stack.enter_context(stops("Run the same command to resume."))
        stack.enter_context(guarded(folder))
        sets = datasets.load_sets(args.dataset, args.data_dir, args.images, args.format)
        for one in sets:  # the table repeats them, but a model may take hours
            for note in one.truth.notes:
                print(f"note: {one.truth.path}: {note}.", flush=True)
        if args.store_threshold and len(sets) > 1:
            raise UserError(
                f"--store_threshold: --dataset={args.dataset} is {len(sets)} datasets, and a "
                "checkpoint has one threshold. Give one annotation file."
            )
        several = args.follow or args.step == "all" or isinstance(args.step, list)
        for step in _steps(args, output):
            folder = output / f"step_{step:08d}" if several else output
            results = _evaluate_checkpoint(args, sets, step, folder)
            if results and several and jax.process_index() == 0:
                _summarize(output, results)


def _steps(args: argparse.Namespace, output: pathlib.Path) -> Iterator[int]:
    """Yield the steps to evaluate; with --follow, as training writes their checkpoints."""
    exchange = output / ".steps.json"
    if not args.follow:
        yield from distributed.run_on_first_process(lambda: _chosen_steps(args), exchange)
        return
    done: list[int] = []

    def wait_for_next() -> int | None:
        announced = False
        while True:
            waiting = [step for step in checkpoint.steps(args.checkpoint) if step not in done]
            if waiting:
                return waiting[0]
            if done and checkpoint.is_finished(args.checkpoint):
                return None
            if not announced:
                after = f" after step {done[-1]}" if done else ""
                print(f"waiting for a checkpoint{after} in {args.checkpoint} ...", flush=True)
                announced = True
            time.sleep(_POLL_SECONDS)

    while (step := distributed.run_on_first_process(wait_for_next, exchange)) is not None:
        yield step
        done.append(step)


def _chosen_steps(args: argparse.Namespace) -> list[int]:
    """Return the steps that --step names."""
    if args.step == "best":
        return [checkpoint.best_step(args.checkpoint)]
    if args.step == "auto":
        return [checkpoint_files.chosen_intact(args.checkpoint)]
    if args.step == "newest":
        return [checkpoint_files.newest_intact(args.checkpoint)]
    known = checkpoint.require_steps(args.checkpoint)
    if args.step == "all":
        return known
    wanted = args.step if isinstance(args.step, list) else [args.step]
    if missing := [step for step in wanted if step not in known]:
        raise UserError(
            f"{args.checkpoint} has no checkpoint of step {missing[0]}. Its steps are "
            f"{', '.join(map(str, known))}."
        )
    return wanted


def _evaluate_checkpoint(
    args: argparse.Namespace, sets: Sequence[EvaluationSet], step: int, output: pathlib.Path
) -> dict[str, Any] | None:
    """Evaluate a checkpoint on all datasets; None if it is skipped.

    It is skipped if training deleted it before it was read, or if it is damaged and all are
    evaluated.
    """
    try:
        model = _Model(args, step)
    except checkpoint_files.DamagedError as error:
        if not args.follow and args.step != "all":
            raise
        print(f"warning: {error} It is not evaluated.", file=sys.stderr, flush=True)
        return None
    except Exception:
        if jax.process_count() > 1 or step in checkpoint.steps(args.checkpoint):
            raise
        print(
            f"warning: training deleted the checkpoint of step {step} before it was evaluated; "
            "skipping it",
            file=sys.stderr,
        )
        return None
    found = {
        one.name: _evaluate_set(model, one, output / one.name, args.results_json) for one in sets
    }
    files = "results.json, detections/*.png"
    if "" in found:  # one dataset
        results = found[""]
    else:
        results = _average(args.dataset, model.about, found)
        files = "results.json, and the results and detections/*.png of each dataset in a folder"
        if jax.process_index() == 0:
            write_json(output / "results.json", results)
    print(f"{results_table(results)}\n\nwritten to {output}: {files}", flush=True)
    if best := results.get("threshold"):
        _offer_threshold(args, step, best, model.threshold)
    return results


def _offer_threshold(
    args: argparse.Namespace, step: int, best: Mapping[str, Any], own: Mapping[str, Any] | None
) -> None:
    """Store the fitted threshold with the checkpoint if asked to, or say that it can be stored."""
    if args.store_threshold:
        if jax.process_index() == 0:
            path = threshold.store(checkpoint.workdir(args.checkpoint), step, best)
            print(f"stored the score threshold {best['score_threshold']:g} in {path}", flush=True)
    elif own is None:
        print(
            f"The checkpoint has no score threshold of its own: detect uses {threshold.FALLBACK:g}."
            " --store_threshold stores the one above in the run.",
            flush=True,
        )


class _Model:
    """A checkpoint on every device of this process, and how it is queried.

    Attributes:
      predictors: one per device, with the same compiled program.
      prompter: turns names into prompts.
      threshold: the checkpoint's own score threshold, None if it has none.
      about: the checkpoint, for the results.
      settings: what metrics depend on, for the results.
      identity: what identifies the model among other jobs.
    """

    def __init__(self, args: argparse.Namespace, step: int):
        loaded = checkpoint.load_model(args.checkpoint, step)
        self.threshold = loaded.threshold
        self.predictors = [
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
        self.prompter = Prompter.for_model(
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
    """Answer this process's share of the missing chunks; the first process measures all answers."""
    names = measure.encode_names(model.predictors[0], one.truth, model.prompter)
    paths = datasets.find_images(one.truth, one.images)
    settings = {**model.settings, **model.prompter.settings(names)}
    store = AnswerStore(output / "predictions", one.truth.images, paths, model.predictors[0], names)
    identity = store.identity({**model.identity, "settings": settings})
    missing = distributed.run_on_first_process(lambda: store.begin(identity), output / ".todo.json")
    if len(missing) < len(store):
        answered = len(store) - len(missing)
        print(f"resuming: {answered} of {len(store)} chunks of images are answered", flush=True)
    mine = missing[jax.process_index() :: jax.process_count()]
    store.answer_chunks(model.predictors, mine, _bar_title(model, one, mine, missing))
    distributed.barrier()

    def measured() -> dict[str, Any]:
        return measure.measure_answers(
            one.truth,
            one.images,
            paths,
            store.answers(),
            model.about,
            settings,
            output=output,
            results_json=results_json,
        )

    return distributed.run_on_first_process(measured, output / ".measured.json")


def _bar_title(
    model: _Model, one: EvaluationSet, mine: Sequence[int], missing: Sequence[int]
) -> str | None:
    """Return the title of the progress bar, which only the first process shows."""
    if jax.process_index():
        return None
    share = f" ({len(mine)} of {len(missing)} chunks)" if len(mine) < len(missing) else ""
    return f"step {model.about['step']}{' ' * bool(one.name)}{one.name}{share}"


def _average(
    dataset: str, about: Mapping[str, Any], found: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return the results of several COCO-format datasets as one: the mean of each metric."""
    rows = {name: results["coco"] for name, results in found.items()}
    average = {}
    for metric in coco.METRICS:
        values = [row[metric] for row in rows.values() if row[metric] is not None]
        average[metric] = float(np.mean(values)) if values else None
    every = [results["settings"] for results in found.values()]
    settings = {k: v for k, v in every[0].items() if all(other.get(k) == v for other in every)}
    for key in every[0]:
        if key.startswith("images") or key == "names_defined":
            settings[key] = sum(other[key] for other in every)
    return {"dataset": dataset, **about, "average": average, "sets": rows, "settings": settings}


def _summarize(output: pathlib.Path, latest: dict[str, Any]) -> None:
    """Write and print the results of all steps in `output`, also those of earlier starts."""
    every = []
    for path in sorted(output.glob("step_*/results.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if _comparable(results) == _comparable(latest):
            every.append(results)
        else:
            print(f"warning: {path} has other settings; the summary leaves it out")
    every.sort(key=lambda results: results["step"])
    kept = ("step", "standard", "fixed", "groups", "coco", "average", "sets", "threshold")
    summary = {
        "dataset": latest["dataset"],
        "checkpoint": latest["checkpoint"],
        "steps": [{key: one[key] for key in kept if key in one} for one in every],
        "settings": latest["settings"],
    }
    write_json(output / "summary.json", summary)
    draw_steps(every, output / "steps.png")
    print(f"{steps_table(every)}\n\nwritten to {output}: summary.json, steps.png\n", flush=True)


def _comparable(results: Mapping[str, Any]) -> Any:
    """Return what must be equal for the metrics of two steps to be in one table."""
    # Counts and versions may differ; "standard" and "fixed" are explanations.
    ignored = ("images", "names_defined", "versions", "standard", "fixed")
    settings = config_dict.with_current_names(DecodeConfig, results["settings"])
    settings = {k: v for k, v in settings.items() if not k.startswith(ignored)}
    return json.loads(json.dumps([results["dataset"], results["checkpoint"], settings]))
