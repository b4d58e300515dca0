"""Validates the backbone against Hugging Face's, with weights loaded by `weights/`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparing import apply, compare, converted, filled, randomized, to_numpy
from flax import nnx
from transformers import SwinBackbone
from transformers import SwinConfig as TheirConfig

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.swin import Swin, SwinConfig
from detclipv2_jax.weights import swin as layouts

SIZES = {
    "T": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "S": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "B": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "L": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}


def both(size, window):
    cfg = SwinConfig(**SIZES[size], window=window)
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in SIZES[size].items()}
    their = TheirConfig(**options, window_size=window, out_features=["stage2", "stage3", "stage4"])
    model = randomized(SwinBackbone(their))
    build = lambda: Swin(cfg, rngs=Draws())
    return model, *filled(build, to_numpy(model.state_dict()), layouts.LAYOUTS)


def pictures(height, width):
    return np.random.default_rng(0).normal(size=(1, height, width, 3)).astype(np.float32)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "window", "canvas"),
    [
        ("T", 7, (97, 64)),
        ("T", 7, (333, 501)),
        ("T", 12, (97, 64)),
        pytest.param("T", 7, (800, 1333), marks=slow),
        pytest.param("T", 12, (800, 1333), marks=slow),
        pytest.param("S", 7, (333, 501), marks=slow),
        pytest.param("B", 7, (333, 501), marks=slow),
        pytest.param("B", 12, (97, 64), marks=slow),
        pytest.param("L", 7, (97, 64), marks=slow),
        pytest.param("L", 12, (333, 501), marks=slow),
        pytest.param("L", 12, (800, 1333), marks=slow),
    ],
)
def test_maps(size, window, canvas):
    model, graphdef, params = both(size, window)
    x = pictures(*canvas)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).feature_maps
    theirs = [m.numpy().transpose(0, 2, 3, 1) for m in theirs]
    ours = list(apply(graphdef, params, jnp.asarray(x)))
    on = f"{canvas[0]}×{canvas[1]}, window {window}, all three maps"
    compare(f"Swin-{size}", "transformers SwinBackbone", on, ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("size", "window", "canvas"),
    [
        ("T", 7, (97, 64)),
        pytest.param("T", 7, (333, 501), marks=slow),
        pytest.param("B", 12, (97, 64), marks=slow),
    ],
)
def test_gradients(size, window, canvas):
    model, graphdef, params = both(size, window)
    x = pictures(*canvas)
    theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).feature_maps
    rng = np.random.default_rng(1)
    pull = [rng.normal(size=np.array(m.shape)[[0, 2, 3, 1]]).astype(np.float32) for m in theirs]
    sum(
        (m * torch.from_numpy(w.transpose(0, 3, 1, 2))).sum() for m, w in zip(theirs, pull)
    ).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def loss(params):
        maps = nnx.merge(graphdef, nnx.State(params))(jnp.asarray(x))
        return sum((m * w).sum() for m, w in zip(maps, pull))

    ours = jax.jit(jax.grad(loss))(params)
    theirs = converted(params, to_numpy(gradients), layouts.LAYOUTS)
    on = f"{canvas[0]}×{canvas[1]}, window {window}, gradient of every parameter"
    compare(f"Swin-{size}", "transformers SwinBackbone", on, ours, theirs, 1e-4)
