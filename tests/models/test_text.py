import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.text import TextConfig, TextTower

CONFIG = TextConfig(width=16, layers=2, heads=4, vocab=50, context=8, embed_dim=6)
END = 49
TOKENS = np.asarray(
    [[48, 3, 7, END, 0, 0, 0], [48, END, 0, 0, 0, 0, 0], [48, 1, 2, 3, 4, 5, END]], np.int32
)


def make(**kwargs):
    graph, state = nnx.split(TextTower(CONFIG, rngs=Draws(), **kwargs))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), state)
    return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)), state


@pytest.fixture(scope="module")
def tower():
    return make()


def naive(state, tokens):
    """Compute CLIP's text transformer one concept and one head at a time, in float64."""
    p = jax.tree.map(np.float64, nnx.to_pure_dict(state))

    def norm(x, q):
        mean = x.mean(-1, keepdims=True)
        x = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5)
        return x * q["scale"] + q["bias"]

    linear = lambda x, q: x @ q["kernel"] + q["bias"]
    features = []
    for row in tokens:
        end = list(row).index(END)
        # Tokens after [EOS] have no effect, so they are left out.
        x = p["token_embedding"][row[: end + 1]] + p["positional_embedding"][: end + 1]
        for block in p["resblocks"].values():
            qkv = np.split(linear(norm(x, block["ln_1"]), block["attn"]["in_proj"]), 3, axis=-1)
            out = np.zeros_like(x)
            for head in range(CONFIG.heads):
                q, k, v = (part[:, 4 * head : 4 * head + 4] for part in qkv)
                for i in range(end + 1):
                    scores = np.exp(q[i] @ k[: i + 1].T / 2)
                    out[i, 4 * head : 4 * head + 4] = scores / scores.sum() @ v[: i + 1]
            x = x + linear(out, block["attn"]["out_proj"])
            hidden = linear(norm(x, block["ln_2"]), block["mlp"]["c_fc"])
            x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), block["mlp"]["c_proj"])
        features.append(norm(x[end], p["ln_final"]) @ p["text_projection"])
    return np.stack(features)


def test_equals_the_definition(tower):
    run, state = tower
    features = run(state, TOKENS)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features, naive(state, TOKENS), atol=1e-5)


def test_tokens_after_the_end_have_no_effect(tower):
    run, state = tower
    changed = TOKENS.copy()
    changed[0, 4:], changed[1, 2:] = 11, 12
    np.testing.assert_array_equal(run(state, TOKENS), run(state, changed))
    changed[0, 2] = 9  # before the end it does
    assert not np.allclose(run(state, TOKENS)[0], run(state, changed)[0])


def test_a_row_of_padding_is_finite(tower):
    run, state = tower
    assert np.isfinite(run(state, np.zeros((3, 7), np.int32))).all()


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"remat": "dots"}])
def test_options_give_the_same_features(tower, options):
    run, state = tower
    other, _ = make(**options)
    features = other(state, TOKENS)
    assert features.dtype == jnp.float32
    scale = float(jnp.abs(run(state, TOKENS)).max())
    np.testing.assert_allclose(features, run(state, TOKENS), atol=0.05 * scale)


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="text: heads 3 must divide width 16"):
        TextConfig(width=16, heads=3)
