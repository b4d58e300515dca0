"""Prefetched batches arrive complete, in order, ahead of the step that uses them."""

import jax
import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training import prefetch, sharding


def batch(value):
    rng = np.random.default_rng(value)
    return Batch(
        images=rng.integers(0, 256, (8, 4, 6, 3), dtype=np.uint8),
        sizes=np.full((8, 2), value, np.int32),
        boxes=rng.random((8, 2, 4), dtype=np.float32),
        labels=np.zeros((8, 2, 1), np.int32),
        scored=rng.random((8, 5)) < 0.5,
        texts=np.zeros((8, 0), np.int32),
        tokens=rng.integers(0, 9, (5, 16), dtype=np.int32),
        token_mask=np.ones(5, bool),
        kind="detection",
    )


def feed(count, taken, fail=False):
    for number in range(count):
        taken.append(number)
        yield number, batch(number)
    if fail:
        raise UserError("the disk is on fire")


def assert_on_device(found, number, mesh):
    expected = batch(number)
    for field in ("images", "sizes", "boxes", "labels", "scored", "texts", "tokens", "token_mask"):
        array = getattr(found, field)
        assert isinstance(array, jax.Array)
        np.testing.assert_array_equal(array, getattr(expected, field))
        assert array.sharding.is_fully_replicated == (field in ("tokens", "token_mask"))
        assert array.sharding.device_set == set(mesh.devices.flat)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 2])
def test_prefetched_batches_equal_those_of_the_feed(count, size):
    mesh, taken, numbers = sharding.make_mesh(), [], []
    for number, found in prefetch.prefetch(feed(count, taken), mesh, size):
        assert len(taken) == min(number + 1 + size, count)  # no more are in flight
        assert_on_device(found, number, mesh)
        numbers.append(number)
    assert numbers == list(range(count))


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_error_is_raised_after_the_batches_before_it(count):
    ahead, numbers = prefetch.prefetch(feed(count, [], fail=True), sharding.make_mesh()), []
    with pytest.raises(UserError, match="on fire"):
        for number, _ in ahead:
            numbers.append(number)
    assert numbers == list(range(count))


def test_a_closed_prefetcher_ends():
    ahead = prefetch.prefetch(feed(5, []), sharding.make_mesh())
    next(ahead)
    ahead.close()
    assert next(ahead, None) is None
