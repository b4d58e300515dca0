"""CLIP's text projection is loaded, and the meanings of real names survive it.

A file holds a known projection; the features before it are chosen so that those after it are CLIP's
embeddings of all names of a data set.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import shared_data
import tiny_model
from safetensors.numpy import save_file

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import detclip
from detclipv2_jax.models.parameters import match_rules, parameter_paths
from detclipv2_jax.training import initialize
from detclipv2_jax.training.initialize import InitConfig
from detclipv2_jax.training.optimizer import OptimizerConfig
from detclipv2_jax.weights import clip

NAMES = {"o365_clip_a+cnamefix.npy": 365, "lvis_v1_clip_a+cname.npy": 1203}


def config(embed_dim):
    """Return a tiny model with CLIP ViT-B's width and a vocabulary of a few tokens."""
    base = tiny_model.CONFIG
    return dataclasses.replace(
        base,
        similarity="cosine",
        head=dataclasses.replace(base.head, embed_dim=embed_dim),
        text=dataclasses.replace(base.text, width=512, heads=8, vocab=16, embed_dim=embed_dim),
    )


@pytest.fixture(scope="module")
def projection():
    """A 512 × 512 projection whose singular values span a factor of ten."""
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(512, 512)))[0] for _ in range(2))
    return (left * np.geomspace(0.3, 3.0, 512)) @ right


@pytest.fixture(scope="module")
def clip_file(projection, tmp_path_factory):
    """A text tower as OpenAI names it, with that projection."""
    _, params = detclip.create(config(512), 1)
    tensors = {}
    for name, value in parameter_paths(params["text"]).items():
        (theirs,) = clip.LAYOUTS[1].names(name)
        tensors[theirs] = np.asarray(value.T if name.endswith("kernel") else value, np.float32)
    tensors["text_projection"] = projection.astype(np.float32)
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return str(path)


def initialized(clip_file, embed_dim):
    params = detclip.create(config(embed_dim), 0)[1]
    return initialize.initialize(params, InitConfig(backbone="scratch", text=clip_file))


def nearest(embeddings):
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines.argmax(axis=1)


def kept(name, projection, ours):
    """Return the share of names that keep their nearest neighbor, in bfloat16 as on devices."""
    embeddings = np.load(shared_data.clip_text() / name).astype(np.float64)
    assert embeddings.shape == (NAMES[name], 512)
    features = jnp.asarray(embeddings @ np.linalg.inv(projection), jnp.bfloat16)
    found = jnp.matmul(features, ours.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return (nearest(np.asarray(found, np.float64)) == nearest(embeddings)).mean()


@pytest.mark.parametrize("name", NAMES)
def test_names_keep_their_nearest_neighbors(name, clip_file, projection):
    params, (report,) = initialized(clip_file, 512)
    assert not report.not_loaded
    assert kept(name, projection, params["text"]["text_projection"]) >= 0.95
    # What the recipes had before: a random projection to 256 dimensions.
    params, _ = initialized(clip_file, 256)
    assert kept(name, projection, params["text"]["text_projection"]) < 0.80


def test_a_random_projection_with_a_reduced_rate_is_refused(clip_file):
    params, reports = initialized(clip_file, 256)
    factors = lambda *rules: match_rules((*rules, *OptimizerConfig().lr_rules), params, "rate")
    message = (
        r"^config.optimizer.lr_rules: text/text_projection trains at 0.1 times .*clip.safetensors "
        r"has no values of its shape \(512, 256\).*'text/text_projection', 1.0.*embed_dim"
    )
    with pytest.raises(UserError, match=message):
        initialize.check_rates(params, reports, factors())
    initialize.check_rates(params, reports, factors(("text/text_projection", 1.0)))
    params, reports = initialized(clip_file, 512)
    initialize.check_rates(params, reports, factors())
