"""What a detector answers."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from detclipv2_jax.common.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Detections:
    """What a detector answers for a batch of images, best first, padded to a static length."""

    boxes: Float[Array, "B T 4"]  # pixels of the canvas
    scores: Float[Array, "B T"]  # probabilities
    labels: Int[Array, "B T"]  # index into the asked names
    mask: Bool[Array, "B T"]  # False: padding


@dataclasses.dataclass(frozen=True)
class ImageDetections:
    """What was found in one image, best first.

    Boxes are xyxy in the image's own pixels, clipped to it; `labels` index the asked names and
    `names` spells them; `size` is the image's (height, width). The same once more under the names
    that `supervision.Detections` gives them: xyxy, confidence, class_id, data["class_name"].
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    names: tuple[str, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def xyxy(self) -> Float[np.ndarray, "n 4"]:
        """`boxes`."""
        return self.boxes

    @property
    def confidence(self) -> Float[np.ndarray, " n"]:
        """`scores`."""
        return self.scores

    @property
    def class_id(self) -> Int[np.ndarray, " n"]:
        """`labels`."""
        return self.labels

    @property
    def data(self) -> dict[str, np.ndarray]:
        """{"class_name": `names` as an array}."""
        return {"class_name": np.array(self.names, dtype=str)}

    def best(self, count: int) -> "ImageDetections":
        """The first `count` of them."""
        return dataclasses.replace(
            self,
            boxes=self.boxes[:count],
            scores=self.scores[:count],
            labels=self.labels[:count],
            names=self.names[:count],
        )

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, for its annotators, trackers and zones.

        Raises:
          UserError: the package `supervision` is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision needs `pip install supervision`.") from None
        return supervision.Detections(
            xyxy=self.xyxy, confidence=self.confidence, class_id=self.class_id, data=self.data
        )
