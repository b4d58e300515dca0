"""Measure a model, its stored answers, or a results file on a dataset with boxes."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, lvis, threshold
from detclipv2_jax.evaluation.answers import Answer, annotated_image, annotated_scale
from detclipv2_jax.evaluation.datasets import find_images
from detclipv2_jax.evaluation.report import PROTOCOLS, draw_comparison, readable_name
from detclipv2_jax.evaluation.results_file import read_results, results_writer
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.names import cut_off_text
from detclipv2_jax.inference.predictor import EncodedNames, Predictor
from detclipv2_jax.inference.prompts import Prompter

_WARNINGS = 3  # per kind of problem; the results count all of them


def measure_model(
    predictor: Predictor,
    ground_truth: coco.GroundTruth,
    image_dir: str | pathlib.Path,
    *,
    prompter: Prompter = Prompter(),  # noqa: B008 - frozen
    step: int | None = None,
    output: str | pathlib.Path | None = None,
    pictures: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Detect all names of a dataset in all of its images; return the metrics.

    With several processes, each must make this call.

    Args:
      predictor: the model.
      ground_truth: the dataset.
      image_dir: where its images are.
      prompter: turns names into prompts.
      step: of the checkpoint, for the results.
      output: where to write what `measure_answers` writes; None writes nothing.
      pictures: how many images to draw.
      progress: whether to show a progress bar.

    Returns:
      As `measure_answers`.

    Raises:
      UserError: no image was found or could be read.
    """
    names = encode_names(predictor, ground_truth, prompter)
    paths = find_images(ground_truth, image_dir)
    settings = {**dataclasses.asdict(predictor.config), "canvas": list(predictor.canvas)}
    return measure_answers(
        ground_truth,
        image_dir,
        paths,
        _answers(predictor, ground_truth, paths, names, progress),
        {"step": step},
        {**settings, **prompter.settings(names)},
        output=output,
        pictures=pictures,
    )


def encode_names(predictor: Predictor, truth: coco.GroundTruth, prompter: Prompter) -> EncodedNames:
    """Encode the names of a dataset's categories; two with the same name have a row each.

    Names that do not fit into the model's tokens, and those that it cannot tell apart for that
    reason, are reported.
    """
    encoded = prompter.encode(
        predictor,
        [readable_name(category.name) for category in truth.categories],
        [(category.definition, category.synset) for category in truth.categories],
    )
    if sentence := cut_off_text(encoded):
        same = sum(other != n and encoded.is_cut[n] for n, other in enumerate(encoded.same_as))
        alike = f" {same} of them are the same to the model as another." * bool(same)
        tqdm.write(f"warning: {truth.path}: {sentence}{alike}", file=sys.stderr)
    return encoded


def _answers(
    predictor: Predictor,
    truth: coco.GroundTruth,
    paths: Sequence[pathlib.Path | None],
    names: EncodedNames,
    progress: bool,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index of the image, answer): first None for missing images, then the others."""
    yield from ((number, None) for number, path in enumerate(paths) if path is None)
    files = {
        number: annotated_image(truth.images[number], path)
        for number, path in enumerate(paths)
        if path is not None
    }
    stream, numbers = predictor.stream(files.values(), names), list(files)
    bar = tqdm(stream, total=len(files), desc="evaluating", unit="image", disable=not progress)
    yield from ((numbers[index], answer) for index, answer in bar)


def measure_answers(
    truth: coco.GroundTruth,
    image_dir: str | pathlib.Path,
    paths: Sequence[pathlib.Path | None],
    answers: Iterable[tuple[int, Answer]],
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    output: str | pathlib.Path | None = None,
    pictures: int = 8,
    results_json: bool = False,
) -> dict[str, Any]:
    """Return the metrics of a model's answers to the images of a dataset.

    LVIS sets get standard and fixed AP of the same detections: over all categories, rare, common
    and frequent ones, and groups. Other sets get COCO's twelve metrics. Images that are missing or
    cannot be read count as images without detections.

    Args:
      truth: the dataset.
      image_dir: where its images are, for messages.
      paths: the file of each image, None if it is missing.
      answers: (index of the image, answer) in any order.
      about: fields for the results: the model and its step.
      settings: fields for the section "settings": how the model was queried.
      output: a directory; None writes nothing. Else writes `results.json` (what is returned), for
        LVIS `categories.json` (both AP of each category), `detections/*.png` (ground truth next to
        the best detections), and with `results_json` all detections as `predictions.json`.
      pictures: how many images to draw.
      results_json: whether to write a results file.

    Returns:
      {"dataset", *about, "standard", "fixed", "groups": {name: {"standard", "fixed"}}, "threshold",
      "settings"} or {"dataset", *about, "coco", "threshold", "settings"}. Metrics are fractions,
      None where there is no ground truth. "threshold" is the score threshold of the best F1
      (`threshold.fitted`), None if no detection is right. "settings" counts the images that are
      missing, unreadable or of another size. "notes" is there if the annotations are doubtful.

    Raises:
      UserError: no image was found or could be read.
    """
    output = None if output is None else pathlib.Path(output)
    evaluator = _evaluator(truth)
    category_ids = np.asarray([category.id for category in truth.categories])
    given_ids = np.asarray([category.given_id for category in truth.categories], object)
    problems = _ImageProblems(truth, image_dir, paths)
    drawn = _spread([n for n, path in enumerate(paths) if path], pictures if output else 0)
    samples: dict[int, ImageDetections] = {}
    with _optional_writer(output, results_json) as write:
        for number, answer in answers:
            problems.count(number, answer)
            if not isinstance(answer, ImageDetections):
                continue
            image = truth.images[number]
            # The boxes are in pixels of the file; the annotations may be for another size.
            boxes = answer.boxes * annotated_scale(image, answer.size)
            evaluator.add(image.id, boxes, answer.scores, category_ids[answer.labels])
            write(image.given_id, boxes, answer.scores, given_ids[answer.labels])
            if number in drawn:
                samples[number] = answer
        problems.check_any_image()
    metrics = _metrics(evaluator)
    results = {
        "dataset": truth.path,
        **about,
        **metrics.values,
        "threshold": threshold.fitted(evaluator, truth),
        "settings": {**settings, **metrics.protocols, **problems.counts, **_left_out(truth)},
        **_notes(truth),
    }
    if output is not None:
        _write_results(output, results, metrics)
        if samples:
            step = about.get("step")
            name = "detections" if step is None else f"step_{step:08d}"
            picture = draw_comparison(truth, paths, samples)
            drawing.save_png(picture, output / "detections" / f"{name}.png")
    return results


def measure_results_file(
    path: str | pathlib.Path,
    truth: coco.GroundTruth,
    *,
    output: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Return the metrics of a results file in COCO's and LVIS's format, written by any tool.

    Args:
      path: the file.
      truth: the dataset.
      output: where to write `results.json` and, for LVIS, `categories.json`; None writes nothing.

    Returns:
      As `measure_answers`, with "predictions" in place of `about`. "settings" counts the entries of
      unknown images or categories.

    Raises:
      UserError: the file cannot be read or an entry is invalid.
    """
    file = read_results(path, truth)
    for sentence in file.warnings():
        tqdm.write(f"warning: {path}: {sentence}", file=sys.stderr)
    evaluator = _evaluator(truth)
    for rows in file.chunks():
        evaluator.add_rows(rows)
    metrics = _metrics(evaluator)
    results = {
        "dataset": truth.path,
        "predictions": str(path),
        **metrics.values,
        "threshold": threshold.fitted(evaluator, truth),
        "settings": {
            **metrics.protocols,
            "images": len(truth.images),
            **file.counts,
            **_left_out(truth),
        },
        **_notes(truth),
    }
    if output is not None:
        _write_results(pathlib.Path(output), results, metrics)
    return results


def _left_out(truth: coco.GroundTruth) -> dict[str, list[str]]:
    return {"categories_left_out": list(truth.left_out)} if truth.left_out else {}


def _notes(truth: coco.GroundTruth) -> dict[str, list[str]]:
    return {"notes": list(truth.notes)} if truth.notes else {}


def _evaluator(truth: coco.GroundTruth) -> coco.CocoEvaluator | lvis.LvisEvaluator:
    if isinstance(truth, lvis.LvisGroundTruth):
        return lvis.LvisEvaluator(truth)
    return coco.CocoEvaluator(truth)


class _Metrics(NamedTuple):
    """What an evaluator computed, by the keys of results.json."""

    values: dict[str, Any]  # "standard", "fixed" and "groups" for LVIS, else "coco"
    protocols: dict[str, str]  # for LVIS, what "standard" and "fixed" mean
    categories: list[dict[str, Any]] | None  # for LVIS, the metrics of each category


def _metrics(evaluator: coco.CocoEvaluator | lvis.LvisEvaluator) -> _Metrics:
    found = evaluator.result()
    if not isinstance(found, lvis.LvisScores):
        return _Metrics({"coco": found}, {}, None)
    values = {"standard": found.standard, "fixed": found.fixed, "groups": found.groups}
    return _Metrics(values, PROTOCOLS, found.categories)


def _write_results(output: pathlib.Path, results: dict[str, Any], metrics: _Metrics) -> None:
    write_json(output / "results.json", results)
    if metrics.categories is not None:
        write_json(output / "categories.json", metrics.categories)


@contextlib.contextmanager
def _optional_writer(
    output: pathlib.Path | None, results_json: bool
) -> Iterator[Callable[..., None]]:
    """Write a results file if asked to; else yield a function that does nothing."""
    if output is None or not results_json:
        yield lambda *_: None
        return
    with results_writer(output / "predictions.json") as write:
        yield write


class _ImageProblems:
    """Counts the images that are missing, unreadable or of another size; warns of the first few."""

    def __init__(
        self,
        truth: coco.GroundTruth,
        image_dir: str | pathlib.Path,
        paths: Sequence[pathlib.Path | None],
    ):
        self._truth, self._image_dir, self._paths = truth, image_dir, paths
        self.counts = {
            "images": len(truth.images),
            "images_missing": 0,
            "images_unreadable": 0,
            "images_other_size": 0,
        }

    def count(self, number: int, answer: Answer) -> None:
        """Count what is wrong with the image of an answer, if anything."""
        image = self._truth.images[number]
        if answer is None:
            self._add(
                "images_missing", f"image {image.given_id} was not found in {self._image_dir}."
            )
        elif isinstance(answer, UserError):
            self._add("images_unreadable", str(answer))
        elif image.height and answer.size != (image.height, image.width):
            self._add(
                "images_other_size",
                f"{self._paths[number]} has {answer.size[0]}×{answer.size[1]} pixels, but the "
                f"annotations say {image.height}×{image.width}. Its boxes are scaled.",
            )

    def _add(self, key: str, sentence: str) -> None:
        self.counts[key] += 1
        if self.counts[key] <= _WARNINGS:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)

    def check_any_image(self) -> None:
        """Raise `UserError` if no image could be read."""
        lost = self.counts["images_missing"] + self.counts["images_unreadable"]
        if lost == self.counts["images"]:
            raise UserError(
                f"none of the {lost} images could be read in {self._image_dir}. Give the directory "
                "of the images (--images=DIR; in a training run, config.eval.images)."
            )


def _spread(numbers: Sequence[int], count: int) -> set[int]:
    """Return `count` of the numbers, evenly spread."""
    picks = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return {numbers[pick] for pick in picks}
