"""Micro-batches give the loss and gradient of the whole batch, in less memory."""

import dataclasses
import functools
import os
import subprocess
import sys
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
from detclipv2_jax.training import accumulate, prefetch, programs, sharding
from detclipv2_jax.training.objective import LossConfig, ProposalConfig

IMAGES = 16
VARIANT = LossConfig(
    grounding_boxes=True,
    word_region=ContrastiveConfig(direction="both", matching="max_size"),
    proposals=ProposalConfig(score="batch_centerness", group=4, k=6),
)


@functools.cache
def model():
    """With a drop path, and moved away from the zeros where some gradients vanish."""
    swin = dataclasses.replace(tiny_model.CONFIG.swin, drop_path=0.5)
    cfg = dataclasses.replace(tiny_model.CONFIG, swin=swin, mask_padding=True)
    graphdef, params = detclip.create(cfg, 0)
    return graphdef, jax.tree.map(lambda p: p + 0.01, params)


def batch_of(kind, images=IMAGES):
    batch = make_batch(kind, images)
    sizes = np.array(batch.sizes)
    sizes[5], sizes[-1] = (40, 56), 0  # a smaller image, and an empty slot
    empty = {"boxes": 0, "labels": -1, "texts": -1}
    arrays = {name: np.array(getattr(batch, name)) for name in empty}
    for name, value in empty.items():
        arrays[name][-1] = value
    return dataclasses.replace(batch, sizes=sizes, **arrays)


def _compiled(mesh, count, batch, loss=LOSS, seed=3):
    """Return a function of a batch on the mesh, and one that moves a batch there."""
    graphdef, params = model()
    devices = sharding.make_mesh(*mesh)
    layout = sharding.batch_shardings(devices, batch)
    shardings = sharding.parameter_shardings(devices, params)
    whole = sharding.replicated(devices)
    key = None if seed is None else jax.random.key(seed)
    run = jax.jit(
        lambda params, batch: accumulate.loss_and_gradient(
            params, batch, key, graphdef, loss, count, whole
        ),
        in_shardings=(shardings, layout),
        out_shardings=accumulate.LossAndGradient(whole, shardings),
    )
    params = jax.device_put(params, shardings)
    return functools.partial(run, params), lambda batch: prefetch.put_batch(batch, layout)


@functools.cache
def result(kind, count, mesh=(1, 1), loss=LOSS, images=IMAGES, seed=3):
    batch = batch_of(kind, images)
    run, put = _compiled(mesh, count, batch, loss, seed)
    return run(put(batch))


def assert_same(found, expected):
    terms, expected_terms = found.loss.terms, expected.loss.terms
    assert terms.keys() == expected_terms.keys()
    np.testing.assert_allclose(found.loss.total, expected.loss.total, rtol=2e-6)
    for name in terms:
        np.testing.assert_allclose(terms[name], expected_terms[name], rtol=2e-6, err_msg=name)
    gradients, expected_gradients = map(
        parameters.parameter_paths, (found.gradient, expected.gradient)
    )
    for path, gradient in gradients.items():
        largest = float(jnp.abs(expected_gradients[path]).max())
        np.testing.assert_allclose(
            gradient,
            expected_gradients[path],
            rtol=2e-4,
            atol=2e-5 * largest + 1e-9,
            err_msg=path,
        )


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch_on_one_device(kind, count):
    assert_same(result(kind, count), result(kind, 1))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_add_up_to_the_batch_on_four_devices(kind, count):
    assert_same(result(kind, count, (2, 2)), result(kind, 1))


@pytest.mark.parametrize("kind", ["grounding", "image_text", "classification"])
def test_a_micro_batch_may_end_within_a_group_that_shares_a_pool(kind):
    """12 images in 2 micro-batches: both contain images of the second group of 4."""
    rest = {"mesh": (1, 1), "loss": VARIANT, "images": 12}
    assert_same(result(kind, 2, **rest), result(kind, 1, **rest))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("mesh", [(1, 1), (-1, 1)], ids=["one device", "all devices"])
def test_pairs_that_are_not_scored_change_no_bit_of_loss_or_gradient(mesh, count):
    """Concept 5 labels no box of the images of the second half, and these are not scored on it."""
    half = IMAGES // 2
    batch = batch_of("detection")
    labels, scored = np.array(batch.labels), np.array(batch.scored)
    labels[half:][labels[half:] == 5] = 4
    scored[half:, 5] = False
    tokens = np.array(batch.tokens)
    tokens[5] = tokens[7]  # quite another text
    empty = {"sizes": 0, "boxes": 0, "labels": -1}
    arrays = {name: np.array(getattr(batch, name)) for name in empty} | {"labels": labels}
    for name, value in empty.items():
        arrays[name][:half] = value  # the first half is empty slots
    batch = dataclasses.replace(batch, scored=scored, **arrays)
    run, put = _compiled(mesh, count, batch)
    before, after = (
        jax.device_get(run(put(dataclasses.replace(batch, tokens=t))))
        for t in (batch.tokens, tokens)
    )
    assert before.loss.total > 0
    jax.tree.map(np.testing.assert_array_equal, after, before)
    everywhere = dataclasses.replace(batch, scored=np.ones_like(scored))
    assert jax.device_get(run(put(everywhere))).loss.total != before.loss.total


@pytest.mark.slow
def test_masked_pairs_on_eight_devices():
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", __file__, "-k", "pairs_that_are_not_scored"]
    environment = os.environ | {"XLA_FLAGS": flags}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "4 passed" in done.stdout, done.stdout


@pytest.mark.slow
def test_drop_path_is_that_of_the_whole_batch():
    seeds = [3, 4, None]
    losses = [float(result("detection", 2, seed=seed).loss.total) for seed in seeds]
    assert len(set(losses)) == 3
    expected = [float(result("detection", 1, seed=seed).loss.total) for seed in seeds]
    np.testing.assert_allclose(losses, expected, rtol=2e-6)


@pytest.mark.parametrize("kind", ["detection", "image_text"])
def test_four_micro_batches_take_a_quarter_of_the_memory(kind):
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
def test_a_batch_that_cannot_be_split_is_refused(batch_size, devices, count):
    accumulate.check(16, 4, 4, "grounding")
    with pytest.raises(
        UserError, match=r"grounding.batch_size is .*config.data.grounding.micro_batches"
    ):
        accumulate.check(batch_size, devices, count, "grounding")


def test_a_run_that_cannot_be_split_is_refused_before_it_starts():
    kinds = {"image_text": types.SimpleNamespace(batch_size=6, micro_batches=4)}
    config = types.SimpleNamespace(data=types.SimpleNamespace(kinds=lambda: kinds))
    with pytest.raises(UserError, match=r"6, which is not a multiple of 1 device.*micro_batches 4"):
        programs.step_function(config, None, None, sharding.make_mesh(1, 1))
