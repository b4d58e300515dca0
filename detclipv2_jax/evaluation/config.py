"""Settings of the evaluations during training: the config section `eval`."""

import dataclasses

from detclipv2_jax.inference.config import DetectConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig(DetectConfig):
    """The validation data and how the detector is queried. Checkpoints store it for later jobs.

    Attributes:
      dataset: LVIS or COCO JSON, relative to `data_dir`. Empty: no evaluation. "auto": the
        validation set that `detclip prepare custom` wrote next to the first source of boxes, if
        there is one.
      images: directory of its images, relative to `data_dir`. Empty: near the annotations.
      zero_shot: a second dataset, of categories that are not trained on, to see whether they are
        forgotten. Empty: none. "auto:FILE": that file, if it exists.
      zero_shot_images: directory of its images, relative to `data_dir`.
      pictures: how many validation images each evaluation draws, and how many images of the run's
        image-text data, each phrase of the caption with its best region.
    """

    dataset: str = ""
    images: str = ""
    zero_shot: str = ""
    zero_shot_images: str = ""
    pictures: int = 8
