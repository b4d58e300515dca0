"""Measuring a model, or a results file, on a set with boxes."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, lvis, results_file
from detclipv2_jax.evaluation.answers import Answer
from detclipv2_jax.evaluation.datasets import find_image
from detclipv2_jax.evaluation.report import PROTOCOLS, compare, readable
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.predictor import Predictor, Texts
from detclipv2_jax.inference.prompts import Prompting

_EXPLAINED = 3  # problems with images that are spelt out before only their number is


def measure_model(
    predictor: Predictor,
    ground_truth: coco.GroundTruth,
    image_dir: str | pathlib.Path,
    *,
    prompts: Prompting = Prompting(),  # noqa: B008 - frozen
    step: int | None = None,
    output: str | pathlib.Path | None = None,
    pictures: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Asks a model for all names of a set on all of its images, and measures what it answers.

    With `output`, writes there what `measure_answers` does. Every process makes this call.

    Returns:
      As `measure_answers`.

    Raises:
      UserError: not one image was found or could be read.
    """
    texts = encode_names(predictor, ground_truth, prompts)
    paths = [find_image(image, image_dir) for image in ground_truth.images]
    return measure_answers(
        ground_truth,
        image_dir,
        paths,
        _answers(predictor, paths, texts, progress),
        {"step": step},
        {**_settings(predictor), **prompts.settings(texts)},
        output=output,
        pictures=pictures,
    )


def encode_names(predictor: Predictor, truth: coco.GroundTruth, prompts: Prompting) -> Texts:
    """The set's names, encoded; two categories of one name are two rows."""
    return prompts.encode(
        predictor,
        [readable(category.name) for category in truth.categories],
        [(category.definition, category.synset) for category in truth.categories],
    )


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
    """The figures of the answers to images, (number of the image, answer) in any order.

    LVIS sets get standard and fixed AP of one and the same detections, over all categories, r/c/f
    and groups; others COCO's twelve figures. With `output`, writes there `results.json` (what is
    returned), for LVIS `categories.json` (both AP of each category), `detections/….png` (ground
    truth beside the best detections of `pictures` images) and, with `results_json`, the detections
    as `predictions.json` in COCO's and LVIS's form.

    Returns:
      {"dataset", *about, "standard", "fixed", "groups": {name: {"standard", "fixed"}}, "settings"}
      or {"dataset", *about, "coco", "settings"}: fractions of one, None where there is no ground
      truth. Images that are missing or cannot be read count as images without detections;
      "settings" tells how many.

    Raises:
      UserError: not one image was found or could be read.
    """
    federated = isinstance(truth, lvis.LvisGroundTruth)
    evaluator = (lvis.LvisEvaluator if federated else coco.CocoEvaluator)(truth)
    output = None if output is None else pathlib.Path(output)
    with contextlib.ExitStack() as stack:
        write = None
        if output is not None and results_json:
            write = stack.enter_context(results_file.writing(output / "predictions.json"))
        wanted = _evenly([n for n, path in enumerate(paths) if path], pictures if output else 0)
        samples: dict[int, ImageDetections] = {}
        problems = _Problems(truth, image_dir, paths)
        category_ids = np.asarray([category.id for category in truth.categories])
        for number, found in answers:
            if problems.told(number, found):
                continue
            image = truth.images[number]
            scale = np.tile([image.width / found.size[1], image.height / found.size[0]], 2)
            row = (image.id, found.boxes * scale, found.scores, category_ids[found.labels])
            evaluator.add(*row)
            if write:
                write(*row)
            if number in wanted:
                samples[number] = found
        problems.check()
    results = {"dataset": truth.path, **about}
    if federated:
        scores = evaluator.result()
        results |= {"standard": scores.standard, "fixed": scores.fixed, "groups": scores.groups}
        settings = {**settings, **PROTOCOLS}
    else:
        results["coco"] = evaluator.result()
    results["settings"] = {**settings, **problems.counts}
    if output is not None:
        write_json(output / "results.json", results)
        if federated:
            write_json(output / "categories.json", scores.categories)
        if samples:
            step = about.get("step")
            name = "detections" if step is None else f"step_{step:08d}"
            drawing.save(compare(truth, paths, samples), output / "detections" / f"{name}.png")
    return results


def measure_results_file(
    path: str | pathlib.Path,
    ground_truth: coco.GroundTruth,
    *,
    output: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """The figures of a results file (COCO's and LVIS's format), of this or of any other tool.

    Returns:
      As `measure_answers`, with "predictions" for `about`; "settings" counts the entries of unknown
      images or categories.

    Raises:
      UserError: the file cannot be read, or an entry is broken.
    """
    found = results_file.read(path, ground_truth)
    for text in found.oddities():
        tqdm.write(f"warning: {path}: {text}", file=sys.stderr)
    figures = results_file.measure_file(found, ground_truth)
    categories = figures.pop("categories", None)
    results = {
        "dataset": ground_truth.path,
        "predictions": str(path),
        **figures,
        "settings": {
            **({} if "coco" in figures else PROTOCOLS),
            "images": len(ground_truth.images),
            **found.counts,
        },
    }
    if output is not None:
        write_json(pathlib.Path(output) / "results.json", results)
        if categories is not None:
            write_json(pathlib.Path(output) / "categories.json", categories)
    return results


def _settings(predictor: Predictor) -> dict[str, Any]:
    return {**dataclasses.asdict(predictor.config), "canvas": list(predictor.canvas)}


def _answers(
    predictor: Predictor, paths: Sequence[pathlib.Path | None], texts: Texts, progress: bool
) -> Iterator[tuple[int, Answer]]:
    """Yields (number of the path, its answer); None, first of all, where there is no path."""
    yield from ((number, None) for number, path in enumerate(paths) if path is None)
    here = [number for number, path in enumerate(paths) if path is not None]
    stream = predictor.stream([paths[number] for number in here], texts)
    bar = tqdm(stream, total=len(here), desc="evaluating", unit="image", disable=not progress)
    yield from ((here[index], found) for index, found in bar)


class _Problems:
    """Counts what is wrong with images, and explains the first few of each sort."""

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

    def told(self, number: int, found: Answer) -> bool:
        """Notes what is wrong with an answer; is there nothing to measure in it?"""
        image = self._truth.images[number]
        if found is None:
            self._add("missing", f"image {image.id} is not under {self._image_dir}")
        elif isinstance(found, UserError):
            self._add("unreadable", str(found))
        elif found.size != (image.height, image.width):
            sizes = f"{found.size[0]}×{found.size[1]}, not {image.height}×{image.width}"
            self._add(
                "other_size",
                f"{self._paths[number]} is {sizes} as the annotations say; its boxes were scaled",
            )
        return found is None or isinstance(found, UserError)

    def _add(self, sort: str, sentence: str) -> None:
        self.counts[f"images_{sort}"] += 1
        if self.counts[f"images_{sort}"] <= _EXPLAINED:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)

    def check(self) -> None:
        """Raises UserError where no image at all could be measured."""
        lost = self.counts["images_missing"] + self.counts["images_unreadable"]
        if lost == self.counts["images"]:
            raise UserError(
                f"none of the {lost} images could be read under {self._image_dir}; "
                "set the directory that holds them (--images=DIR)."
            )


def _evenly(numbers: Sequence[int], count: int) -> set[int]:
    """`count` of the numbers, spread over them."""
    picks = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return {numbers[pick] for pick in picks}
