"""Loading of valid and invalid files, written here with the publishers' names."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file, save_file

from detclipv2_jax import export
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.detclip import abstract, create
from detclipv2_jax.models.parameters import parameter_paths
from detclipv2_jax.training import initialize
from detclipv2_jax.training.initialize import InitConfig
from detclipv2_jax.weights import clip, swin


def arrays(seed):
    return {n: np.asarray(v) for n, v in parameter_paths(tiny_model.parts(seed)[1]).items()}


def backbone_file(path, dtype=np.float32, change=lambda tensors: None, publisher=swin.LAYOUTS[1]):
    """Write the backbone of seed 1 as the official code names and arranges it."""
    tensors = {}
    for name, value in arrays(1).items():
        if name.startswith("backbone/") and "/norms/" not in name:
            (theirs,) = publisher.names(name.removeprefix("backbone/"))
            if theirs == "patch_embed.proj.weight":
                value = value.reshape(4, 4, 3, -1).transpose(3, 2, 0, 1)
            elif name.endswith("kernel"):
                value = value.T
            tensors[theirs] = np.ascontiguousarray(value.astype(dtype))
    tensors["head.weight"] = np.zeros((10, 64), dtype)
    change(tensors)
    save_file(tensors, path)
    return str(path)


def start(**paths):
    params, reports = initialize.initialize(tiny_model.parts()[1], InitConfig(**paths))
    return {n: np.asarray(v) for n, v in parameter_paths(params).items()}, reports


def test_a_backbone_replaces_the_backbone_only(tmp_path):
    found, (report,) = start(backbone=backbone_file(tmp_path / "swin.safetensors"))
    before, other = arrays(0), arrays(1)
    for name, value in found.items():
        loaded = name.startswith("backbone/") and "/norms/" not in name
        np.testing.assert_array_equal(value, (other if loaded else before)[name], name)
        assert (name in report.loaded) == loaded
    assert report.unused == ("head.weight",) and len(report.not_loaded) == 6
    table = initialize.table([report])
    assert "backbone from" in table and "(the official code)" in table
    assert "backbone/norms/*/scale (3)" in table and "head.weight" in table


def test_no_file_changes_nothing():
    found, reports = start()
    assert not reports and initialize.table(reports) == ""
    for name, value in arrays(0).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(tmp_path, dtype):
    found, _ = start(backbone=backbone_file(tmp_path / "swin.safetensors", dtype))
    name = "backbone/layers/0/blocks/0/attn/qkv/kernel"
    assert found[name].dtype == np.float32
    np.testing.assert_array_equal(found[name], arrays(1)[name].astype(dtype).astype(np.float32))


def test_a_text_tower_takes_the_first_positions(tmp_path):
    tensors = {
        clip.LAYOUTS[1].names(name.removeprefix("text/"))[0]: value
        for name, value in arrays(1).items()
        if name.startswith("text/")
    }
    tensors = {n: v.T if n.endswith("weight") and v.ndim == 2 else v for n, v in tensors.items()}
    tensors["token_embedding.weight"] = arrays(1)["text/token_embedding"]
    positions = np.random.default_rng(0).normal(size=(77, 16)).astype(np.float32)
    tensors["positional_embedding"] = positions
    tensors = {n: np.ascontiguousarray(v) for n, v in tensors.items()}
    save_file(tensors, tmp_path / "clip.safetensors")
    found, (report,) = start(text=str(tmp_path / "clip.safetensors"))
    assert report.publisher == "OpenAI" and not report.not_loaded and not report.unused
    for name, value in arrays(1).items():
        if name.startswith("text/") and name != "text/positional_embedding":
            np.testing.assert_array_equal(found[name], value, name)
    np.testing.assert_array_equal(found["text/positional_embedding"], positions[:16])


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


QKV = "layers.1.blocks.0.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QKV), rf"{QKV} is missing, which backbone/layers/1/.*\(16, 48\) needs.*model.swin"),
        (
            put(QKV, np.zeros((48, 8), np.float32)),
            rf"{QKV} has shape \(48, 8\), which does not fit backbone/layers/1/.*model.swin",
        ),
        (put(QKV, np.full((48, 16), np.nan, np.float32)), f"{QKV} has values that are not finite"),
        (
            put(QKV, np.zeros((48, 16), np.int32)),
            f"{QKV} has type int32. Use a file of floating-point",
        ),
        (
            put("layers.2.blocks.6.norm1.weight", np.ones(32, np.float32)),
            "layers.2.blocks.6.norm1.weight belongs to a layer that .*model.swin",
        ),
        (
            put(
                "layers.0.blocks.0.attn.relative_position_bias_table", np.ones((50, 1), np.float32)
            ),
            r"relative_position_bias_table has shape \(50, 1\)",
        ),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, message):
    path = backbone_file(tmp_path / "swin.safetensors", change=change)
    with pytest.raises(UserError, match=message) as error:
        start(backbone=path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "swin.safetensors"
    backbone_file(path)
    cut(path, share)
    with pytest.raises(UserError, match="not a complete safetensors file.*Download it again"):
        start(backbone=str(path))


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors: no such file"):
        start(backbone=str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights.h5: .h5 is not a known format .*\.safetensors"):
        start(backbone=str(tmp_path / "weights.h5"))
    save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(
        UserError,
        match=r"\(conv1.weight, …\) match no known layout of backbone.*timm, the official",
    ):
        start(backbone=str(tmp_path / "resnet.safetensors"))
    with pytest.raises(UserError, match=r"layout of text weights.*: Hugging Face, OpenAI"):
        start(text=backbone_file(tmp_path / "swin.safetensors"))


def test_a_file_of_a_student_and_its_teacher_is_refused(tmp_path):
    def both(tensors):
        named = {name: tensors.pop(name) for name in list(tensors)}
        for number, prefix in enumerate(("student.backbone.", "teacher.backbone.")):
            tensors |= {prefix + name: value + number for name, value in named.items()}

    with pytest.raises(UserError, match=r"2 models.*'student.backbone.', 'teacher.backbone.'"):
        start(backbone=backbone_file(tmp_path / "both.safetensors", change=both))


def test_a_prefix_before_every_name(tmp_path):
    def named(tensors):
        for name in list(tensors):
            tensors["module.backbone." + name] = tensors.pop(name)

    found, _ = start(backbone=backbone_file(tmp_path / "ddp.safetensors", change=named))
    name = "backbone/patch_embed/proj/kernel"
    np.testing.assert_array_equal(found[name], arrays(1)[name])


def test_export_and_load_are_bit_equal(tmp_path, monkeypatch, capsys):
    graphdef, params = create(tiny_model.CONFIG, 1)
    loaded = dataclasses.replace(tiny_model.loaded(), params=params)
    monkeypatch.setattr("detclipv2_jax.inference.checkpoint.load_model", lambda *_: loaded)
    command = ["--checkpoint=run", "--format=safetensors", f"--output={tmp_path / 'out'}"]
    assert export.main(command) == 0
    assert "model.safetensors: step 7, " in capsys.readouterr().out
    path = tmp_path / "out" / "model.safetensors"
    assert "backbone.layers.0.blocks.0.attn.qkv.kernel" in load_file(path)
    found, (report,) = start(model=str(path))
    assert not report.not_loaded and not report.unused and len(report.loaded) == len(found)
    initialize.check_same_function(tiny_model.CONFIG, str(path))
    for name, value in arrays(1).items():
        assert found[name].tobytes() == value.tobytes(), name


def change_of(field):
    """Return the tiny model with another value of a field that changes no parameter's shape."""
    base, (section, _, name) = tiny_model.CONFIG, field.rpartition(".")
    values = {
        "similarity": "dot", "scale": 4.0, "offset": 0.0, "groups": 4, "activation": "gelu",
        "heads": 4,
    }  # fmt: skip
    if not section:
        return dataclasses.replace(base, **{name: values[name]})
    part = dataclasses.replace(getattr(base, section), **{name: values[name]})
    return dataclasses.replace(base, **{section: part})


@pytest.mark.parametrize("field", initialize._SAME)
def test_a_model_that_computes_something_else_is_refused(tmp_path, field):
    stored, shapes = change_of(field), lambda cfg: jax.tree.map(jnp.shape, abstract(cfg)[1])
    assert shapes(stored) == shapes(tiny_model.CONFIG)  # so nothing else would tell
    metadata = {"model": json.dumps(stored.to_dict())}
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors", metadata)
    with pytest.raises(UserError, match=f"^config.model.{field} is .*was trained with"):
        initialize.check_same_function(tiny_model.CONFIG, str(tmp_path / "model.safetensors"))


def test_an_export_of_another_model_is_refused(tmp_path):
    params = tiny_model.parts(1)[1]
    flat = {n.replace("/", "."): np.asarray(v) for n, v in parameter_paths(params).items()}
    del flat["head.scales"]
    save_file(flat, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="head.scales is missing, which head/scales"):
        start(model=str(tmp_path / "model.safetensors"))
