"""Checks of a whole config: a run that cannot work is refused, with the field and the remedy.

`config.parse` calls `check_run`, so every command that reads a config does. `train` calls
`check_devices` and `check_start` before it opens the data. Values that one dataclass can judge
alone are checked there.
"""

import math
import operator
import re
from pathlib import Path
from typing import TYPE_CHECKING

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import rungs
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import KINDS, TEXT_KINDS, Kind
from detclipv2_jax.inference.prompts import Prompter
from detclipv2_jax.models import detclip
from detclipv2_jax.models.parameters import match_rules, parameter_paths
from detclipv2_jax.ops.boxes import level_sizes
from detclipv2_jax.text.tokenizer import CONTEXT, VOCABULARY_SIZE
from detclipv2_jax.training.objective import regions_per_image
from detclipv2_jax.training.recipes import SCRATCH
from detclipv2_jax.training.workdir import refuse_foreign
from detclipv2_jax.weights import activation, published

if TYPE_CHECKING:
    from detclipv2_jax.training.config import RunConfig

# Fields and the interval that their values lie in.
_RANGES = {
    "seed": ">= 0",
    "data.max_broken_share": ">= 0, <= 1",
    "loss.box": ">= 0",
    "loss.centerness": ">= 0",
    "loss.contrastive": ">= 0",
    "loss.classification": ">= 0",
    "loss.classification_k": ">= 1",
    "loss.proposal_heads": ">= 0",
    "loss.candidates": ">= 1",
    "loss.word_region.temperature": "> 0",
    "loss.word_region.soft_temperature": "> 0",
    "loss.word_region.label_smoothing": ">= 0, < 1",
    "loss.proposals.group": ">= 1",
    "loss.proposals.k": ">= 1",
    "loss.proposals.pre_nms_top_k": ">= 1",
    "loss.proposals.nms_iou": "> 0, <= 1",
    "optimizer.learning_rate": ">= 0",
    "optimizer.warmup_steps": ">= 0",
    "optimizer.final_fraction": ">= 0, <= 1",
    "optimizer.beta1": ">= 0, < 1",
    "optimizer.beta2": ">= 0, < 1",
    "optimizer.weight_decay": ">= 0",
    "optimizer.clip_norm": "> 0",
    "optimizer.spike_factor": ">= 0",
    "optimizer.spike_after": ">= 0",
    "optimizer.ema_decay": ">= 0, < 1",
    "train.epochs": "> 0",
    "train.log_every": ">= 0",
    "train.checkpoint_every": ">= 0",
    "train.eval_every": ">= -1",
    "train.keep_checkpoints": ">= 1",
    "train.max_skipped": ">= 1",
    "eval.batch_size": ">= 1",
    "eval.pictures": ">= 0",
    "mesh.fsdp": ">= 1",
}
_REMEDY = (
    "Set it to a file of pretrained weights (docs/weights.md), or train without them by the "
    f"recipe's variant, such as --config=pretrain.py:swin_t,{SCRATCH}."
)
_COMPARE = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def check_run(config: "RunConfig") -> None:
    """Check what a config alone can tell: ranges of values, and fields that must fit together.

    Raises:
        UserError: the message names the field and how to fix it.
    """
    for path, interval in _RANGES.items():
        value = operator.attrgetter(path)(config)
        for limit in interval.split(", "):
            sign, bound = limit.split()
            if not _COMPARE[sign](value, float(bound)):  # NaN fails too
                raise UserError(f"config.{path} is {value}. It must be {interval}.")
    _check_closed_set(config)
    _check_text_tower(config)
    _check_proposal_score(config)
    _check_rules(config)
    _check_sources(config)
    for kind, data in config.data.kinds().items():
        _check_kind(config, kind, data)
    _check_evaluation(config)
    if config.mesh.data != -1:
        if config.mesh.data < 1:
            raise UserError(
                f"config.mesh.data is {config.mesh.data}. Use -1 for all devices, or at least 1."
            )
        check_devices(config, config.mesh.data * config.mesh.fsdp)


def _check_proposal_score(config: "RunConfig") -> None:
    """Check that the head has the output that chooses the regions of captioned images."""
    score, outputs = config.loss.proposals.score, config.model.head.proposal_scores
    if score in ("foreground", "iou") and score not in outputs:
        raise UserError(
            f"config.loss.proposals.score is {score!r}, but config.model.head.proposal_scores is "
            f"{outputs!r}. Add {score!r} to it, so that the head has this output."
        )


def check_devices(config: "RunConfig", devices: int) -> None:
    """Check that the batch of every kind can be split over the devices and into micro-batches.

    Raises:
        UserError: the message names the field and how to fix it.
    """
    for kind, data in config.data.kinds().items():
        multiple = devices * data.micro_batches
        if data.batch_size % multiple:
            near = max(multiple, round(data.batch_size / multiple) * multiple)
            raise UserError(
                f"config.data.{kind}.batch_size is {data.batch_size}, which is not a multiple of "
                f"{devices} device(s) × config.data.{kind}.micro_batches {data.micro_batches}. "
                f"Choose a multiple such as {near}, fewer micro-batches, or fewer devices by "
                "config.mesh.data."
            )


def check_start(config: "RunConfig", workdir: Path) -> None:
    """Check where a run writes, and where a new one starts from.

    Args:
        config: of the run.
        workdir: of the run; if it contains a checkpoint, the run has its own parameters.

    Raises:
        UserError: the workdir has files of somebody else; a tower has neither a file nor
            "scratch", its file does not exist or is of a tower with another activation, or it is
            random and has a reduced learning rate.
    """
    from detclipv2_jax.inference.checkpoint import steps  # imports orbax

    refuse_foreign(workdir)
    if steps(workdir):
        return
    init = config.init
    if init.model:
        if steps(init.model) or Path(init.model).is_file():
            return
        raise UserError(
            f"config.init.model is {init.model!r}, which is neither the workdir of a run with a "
            "checkpoint nor a file. Train that model first, or name another one."
        )
    _check_tower(config, "backbone")
    if config.data.closed_set:
        return  # there is no text tower
    _check_tower(config, "text")
    if init.text != SCRATCH:
        print(f"{init.text}: {activation.check(config.model.text.activation, init.text)}")


def _check_tower(config: "RunConfig", part: str) -> None:
    """Check where a tower starts from, and its learning rate if it starts random."""
    path = getattr(config.init, part)
    if not path:
        raise UserError(f"config.init.{part} is empty. {_REMEDY}")
    if path == SCRATCH:
        _check_random_tower(config, part)
    elif not Path(path).is_file():
        raise UserError(
            f"config.init.{part}: the file {path} does not exist. {published.how_to_get(path)} "
            f"Or {_REMEDY[0].lower()}{_REMEDY[1:]}"
        )


def _check_random_tower(config: "RunConfig", part: str) -> None:
    _, params = detclip.abstract(config.model)
    factors = parameter_paths(match_rules(config.optimizer.lr_rules, params, "learning-rate"))
    slow = {name: f for name, f in factors.items() if name.startswith(part + "/") and f < 1}
    if slow:
        name, factor = min(slow.items(), key=lambda item: item[1])
        raise UserError(
            f"config.optimizer.lr_rules: {name} trains at {factor:g} times the learning rate, "
            f"which is meant for pretrained weights, but config.init.{part} is {SCRATCH!r}. Use "
            f"the recipe's variant, such as --config=pretrain.py:swin_t,{SCRATCH}, which sets all "
            "that a random tower needs, or set the factor to 1."
        )


def _check_closed_set(config: "RunConfig") -> None:
    """Check that a model without a text tower meets nothing but names of its classes."""
    if not config.data.closed_set:
        return
    for kind in config.data.kinds():
        if kind != "detection":
            raise UserError(
                f"config.data.closed_set is True, but config.data.{kind} has sources. Train on "
                "detection data alone, or set closed_set to False."
            )
    for path, expected in (
        ("data.detection.definitions", False),
        ("data.detection.general_negatives", 0),
        ("model.similarity", "dot"),
    ):
        if (value := operator.attrgetter(path)(config)) != expected:
            raise UserError(
                f"config.data.closed_set is True, but config.{path} is {value!r}. Set it to "
                f"{expected!r}."
            )


def _check_text_tower(config: "RunConfig") -> None:
    text = config.model.text
    if text.context < CONTEXT:
        raise UserError(
            f"config.model.text.context is {text.context}, but a concept has {CONTEXT} tokens. Set "
            f"it to {CONTEXT}."
        )
    if text.vocab < VOCABULARY_SIZE:
        raise UserError(
            f"config.model.text.vocab is {text.vocab}, but the tokenizer has {VOCABULARY_SIZE} "
            f"tokens. Set it to {VOCABULARY_SIZE}."
        )


def _check_rules(config: "RunConfig") -> None:
    for field in ("lr_rules", "decay_rules"):
        for pattern, factor in getattr(config.optimizer, field):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"config.optimizer.{field}: {pattern!r} is not a regular expression "
                    f"({error}). Fix it."
                ) from None
            if not 0 <= factor < math.inf:
                raise UserError(
                    f"config.optimizer.{field}: the factor of {pattern!r} is {factor}. It must be "
                    "at least 0."
                )


def _check_sources(config: "RunConfig") -> None:
    kinds = config.data.kinds()
    if not kinds:
        raise UserError(
            f"config.data: no kind of data has sources. Set `sources` of one of {', '.join(KINDS)}."
        )
    owner: dict[str, str] = {}
    for kind, data in kinds.items():
        for name in data.all_sources:
            if name in owner:
                raise UserError(
                    f"config.data.{kind}: source {name!r} is already one of "
                    f"config.data.{owner[name]}. Name each source once."
                )
            owner[name] = kind


def _check_kind(config: "RunConfig", kind: Kind, data: KindConfig) -> None:
    def refuse(field: str, why: str, remedy: str) -> None:
        value = getattr(data, field)
        raise UserError(f"config.data.{kind}.{field} is {value}{why}. {remedy}")

    if data.micro_batches < 1 or data.batch_size % data.micro_batches:
        refuse(
            "micro_batches",
            f", which does not divide config.data.{kind}.batch_size {data.batch_size}",
            "Choose a divisor.",
        )
    if data.definitions and not config.data.dictionary:
        refuse(
            "definitions",
            ", but config.data.dictionary is empty",
            "Set the dictionary (`detclip prepare concepts`, docs/concepts.md), or set definitions "
            "to False to train on bare names.",
        )
    if data.table_size < data.concepts_per_image:
        refuse(
            "table_size",
            f", but an image is scored on config.data.{kind}.concepts_per_image "
            f"{data.concepts_per_image} concepts",
            "Choose at least that many rows, or fewer concepts.",
        )
    if kind in TEXT_KINDS:
        _check_texts(config, kind, data)
    elif data.max_boxes < 1:
        refuse("max_boxes", "", "Choose at least 1: this kind learns from boxes.")


def _check_texts(config: "RunConfig", kind: Kind, data: KindConfig) -> None:
    """Check the fields of images with texts against each other and against the proposals."""
    where, proposals = f"config.data.{kind}", config.loss.proposals
    if kind == "classification" and data.texts_per_image != 1:
        raise UserError(
            f"{where}.texts_per_image is {data.texts_per_image}. It must be 1: an image has one "
            "class."
        )
    if data.texts_per_image < 1:
        raise UserError(
            f"{where}.texts_per_image is {data.texts_per_image}. Choose at least 1, the caption; "
            "the recipes use 8."
        )
    if kind == "image_text" and data.table_size < data.batch_size:
        raise UserError(
            f"{where}.table_size is {data.table_size}, but the {data.batch_size} captions of a "
            "batch need a row each. Choose about four rows per image of batch_size."
        )
    pools_by_group = proposals.score in ("batch", "batch_centerness")
    if pools_by_group and data.batch_size % proposals.group:
        divisor = math.gcd(data.batch_size, proposals.group)
        raise UserError(
            f"config.loss.proposals.group is {proposals.group}, which does not divide "
            f"{where}.batch_size {data.batch_size}. Choose a divisor such as {divisor}, or a batch "
            f"size that is a multiple of {proposals.group}."
        )
    k, field = regions_per_image(kind, config.loss), "proposals.k"
    if kind == "classification":
        field = "classification_k"
    for height, width in rungs.canvases(data):
        anchors = sum(level_sizes(height, width, config.model.anchors))
        if k > anchors:
            raise UserError(
                f"config.loss.{field} is {k}, but the canvas {height}×{width} of "
                f"{where} has {anchors} anchors. Choose fewer regions or a larger canvas."
            )


def _check_evaluation(config: "RunConfig") -> None:
    evaluation, detection = config.eval, config.data.detection
    if config.optimizer.auto_step.on and not evaluation.dataset:
        raise UserError(
            "config.optimizer.auto_step.on is True, but config.eval.dataset is empty. Name the "
            "validation set whose score decides, or set it to False."
        )
    if min(evaluation.canvas) < 1:
        raise UserError(
            f"config.eval.canvas is {evaluation.canvas}. Give (height, width) in pixels."
        )
    with_definitions = bool(config.data.dictionary) and detection.definitions
    if evaluation.definitions == "on" and not with_definitions:
        raise UserError(
            "config.eval.definitions is 'on', but the detection data trains on bare names "
            "(config.data.detection.definitions, config.data.dictionary). Use 'as_trained'."
        )
    try:
        Prompter.for_model(evaluation, {"": ""} if with_definitions else {}, config.data.template)
        if evaluation.prompts and evaluation.definitions == "on":
            raise UserError("names get either definitions (config.eval.definitions) or sentences.")
    except UserError as error:
        raise UserError(f"config.eval.prompts is {evaluation.prompts}: {error}") from None
