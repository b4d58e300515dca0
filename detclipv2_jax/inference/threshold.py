"""Which score threshold a detector uses, and where it comes from.

Scores of two checkpoints are not comparable, so the threshold belongs to the checkpoint. Training
fits one whenever it evaluates (evaluation/threshold.py) and stores it with the checkpoint.
`detclip evaluate --store_threshold` fits one for a checkpoint that exists and stores it in the
run's `thresholds.json`, which has priority.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError

FILE = "thresholds.json"  # in the workdir: {step: what `evaluation.threshold.fitted` returns}
FALLBACK = 0.1  # for checkpoints without a fitted one
_WEAK = 0.2  # F1 below which what is found is mostly wrong, or little is found


@dataclasses.dataclass(frozen=True)
class Threshold:
    """A score threshold and where it comes from.

    Attributes:
      score_threshold: only detections with a higher score are returned.
      source: such as "fitted on val.json at step 673: F1 0.45 at IoU 0.5".
      f1: the F1 where it was fitted, in [0, 1]; None if it was not.
    """

    score_threshold: float
    source: str
    f1: float | None = None

    def __str__(self) -> str:
        """Return a text for people, with a warning if the model has not learned its data."""
        text = f"score threshold {self.score_threshold:g} ({self.source})"
        return text if self.f1 is None else "\n".join([text, *weak(self.f1)])

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a results file."""
        return {"score_threshold": self.score_threshold, "score_threshold_from": self.source}


def threshold(given: float | None, fitted: Mapping[str, Any] | None) -> Threshold:
    """Return the threshold to use: the one given, else the checkpoint's, else `FALLBACK`.

    Args:
      given: by the user.
      fitted: as stored with the checkpoint.
    """
    if given is not None:
        return Threshold(given, "as given")
    if fitted is None:
        return Threshold(
            FALLBACK,
            "a fallback: the checkpoint has none of its own; `detclip evaluate --store_threshold` "
            "fits one",
        )
    step = f" at step {fitted['step']}" if "step" in fitted else ""
    return Threshold(
        fitted["score_threshold"],
        f"fitted on {fitted['dataset']}{step}: F1 {fitted['f1']:.2f} at IoU {fitted['iou']:g}",
        fitted["f1"],
    )


def weak(f1: float) -> list[str]:
    """Return what to say of a model whose best F1 is low, in lines; none if it is not."""
    if f1 >= _WEAK:
        return []
    return [
        f"warning: at F1 {f1:.2f} most boxes are wrong, or most objects are missed. Train longer "
        "(--config.train.epochs), or start from a trained model (--config.init.model)."
    ]


def stored(workdir: Path, step: int, meta: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the threshold of a checkpoint: of `thresholds.json`, else of the checkpoint's meta.

    Raises:
      UserError: `thresholds.json` cannot be read.
    """
    return _read(workdir / FILE).get(str(step)) or meta.get("threshold")


def store(workdir: str | os.PathLike, step: int, fitted: Mapping[str, Any]) -> Path:
    """Write the threshold of a checkpoint to the run's `thresholds.json`; return the file.

    Raises:
      UserError: the file cannot be read or written.
    """
    path = Path(workdir) / FILE
    write_json(path, _read(path) | {str(step): {**fitted, "step": step}})
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Delete it, or fit it again with `detclip evaluate "
            "--store_threshold`."
        ) from None
    if not isinstance(content, dict) or not all(map(_is_valid, content.values())):
        raise UserError(
            f"{path}: is not thresholds by step. Delete it, or fit it again with `detclip evaluate "
            "--store_threshold`."
        )
    return content


def _is_valid(entry: Any) -> bool:
    """Return whether an entry has the fields that `threshold` reads."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dataset"), str):
        return False
    numbers = [entry.get(name) for name in ("score_threshold", "f1", "iou")]
    are_numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers)
    return are_numbers and 0 <= entry["score_threshold"] < 1
