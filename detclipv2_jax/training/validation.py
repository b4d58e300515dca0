"""Evaluation of a run on its validation sets while it trains."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import AUTO
from detclipv2_jax.data.index import Source
from detclipv2_jax.evaluation import datasets, measure
from detclipv2_jax.evaluation.coco import GroundTruth
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.inference.prompts import Prompter
from detclipv2_jax.training import sharding
from detclipv2_jax.training.caption_pictures import CaptionPictures
from detclipv2_jax.training.config import RunConfig
from detclipv2_jax.training.state import TrainState

BEFORE = "before.json"  # in the workdir: results before the first step (`train.eval_first`)
NOT_MEASURED = (
    "this run is not measured. Prepare the data with a validation file or with --val_share=0.1, or "
    "name a set with --config.eval.dataset=FILE (absolute, or relative to data_dir)"
)
PHRASES = "detections/phrases"  # folder of the pictures of captions
ZERO_SHOT = "zero_shot"  # key and folder of the results on the second validation set


def with_validation_sets(config: RunConfig) -> RunConfig:
    """Return the config with the validation sets that "auto" stands for; "" where there is none.

    It prints which sets the run is measured on.
    """
    root, evaluation = Path(config.data_dir), config.eval
    if evaluation.dataset == AUTO:
        source = next(iter(config.data.detection.all_sources), "")
        folder = Path(source).parent / "validation"
        dataset, images = str(folder / "annotations.json"), str(folder / "images")
        if not (root / dataset).is_file():
            print(f"{root / dataset} does not exist, so {NOT_MEASURED}")
            dataset = images = ""
        evaluation = dataclasses.replace(evaluation, dataset=dataset, images=images)
    first, auto, zero_shot = evaluation.zero_shot.partition(f"{AUTO}:")
    if auto and not first:
        if not (root / zero_shot).is_file():
            print(f"{root / zero_shot} does not exist, so zero-shot AP is not measured")
            zero_shot = ""
        evaluation = dataclasses.replace(evaluation, zero_shot=zero_shot)
    if evaluation.dataset:
        print(f"measured on {root / evaluation.dataset}")
    return dataclasses.replace(config, eval=evaluation)


class Validator:
    """Evaluates the averaged parameters (EMA) on the config's validation sets, and draws images.

    Of a run with image-text data it also draws captions with the best region of each phrase.
    """

    def __init__(
        self,
        config: RunConfig,
        definitions: Mapping[str, str],
        workdir: Path,
        mesh: jax.sharding.Mesh,
        captioned: Mapping[str, Source],
    ):
        """Read the ground truth, so that a missing file is found before the training.

        Args:
            config: of the run.
            definitions: name → definition, as the names of detection data are trained with.
            workdir: of the run.
            mesh: the devices to evaluate on.
            captioned: the run's sources of image-text data by name, of which some images are drawn.

        Raises:
            UserError: an annotation file is missing or invalid.
        """
        self._config, self._workdir, self._mesh = config, workdir, mesh
        root = Path(config.data_dir)
        sets = {"": (config.eval.dataset, config.eval.images)}
        if config.eval.zero_shot:
            sets[ZERO_SHOT] = (config.eval.zero_shot, config.eval.zero_shot_images)
        self._sets = {
            name: _opened(root, dataset, images) for name, (dataset, images) in sets.items()
        }
        self._prompter = Prompter.for_model(config.eval, definitions, config.data.template)
        self._predictor: Predictor | None = None
        self._captions = CaptionPictures(
            captioned, config.eval.pictures, config.data.image_text.shapes[0], mesh
        )

    def __call__(self, graphdef: Any, state: TrainState) -> dict[str, Any]:
        """Evaluate and return the results; write results.json and detections/ in the workdir.

        The results of the second set, if the config names one, are under `ZERO_SHOT`, and their
        files in the folder of that name. All processes call it; the first one writes.
        """
        config = self._config.eval
        if self._predictor is None:
            self._predictor = Predictor(
                graphdef,
                state.ema,
                canvas=config.canvas,
                config=config.decoding,
                batch_size=-(-config.batch_size // self._mesh.size) * self._mesh.size,
                batch_sharding=sharding.split(self._mesh),
            )
        self._predictor.params = state.ema
        is_first = jax.process_index() == 0
        results = {
            name: measure.measure_model(
                self._predictor,
                truth,
                images,
                prompter=self._prompter,
                step=int(state.step),
                output=self._workdir / name if is_first else None,
                pictures=config.pictures,
                progress=is_first,
            )
            for name, (truth, images) in self._sets.items()
        }
        name = f"step_{int(state.step):08d}.png"
        self._captions(graphdef, state.ema, self._workdir / PHRASES / name if is_first else None)
        return results.pop("") | results


def _opened(root: Path, dataset: str, images: str) -> tuple[GroundTruth, Path]:
    """Return a validation set and the directory of its images; "" looks near the annotations."""
    truth = datasets.load_ground_truth(root / dataset)
    if not images:
        with contextlib.suppress(UserError):  # else they are relative to data_dir
            return truth, datasets.guess_image_dir(truth)
    return truth, root / images


def headline(results: dict[str, Any]) -> float:
    """Return the score that checkpoints are compared by: fixed AP, or COCO's AP; 0 if undefined."""
    return (results["fixed"] if "fixed" in results else results["coco"])["AP"] or 0.0


def scalars(results: dict[str, Any]) -> dict[str, float | None]:
    """Return results as one flat line for the log: 'fixed/AP', 'novel/fixed/AP', …"""
    tables = {name: results[name] for name in ("standard", "fixed", "coco") if name in results}
    for group, protocols in results.get("groups", {}).items():
        tables |= {f"{group}/{protocol}": figures for protocol, figures in protocols.items()}
    flat = {f"{name}/{key}": value for name, row in tables.items() for key, value in row.items()}
    second = scalars(results[ZERO_SHOT]) if ZERO_SHOT in results else {}
    return flat | {f"{ZERO_SHOT}/{name}": value for name, value in second.items()}


def compared(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return a table of the AP before the first step and after the last, by set and group."""
    old, new = scalars(before), scalars(after)
    rows = [name for name in new if name.endswith("/AP")]
    width = max(map(len, rows))
    cell = lambda value: f"{'-':>7}" if value is None else f"{value:7.3f}"
    lines = [f"{name:<{width}} {cell(old.get(name))}{cell(new[name])}" for name in rows]
    return "\n".join([f"{'':<{width}}  before  after", *lines])
