"""The schema of a run: every field a config may set, typed, with what it means.

A config file (`configs/*.py`) returns an `ml_collections.ConfigDict`; `RunConfig` is what the rest
of the code sees. A field that is not listed here is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from detclipv2_jax.common import config_dict
from detclipv2_jax.data.config import DataConfig
from detclipv2_jax.evaluation.config import EvalConfig
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.training.initialize import InitConfig
from detclipv2_jax.training.objective import LossConfig
from detclipv2_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run, in epochs and steps."""

    RENAMED = {"keep": "keep_checkpoints"}

    epochs: float = 12.0  # passes over every source (paper §4.1)
    log_every: int = 50
    checkpoint_every: int = 1000  # steps between checkpoints
    eval_every: int = 0  # steps between evaluations; 0 = only after the last step
    eval_first: bool = False  # before the first step as well: what a fine-tuning starts from
    keep_checkpoints: int = 3  # newest checkpoints kept, beside the best
    max_skipped: int = 20  # non-finite or spiking steps in a row after which the run stops


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
    return config_dict.from_dict(RunConfig, values, "config")
