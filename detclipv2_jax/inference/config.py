"""Settings of a detector: how model outputs become detections, and how it is queried.

A training run has these fields in its config section `eval`. Every checkpoint stores them.
"""

import dataclasses
from typing import Literal, get_args

from detclipv2_jax.common.errors import UserError

Definitions = Literal["as_trained", "on", "off"]
DEFINITIONS: tuple[Definitions, ...] = get_args(Definitions)


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How the model's dense output becomes detections. The paper gives none of these values.

    Attributes:
      score_threshold: only detections that score above it are returned. 0 for measuring AP.
      nms_iou: IoU above which non-maximum suppression drops the box with the lower score. A box
        suppresses only boxes of the same name. The default is ATSS's.
      pre_nms_top_k: for each name, only so many anchors enter suppression, those with the best
        scores. 0: all. An object has about ten anchors with a high score, so 100 keep about a
        third of 100 objects of one name.
      max_detections: at most this many boxes per image, the best of all names together. The default
        is for measuring: standard AP uses 300, and fixed AP, which has no limit per image, 10,000
        per name over a whole dataset. `Detector` and exported files return 300.
      score: 'alignment*centerness' ranks by the product of the two probabilities, as ATSS does;
        'alignment' leaves the centerness out.
    """

    score_threshold: float = 0.0
    nms_iou: float = 0.6
    pre_nms_top_k: int = 0
    max_detections: int = 10_000
    score: Literal["alignment*centerness", "alignment"] = "alignment*centerness"

    RENAMED = {"candidates": "pre_nms_top_k", "keep": "max_detections"}

    def __post_init__(self):
        if self.score not in ("alignment*centerness", "alignment"):
            raise UserError(
                f"score is {self.score!r}, expected 'alignment*centerness' or 'alignment'."
            )
        if not 0 <= self.score_threshold < 1:
            raise UserError(
                f"score_threshold is {self.score_threshold}. Choose a value from 0 up to, but "
                "not including, 1."
            )
        if not 0 < self.nms_iou <= 1:
            raise UserError(f"nms_iou is {self.nms_iou}. Choose a value above 0 and at most 1.")
        for field, least in (("max_detections", 1), ("pre_nms_top_k", 0)):
            if getattr(self, field) < least:
                raise UserError(f"{field} is {getattr(self, field)}. Choose {least} or more.")


@dataclasses.dataclass(frozen=True)
class DetectConfig(DecodeConfig):
    """`DecodeConfig`, and how images and names are given to the model.

    Attributes:
      canvas: (height, width) in pixels. Images are scaled to fit into it.
      batch_size: images per call of the compiled program.
      definitions: whether to ask for names with their definitions: 'on', 'off', or 'as_trained'
        (like the names of the detection data in training; Yao et al. 2023 use definitions both in
        training and in testing).
      prompts: sentences such as 'a photo of a {}.'. The mean of their text embeddings stands for
        the name. Empty: the name itself is the prompt.
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
