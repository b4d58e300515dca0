"""Which device holds which parameters, on meshes of one to four devices."""

import jax
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models import detclip, parameters, sizes
from detclipv2_jax.training import sharding


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [(-1, 1, (4, 1)), (-1, 2, (2, 2)), (-1, 4, (1, 4)), (1, 1, (1, 1)), (1, 2, (1, 2))],
)
def test_meshes(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp")


@pytest.mark.parametrize(("data", "fsdp"), [(0, 1), (5, 1), (3, 2), (-1, 3), (-1, 0), (-1, 8)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(UserError, match=r"config\.mesh\.(data|fsdp).*devices"):
        sharding.make_mesh(data, fsdp)


@pytest.mark.parametrize("size", [sizes.NANO, sizes.SWIN_T, sizes.SWIN_L])
def test_most_of_every_model_is_split(size):
    _, params = detclip.abstract(size)
    shardings = sharding.parameter_shardings(sharding.make_mesh(1, 4), params)
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    held = sum(
        np.prod(layout.shard_shape(leaf.shape))
        for leaf, layout in zip(jax.tree.leaves(params), jax.tree.leaves(shardings))
    )
    assert held < 0.27 * whole
    alone = sharding.parameter_shardings(sharding.make_mesh(4, 1), params)
    assert all(layout.is_fully_replicated for layout in jax.tree.leaves(alone))


def test_what_fsdp_does_not_divide_is_replicated():
    _, params = tiny_model.parts()
    paths = parameters.parameter_paths(params)
    layouts = parameters.parameter_paths(
        sharding.parameter_shardings(sharding.make_mesh(1, 4), params)
    )
    for path, value in paths.items():
        odd = value.ndim == 0 or value.shape[-1] % 4
        if odd or not path.endswith(("kernel", "token_embedding", "text_projection")):
            assert layouts[path].is_fully_replicated, path
        else:
            assert not layouts[path].is_fully_replicated, path
    assert layouts["head/dcn/offset/kernel"].is_fully_replicated  # 27 channels
