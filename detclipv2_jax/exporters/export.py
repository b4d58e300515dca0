"""A checkpoint as files for other programs."""

import argparse
import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.atomic import replacing, write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.exporters import card, manifest, onnx, safetensors, saved_model, stablehlo
from detclipv2_jax.exporters.served import ServedModel
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


DETECTORS = ("stablehlo", "savedmodel", "onnx")


def served_model(
    loaded: "LoadedModel",
    names: Sequence[str] | None = None,
    *,
    canvas: tuple[int, int] | None = None,
    score_threshold: float = 0.05,
    max_detections: int = 300,
    definitions: str | None = None,
) -> tuple[ServedModel, dict[str, str]]:
    """What the detectors' formats write, and the text that stands for each name that has another.

    `names` None makes the vocabulary an input; the texts are then those of all names whose
    definition the run knew. Computes in float32, whatever the run trained in; `canvas` is by
    default the one that the run was evaluated in.

    Raises:
      UserError: an empty name, or one that is given twice.
    """
    from detclipv2_jax.inference.detector import Detector
    from detclipv2_jax.models import detclip

    graphdef, _ = detclip.abstract(
        dataclasses.replace(loaded.model, dtype="float32", remat="none", loop=False, kernels="xla")
    )
    detector = Detector(
        dataclasses.replace(loaded, graphdef=graphdef),
        score_threshold=score_threshold,
        max_detections=max_detections,
        definitions=definitions,
    )
    served = ServedModel(
        graphdef=graphdef,
        params=jax.tree.map(np.asarray, loaded.params),
        canvas=tuple(canvas or loaded.detect.canvas),
        config=detector.predictor.config,
    )
    if names is None:
        return served, detector.prompts.known()
    texts = detector.encode(names)
    embeddings = np.asarray(texts.embeddings)[: len(names)]
    prompts = {normalize(name): text for name, text in zip(names, texts.prompts)}
    return dataclasses.replace(served, names=tuple(names), texts=embeddings), prompts


def run(args: argparse.Namespace) -> None:
    """Exports as the command line says."""
    from detclipv2_jax.inference.checkpoint import load_model

    names, canvas = _names(args), _canvas(args.canvas)
    if args.rows < 1:
        raise UserError(f"--rows={args.rows} leaves no room for a name; give 1 or more.")
    loaded = load_model(args.checkpoint, args.step)
    output = pathlib.Path(args.output)
    about = {"step": loaded.step}
    if args.format == "safetensors":
        if names or canvas:
            raise UserError(
                "--format=safetensors writes all parameters and no detector: leave "
                "--names, --names_file and --canvas out."
            )
        files = safetensors.write(loaded, output)
        settings = config_dict.to_dict(loaded.detect)
        about |= {"format": args.format, "settings": settings, "names": loaded.names}
        about |= {"definitions": dict(loaded.definitions)}
    else:
        files, description = _write_detector(args, loaded, names, canvas, output)
        about |= description
    about |= {"files": files, "versions": manifest.versions(args.format)}
    write_json(output / "manifest.json", about)
    text = card.card(loaded, about, _results(args.checkpoint), args.license)
    with replacing(output / "README.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    for file in dict.fromkeys(files.values()):
        size = sum(f.stat().st_size for f in (output / file, *(output / file).rglob("*")))
        print(f"{output / file}: step {loaded.step}, {size / 1e6:.1f} MB")


def _write_detector(
    args: argparse.Namespace,
    loaded: "LoadedModel",
    names: list[str] | None,
    canvas: tuple[int, int] | None,
    output: pathlib.Path,
) -> tuple[dict[str, str], dict[str, Any]]:
    """Writes the files of a detector; returns them by role, and the manifest."""
    served, prompts = served_model(
        loaded,
        names,
        canvas=canvas,
        score_threshold=args.score_threshold,
        max_detections=args.max_detections,
        definitions=args.definitions,
    )
    if args.format == "stablehlo":
        files, rows = stablehlo.write(served, output, args.rows), args.rows
    elif args.format == "savedmodel":
        files, rows = saved_model.write(served, output), "rows"
    else:
        files, rows = onnx.write(served, output), "rows"
    example = pathlib.Path(__file__).parent / "example.py"
    with replacing(output / "example.py") as temporary:
        temporary.write_bytes(example.read_bytes())
    if names is None:
        manifest.write_tokenizer(output / "tokenizer.json")
    return files, manifest.manifest(served, args.format, rows) | {"prompts": prompts}


def _names(args: argparse.Namespace) -> list[str] | None:
    """None: the vocabulary is an input."""
    from detclipv2_jax.inference.detect_files import asked_names

    if args.names is None and args.names_file is None:
        return None
    return asked_names(args.names, args.names_file)


def _canvas(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match or not all(32 <= int(side) <= 8192 for side in match.groups()):
        raise UserError(
            f"--canvas={text}: give height x width in pixels, each 32 to 8192, as in 800x1344."
        )
    return int(match[1]), int(match[2])


def _results(checkpoint: str) -> Mapping[str, Any] | None:
    """What the run's own evaluation wrote, if it is there."""
    root = pathlib.Path(checkpoint)
    for path in (root / "results.json", root.parent / "results.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found if isinstance(found, dict) else None
    return None
