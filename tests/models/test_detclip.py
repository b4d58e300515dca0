import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import detclip, parameters, sizes
from detclipv2_jax.ops.boxes import anchor_grid

CONFIG = tiny_model.CONFIG
TOKENS = np.asarray([[49406, 320, 49407, 0], [49406, 49407, 0, 0], [0, 0, 0, 0]], np.int32)


@pytest.fixture(scope="module")
def model():
    graph, params = tiny_model.parts()
    encode = jax.jit(lambda params, images: detclip.build(graph, params).encode_image(images))
    return graph, params, encode


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def counts(cfg):
    _, params = detclip.abstract(cfg)
    total = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree)) / 1e6
    return total(params), {name: total(part) for name, part in params.items()}


def test_parameter_counts_are_the_papers():
    """About 27.5 + 9 + 63.3 = 100 M for Swin-T and 268 M for Swin-L (Yao et al. 2023)."""
    total, parts = counts(with_embed_dim(sizes.SWIN_T, 256))  # of the paper [inferred]
    assert parts["backbone"] == pytest.approx(27.5, rel=0.02)
    assert parts["neck"] + parts["head"] == pytest.approx(9, rel=0.05)
    assert parts["text"] == pytest.approx(63.3, rel=0.02)
    assert total == pytest.approx(100, rel=0.02)
    assert counts(with_embed_dim(sizes.SWIN_L, 256))[0] == pytest.approx(268, rel=0.02)
    # CLIP's 512 dimensions: a wider 3×3 convolution and projection.
    more = (9 * 256 * 256 + 256 + 512 * 256) / 1e6
    assert counts(sizes.SWIN_T)[0] == pytest.approx(total + more, abs=1e-6)


def with_embed_dim(cfg, size):
    return dataclasses.replace(
        cfg,
        head=dataclasses.replace(cfg.head, embed_dim=size),
        text=dataclasses.replace(cfg.text, embed_dim=size),
    )


def test_every_parameter_has_its_own_path(model):
    graph, params, _ = model
    paths = parameters.parameter_paths(params)
    assert len(paths) == len(jax.tree.leaves(params))
    assert "backbone/layers/0/blocks/0/attn/qkv/kernel" in paths
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in paths.values())
    # The parameters are the model's whole state, and the round trip keeps them.
    again, rebuilt = detclip._split(detclip.build(graph, params))
    assert again == graph
    assert all(
        rebuilt_leaf is leaf for rebuilt_leaf, leaf in zip(jax.tree.leaves(rebuilt), paths.values())
    )


def test_abstract_has_the_shapes_of_create(model):
    graph, params, _ = model
    abstract_graph, shapes = detclip.abstract(CONFIG)
    assert abstract_graph == graph
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_the_seed_decides_every_drawn_parameter(model):
    _, params, _ = model
    same, other = (detclip.create(CONFIG, seed)[1] for seed in (0, 1))
    drawn = 0
    for a, b, c in zip(*map(jax.tree.leaves, (params, same, other))):
        np.testing.assert_array_equal(a, b)
        if np.asarray(a).std() > 0:
            drawn += 1
            assert not np.array_equal(a, c)
    kernels = [p for p in parameters.parameter_paths(params) if p.endswith(("kernel", "table"))]
    assert drawn >= len(kernels) - 1  # all but the deformable convolution's zero offsets


def test_initial_deviations_are_the_references(model):
    """Checked per layer, so that no two parameters share a slice of the draw."""
    wide = dataclasses.replace(
        CONFIG,
        neck_channels=32,
        head=dataclasses.replace(CONFIG.head, channels=32),
        text=dataclasses.replace(CONFIG.text, width=64, layers=2),
    )
    paths = parameters.parameter_paths(detclip.create(wide, 3)[1])
    expected = {
        "text/token_embedding": 0.02,
        "text/resblocks/0/attn/in_proj/kernel": 64**-0.5,
        "text/resblocks/1/attn/out_proj/kernel": 64**-0.5 * 4**-0.5,
        "text/resblocks/1/mlp/c_fc/kernel": 128**-0.5,
        "text/resblocks/1/mlp/c_proj/kernel": 64**-0.5 * 4**-0.5,
        "backbone/layers/3/blocks/0/mlp/fc1/kernel": 0.02,
        "head/reg_convs/0/conv/kernel": 0.01,
        "neck/output/0/kernel": (2 / (9 * 64)) ** 0.5,
    }
    for path, deviation in expected.items():
        assert float(paths[path].std()) == pytest.approx(deviation, rel=0.1), path
    assert not np.any(paths["head/dcn/offset/kernel"])
    smaller = dataclasses.replace(
        wide,
        neck_coarse_gain=0.1,
        head=dataclasses.replace(wide.head, branch_std=0.06),
        text=dataclasses.replace(wide.text, projection_gain=0.1),
    )
    factors = {path: 1.0 for path in paths} | {
        "neck/lateral/1/kernel": 0.1,
        "neck/lateral/2/kernel": 0.1,
        "head/dcn/kernel": 6.0,
        "text/text_projection": 0.1,
    }
    branches = ("head/cls_convs", "head/reg_convs")
    factors |= {p: 6.0 for p in paths if p.startswith(branches) and p.endswith("conv/kernel")}
    for path, value in parameters.parameter_paths(detclip.create(smaller, 3)[1]).items():
        np.testing.assert_allclose(value, factors[path] * paths[path], rtol=1e-5, err_msg=path)
    values = np.concatenate([np.ravel(p) for k, p in paths.items() if k.endswith("kernel")])
    values = values[values != 0]
    assert len(np.unique(values)) > 0.99 * len(values)


@pytest.mark.parametrize("size", [(64, 96), (97, 33)])
def test_one_output_per_anchor_for_any_size(model, size):
    _, params, encode = model
    outputs = encode(params, images(2, *size))
    assert outputs.deltas.shape == (2, len(anchor_grid(*size, CONFIG.anchors)), 4)
    assert outputs.embeddings.shape[:2] == outputs.centerness.shape == outputs.deltas.shape[:2]
    np.testing.assert_allclose(jnp.linalg.norm(outputs.embeddings, axis=-1), 1, atol=1e-3)


def outputs_and_gradients(cfg):
    """Return loss, outputs and gradients for a black image and a random one."""
    graph, params = detclip.create(cfg, 0)
    batch = np.concatenate([np.zeros((1, 64, 64, 3), np.uint8), images(1, 64, 64)])

    def loss(params):
        model = detclip.build(graph, params)
        drop_path_factors = model.backbone.draw_drop_path(jax.random.key(0), len(batch))
        regions = model.encode_image(batch, drop_path_factors)
        texts = model.encode_text(TOKENS)
        logits = model.logits(regions.embeddings, texts)
        total = jnp.mean(logits) + jnp.mean(regions.deltas**2) + jnp.mean(regions.centerness)
        return total, (regions, texts, logits)

    # Optimization would take most of the time and does not change what is tested.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=options)(params)


def test_a_black_image_is_finite_and_rematerialization_changes_nothing():
    plain = jax.tree.leaves(outputs_and_gradients(CONFIG))
    for remat in ("dots", "blocks"):
        again = outputs_and_gradients(dataclasses.replace(CONFIG, remat=remat))
        for a, b in zip(plain, jax.tree.leaves(again), strict=True):
            assert np.isfinite(a).all()
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


def test_blocks_in_a_loop_change_nothing_but_the_size_of_the_program():
    swin = dataclasses.replace(CONFIG.swin, depths=(2, 4, 3, 1), drop_path=0.5)
    deep = dataclasses.replace(
        CONFIG, swin=swin, text=dataclasses.replace(CONFIG.text, layers=3), remat="blocks"
    )
    looped = dataclasses.replace(deep, loop=True)
    plain, again = (jax.tree.leaves(outputs_and_gradients(cfg)) for cfg in (deep, looped))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))

    def lines(loop):
        text = dataclasses.replace(CONFIG.text, layers=12)
        graph, params = detclip.abstract(dataclasses.replace(CONFIG, text=text, loop=loop))
        tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)
        run = lambda params, tokens: detclip.build(graph, params).encode_text(tokens)
        return jax.jit(run).lower(params, tokens).as_text().count("\n")

    assert lines(True) < 0.5 * lines(False)


def test_each_policy_stores_fewer_activations():
    """Counts the values that the forward pass stores for the backward pass."""

    def stored(remat):
        graph, params = detclip.abstract(dataclasses.replace(CONFIG, remat=remat))
        batch = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)

        def pullback(params, batch):
            run = lambda p: detclip.build(graph, p).encode_image(batch)
            return jax.vjp(run, params)[1]

        shapes = jax.tree.leaves(jax.eval_shape(pullback, params, batch))
        return sum(leaf.size for leaf in shapes)

    assert stored("blocks") < stored("dots") < stored("none")


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="remat is 'all'. Choose one of none, dots, blocks"):
        dataclasses.replace(CONFIG, remat="all")


def test_bfloat16_outputs_are_float32_with_finite_gradients():
    cfg = dataclasses.replace(CONFIG, dtype="bfloat16", similarity="dot")
    for x in jax.tree.leaves(outputs_and_gradients(cfg)):
        assert x.dtype == jnp.float32
        assert np.isfinite(x).all()


def test_bfloat16_is_close_to_float32(model):
    graph, params, encode = model
    half, _ = detclip.abstract(dataclasses.replace(CONFIG, dtype="bfloat16"))
    run = jax.jit(lambda params, images: detclip.build(half, params).encode_image(images))
    x = images(1, 64, 96)
    a, b = run(params, x), encode(params, x)
    cosine = jnp.sum(a.embeddings * b.embeddings, axis=-1)
    assert float(jnp.mean(cosine)) > 0.99
    assert not np.array_equal(a.embeddings, b.embeddings)


def test_the_key_decides_which_paths_drop():
    cfg = dataclasses.replace(CONFIG, swin=dataclasses.replace(CONFIG.swin, drop_path=0.5))
    graph, params = detclip.create(cfg, 0)
    x = images(2, 32, 32)

    @jax.jit
    def run(params, key):
        model = detclip.build(graph, params)
        return model.encode_image(x, model.backbone.draw_drop_path(key, len(x))).embeddings

    first, again, other = (run(params, jax.random.key(seed)) for seed in (0, 0, 3))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_logits_are_scaled_similarities_plus_the_bias(model):
    graph, params, _ = model
    params = {**params, "logit_scale": jnp.log(3.0), "logit_bias": jnp.float32(-0.5)}
    rng = np.random.default_rng(0)
    regions, texts = rng.normal(size=(2, 7, 8)), rng.normal(size=(5, 8))
    run = jax.jit(lambda p, r, t: detclip.build(graph, p).logits(r, t))
    got = run(params, regions.astype(np.float32), texts.astype(np.float32))
    np.testing.assert_allclose(got, 3 * regions @ texts.T - 0.5, atol=1e-4)


def test_an_untrained_model_starts_at_its_prior():
    params = detclip.create(dataclasses.replace(CONFIG, prior=0.01), 0)[1]
    assert float(jax.nn.sigmoid(params["logit_bias"])) == pytest.approx(0.01, rel=1e-5)
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07, rel=1e-5)
    dot = detclip.create(dataclasses.replace(CONFIG, similarity="dot"), 0)[1]
    assert float(dot["logit_scale"]) == 0


def test_images_are_normalized_as_published_weights_expect():
    x = np.asarray([[[[0, 128, 255]]]], np.uint8)
    expected = (np.asarray([0, 128, 255]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(detclip.normalize_images(x)[0, 0, 0], expected, atol=1e-5)


def test_a_config_survives_plain_dicts():
    for cfg in (CONFIG, sizes.SWIN_T, sizes.NANO):
        assert detclip.DetCLIPConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize(
    "values, words",
    [
        ({"swim": {}}, "swim"),
        ({"swin": {"embed_dims": 3}}, "swin.embed_dims"),
        ({"swin": {"embed_dim": "48"}}, "swin.embed_dim"),
        ({"dtype": "float16"}, "float16"),
        ({"similarity": "euclid"}, "euclid"),
        ({"head": {"embed_dim": 64}}, "embed_dim"),
        ({"swin": {"patch_size": 2}}, "strides"),
        ({"prior": 1.5}, "prior"),
        ({"initial_scale": 0}, "initial_scale"),
    ],
)
def test_mistakes_in_a_config_are_named(values, words):
    with pytest.raises(UserError, match=words):
        detclip.DetCLIPConfig.from_dict(values)
