"""A convolution of a packed map by the TPU kernel equals XLA's, in simulation; so does a head.

The simulation fills unwritten memory with NaN and raises an error for a read beyond an array.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from kernel_comparison import check_close

from detclipv2_jax.models.atss_head import ATSSHead, DeformConv, HeadConfig
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.packed_levels import PackedLevels
from detclipv2_jax.ops.kernels import packed_conv, place

SLOW = pytest.mark.slow
PYRAMID = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))


def plain(x, norm, kernel, packed, extents=None):
    """The same in plain JAX: zeros in the gaps of the map, statistics of every level."""
    mask = packed.mask if extents is None else packed.inside(extents)
    if norm is not None:
        spread = lambda values: sum(
            jnp.where(packed.level_mask(level), values[:, level, None, None], 0)
            for level in range(len(packed.sizes))
        )
        x = jax.nn.relu(x * spread(norm.factor) + spread(norm.offset))
    x = jnp.where(mask, x, 0)
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)
    everywhere = jnp.broadcast_to(mask, (len(x), *mask.shape[-3:]))
    levels = list(zip(packed.unpack(y), packed.unpack(everywhere)))
    mean = [jnp.mean(level, (1, 2), where=part) for level, part in levels]
    variance = [jnp.var(level, (1, 2), where=part) for level, part in levels]
    statistics = (jnp.stack(values, axis=1) for values in (mean, variance))
    return jnp.where(mask, y, 0), *statistics


def by_kernel(x, norm, kernel, packed, extents=None):
    y, statistics = packed_conv.packed_conv(x, norm, kernel, packed.rectangles, extents)
    mask = packed.mask if extents is None else packed.inside(extents)
    return jnp.where(mask, y, 0), statistics.mean, statistics.variance


# Rows and columns of PYRAMID that images smaller than their canvas cover.
SMALLER = np.asarray([[[4, 3], [2, 2], [1, 1], [1, 1], [1, 1]], [[6, 2], [3, 1]] + [[1, 1]] * 3])


@pytest.mark.parametrize(
    ("sizes", "images", "channels", "normed", "tokens", "extents"),
    [
        (PYRAMID, 2, (8, 6), True, 48, None),  # bands of three rows, of seven rows
        (PYRAMID, 2, (8, 6), True, 48, SMALLER),
        (PYRAMID, 1, (8, 6), False, 2560, None),
        pytest.param(((1, 1),), 1, (4, 4), True, 16, None, marks=SLOW),
        pytest.param(((5, 16),), 3, (4, 8), True, 64, None, marks=SLOW),  # a whole tile wide
        pytest.param(((9, 3),), 2, (4, 8), False, 16, None, marks=SLOW),  # one row per band
        pytest.param(((13, 17), (7, 9), (4, 5)), 2, (16, 130), True, 160, None, marks=SLOW),
    ],
)
def test_map_statistics_and_gradients_equal_those_of_plain_jax(
    monkeypatch, sizes, images, channels, normed, tokens, extents
):
    monkeypatch.setattr(packed_conv, "_TOKENS", tokens)
    monkeypatch.setattr(packed_conv, "_PIECE", 32)
    packed, random = PackedLevels(sizes), np.random.default_rng(0)
    noise = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
    (inputs, outputs), levels = channels, len(sizes)
    x, kernel = noise(images, *packed.shape, inputs), noise(3, 3, inputs, outputs)
    pair = lambda width: [noise(images, levels, width) for _ in range(2)]
    norm = packed_conv.Norm(*pair(inputs)) if normed else None
    grad_outs = noise(images, *packed.shape, outputs), *pair(outputs)
    mask = packed.mask if extents is None else packed.inside(extents)

    def everything(function, gaps):
        def run(x, norm, kernel):
            x = jnp.where(mask, x, gaps)
            value, back = jax.vjp(lambda *args: function(*args, packed, extents), x, norm, kernel)
            grad_x, grad_norm, grad_kernel = back(grad_outs)
            return value, jnp.where(mask, grad_x, 0), grad_norm, grad_kernel

        return jax.jit(run)(x, norm, kernel)

    expected = everything(plain, 0)
    with pltpu.force_tpu_interpret_mode():
        found = everything(by_kernel, jnp.nan)  # the contents of the gaps have no influence
    check_close(expected, found)


def test_the_variance_of_values_far_from_zero_is_accurate(monkeypatch):
    """The mean of squares minus the square of the mean would have no digits left."""
    monkeypatch.setattr(packed_conv, "_TOKENS", 64)
    random = np.random.default_rng(0)
    x = jnp.asarray(1000 + random.normal(size=(1, 11, 13, 4)), jnp.float32)
    kernel = jnp.zeros((3, 3, 4, 4)).at[1, 1].set(jnp.eye(4))
    with pltpu.force_tpu_interpret_mode():
        _, found = packed_conv.packed_conv(x, None, kernel, ((0, 0, 11, 13),))
    exact = np.asarray(x, np.float64)
    np.testing.assert_allclose(found.mean[:, 0], exact.mean((1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found.variance[:, 0], exact.var((1, 2)), rtol=1e-4)


def head(sizes, dtype=jnp.float32, **options):
    cfg = HeadConfig(**{"channels": 16, "convs": 2, "groups": 4, "embed_dim": 6} | options)
    graph, state = nnx.split(ATSSHead(8, len(sizes), cfg, dtype=dtype, rngs=Draws()))
    random = np.random.default_rng(0)
    draw = lambda x: jnp.asarray(random.normal(0, 0.3, x.shape), jnp.float32)
    return graph, jax.tree.map(draw, state)


def use_kernels(monkeypatch):
    for module in (ATSSHead, DeformConv):
        monkeypatch.setattr(module, "has_kernels", lambda *_: True)


def both(graph, state, sizes, monkeypatch, dtype=jnp.float32, extents=None):
    """Outputs and gradients of a head without and with kernels."""
    random = np.random.default_rng(1)
    noise = lambda shape, dtype: jnp.asarray(random.normal(size=shape), dtype)
    levels = [noise((2, *size, 8), dtype) for size in sizes]
    packed = PackedLevels(sizes)
    mask = packed.mask if extents is None else packed.inside(extents)
    everywhere = jnp.broadcast_to(mask, (2, *mask.shape[-3:]))
    levels = [jnp.where(*pair, 0) for pair in zip(packed.unpack(everywhere), levels)]
    counted = packed.flatten(everywhere)[..., 0]

    def outputs(state, levels):
        found = nnx.merge(graph, state)(levels, extents)
        return jax.tree.map(
            lambda x: jnp.where(counted.reshape(*counted.shape, *[1] * (x.ndim - 2)), x, 0), found
        )

    shapes = jax.eval_shape(outputs, state, levels)
    grad_outs = jax.tree.map(lambda x: noise(x.shape, x.dtype), shapes)

    def run(state, levels):
        value, back = jax.vjp(outputs, state, levels)
        grad_state, grad_levels = back(grad_outs)
        parts = zip(packed.unpack(everywhere), grad_levels)
        return value, grad_state, [jnp.where(part, x, 0) for part, x in parts]

    expected = jax.jit(run)(state, levels)
    with monkeypatch.context() as patch, pltpu.force_tpu_interpret_mode():
        use_kernels(patch)
        return expected, jax.jit(lambda *args: run(*args))(state, levels)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (((4, 3), (2, 2)), {"convs": 1, "proposal_scores": ("iou", "foreground")}),
        pytest.param(PYRAMID, {}, marks=SLOW),
        pytest.param(PYRAMID, {"deformable": False}, marks=SLOW),
    ],
)
def test_a_head_with_kernels_equals_the_plain_head(monkeypatch, sizes, options):
    check_close(*both(*head(sizes, **options), sizes, monkeypatch), 1e-5)


def test_so_it_does_for_images_smaller_than_their_canvas(monkeypatch):
    sizes, extents = PYRAMID[:2], SMALLER[:, :2]
    check_close(*both(*head(sizes, convs=1), sizes, monkeypatch, extents=extents), 1e-5)


@SLOW
def test_bfloat16_head_is_as_accurate_as_without_kernels(monkeypatch):
    """Compare the mean error of all arrays: a single one depends on which ReLUs flip.

    Without the deformable convolution, where an offset across a pixel's border has that effect too.
    """
    sizes = ((16, 20), (8, 10), (4, 5), (2, 3), (2, 2))
    exact, _ = both(*head(sizes, deformable=False), sizes, monkeypatch)
    graph, state = head(sizes, jnp.bfloat16, deformable=False)
    expected, found = both(graph, state, sizes, monkeypatch, jnp.bfloat16)
    ratios = []
    for a, b, c in zip(*map(jax.tree.leaves, (exact, expected, found))):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        ratios.append(np.linalg.norm(c - a) / np.linalg.norm(b - a))
        assert np.linalg.norm(c - a) <= 0.2 * np.linalg.norm(a)
    assert np.exp(np.mean(np.log(ratios))) <= 1.1


def test_unsupported_inputs_use_xla(monkeypatch):
    made = lambda **options: ATSSHead(
        256, 5, HeadConfig(), **{"dtype": jnp.bfloat16, "kernels": "auto"} | options, rngs=Draws()
    )
    shape = (4, 100, 253, 256)
    assert not made().has_kernels(shape)  # the device is not a TPU
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**26)
    assert made().has_kernels(shape)
    assert not made(kernels="xla").has_kernels(shape)
    assert not made(dtype=jnp.float32).has_kernels(shape)
    monkeypatch.setattr(place, "vmem_budget", lambda: 0.95 * 2**24)  # v4
    assert not made().has_kernels(shape)


@pytest.mark.parametrize("extents", [None, SMALLER])
def test_a_head_lowers_to_tpu_kernels(monkeypatch, extents):
    """Lower forward and backward for a TPU that is not there, without compiling."""
    use_kernels(monkeypatch)
    graph, state = head(PYRAMID, jnp.bfloat16)
    levels = [jnp.zeros((2, *size, 8), jnp.bfloat16) for size in PYRAMID]

    def loss(state):
        outputs = nnx.merge(graph, state)(levels, extents)
        return sum(output.sum() for output in jax.tree.leaves(outputs))

    text = jax.jit(jax.value_and_grad(loss)).trace(state).lower(lowering_platforms=("tpu",))
    for name in ("packed_conv", "deform_conv"):
        assert f"{name}_forward" in text.as_text() and f"{name}_backward" in text.as_text()


def test_a_bfloat16_map_may_have_a_float32_convolution():
    """Its gradient is that of the same map convolved to bfloat16, up to rounding."""
    packed, random = PackedLevels(PYRAMID), np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(1, *packed.shape, 8)), jnp.bfloat16)
    kernel = jnp.bfloat16(random.normal(size=(3, 3, 8, 6))).astype(jnp.float32)
    grad_y = jnp.asarray(random.normal(size=(1, *packed.shape, 6)), jnp.float32)

    def run(dtype):
        convolve = lambda x, k: packed_conv.packed_conv(
            x, None, k, packed.rectangles, out_dtype=dtype
        )[0]
        y, back = jax.vjp(convolve, x, kernel)
        return jnp.where(packed.mask, y, 0), *back(grad_y.astype(dtype))

    with pltpu.force_tpu_interpret_mode():
        (y, *wide), (_, *narrow) = (
            jax.jit(run, static_argnums=0)(d) for d in ("float32", "bfloat16")
        )
    expected = plain(x.astype(jnp.float32), None, kernel, packed)[0]
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, atol=1e-5)
    check_close(narrow, wide, 2e-2)
