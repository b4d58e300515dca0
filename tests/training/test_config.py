import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.config import DataConfig, KindConfig
from detclipv2_jax.evaluation.config import EvalConfig
from detclipv2_jax.training import config
from detclipv2_jax.training.recipes import load


@pytest.mark.parametrize("size", ["nano", "swin_t", "swin_l"])
def test_recipes_parse_and_are_the_same_after_json(size):
    values = load("pretrain").get_config(size).to_dict()
    parsed = config.parse(values)
    assert config.parse(json.loads(json.dumps(config_dict.to_dict(parsed)))) == parsed


def test_the_recipe_has_the_papers_numbers():
    t, large = (
        config.parse(load("pretrain").get_config(s).to_dict()) for s in ("swin_t", "swin_l")
    )
    assert (t.data.detection.batch_size, large.data.detection.batch_size) == (128, 256)
    assert t.data.image_text.batch_size == large.data.image_text.batch_size == 6144
    assert t.data.image_text.shapes == ((320, 320),)
    assert (t.optimizer.learning_rate, large.optimizer.learning_rate) == (2.8e-4, 4e-4)
    assert t.optimizer.lr_rules[0] == ("text/.*", 0.1)
    assert (t.optimizer.weight_decay, t.optimizer.warmup_steps, t.train.epochs) == (0.05, 1000, 12)
    assert (t.loss.box, t.loss.centerness, t.loss.contrastive) == (2, 1, 0.1)
    assert (t.loss.proposals.k, t.loss.proposals.score) == (100, "batch")
    assert (t.loss.word_region.temperature, t.loss.word_region.label_smoothing) == (0.5, 0.1)
    assert t.loss.word_region.direction == "text_to_image" and t.loss.word_region.matching == "max"
    assert (t.data.detection.concepts_per_image, t.data.grounding.concepts_per_image) == (150, 100)
    assert t.model.swin.drop_path == 0.2 and (t.model.swin.window, large.model.swin.window) == (
        7,
        12,
    )


@pytest.mark.parametrize("size", ["nano", "swin_t", "swin_l"])
@pytest.mark.parametrize("name", ["finetune_lvis", "finetune_coco_format"])
def test_fine_tuning_rehearses_the_pretraining_of_its_size(name, size):
    before, after = (
        config.parse(load(file).get_config(size).to_dict()) for file in ("pretrain", name)
    )
    assert after.model == before.model and after.init.model and after.train.eval_first
    kinds, earlier = after.data.kinds(), before.data.kinds()
    for kind in ("grounding", "image_text"):
        assert kinds[kind].rehearsal == earlier[kind].sources and not kinds[kind].sources
        assert kinds[kind].shapes == earlier[kind].shapes
    assert kinds["detection"].sources and 0 < kinds["detection"].rehearsal_share < 1
    assert after.optimizer.learning_rate < before.optimizer.learning_rate


@pytest.mark.parametrize("size", ["swin_t", "swin_l"])
def test_the_fine_tuning_recipes_have_the_papers_numbers(size):
    lvis, coco = (
        config.parse(load(name).get_config(size).to_dict())
        for name in ("finetune_lvis", "finetune_coco_format")
    )
    assert lvis.optimizer.learning_rate == coco.optimizer.learning_rate == 4e-5
    assert lvis.optimizer.lr_rules[0] == ("text/.*", 0.1)
    assert coco.optimizer.lr_rules[0] == ("text/.*", 0.01)  # 4e-7
    assert (lvis.train.epochs, lvis.data.detection.batch_size) == (24, 64)
    assert coco.data.detection.batch_size == 32 and coco.optimizer.drops


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sed": 1}, "config.sed is not a field.*Did you mean seed"),
        ({"train": {"epoch": 1.0}}, "config.train.epoch is not a field.*epochs"),
        ({"train": {"epochs": "many"}}, "config.train.epochs must be of type float, not 'many'"),
        ({"train": 3}, "config.train must be a section"),
        ({"data": {"detection": {"shapes": ((1, 2, 3),)}}}, r"detection.shapes\[0\] must have 2"),
        ({"loss": {"proposals": {"score": "best"}}}, "config.loss.proposals.score must be one of"),
        ({"seed": True}, "config.seed must be of type int, not True"),
        (
            {"data": {"detection": {"negatives": 9}}},
            "^config.data.detection.negatives is now config.data.detection.concepts_per_image. Use",
        ),
        (
            {"loss": {"proposals": {"score": "classification"}}},
            "^config.loss.proposals.score 'classification' is now 'step'. Use",
        ),
        (
            {"loss": {"proposals": {"score": "iou"}}},
            r"score is 'iou', but config.model.head.proposal_scores is \(\). Add 'iou'",
        ),
        (
            {"model": {"head": {"proposal_scores": ["iou", "iou"]}}},
            r"proposal_scores is \('iou', 'iou'\). Choose",
        ),
        ({"eval": {"keep": 9}}, "^config.eval.keep is now config.eval.max_detections. Use"),
        ({"model": {"swin": {"depth": 3}}}, "config.model.swin.depth is not a field.*depths"),
    ],
)
def test_a_wrong_field_is_named(change, message):
    values = load("pretrain").get_config("nano").to_dict()
    with pytest.raises(UserError, match=message):
        config.parse(values | change)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("train.epoch", "^--config.train.epoch is not a field.*Did you mean epochs"),
        ("trian.epochs", "^--config.trian is not a field.*Did you mean train"),
        ("train.epochs.all", "^--config.train.epochs.all is not a field.*no fields"),
        ("", "^--config. is not a field.*It has model, init, data_dir"),
    ],
)
def test_a_wrong_path_is_named(path, message):
    config_dict.check_path(config.RunConfig, "model.swin.depths", "--config")
    with pytest.raises(UserError, match=message):
        config_dict.check_path(config.RunConfig, path, "--config")


def test_every_field_is_read_somewhere():
    package = Path(config.__file__).parents[1]
    code = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "config.py")
    for cls in (KindConfig, DataConfig, config.TrainConfig, EvalConfig):
        for name in cls.__dataclass_fields__:
            assert f".{name}" in code or f"{name}: " in code, f"{cls.__name__}.{name}"


def test_help_lists_options_recipes_and_fields():
    done = subprocess.run(
        [sys.executable, "-m", "detclipv2_jax", "train", "--help"],
        env=tiny_run.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for word in ("--workdir", "--profile", "finetune_lvis.py", "data.detection", "ema_decay"):
        assert word in done.stdout


def test_a_scale_that_starts_above_its_limit_is_refused():
    values = load("pretrain").get_config("swin_t").to_dict()
    values["optimizer"]["max_scale"] = 10.0
    with pytest.raises(UserError, match="model.initial_scale .* above config.optimizer.max_scale"):
        config.parse(values)
    values["optimizer"]["max_scale"] = 0.0
    with pytest.raises(UserError, match="config.optimizer.max_scale is 0.0"):
        config.parse(values)
