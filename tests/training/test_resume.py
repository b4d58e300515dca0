"""A start is refused if the checkpoint's parameters mean something else, or it trains nothing."""

import dataclasses
import json

import pytest
import tiny_model

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.training import resume
from detclipv2_jax.training.config import RunConfig

CONFIG = RunConfig(model=tiny_model.CONFIG)


def stored(config=CONFIG):
    return json.loads(json.dumps(config_dict.to_dict(config)))


def changed(path, value, config=CONFIG):
    """Return the config with another value of a field."""
    name, _, rest = path.partition(".")
    value = changed(rest, value, getattr(config, name)) if rest else value
    return dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.text.heads", 1),
        ("model.text.activation", "gelu"),
        ("model.head.groups", 4),
        ("model.anchors.scale", 4.0),
        ("model.anchors.offset", 0.0),
        ("model.similarity", "dot"),
        ("model.mask_padding", not CONFIG.model.mask_padding),
        ("model.swin.window", 5),
    ],
)
def test_a_field_that_changes_what_the_model_computes_is_refused(field, value):
    was = config_dict.to_dict(CONFIG)
    for name in field.split("."):
        was = was[name]
    assert was != value
    with pytest.raises(UserError) as error:
        resume.check_same_model(stored(), changed(field, value), "runs/a")
    assert f"config.{field} is {value!r}, was {was!r}. Set the old values, or" in str(error.value)
    assert str(error.value).startswith("runs/a: ")


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.remat", "dots"), ("model.dtype", "bfloat16"), ("train.epochs", 3.0), ("seed", 7)],
)
def test_other_fields_may_change(field, value):
    resume.check_same_model(stored(), changed(field, value), "runs/a")


def test_a_stored_config_of_an_older_version_has_the_defaults_of_what_it_lacks():
    old = stored()
    del old["model"]["mask_padding"]
    resume.check_same_model(old, CONFIG, "runs/a")
    resume.check_unchanged(old, CONFIG, 9, "runs/a")
    with pytest.raises(UserError, match="config.model.mask_padding is True, was False"):
        resume.check_same_model(old, changed("model.mask_padding", True), "runs/a")


@pytest.mark.parametrize(
    ("field", "value"),
    [("optimizer.learning_rate", 0.5), ("train.epochs", 1.0), ("data.detection.flip", 0.1)],
)
def test_a_finished_run_refuses_settings_that_would_train_nothing(field, value):
    with pytest.raises(UserError) as error:
        resume.check_unchanged(stored(), changed(field, value), 9, "runs/a")
    message = str(error.value)
    assert message.startswith("runs/a: the run has done its 9 steps")
    assert f"config.{field} is {value!r}, was " in message
    assert "--config.init.model=runs/a, or train it longer with a higher config.train" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [("eval.dataset", "val.json"), ("mesh.fsdp", 2), ("data_dir", "d"), ("model.remat", "dots")],
)
def test_a_finished_run_is_measured_with_other_settings(field, value):
    resume.check_unchanged(stored(), changed(field, value), 9, "runs/a")
