"""The results of a detector, of a batch and of one image.

`Detections` and `ImageDetections`: where the names are. `BestRegions` and `PhraseRegions`: the one
region that fits each phrase best.
"""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
    """Detections of a batch of images: best first, padded to a fixed length T.

    Attributes:
      boxes: (x_min, y_min, x_max, y_max) in pixels of the canvas.
      scores: probabilities.
      labels: index into the names that were asked for.
      mask: False where there is no detection (padding).
      best_scores: the highest score of each image, whatever the threshold; 0 if there is none.
      best_labels: the name that has it.
    """

    boxes: Float[Array, "B T 4"]
    scores: Float[Array, "B T"]
    labels: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    best_scores: Float[Array, " B"]
    best_labels: Int[Array, " B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BestRegions:
    """The best region of each of P phrases, for each image of a batch, in the phrases' order.

    Attributes:
      boxes: (x_min, y_min, x_max, y_max) in pixels of the canvas.
      scores: probabilities, without the centerness.
      similarities: of region and phrase: cosines, or dot products if the model compares by them.
      mask: False where there is no phrase, or no region for it.
    """

    boxes: Float[Array, "B P 4"]
    scores: Float[Array, "B P"]
    similarities: Float[Array, "B P"]
    mask: Bool[Array, "B P"]


@dataclasses.dataclass(frozen=True)
class PhraseRegions:
    """The best region of each phrase of one image's caption, in the order of the n phrases.

    Attributes:
      phrases: what was looked for.
      boxes: (x_min, y_min, x_max, y_max) in pixels of the image, clipped to it.
      scores: probabilities, without the centerness.
      similarities: of region and phrase: cosines, or dot products if the model compares by them.
      size: (height, width) of the image in pixels.
    """

    phrases: tuple[str, ...]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    similarities: Float[np.ndarray, " n"]
    size: tuple[int, int]


def summary(names: Iterable[str], best: "ImageDetections | None") -> str:
    """Return for example '2 cat, 1 dog', or why nothing is found.

    Args:
      names: of the boxes that are found, in an image or in all frames of a video.
      best: of the image, or of the frame with the highest best score; None: there is none.
    """
    counts = collections.Counter(names).most_common()
    if counts:
        return ", ".join(f"{count} {printable(name)}" for name, count in counts)
    if best is None or best.best_score is None or best.threshold is None:
        return "nothing found"
    if not best.best_score:
        return "nothing found: no region has a score above 0"
    # As many digits as show that the score is not above the threshold.
    shown = (n for n in (2, 3, 4) if round(best.best_score, n) < best.threshold)
    score = f"{best.best_score:.{next(shown, 6)}f}"
    return (
        f"nothing found: best score {score} ({printable(best.best_name)}), not above "
        f"score_threshold {best.threshold:g}"
    )


@dataclasses.dataclass(frozen=True)
class ImageDetections:
    """Detections of one image, best first. `len()` is their number n.

    The properties `xyxy`, `confidence`, `class_id` and `data` give the same values under the names
    of `supervision.Detections`.

    Attributes:
      boxes: (x_min, y_min, x_max, y_max) in pixels of the image, clipped to it.
      scores: between 0 and 1.
      labels: index into the names that were asked for.
      names: the name of each box.
      size: (height, width) of the image in pixels.
      best_score: the highest score of any region for any name, also below the threshold: what to
        look at where nothing is found. 0 if no region has a score, None if it is not known.
      best_name: the name that has it.
      threshold: the score threshold that was applied; None if it is not known.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    size: tuple[int, int]
    best_score: float | None = None
    best_name: str | None = None
    threshold: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def xyxy(self) -> Float[np.ndarray, "n 4"]:
        """The same as `boxes`."""
        return self.boxes

    @property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """The same as `scores`."""
        return self.scores

    @property
    def class_id(self) -> Int[np.ndarray, " n"]:
        """The same as `labels`."""
        return self.labels

    @property
    def data(self) -> dict[str, np.ndarray]:
        """A dict with `names` as an array of strings under the key "class_name"."""
        return {"class_name": np.array(self.names, dtype=str)}

    def __str__(self) -> str:
        """For example '2 cat, 1 dog', or why nothing is found."""
        return summary(self.names, self)

    def best(self, count: int) -> "ImageDetections":
        """Return the `count` detections with the highest scores."""
        return dataclasses.replace(
            self,
            boxes=self.boxes[:count],
            scores=self.scores[:count],
            labels=self.labels[:count],
            names=self.names[:count],
        )

    def to_supervision(self) -> Any:
        """Return a `supervision.Detections`, for that package's annotators, trackers and zones.

        Raises:
          UserError: the package `supervision` is not installed.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports]  # optional
        except ImportError:
            raise UserError(
                "to_supervision() needs the package supervision. Run `pip install supervision`."
            ) from None
        return supervision.Detections(
            xyxy=self.xyxy, confidence=self.confidence, class_id=self.class_id, data=self.data
        )
