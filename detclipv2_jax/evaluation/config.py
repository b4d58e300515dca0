"""The schema of the evaluations in a run."""

import dataclasses

from detclipv2_jax.inference.predict import DetectConfig
from detclipv2_jax.inference.prompts import Definitions


@dataclasses.dataclass(frozen=True)
class EvalConfig(DetectConfig):
    """The validation set and how the detector is asked; the checkpoint carries it to later jobs."""

    dataset: str = ""  # LVIS or COCO JSON, relative to data_dir; "" = no evaluation
    images: str = ""  # folder of its images, relative to data_dir
    zero_shot: str = ""  # a second set, of what is not trained on: is it forgotten? "" = none
    zero_shot_images: str = ""  # folder of its images, relative to data_dir
    canvas: tuple[int, int] = (800, 1344)  # (height, width) that pictures are scaled into
    batch_size: int = 8
    pictures: int = 8  # validation pictures drawn at each evaluation
    definitions: Definitions = "as_trained"  # are names asked with their definitions? on, off, or
    # as the detection data had them (paper §1: in training and in testing)
    prompts: tuple[str, ...] = ()  # or in sentences, as 'a photo of a {}.': their mean is asked
