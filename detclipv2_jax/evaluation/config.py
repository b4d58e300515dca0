"""The schema of the evaluations in a run."""

import dataclasses

from detclipv2_jax.inference.config import DetectConfig


@dataclasses.dataclass(frozen=True)
class EvalConfig(DetectConfig):
    """The validation set and how the detector is asked; the checkpoint carries it to later jobs."""

    dataset: str = ""  # LVIS or COCO JSON, relative to data_dir; "" = no evaluation
    images: str = ""  # folder of its images, relative to data_dir
    zero_shot: str = ""  # a second set, of what is not trained on: is it forgotten? "" = none
    zero_shot_images: str = ""  # folder of its images, relative to data_dir
    pictures: int = 8  # validation pictures drawn at each evaluation
