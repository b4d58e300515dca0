"""A random DetCLIP of a few thousand weights for tests of what stands around the model."""

import functools
import types

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
CANVAS = (64, 64)  # square: one program for pictures of any shape


@functools.cache
def parts(seed=0):
    """(graphdef, params)."""
    return create(CONFIG, seed)


def loaded(**evaluation):
    """What `checkpoint.load_model` gives for it."""
    graphdef, params = parts()
    section = {"canvas": CANVAS, "batch_size": 2, "candidates": 60, "keep": 20, **evaluation}
    return types.SimpleNamespace(
        graphdef=graphdef,
        params=params,
        config={"eval": section},
        step=7,
        names=["cat"],
        definitions={},
    )
