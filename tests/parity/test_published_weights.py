"""A reference model of each publisher, saved to disk and loaded here, gives equal features."""

import collections
import re

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import timm
import torch
from comparing import apply, compare, randomized
from flax import nnx
from mmdet.models.backbones.swin import SwinTransformer
from safetensors.torch import save_file
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
)

from detclipv2_jax.models import swin, text
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.parameters import parameter_paths
from detclipv2_jax.text.tokenizer import tokenize
from detclipv2_jax.weights import activation, convert, files
from detclipv2_jax.weights import clip as clip_layouts
from detclipv2_jax.weights import swin as swin_layouts

SIZES = dict(embed_dim=16, depths=(2, 1, 3, 1), num_heads=(1, 2, 4, 4))
PICTURE = np.random.default_rng(0).normal(size=(1, 75, 110, 3)).astype(np.float32)
# timm rolls before it pads, so it computes what the others do where windows divide every map.
WHOLE = np.random.default_rng(1).normal(size=(1, 224, 224, 3)).astype(np.float32)
STAGES = ["stage2", "stage3", "stage4"]


def load(path, build, layouts, part):
    """Return (graph, parameters, report) of our module with a file's weights."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    params = _map(nnx.to_pure_dict(state), str)
    flat = parameter_paths(params)
    wanted = {f"{part}/{name}": leaf.shape for name, leaf in flat.items()}
    found, report = convert.convert(files.read(path), layouts, wanted, part, str(path))
    fresh = lambda name, leaf: jnp.full(leaf.shape, float(name.endswith("scale")))
    values = {name: found.get(f"{part}/{name}", fresh(name, leaf)) for name, leaf in flat.items()}
    tree = nested(values)
    return graphdef, _map(tree, lambda key: int(key) if key.isdigit() else key), report


def _map(tree, rename):
    if not isinstance(tree, dict):
        return tree
    return {rename(key): _map(value, rename) for key, value in tree.items()}


def nested(flat):
    tree = lambda: collections.defaultdict(tree)
    root = tree()
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = root
        for parent in parents:
            node = node[parent]
        node[last] = value
    plain = lambda n: {k: plain(v) for k, v in n.items()} if isinstance(n, dict) else n
    return plain(root)


def load_swin(path, window=7, picture=PICTURE):
    build = lambda: swin.Swin(swin.SwinConfig(**SIZES, window=window), rngs=Draws())
    graphdef, params, report = load(path, build, swin_layouts.LAYOUTS, "backbone")
    return list(apply(graphdef, params, jnp.asarray(picture))), report


def their_config():
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in SIZES.items()}
    return SwinConfig(**options, window_size=7, out_features=STAGES)


def their_maps(model):
    with torch.no_grad():
        maps = model(torch.from_numpy(PICTURE.transpose(0, 3, 1, 2)))
    maps = getattr(maps, "feature_maps", maps)  # MMDetection gives a list
    return [m.numpy().transpose(0, 2, 3, 1) for m in maps]


def test_hugging_face_backbone(tmp_path):
    model = randomized(SwinBackbone(their_config()))
    model.save_pretrained(tmp_path)
    ours, report = load_swin(tmp_path / "model.safetensors")
    assert report.publisher == "Hugging Face" and not report.not_loaded
    on = "Hugging Face backbone.safetensors"
    compare("Weights in: Swin", "transformers SwinBackbone", on, ours, their_maps(model), 1e-4)


def test_hugging_face_names_of_transformers_5(tmp_path):
    model = randomized(SwinBackbone(their_config()))
    torch.save(model.state_dict(), tmp_path / "model.bin")
    ours, report = load_swin(tmp_path / "model.bin")
    assert report.publisher == "Hugging Face (transformers 5)" and not report.not_loaded
    on = "Hugging Face model.bin, names of version 5"
    compare("Weights in: Swin", "transformers SwinBackbone", on, ours, their_maps(model), 1e-4)


def test_hugging_face_classifier(tmp_path):
    """A classifier has no norms between stages: they stay as initialized, the identity."""
    model = randomized(SwinForImageClassification(their_config()))
    model.save_pretrained(tmp_path)
    ours, report = load_swin(tmp_path / "model.safetensors")
    assert {n.split("/")[1] for n in report.not_loaded} == {"norms"} and len(report.not_loaded) == 6
    assert set(report.unused) == {
        "classifier.weight",
        "classifier.bias",
        "swin.layernorm.weight",
        "swin.layernorm.bias",
    }
    backbone = SwinBackbone(their_config()).eval()
    backbone.swin.load_state_dict(model.swin.state_dict())
    on = "Hugging Face classifier.safetensors"
    compare("Weights in: Swin", "transformers SwinBackbone", on, ours, their_maps(backbone), 1e-4)


def timm_model():
    return randomized(timm.create_model("swin_tiny_patch4_window7_224", **SIZES))


def timm_maps(model):
    """Return the maps of timm's stages, without the classifier's norm."""
    with torch.no_grad():
        x = model.patch_embed(torch.from_numpy(WHOLE.transpose(0, 3, 1, 2)))
        maps = []
        for stage in model.layers:
            x = stage(x)
            maps.append(x)
    normed = [functional.layer_norm(m, m.shape[-1:]) for m in maps[1:]]
    return [m.numpy() for m in normed]


def test_timm(tmp_path):
    model = timm_model()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    ours, report = load_swin(tmp_path / "model.safetensors", picture=WHOLE)
    assert report.publisher == "timm"
    compare(
        "Weights in: Swin",
        "timm SwinTransformer",
        "model.safetensors",
        ours,
        timm_maps(model),
        1e-4,
    )


def official_names(state):
    """Return the official names: timm's, with each merging one stage earlier, and buffers."""
    names = {}
    for name, tensor in state.items():
        found = re.match(r"layers\.(\d)\.downsample", name)
        if found:
            name = name.replace(found[0], f"layers.{int(found[1]) - 1}.downsample")
        names[name.replace("head.fc", "head")] = tensor
    names["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    names["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    return names


def test_official(tmp_path):
    model = timm_model()
    content = {"model": official_names(model.state_dict()), "epoch": 300}
    torch.save(content, tmp_path / "swin.pth")
    ours, report = load_swin(tmp_path / "swin.pth", picture=WHOLE)
    assert report.publisher == "the official code"
    assert "head.weight" in report.unused and "layers.0.blocks.1.attn_mask" in report.unused
    compare(
        "Weights in: Swin",
        "timm SwinTransformer",
        "official swin.pth",
        ours,
        timm_maps(model),
        1e-4,
    )


def mmdet_model():
    return randomized(
        SwinTransformer(
            embed_dims=SIZES["embed_dim"],
            depths=SIZES["depths"],
            num_heads=SIZES["num_heads"],
            out_indices=(1, 2, 3),
        )
    )


@pytest.mark.parametrize("half", [False, True])
def test_mmdetection(tmp_path, half):
    """A detector's file: another order of merged neighbors, a prefix and other parts."""
    model = mmdet_model()
    if half:  # the model that the file then holds
        model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
    state = {f"backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    state["bbox_head.atss_cls.weight"] = torch.zeros(80, 256, 3, 3)
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "atss_swin.pth")
    ours, report = load_swin(tmp_path / "atss_swin.pth")
    assert report.publisher == "MMDetection" and not report.not_loaded and not report.resized
    assert "bbox_head.atss_cls.weight" in report.unused
    on = f"detector .pth{', half precision' if half else ''}"
    compare("Weights in: Swin", "mmdet SwinTransformer", on, ours, their_maps(model), 1e-4)


@pytest.mark.parametrize("window", [12, 5])
def test_another_window(tmp_path, window):
    model = randomized(SwinBackbone(their_config()))
    model.save_pretrained(tmp_path)
    _, report = load_swin(tmp_path / "model.safetensors", window)
    assert len(report.resized) == sum(SIZES["depths"]) and not report.not_loaded
    rng = np.random.default_rng(1)
    table = rng.normal(size=(13 * 13, 6)).astype(np.float32)
    side = 2 * window - 1
    theirs = functional.interpolate(
        torch.from_numpy(table.T.reshape(1, 6, 13, 13)), size=(side, side), mode="bicubic"
    )
    theirs = theirs.numpy().reshape(6, -1).T
    path = "layers/0/blocks/0/attn/relative_position_bias_table"
    ours = swin_layouts.LAYOUTS[0].converter(path)([table], (side * side, 6))
    reference = "torch interpolate(bicubic)"
    compare("Weights in: bias tables", reference, f"window 7 to {window}", ours, theirs, 1e-5)


TEXTS = ["a red anchor", "", "word " * 300, "Crème brûlée"]


def load_text(path, cfg):
    build = lambda: text.TextTower(cfg, rngs=Draws())
    graphdef, params, report = load(path, build, clip_layouts.LAYOUTS, "text")
    return apply(graphdef, params, jnp.asarray(tokenize(TEXTS))), report


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_hugging_face_text(tmp_path, act):
    cfg = text.TextConfig(width=64, layers=2, heads=2, embed_dim=32, activation=act)
    their = CLIPTextConfig(
        hidden_act=act,
        hidden_size=64,
        intermediate_size=256,
        projection_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=49407,
    )
    model = randomized(CLIPTextModelWithProjection(their))
    model.save_pretrained(tmp_path)
    ours, report = load_text(tmp_path / "model.safetensors", cfg)
    found = activation.stated(tmp_path / "model.safetensors")
    assert found == (act, str(tmp_path / "config.json"))
    assert report.publisher == "Hugging Face" and not report.not_loaded
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokenize(TEXTS).astype(np.int64))).text_embeds
    reference = "transformers CLIPTextModelWithProjection"
    compare("Weights in: CLIP", reference, f"model.safetensors, {act}", ours, theirs.numpy(), 1e-4)


class Whole(torch.nn.Module):
    """A CLIP as OpenAI publishes it: an image tower, a text tower and a few other values."""

    def __init__(self, tower):
        super().__init__()
        self.visual = torch.nn.Linear(3, 4)
        self.transformer = tower.transformer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        self.context_length = 77
        self.sizes = [1, 2]

    def forward(self, x):
        return self.ln_final(self.token_embedding(x)) @ self.text_projection * self.context_length


@pytest.mark.parametrize(
    ("form", "act"),
    [
        ("TorchScript", "quick_gelu"),
        ("TorchScript", "gelu"),
        ("state_dict", "quick_gelu"),
        ("half", "quick_gelu"),
    ],
)
def test_openai_text(tmp_path, form, act):
    cfg = text.TextConfig(width=64, layers=2, heads=2, embed_dim=32, activation=act)
    layers = {"quick_gelu": open_clip.transformer.QuickGELU, "gelu": torch.nn.GELU}
    tower = open_clip.transformer.TextTransformer(
        context_length=77,
        vocab_size=cfg.vocab,
        width=64,
        heads=2,
        layers=2,
        output_dim=32,
        act_layer=layers[act],
    )
    tower = randomized(tower)
    path = tmp_path / "ViT.pt"
    if form == "half":
        tower.load_state_dict({k: v.half().float() for k, v in tower.state_dict().items()})
    whole = Whole(tower)
    if form == "state_dict":
        torch.save(whole.state_dict(), path)
    else:
        traced = torch.jit.trace(whole, torch.tensor([[1, 2]]), check_trace=False)
        torch.jit.save(traced.half() if form == "half" else traced, path)
        whole.float()
    ours, report = load_text(path, cfg)
    states = activation.stated(path).activation
    assert states == (None if form == "state_dict" else act)  # an archive has the model's code
    assert report.publisher == "OpenAI" and not report.not_loaded
    assert set(report.unused) == {"visual.weight", "visual.bias", "logit_scale"}
    tokens = np.zeros((len(TEXTS), 77), np.int64)
    tokens[:, :16] = tokenize(TEXTS)
    with torch.no_grad():
        theirs = tower(torch.from_numpy(tokens)).numpy()
    on = f"ViT.pt, {form}{' TorchScript' if form == 'half' else ''}, {act}"
    compare("Weights in: CLIP", "open_clip_torch TextTransformer", on, ours, theirs, 1e-4)


def test_a_projection_of_another_width_is_not_loaded(tmp_path):
    their = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        projection_dim=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    CLIPTextModelWithProjection(their).save_pretrained(tmp_path)
    cfg = text.TextConfig(width=64, layers=2, heads=2, embed_dim=32)
    _, report = load_text(tmp_path / "model.safetensors", cfg)
    assert report.not_loaded == ("text/text_projection",)
    assert report.unused == ("text_projection.weight",)
