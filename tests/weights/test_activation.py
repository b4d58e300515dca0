"""The activation of a CLIP text tower is read where its files state it."""

import json

import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import activation

OPEN_CLIP = {"model_cfg": {"embed_dim": 512, "text_cfg": {"width": 512}}}
QUICK = {"model_cfg": OPEN_CLIP["model_cfg"] | {"quick_gelu": True}}


def file(tmp_path, **configs):
    for name, content in configs.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "model.safetensors").touch()
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("open_clip_config", OPEN_CLIP, "gelu"),
        ("open_clip_config", QUICK, "quick_gelu"),
        ("config", {"model_type": "clip_text_model", "hidden_act": "gelu"}, "gelu"),
        ("config", {"model_type": "clip_text_model"}, "quick_gelu"),
        ("config", {"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "gelu"),
        ("config", {"model_type": "swin", "hidden_act": "gelu"}, None),
        ("config", "not JSON", None),
        ("other", {}, None),
    ],
)
def test_configs_next_to_the_file(tmp_path, name, content, expected):
    found = activation.stated(file(tmp_path, **{name: content}))
    assert found.activation == expected
    assert expected is None or found.where == str(tmp_path / f"{name}.json")


def test_another_activation_is_refused(tmp_path):
    path = file(tmp_path, config={"model_type": "clip_text_model", "hidden_act": "gelu_new"})
    with pytest.raises(UserError, match="config.json: .* has the activation 'gelu_new'"):
        activation.stated(path)


def test_the_config_must_agree_with_the_file(tmp_path):
    path = file(tmp_path, open_clip_config=OPEN_CLIP)
    with pytest.raises(UserError, match="^config.model.text.activation is 'quick_gelu', but"):
        activation.check("quick_gelu", path)
    assert f"gelu, as {tmp_path}" in str(activation.check("gelu", path))


def test_an_assumption_is_reported(tmp_path):
    path = file(tmp_path)
    assert "quick_gelu is assumed: neither" in str(activation.check("quick_gelu", path))
    assert str(activation.check("gelu", path)).endswith("as config.model.text.activation states")
