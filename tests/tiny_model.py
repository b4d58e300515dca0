"""A DetCLIP with a few thousand random parameters, for tests of the code around the model."""

import functools

from detclipv2_jax.inference.checkpoint import LoadedModel
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.models.atss_head import HeadConfig
from detclipv2_jax.models.detclip import DetCLIPConfig, create
from detclipv2_jax.models.swin import SwinConfig
from detclipv2_jax.models.text import TextConfig

CONFIG = DetCLIPConfig(
    swin=SwinConfig(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), window=4),
    neck_channels=8,
    head=HeadConfig(channels=8, convs=1, groups=2, embed_dim=8),
    text=TextConfig(width=16, layers=1, heads=2, embed_dim=8),
    prior=0.5,
)
CANVAS = (64, 64)  # square: one program for images of any shape


@functools.cache
def parts(seed=0):
    """Return (graphdef, params)."""
    return create(CONFIG, seed)


def be_checkpoint(monkeypatch, loaded):
    """Let every command find what `loaded()` returns as the only checkpoint, that of step 7."""
    from detclipv2_jax.inference import checkpoint, checkpoint_files

    monkeypatch.setattr(checkpoint, "steps", lambda path: [7])
    monkeypatch.setattr(checkpoint_files, "chosen_intact", lambda path: 7)
    monkeypatch.setattr(checkpoint, "load_model", lambda path, step=None: loaded())


def loaded(**evaluation):
    """Return what `load_model` returns for it; `evaluation` sets fields of its `DetectConfig`."""
    graphdef, params = parts()
    section = {
        "canvas": CANVAS,
        "batch_size": 2,
        "pre_nms_top_k": 60,
        "max_detections": 20,
        **evaluation,
    }
    return LoadedModel(
        graphdef, params, CONFIG, DetectConfig(**section), 7, ["cat"], {}, run={"eval": section}
    )
