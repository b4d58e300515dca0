import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import swin
from detclipv2_jax.models.initializers import Draws

RNG = np.random.default_rng(0)
TINY = swin.SwinConfig(
    embed_dim=8, depths=(2, 1, 1, 1), num_heads=(2, 2, 4, 4), window=4, drop_path=0.5
)


def randomize(module, seed=0, scale=0.3):
    """Return the module with random parameters: a scale of 1 or a bias of 0 may hide a mistake."""
    graph, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    draw = lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32)
    return nnx.merge(graph, jax.tree.map(draw, state))


def apply(module, *args, **kwargs):
    graph, state = nnx.split(module)
    run = lambda state, *args: nnx.merge(graph, state)(*args, **kwargs)
    return jax.jit(run)(state, *args)


def value(parameter):
    return np.asarray(parameter[...], np.float64)


def layer_norm(x, norm):
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
    return x * value(norm.scale) + value(norm.bias)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def naive_block(block, x, window, heads):
    """Compute a Swin block token by token, without rolls, windows or masks.

    The shifted partition cuts each axis at shift, shift + window, …. Two tokens attend to each
    other if they are between the same cuts.
    """
    batch, height, width, channels = x.shape
    normed = np.zeros(
        (batch, -(-height // window) * window, -(-width // window) * window, channels)
    )
    normed[:, :height, :width] = layer_norm(x, block.norm1)
    attn, table = block.attn, value(block.attn.relative_position_bias_table)
    qkv = normed @ value(attn.qkv.kernel) + value(attn.qkv.bias)
    query, key, val = (
        part.reshape(*normed.shape[:3], heads, channels // heads) for part in np.split(qkv, 3, -1)
    )
    places = [(y, x) for y in range(normed.shape[1]) for x in range(normed.shape[2])]
    cell = lambda place: tuple((p - block.shift) // window for p in place)
    attended = np.zeros_like(x)
    for y, x_ in np.ndindex(height, width):
        seen = [p for p in places if cell(p) == cell((y, x_))]
        ys, xs = np.asarray(seen).T
        row = (y - ys + window - 1) * (2 * window - 1) + x_ - xs + window - 1
        scores = np.einsum("bhd,bkhd->bkh", query[:, y, x_], key[:, ys, xs])
        scores = scores / math.sqrt(channels // heads) + table[row]
        scores = np.exp(scores - scores.max(1, keepdims=True))
        weights = scores / scores.sum(1, keepdims=True)
        out = np.einsum("bkh,bkhd->bhd", weights, val[:, ys, xs]).reshape(batch, channels)
        attended[:, y, x_] = out @ value(attn.proj.kernel) + value(attn.proj.bias)
    x = x + attended
    hidden = layer_norm(x, block.norm2) @ value(block.mlp.fc1.kernel) + value(block.mlp.fc1.bias)
    return x + gelu(hidden) @ value(block.mlp.fc2.kernel) + value(block.mlp.fc2.bias)


@pytest.mark.parametrize(
    "size, window, shifted",
    [
        ((8, 8), 4, False),
        ((8, 12), 4, True),  # several shifted windows
        ((9, 6), 4, True),  # padded on both sides
        ((3, 2), 4, True),  # smaller than a window
        ((7, 10), 3, True),  # an odd window, shifted by one
    ],
)
def test_block_equals_attention_token_by_token(size, window, shifted):
    cfg = swin.SwinConfig(window=window)
    block = randomize(swin.SwinBlock(8, 2, shifted, cfg, dtype=jnp.float32, rngs=Draws()))
    x = RNG.normal(size=(2, *size, 8))
    expected = naive_block(block, x, window, heads=2)
    np.testing.assert_allclose(apply(block, x.astype(np.float32), None), expected, atol=2e-5)


def test_patch_embedding_equals_a_strided_convolution():
    embed = randomize(swin.PatchEmbed(TINY, dtype=jnp.float32, rngs=Draws()))
    x = RNG.normal(size=(1, 7, 9, 3))
    padded = np.zeros((1, 8, 12, 3))
    padded[:, :7, :9] = x
    kernel = value(embed.proj.kernel).reshape(4, 4, 3, 8)
    expected = np.zeros((1, 2, 3, 8))
    for i, j in np.ndindex(2, 3):
        patch = padded[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        expected[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel)
    expected = layer_norm(expected + value(embed.proj.bias), embed.norm)
    np.testing.assert_allclose(apply(embed, x.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 1)])
def test_patch_merging_takes_neighbors_in_the_official_order(size):
    merging = randomize(swin.PatchMerging(4, dtype=jnp.float32, rngs=Draws()))
    x = RNG.normal(size=(2, *size, 4))
    padded = np.pad(x, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)))
    parts = [padded[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    expected = layer_norm(np.concatenate(parts, -1), merging.norm) @ value(merging.reduction.kernel)
    np.testing.assert_allclose(apply(merging, x.astype(np.float32)), expected, atol=1e-5)


@pytest.mark.parametrize(
    "size, dtype", [((97, 64), jnp.float32), ((33, 50), jnp.bfloat16), ((3, 5), jnp.float32)]
)
def test_any_size_gives_three_finite_maps(size, dtype):
    model = swin.Swin(TINY, dtype=dtype, rngs=Draws(jax.random.normal(jax.random.key(0), (99999,))))
    maps = apply(model, np.ones((1, *size, 3), np.float32))
    for stride, width, x in zip((8, 16, 32), (16, 32, 64), maps, strict=True):
        assert x.shape == (1, -(-size[0] // stride), -(-size[1] // stride), width)
        assert x.dtype == dtype
        assert np.isfinite(np.asarray(x, np.float32)).all()


@pytest.fixture(scope="module")
def randomized():
    return randomize(swin.Swin(TINY, rngs=Draws()))


def test_without_a_rate_a_key_changes_nothing(randomized):
    module = nnx.merge(*nnx.split(randomized))
    assert module.draw_drop_path(jax.random.key(1), 2) is not None
    assert module.draw_drop_path(None, 2) is None
    module.rates = (0.0,) * len(module.rates)
    assert module.draw_drop_path(jax.random.key(1), 2) is None


def test_dropped_paths_are_per_sample_and_keep_the_mean():
    rates = np.asarray([0.0, 0.25, 0.5])
    factors = swin.draw_drop_path_factors(jax.random.key(0), rates, 20000)
    assert factors.shape == (3, 2, 20000)
    assert (factors[0] == 1).all()
    for block, rate in enumerate(rates):
        np.testing.assert_allclose(np.unique(factors[block, 0])[-1], 1 / (1 - rate), rtol=1e-6)
        np.testing.assert_allclose(np.mean(factors[block], axis=-1), 1, atol=0.03)
    assert 0.2 < np.mean((factors[2, 0] == 0) & (factors[2, 1] == 0)) < 0.3  # independent branches


def test_a_dropped_block_is_the_identity_for_that_sample_only():
    block = randomize(swin.SwinBlock(8, 2, True, TINY, dtype=jnp.float32, rngs=Draws()))
    x = RNG.normal(size=(2, 8, 8, 8)).astype(np.float32)
    y = apply(block, x, jnp.asarray([[0.0, 1.0], [0.0, 1.0]]))
    np.testing.assert_array_equal(y[0], x[0])
    np.testing.assert_allclose(y[1], apply(block, x, None)[1], rtol=1e-6)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"num_heads": (3, 6, 12, 5)}, "num_heads"),
        ({"depths": (2, 2)}, "depths"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_invalid_sizes_are_refused_by_name(change, field):
    with pytest.raises(UserError, match=f"config.model.swin.*{field}"):
        swin.SwinConfig(**change)
