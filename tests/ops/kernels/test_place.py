"""Kernels run on each device's images, and only on TPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from detclipv2_jax.ops.kernels import place
from detclipv2_jax.training import sharding


def sized(images, weights):
    """Add 1000 times the number of images that the call received."""
    x, factors = images
    return x * factors[:, None, None, None] * weights["scale"] + 1000.0 * len(x)


@pytest.mark.parametrize("already_split", [False, True])
def test_images_are_split_and_gradients_of_weights_are_summed(already_split):
    mesh = sharding.make_mesh(2, 2)
    random = np.random.default_rng(0)
    x, grad_out = (jnp.asarray(random.normal(size=(8, 3, 2, 4)), jnp.float32) for _ in range(2))
    factors = jnp.asarray(random.uniform(size=8), jnp.float32)
    weights = {"scale": jnp.asarray(random.normal(size=4), jnp.float32)}
    images = NamedSharding(mesh, PartitionSpec(sharding.BATCH))

    def run(x, weights):
        call = lambda images, weights: place.on_each_device(sized, images, weights)
        if already_split:
            split, whole = images.spec, PartitionSpec()
            call = jax.shard_map(
                call, mesh=mesh, in_specs=(split, whole), out_specs=split, check_vma=False
            )
        return call((x, factors), weights)

    def everything(x, weights):
        value, back = jax.vjp(run, x, weights)
        return value, back(grad_out)

    with jax.set_mesh(mesh):
        value, (grad_x, grad_weights) = jax.jit(everything)(jax.device_put(x, images), weights)
    factor = factors[:, None, None, None]
    np.testing.assert_allclose(value, x * factor * weights["scale"] + 2000.0, rtol=1e-6)
    np.testing.assert_allclose(grad_x, grad_out * factor * weights["scale"], rtol=1e-6)
    expected = np.sum(np.asarray(grad_out * x * factor, np.float64), axis=(0, 1, 2))
    np.testing.assert_allclose(grad_weights["scale"], expected, rtol=1e-5, atol=1e-6)


def test_without_a_mesh_nothing_is_split():
    ones = jnp.ones((3, 1, 1, 4))
    value = place.on_each_device(sized, (ones, jnp.ones(3)), {"scale": jnp.ones(4)})
    assert (value == 3001.0).all()


@pytest.mark.parametrize(
    ("kind", "budget", "cores"), [("TPU v5 lite", 0.95 * 2**27, 4), ("NVIDIA H100", 0, 2)]
)
def test_devices_of_the_mesh_need_not_be_attached(monkeypatch, kind, budget, cores):
    class Mesh:
        abstract_device = type("Device", (), {"device_kind": kind})

    class Info:
        vmem_capacity_bytes, num_cores = 2**27, 4

    monkeypatch.setattr(place.jax.sharding, "get_abstract_mesh", lambda: Mesh)
    monkeypatch.setattr(place.pltpu, "get_tpu_info", lambda: Info)
    assert place.vmem_budget() == budget
    assert place.cores(12) == cores
    assert place.cores(3) == 1
