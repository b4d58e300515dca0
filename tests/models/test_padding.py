"""With `mask_padding`, an image's outputs do not depend on the padding around it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from flax import nnx

from detclipv2_jax.models import detclip
from detclipv2_jax.models.atss_head import ATSSHead, HeadConfig
from detclipv2_jax.models.fpn import FPN
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.padding import level_extents, zero_padding
from detclipv2_jax.ops.boxes import anchor_grid, anchors_inside

STRIDES = (8, 16, 32, 64, 128)
SIZE = (90, 120)  # of the image: on no level a whole number of cells
CANVASES = ((96, 128), (96, 192), (160, 256))


def test_extents_are_the_level_sizes_of_a_canvas_of_the_images_size():
    sizes = np.asarray([[90, 120], [1, 8], [9, 128], [0, 0]], np.int32)
    expected = [[[math.ceil(side / s) for side in size] for s in STRIDES] for size in sizes]
    np.testing.assert_array_equal(jax.jit(lambda x: level_extents(x, STRIDES))(sizes), expected)


def test_padding_is_set_to_zero_per_image():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 2)).astype(np.float32)
    expected = np.zeros_like(x)
    for image, (rows, columns) in enumerate(((2, 5), (4, 1), (0, 0))):
        expected[image, :rows, :columns] = x[image, :rows, :columns]
    np.testing.assert_array_equal(zero_padding(x, jnp.asarray([[2, 5], [4, 1], [0, 0]])), expected)


def random_state(module, std):
    graph, state = nnx.split(module)
    random = np.random.default_rng(1)
    draw = lambda x: jnp.asarray(random.normal(0, std, x.shape), jnp.float32)
    return graph, jax.tree.map(draw, state)


def on_canvas(image, height, width, fill):
    """Return the image with `fill` around it, drawn at random if it is a generator."""
    shape = (len(image), height, width, image.shape[-1])
    canvas = np.full(shape, fill) if np.isscalar(fill) else fill.normal(size=shape)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return jnp.asarray(canvas, jnp.float32)


def inside(outputs, canvas, size=SIZE):
    """Return the outputs of the anchors of the image."""
    mask = anchors_inside(
        jnp.asarray(anchor_grid(*canvas, tiny_model.CONFIG.anchors)), np.int32([size])
    )
    return jax.tree.map(lambda x: np.asarray(x)[:1, np.asarray(mask)[0]], outputs)


@pytest.fixture(scope="module")
def neck():
    return random_state(FPN((6, 5, 4), 8, rngs=Draws()), 0.2)


@pytest.fixture(scope="module")
def head():
    cfg = HeadConfig(channels=8, convs=2, groups=2, embed_dim=6)
    return random_state(ATSSHead(8, 5, cfg, rngs=Draws()), 0.3)


def test_the_neck_ignores_what_the_backbone_computes_in_the_padding(neck):
    random = np.random.default_rng(0)
    extents = level_extents(jnp.asarray([SIZE]), STRIDES)
    maps = [random.normal(size=(1, *extents[0, i], c)) for i, c in enumerate((6, 5, 4))]
    exact = jax.jit(lambda maps: nnx.merge(*neck)(maps))([jnp.float32(x) for x in maps])
    run = jax.jit(lambda maps, extents: nnx.merge(*neck)(maps, extents))
    for height, width in CANVASES:
        sides = [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES[:3]]
        padded = [on_canvas(x, *side, random) for x, side in zip(maps, sides)]
        for level, (x, expected) in enumerate(zip(run(padded, extents), exact, strict=True)):
            expected = on_canvas(expected, *x.shape[1:3], 0.0)
            np.testing.assert_allclose(x, expected, atol=1e-5, err_msg=f"level {level}")


@pytest.mark.parametrize("canvas", CANVASES)
def test_outputs_and_gradients_of_the_head_do_not_depend_on_the_canvas(head, canvas):
    """Those of the image alone, on a canvas without padding; the second image is smaller."""
    graph, state = head
    random = np.random.default_rng(0)
    sizes = jnp.asarray([SIZE, (40, 30)])
    extents = level_extents(sizes, STRIDES)
    levels = [random.normal(size=(2, *extents[0, i], 8)) for i in range(5)]
    levels = [zero_padding(jnp.float32(x), extents[:, i]) for i, x in enumerate(levels)]

    def run(state, levels, extents, size):
        outputs = nnx.merge(graph, state)(levels, extents)
        picked = inside_by_mask(outputs, size)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(picked)), outputs

    def inside_by_mask(outputs, size):
        grid = jnp.asarray(anchor_grid(*size, tiny_model.CONFIG.anchors))
        mask = anchors_inside(grid, jnp.asarray([SIZE]))[0]
        return jax.tree.map(
            lambda x: jnp.where(mask.reshape(-1, *[1] * (x.ndim - 2)), x[0], 0), outputs
        )

    both = lambda size: jax.jit(
        jax.value_and_grad(lambda s, x, e: run(s, x, e, size), argnums=(0, 1), has_aux=True)
    )
    (loss, exact), (of_state, of_levels) = both(SIZE)(state, [x[:1] for x in levels], None)
    padded = [
        on_canvas(x, math.ceil(canvas[0] / s), math.ceil(canvas[1] / s), 0.0)
        for x, s in zip(levels, STRIDES)
    ]
    (found_loss, found), (found_state, found_levels) = both(canvas)(state, padded, extents)
    for a, b in zip(*map(jax.tree.leaves, (inside(exact, SIZE), inside(found, canvas)))):
        np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())
    np.testing.assert_allclose(found_loss, loss, rtol=1e-4, atol=1e-3)
    for a, b in zip(*map(jax.tree.leaves, (of_state, found_state))):
        np.testing.assert_allclose(b, a, atol=2e-4 * np.abs(a).max() + 1e-6)
    for a, b in zip(of_levels, found_levels):
        b = b[:1, : a.shape[1], : a.shape[2]]
        np.testing.assert_allclose(b, a, atol=2e-4 * np.abs(a).max() + 1e-6)
    if canvas != CANVASES[0]:  # without the sizes, the padding counts
        (_, seen), _ = both(canvas)(state, padded, None)
        apart = inside(seen, canvas).embeddings - inside(exact, SIZE).embeddings
        assert np.abs(apart).max() > 0.1


def test_an_empty_slot_is_finite_with_finite_gradients(head):
    graph, state = head
    extents = level_extents(jnp.zeros((1, 2), jnp.int32), STRIDES)
    levels = [jnp.zeros((1, math.ceil(96 / s), math.ceil(128 / s), 8)) for s in STRIDES]

    def total(state):
        return sum(
            jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(nnx.merge(graph, state)(levels, extents))
        )

    value, gradient = jax.jit(jax.value_and_grad(total))(state)
    assert all(np.isfinite(x).all() for x in (value, *jax.tree.leaves(gradient)))


def test_only_the_backbone_still_sees_the_padding():
    """Outputs of a model, between canvases. Its backbone's windows see padding at the border."""
    cfg = dataclasses.replace(tiny_model.CONFIG, mask_padding=True)
    _, params = tiny_model.parts()
    image = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)

    def spread(cfg):
        graph, _ = detclip.abstract(cfg)
        run = jax.jit(lambda x, s: detclip.build(graph, params).encode_image(x, sizes=s))
        found = []
        for canvas in CANVASES:
            x = np.zeros((1, *canvas, 3), np.uint8)
            x[:, : SIZE[0], : SIZE[1]] = image
            found.append(inside(run(x, np.int32([SIZE])), canvas).embeddings)
        norm = lambda x: float(np.sqrt((x**2).mean()))
        return max(norm(found[i] - found[0]) for i in (1, 2)) / norm(found[0])

    masked, seen = spread(cfg), spread(tiny_model.CONFIG)
    assert masked < 0.1 * seen  # 1.6 % against 47 %
