"""The config of a run: every field with its type, default and meaning.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`; `parse` converts it to the
`RunConfig` that the rest of the code reads, and refuses unknown fields by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import DataConfig
from detclipv2_jax.evaluation.config import EvalConfig
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.training import check
from detclipv2_jax.training.initialize import InitConfig
from detclipv2_jax.training.objective import LossConfig
from detclipv2_jax.training.optimizer import OptimizerConfig

EACH_EPOCH = -1  # of `TrainConfig.eval_every`


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of a run, and how often it logs, saves and evaluates."""

    RENAMED = {"keep": "keep_checkpoints"}

    epochs: float = 12.0  # passes over every source (paper §4.1)
    log_every: int = 50  # steps between lines of metrics.jsonl
    checkpoint_every: int = 1000  # steps between checkpoints
    # Steps between evaluations; -1: one epoch; 0: only after the last step. A checkpoint is saved
    # where the score is the best so far.
    eval_every: int = 0
    eval_first: bool = False  # evaluate before the first step too: where fine-tuning starts from
    keep_checkpoints: int = 3  # the newest checkpoints are kept (at least two), and the best one
    max_skipped: int = 20  # skipped steps in a row (not finite, or spikes) that stop the run


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The device mesh: data × fsdp devices. The batch is split over all of them."""

    data: int = -1  # copies of the parameters; -1: as many as there are devices for
    fsdp: int = 1  # devices that share one copy of parameters, moments and moving average


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The config of a run."""

    model: DetCLIPConfig
    init: InitConfig = InitConfig()
    data_dir: str = "data"  # directory of the prepared sources
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0  # of parameters, order, negatives and augmentation

    def __post_init__(self):
        cosine = self.model.similarity == "cosine"
        if cosine and self.model.initial_scale > self.optimizer.max_scale:
            raise UserError(
                f"config.model.initial_scale is {self.model.initial_scale}, above "
                f"config.optimizer.max_scale {self.optimizer.max_scale}. Lower it, or raise the "
                "limit."
            )


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Return the config that nested dicts describe, checked as a whole.

    Raises:
        UserError: a field is unknown or invalid, or fields do not fit together; names them.
    """
    config = config_dict.from_dict(RunConfig, values, "config")
    check.check_run(config)
    return config
