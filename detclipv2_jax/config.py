"""The schema of a run: every field a config may set, typed, with what it means.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`; `RunConfig` is what the rest
of the code sees. A field that is not listed here is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from detclipv2_jax import fields
from detclipv2_jax.data.concepts import TEMPLATE, check_template
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.objective import LossConfig
from detclipv2_jax.optimizer import OptimizerConfig
from detclipv2_jax.predictor import DetectConfig
from detclipv2_jax.prompting import Definitions
from detclipv2_jax.structures import KINDS
from detclipv2_jax.weights.initialise import InitConfig


@dataclasses.dataclass(frozen=True)
class KindConfig:
    """One kind of data: its prepared sources, its batch, how its pictures are brought to size."""

    sources: tuple[str, ...] = ()  # directories of prepared sources, relative to data_dir; () = off
    # Prepared sources of the pre-training that fine-tuning rehearses, so as not to forget [ours].
    rehearsal: tuple[str, ...] = ()
    rehearsal_share: float = 0.25  # their records an epoch, for each record of all kinds' `sources`
    batch_size: int = 128  # images a global step
    accumulate: int = 1  # parts that each device's images are cut into: less memory, the same step
    shapes: tuple[tuple[int, int], ...] = (
        (800, 1344),
        (1344, 800),
        (1088, 1088),
    )  # (height, width)
    table_size: int = 512  # rows of the step's concept table
    negatives: int = 150  # concepts an image asks for, its own included (paper §4.1: 150, 100)
    max_boxes: int = 100  # boxes an image; more are dropped, counted
    texts_per_image: int = 0  # image_text: concepts an image, caption first (ours: 8)
    flip: float = 0.5  # chance of a horizontal flip
    scales: tuple[float, float] = (0.6, 1.0)  # size of the picture relative to fitting its canvas
    crop: bool = False  # may a picture exceed its canvas and be cropped at random?
    mosaic: float = 0.0  # share of canvases with four pictures (not image_text); raise max_boxes
    begin: float = 0.0  # share of the first epoch's other batches before this kind's (paper: 0)
    definitions: bool = False  # with a dictionary: are names joined with their definitions?


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What each kind of data takes from the prepared sources."""

    prepare: str = ""  # the command that would make the data, shown where it is missing
    skip_missing: bool = False  # train without the kinds whose sources are not there
    concepts: str = ""  # directory of the prepared dictionary, relative to data_dir; "" = none
    template: str = TEMPLATE  # of a name with its definition; cut to 16 tokens at a word's end
    detection: KindConfig = KindConfig(definitions=True)
    grounding: KindConfig = KindConfig()
    image_text: KindConfig = KindConfig()
    max_broken_share: float = 0.05  # a run stops once more of its records than this are unreadable

    def __post_init__(self):
        check_template(self.template, "config.data.template")

    def kinds(self) -> dict[str, KindConfig]:
        """The kinds that have a source, by name."""
        every = {kind: getattr(self, kind) for kind in KINDS}
        return {kind: c for kind, c in every.items() if c.sources or c.rehearsal}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run, in epochs and steps."""

    epochs: float = 12.0  # passes over every source (paper §4.1)
    log_every: int = 50
    checkpoint_every: int = 1000  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations; 0 = only after the last step
    eval_first: bool = False  # before the first step as well: what a fine-tuning starts from
    keep: int = 3  # newest checkpoints kept, beside the best
    max_skipped: int = 20  # non-finite or spiking steps in a row after which the run stops


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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh: data × fsdp devices, over all of which the batch is split."""

    data: int = -1  # copies of the parameters; -1 stands for all devices that are left
    fsdp: int = 1  # devices that share one copy of parameters, optimizer and moving average


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All of a run."""

    model: DetCLIPConfig
    init: InitConfig = InitConfig()
    data_dir: str = "data"  # where the prepared sources lie
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0


def parse(values: Mapping[str, Any]) -> RunConfig:
    """The run that nested dicts describe; UserError names a field that is unknown or mistyped."""
    return fields.from_dict(RunConfig, values, "config")
