"""Text embeddings from a file of weights equal those of the tower itself."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.text import TextConfig, TextTower
from detclipv2_jax.text.tokenizer import tokenize
from detclipv2_jax.weights import clip
from detclipv2_jax.weights.text_embedder import text_embedder

NAMES = ["cat", "traffic light", "🙂", "word " * 40, ""]
OPENAI = clip.LAYOUTS[1]


def tower(width=128, embed_dim=24):
    """Return a tower with heads of 64 channels, as in every CLIP."""
    config = TextConfig(width=width, layers=3, heads=width // 64, embed_dim=embed_dim)
    draw = jax.random.normal(jax.random.key(0), (8_000_000,))
    return nnx.jit(lambda draw: TextTower(config, rngs=Draws(draw)))(draw)


def tensors(model, *, projection=True):
    """Return its parameters as OpenAI names and arranges them, among those of other parts."""
    found = {"visual.conv1.weight": np.zeros((3, 3), np.float32)}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        local = "/".join(map(str, path))
        value = np.asarray(variable[...])
        if local == "text_projection" and not projection:
            continue
        if local == "positional_embedding":
            value = np.concatenate([value, np.ones((61, value.shape[1]), np.float32)])
        (name,) = OPENAI.names(local)
        found[name] = np.ascontiguousarray(value.T if local.endswith("kernel") else value)
    return found


@pytest.mark.parametrize("projection", [True, False])
def test_embeddings_equal_the_towers(tmp_path, projection):
    model = tower()
    save_file(tensors(model, projection=projection), tmp_path / "clip.safetensors")
    if not projection:
        model = tower(embed_dim=128)
        model.text_projection[...] = np.eye(128)
    embed = text_embedder(tmp_path / "clip.safetensors")
    expected = np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, tokenize(NAMES)))
    np.testing.assert_allclose(embed(NAMES), expected, atol=2e-5)
    many = embed(NAMES * 60)  # more than a batch
    assert many.shape == (300, expected.shape[1])
    np.testing.assert_allclose(many[-5:], expected, atol=2e-5)
    assert len(embed([])) == 0


def test_a_file_without_a_text_tower_is_refused(tmp_path):
    save_file({"conv1.weight": np.zeros(3, np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"resnet.safetensors: .*match no known layout"):
        text_embedder(tmp_path / "resnet.safetensors")
    with pytest.raises(UserError, match=r"none.pt: no such file"):
        text_embedder(tmp_path / "none.pt")
    broken = tensors(tower())
    del broken["transformer.resblocks.1.ln_2.weight"]
    save_file(broken, tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"resblocks.1.ln_2.weight is missing"):
        text_embedder(tmp_path / "clip.safetensors")
