"""A step in parts is the step of the whole batch, in less memory."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_batch import LOSS, make_batch

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import KINDS
from detclipv2_jax.models import detclip, parameters
from detclipv2_jax.ops.contrastive import ContrastiveConfig
from detclipv2_jax.training import accumulate, programs, sharding
from detclipv2_jax.training import inputs as inputs_lib
from detclipv2_jax.training.objective import LossConfig, ProposalConfig

IMAGES = 16
VARIANT = LossConfig(
    grounding_boxes=True,
    word_region=ContrastiveConfig(direction="both", matching="max_size"),
    proposals=ProposalConfig(score="batch_centerness", group=4, k=6),
)


@functools.cache
def model():
    """With a drop path, and away from the zeros at which some gradients vanish."""
    swin = dataclasses.replace(tiny_model.CONFIG.swin, drop_path=0.5)
    graphdef, params = detclip.create(dataclasses.replace(tiny_model.CONFIG, swin=swin), 0)
    return graphdef, jax.tree.map(lambda p: p + 0.01, params)


def batch_of(kind, images=IMAGES):
    batch = make_batch(kind, images)
    sizes = np.array(batch.sizes)
    sizes[5], sizes[-1] = (40, 56), 0  # a smaller picture, and a slot without one
    empty = {"boxes": 0, "labels": -1, "texts": -1}
    arrays = {name: np.array(getattr(batch, name)) for name in empty}
    for name, value in empty.items():
        arrays[name][-1] = value
    return dataclasses.replace(batch, sizes=sizes, **arrays)


@functools.cache
def result(kind, count, mesh=(1, 1), loss=LOSS, images=IMAGES, seed=3):
    graphdef, params = model()
    devices, batch = sharding.make_mesh(*mesh), batch_of(kind, images)
    layout = sharding.batch_shardings(devices, batch)
    shardings = sharding.parameter_shardings(devices, params)
    whole = sharding.replicated(devices)
    key = None if seed is None else jax.random.key(seed)
    run = jax.jit(
        lambda params, batch: accumulate.loss_and_gradient(
            params, batch, key, graphdef, loss, count, whole
        ),
        in_shardings=(shardings, layout),
        out_shardings=(whole, shardings),
    )
    return run(jax.device_put(params, shardings), inputs_lib.put_batch(batch, layout))


def assert_same(found, expected):
    ((loss, parts), gradient), ((loss0, parts0), gradient0) = found, expected
    assert parts.keys() == parts0.keys()
    np.testing.assert_allclose(loss, loss0, rtol=2e-6)
    for name in parts:
        np.testing.assert_allclose(parts[name], parts0[name], rtol=2e-6, err_msg=name)
    paths, expected = map(parameters.parameter_paths, (gradient, gradient0))
    for path, slope in paths.items():
        largest = float(jnp.abs(expected[path]).max())
        np.testing.assert_allclose(
            slope, expected[path], rtol=2e-4, atol=2e-5 * largest + 1e-9, err_msg=path
        )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole_on_one_device(kind, count):
    assert_same(result(kind, count), result(kind, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_add_up_to_the_whole_on_four_devices(kind):
    assert_same(result(kind, 2, (2, 2)), result(kind, 1))


@pytest.mark.parametrize("kind", ["grounding", "image_text"])
def test_parts_add_up_with_other_losses_and_a_part_that_ends_within_a_group(kind):
    """12 images in 2 parts: the second group of 4 that share a pool lies in both."""
    rest = {"mesh": (1, 1), "loss": VARIANT, "images": 12}
    assert_same(result(kind, 2, **rest), result(kind, 1, **rest))


@pytest.mark.slow
def test_drop_path_is_drawn_and_left_out_as_for_the_whole_batch():
    seeds = [3, 4, None]
    losses = [float(result("detection", 2, seed=seed)[0][0]) for seed in seeds]
    assert len(set(losses)) == 3
    expected = [float(result("detection", 1, seed=seed)[0][0]) for seed in seeds]
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("kind", ["detection", "image_text"])
def test_four_parts_take_a_quarter_of_the_memory(kind):
    graphdef, params = tiny_model.parts()
    batch = dataclasses.replace(make_batch(kind, 16), images=np.zeros((16, 128, 128, 3), np.uint8))

    def temporary(count):
        run = lambda *inputs: accumulate.loss_and_gradient(
            *inputs, None, graphdef, LOSS, count, None
        )
        compiled = jax.jit(run).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(4) < 0.3 * temporary(1)  # 15.0 and 14.8 MiB against 59.6 and 59.2


@pytest.mark.parametrize(
    ("batch_size", "devices", "count"), [(16, 1, 3), (16, 4, 8), (16, 3, 1), (16, 1, 0), (8, 8, -1)]
)
def test_a_batch_that_cannot_be_cut_is_told(batch_size, devices, count):
    accumulate.check(16, 4, 4, "grounding")
    with pytest.raises(UserError, match=r"grounding.batch_size is .*config.data.grounding.accumul"):
        accumulate.check(batch_size, devices, count, "grounding")


def test_a_run_is_told_before_it_starts():
    kinds = {"image_text": types.SimpleNamespace(batch_size=6, micro_batches=4)}
    config = types.SimpleNamespace(data=types.SimpleNamespace(kinds=lambda: kinds))
    with pytest.raises(UserError, match=r"6, which 1 device.*micro_batches 4 do not divide"):
        programs.step_function(config, None, None, sharding.make_mesh(1, 1))
