"""Measures a model on an LVIS- or COCO-format set, in a training run or as a job of its own.

    python -m detclipv2_jax.evaluate --checkpoint=DIR --dataset=FILE.json --output=DIR
    python -m detclipv2_jax.evaluate --predictions=FILE.json --dataset=FILE.json --output=DIR

All names of the set are asked at once. Runs without TensorFlow.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from detclipv2_jax import drawing, images
from detclipv2_jax import results as results_file
from detclipv2_jax.commands import status
from detclipv2_jax.errors import UserError
from detclipv2_jax.evaluation import coco, lvis
from detclipv2_jax.files import write_json
from detclipv2_jax.ops.nms import nms
from detclipv2_jax.predictor import ImageDetections, Predictor, Texts, detect_config
from detclipv2_jax.prompting import CHOICES, Prompting, prompting

_PROTOCOLS = {
    "standard": "best 300 detections of each image",
    "fixed": "best 10,000 detections of each category, no limit an image",
}
_EXPLAINED = 3  # problems with images that are spelt out before only their number is


def evaluate_lvis(
    predictor: Predictor,
    ground_truth: lvis.LvisGroundTruth,
    image_dir: str | pathlib.Path,
    *,
    prompts: Prompting = Prompting(),  # noqa: B008 - frozen
    step: int | None = None,
    output: str | pathlib.Path | None = None,
    pictures: int = 8,
    progress: bool = True,
) -> dict[str, Any]:
    """Standard and fixed AP of one set of detections, over all categories, r/c/f and groups.

    With `output`, writes there `results.json` (what is returned), `categories.json` (both AP of
    each category) and `detections/step_….png` (ground truth beside the best detections of
    `pictures` images).

    Returns:
      {"dataset", "step", "standard", "fixed", "groups": {name: {"standard", "fixed"}}, "settings"},
      fractions of one, None where there is no ground truth. Images that are missing or cannot be
      read count as images without detections; "settings" tells how many.

    Raises:
      UserError: not one image was found or could be read.
    """
    evaluator = lvis.LvisEvaluator(ground_truth)
    settings = _detect_all(
        predictor, ground_truth, image_dir, evaluator.add, prompts, step, output, pictures, progress
    )
    scores = evaluator.result()
    results = {
        "dataset": ground_truth.path,
        "step": step,
        "standard": scores.standard,
        "fixed": scores.fixed,
        "groups": scores.groups,
        "settings": {
            **_settings(predictor),
            **_PROTOCOLS,
            **settings,
        },
    }
    if output is not None:
        write_json(pathlib.Path(output) / "results.json", results)
        write_json(pathlib.Path(output) / "categories.json", scores.categories)
    return results


def evaluate_coco(
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
    """COCO's twelve figures; otherwise as `evaluate_lvis`.

    Returns:
      {"dataset", "step", "coco", "settings"}.
    """
    evaluator = coco.CocoEvaluator(ground_truth)
    settings = _detect_all(
        predictor, ground_truth, image_dir, evaluator.add, prompts, step, output, pictures, progress
    )
    results = {
        "dataset": ground_truth.path,
        "step": step,
        "coco": evaluator.result(),
        "settings": {**_settings(predictor), **settings},
    }
    if output is not None:
        write_json(pathlib.Path(output) / "results.json", results)
    return results


def evaluate(predictor: Predictor, ground_truth: coco.GroundTruth, *args, **options) -> dict:
    """`evaluate_lvis` or `evaluate_coco`, as the ground truth is."""
    federated = isinstance(ground_truth, lvis.LvisGroundTruth)
    return (evaluate_lvis if federated else evaluate_coco)(
        predictor, ground_truth, *args, **options
    )


def evaluate_predictions(
    path: str | pathlib.Path,
    ground_truth: coco.GroundTruth,
    *,
    output: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """The figures of a results file (COCO's and LVIS's format), of this or of any other tool.

    Returns:
      As `evaluate_lvis` or `evaluate_coco`, with "predictions" for "step"; "settings" tells how
      many entries were of unknown images or categories.

    Raises:
      UserError: the file cannot be read, or an entry is broken.
    """
    predictions = results_file.read(path, ground_truth)
    for text in predictions.oddities():
        tqdm.write(f"warning: {path}: {text}", file=sys.stderr)
    figures = results_file.measure(predictions, ground_truth)
    categories = figures.pop("categories", None)
    results = {
        "dataset": ground_truth.path,
        "predictions": str(path),
        **figures,
        "settings": {
            **({} if "coco" in figures else _PROTOCOLS),
            "images": len(ground_truth.images),
            **predictions.counts,
        },
    }
    if output is not None:
        write_json(pathlib.Path(output) / "results.json", results)
        if categories is not None:
            write_json(pathlib.Path(output) / "categories.json", categories)
    return results


def load_ground_truth(path: str | pathlib.Path, layout: str = "auto") -> coco.GroundTruth:
    """An annotation file as LVIS or COCO ground truth; `layout` is 'auto', 'lvis' or 'coco'.

    Raises:
      UserError: the file is missing or broken; names the file and the field.
    """
    content = coco.read_annotations(path)
    federated = lvis.is_lvis(content) if layout == "auto" else layout == "lvis"
    return (lvis if federated else coco).from_content(path, content)


def readable(name: str) -> str:
    """A category's name as people write it: LVIS spells 'traffic_light'."""
    return " ".join(name.replace("_", " ").split())


def table(results: dict[str, Any]) -> str:
    """The results for people: a block for each protocol, so that no column mixes two."""
    settings = results["settings"]
    source = results.get("predictions") or f"step {results['step']}"
    lines = [f"{results['dataset']}, {source}: {settings['images']} images"]
    for problem in ("missing", "unreadable", "other_size"):
        if count := settings.get(f"images_{problem}"):
            lines[0] += f", {count} {problem.replace('_', ' ')}"
    if "coco" in results:
        blocks = {"COCO": {"all": results["coco"]}}
    else:
        blocks = {
            f"{protocol} AP ({settings[protocol]})": {
                "all": results[protocol],
                **{name: group[protocol] for name, group in results["groups"].items()},
            }
            for protocol in ("fixed", "standard")
        }
    for title, rows in blocks.items():
        columns = list(rows["all"])
        width = max(map(len, rows))
        lines += ["", title, " ".join([" " * width, *(f"{column:>6}" for column in columns)])]
        for name, row in rows.items():
            lines.append(" ".join([f"{name:<{width}}", *(_cell(row, key) for key in columns)]))
    return "\n".join(lines)


def _cell(row: dict[str, float | None], key: str) -> str:
    """A figure; '-' where there was no ground truth, blank where the row has no such figure."""
    if key not in row:
        return " " * 6
    return "     -" if row[key] is None else f"{row[key]:6.3f}"


def _settings(predictor: Predictor) -> dict[str, Any]:
    return {**dataclasses.asdict(predictor.config), "canvas": list(predictor.canvas)}


def _detect_all(
    predictor: Predictor,
    truth: coco.GroundTruth,
    image_dir: str | pathlib.Path,
    add: Callable[..., None],
    prompts: Prompting,
    step: int | None,
    output: str | pathlib.Path | None,
    pictures: int,
    progress: bool,
) -> dict[str, Any]:
    """Hands the detections of every image to `add`; tells how it asked and what was wrong."""
    texts = prompts.encode(
        predictor,
        [readable(category.name) for category in truth.categories],
        [(category.definition, category.synset) for category in truth.categories],
    )
    category_ids = np.asarray([category.id for category in truth.categories])
    paths = [find_image(image, image_dir) for image in truth.images]
    problems = _Problems(len(paths))
    wanted = _evenly([n for n, path in enumerate(paths) if path], pictures if output else 0)
    samples: dict[int, ImageDetections] = {}
    for number, found in _answers(predictor, paths, texts, progress):
        image = truth.images[number]
        if found is None:
            problems.add("missing", f"image {image.id} is not under {image_dir}")
            continue
        if isinstance(found, UserError):
            problems.add("unreadable", str(found))
            continue
        if found.size != (image.height, image.width):
            sizes = f"{found.size[0]}×{found.size[1]}, not {image.height}×{image.width}"
            problems.add(
                "other_size",
                f"{paths[number]} is {sizes} as the annotations say; its boxes were scaled",
            )
        scale = np.tile([image.width / found.size[1], image.height / found.size[0]], 2)
        add(image.id, found.boxes * scale, found.scores, category_ids[found.labels])
        if number in wanted:
            samples[number] = found
    problems.check(image_dir)
    if samples:
        name = "detections" if step is None else f"step_{step:08d}"
        sheet = _compare(truth, paths, samples)
        drawing.save(sheet, pathlib.Path(output) / "detections" / f"{name}.png")
    return {**prompts.settings(texts), **problems.counts}


def _answers(
    predictor: Predictor, paths: Sequence[pathlib.Path | None], texts: Texts, progress: bool
) -> Iterator[tuple[int, ImageDetections | UserError | None]]:
    """Yields (number of the path, its answer); None, first of all, where there is no path."""
    yield from ((number, None) for number, path in enumerate(paths) if path is None)
    here = [number for number, path in enumerate(paths) if path is not None]
    stream = predictor.stream([paths[number] for number in here], texts)
    bar = tqdm(stream, total=len(here), desc="evaluating", unit="image", disable=not progress)
    yield from ((here[index], found) for index, found in bar)


class _Problems:
    """Counts what is wrong with images, and explains the first few of each sort."""

    def __init__(self, images: int):
        self.counts = {
            "images": images,
            "images_missing": 0,
            "images_unreadable": 0,
            "images_other_size": 0,
        }

    def add(self, sort: str, sentence: str) -> None:
        self.counts[f"images_{sort}"] += 1
        if self.counts[f"images_{sort}"] <= _EXPLAINED:
            tqdm.write(f"warning: {sentence}", file=sys.stderr)

    def check(self, image_dir: str | pathlib.Path) -> None:
        """Raises UserError where no image at all could be measured."""
        lost = self.counts["images_missing"] + self.counts["images_unreadable"]
        if lost == self.counts["images"]:
            raise UserError(
                f"none of the {lost} images could be read under {image_dir}; "
                "set the directory that holds them (--images=DIR)."
            )


def find_image(image: coco.ImageInfo, image_dir: str | pathlib.Path) -> pathlib.Path | None:
    """The file of an image: by its `file_name`, or by the end of its `coco_url` as in LVIS."""
    names = [image.file_name] if image.file_name else []
    if image.coco_url:
        names.append("/".join(image.coco_url.split("/")[-2:]))
    names += [pathlib.PurePosixPath(name).name for name in names]
    for name in names:
        path = pathlib.Path(image_dir) / name
        if path.is_file():
            return path
    return None


def guess_image_dir(ground_truth: coco.GroundTruth) -> pathlib.Path:
    """Where the images of an annotation file lie, by the habits of COCO-format sets.

    Raises:
      UserError: in none of the usual places.
    """
    home = pathlib.Path(ground_truth.path).absolute().parent
    places = [home, home / "images", home.parent / "images", home.parent]
    for place in places:
        if any(find_image(image, place) for image in ground_truth.images[:20]):
            return place
    looked = ", ".join(map(str, places))
    raise UserError(f"the images of {ground_truth.path} are not in {looked}; give --images=DIR.")


def _evenly(numbers: Sequence[int], count: int) -> set[int]:
    """`count` of the numbers, spread over them."""
    picks = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return {numbers[pick] for pick in picks}


def _compare(
    truth: coco.GroundTruth,
    paths: Sequence[pathlib.Path | None],
    samples: dict[int, ImageDetections],
):
    """A sheet with ground truth on the left and the best detections on the right of each image."""
    names = {category.id: readable(category.name) for category in truth.categories}
    sheets, titles = [], []
    for number in sorted(samples):
        image, found = truth.images[number], samples[number]
        pixels, rows = images.read(paths[number]), truth.rows[image.id]
        scale = np.tile([found.size[1] / image.width, found.size[0] / image.height], 2)
        labels = [names[int(key)] for key in truth.category_ids[rows]]
        sheets.append(drawing.draw_boxes(pixels, truth.boxes[rows] * scale, labels, side=480))
        titles.append(f"{image.file_name or image.id}: truth, {len(rows)} boxes")
        # As many as there is to find: readable for a young model and for a good one.
        best = _best_names(found)[: max(len(rows), 3)]
        answers = (found.boxes[best], [found.names[n] for n in best], found.scores[best])
        sheets.append(drawing.draw_boxes(pixels, *answers, side=480))
        titles.append(f"the best {len(best)} detections")
    return drawing.grid(sheets, titles, columns=4)


def _best_names(found: ImageDetections) -> Int[np.ndarray, " k"]:
    """Of the best detections, those that no better one overlaps, whatever the names: one a place.

    For pictures only; what is measured keeps every name of a place.
    """
    count = min(len(found), 200)
    everything = np.ones(count, bool)
    return np.flatnonzero(nms(found.boxes[:count], found.scores[:count], everything, 0.6))


def run(args: argparse.Namespace) -> None:
    """Evaluates as the command line says, writes and prints the results."""
    truth = load_ground_truth(args.dataset, args.format)
    if args.predictions:
        print(table(evaluate_predictions(args.predictions, truth, output=args.output)))
        print(f"\nwritten to {args.output}: results.json")
        return
    image_dir = pathlib.Path(args.images) if args.images else guess_image_dir(truth)
    from detclipv2_jax.checkpoint import load_model  # orbax, which a training run has already

    loaded = load_model(args.checkpoint, args.step)
    predictor = Predictor(
        loaded.graphdef,
        loaded.params,
        canvas=loaded.config["eval"]["canvas"],
        config=detect_config(loaded.config),
        batch_size=args.batch_size or loaded.config["eval"]["batch_size"],
    )
    prompts = prompting(loaded.config, loaded.definitions, args.definitions)
    results = evaluate(
        predictor, truth, image_dir, prompts=prompts, step=loaded.step, output=args.output
    )
    print(table(results))
    print(f"\nwritten to {args.output}: results.json, detections/*.png")


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.evaluate",
        description="Measures a checkpoint on an LVIS set (standard and fixed AP) or a COCO-format "
        "set (COCO's twelve figures); writes results.json and pictures, prints a table.",
    )
    detector = result.add_mutually_exclusive_group(required=True)
    detector.add_argument("--checkpoint", metavar="DIR", help="the workdir of a training run")
    detector.add_argument(
        "--predictions",
        metavar="FILE.json",
        help="instead: a results file of COCO's and LVIS's format, of any tool",
    )
    result.add_argument(
        "--dataset",
        required=True,
        metavar="FILE.json",
        help="annotations, LVIS v1 or COCO instances",
    )
    result.add_argument(
        "--images", metavar="DIR", help="where its images lie (default: near the annotations)"
    )
    result.add_argument(
        "--format", choices=("auto", "lvis", "coco"), default="auto", help="(default: %(default)s)"
    )
    result.add_argument("--output", required=True, metavar="DIR", help="where to write")
    result.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    result.add_argument(
        "--batch_size", type=int, help="images at once (default: as in the training run)"
    )
    result.add_argument(
        "--definitions",
        choices=CHOICES,
        help="ask for names with their definitions (default: as in the training run)",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, in one sentence."""
    return status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
