"""The schema of a detector: how its output becomes detections, and how it is asked.

A training run has these fields in its section `eval`; each checkpoint carries them.
"""

import dataclasses
from typing import Literal, get_args

from detclipv2_jax.common.errors import UserError

Definitions = Literal["as_trained", "on", "off"]
DEFINITIONS: tuple[Definitions, ...] = get_args(Definitions)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the dense output becomes detections. The paper gives none of these values.

    * `score_threshold`: detections score more than this; 0 for measuring AP.
    * `nms_iou`: ATSS's 0.6. A box suppresses only boxes of its own name.
    * `pre_nms_top_k`: anchors per name, the best, that enter suppression.
    * `max_detections`: detections per image, the best, whatever their names. Above 300, so that
      standard AP sees its 300 and fixed AP, which has no limit per image, sees more.
    * `score`: 'alignment*centerness' ranks by the product of both probabilities, as ATSS does;
      'alignment' leaves the centerness out.
    """

    score_threshold: float = 0.0
    nms_iou: float = 0.6
    pre_nms_top_k: int = 100
    max_detections: int = 1000
    score: Literal["alignment*centerness", "alignment"] = "alignment*centerness"

    RENAMED = {"candidates": "pre_nms_top_k", "keep": "max_detections"}

    def __post_init__(self):
        if self.score not in ("alignment*centerness", "alignment"):
            raise UserError(
                f"score is {self.score!r}; choose 'alignment*centerness' or 'alignment'."
            )
        if not 0 <= self.score_threshold < 1 or not 0 < self.nms_iou <= 1:
            raise UserError(
                f"score_threshold {self.score_threshold} must lie in [0, 1) and nms_iou "
                f"{self.nms_iou} in (0, 1]."
            )
        if self.max_detections < 1 or self.pre_nms_top_k < 1:
            raise UserError(
                f"max_detections {self.max_detections} and pre_nms_top_k {self.pre_nms_top_k} "
                "must be at least 1."
            )


@dataclasses.dataclass(frozen=True)
class DetectConfig(DecodeConfig):
    """How a detector is asked: picture size, batch, and the text that stands for a name.

    * `canvas`: (height, width) in pixels that pictures are scaled into.
    * `definitions`: whether names are asked with their definitions: on, off, or as the detection
      data of the training had them (paper §1: in training and in testing).
    * `prompts`: sentences such as 'a photo of a {}.'; the mean of their embeddings stands for the
      name. () = the name alone.
    """

    canvas: tuple[int, int] = (800, 1344)
    batch_size: int = 8
    definitions: Definitions = "as_trained"
    prompts: tuple[str, ...] = ()

    @property
    def decoding(self) -> DecodeConfig:
        """The fields of `DecodeConfig` alone."""
        names = [field.name for field in dataclasses.fields(DecodeConfig)]
        return DecodeConfig(**{name: getattr(self, name) for name in names})
