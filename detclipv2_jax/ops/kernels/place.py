"""Where a kernel can run, and how it runs there: on each device's share of the images."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

Weights = TypeVar("Weights")

_FAST_MEMORY = 64 * 2**20  # bytes that the kernels may want: all chips since v5 have them


def available() -> bool:
    """Is what is being traced for a TPU that has the fast memory?

    For the devices of the mesh that `jax.set_mesh` names, which need not be here, else for those
    that are here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_tpu = jax.default_backend() == "tpu" if device is None else "TPU" in device.device_kind
    return on_tpu and pltpu.get_tpu_info().vmem_capacity_bytes >= _FAST_MEMORY


def on_each_device(
    kernel: Callable[[Array, Array, Weights], Array],
    x: Float[Array, "B H W C"],
    keep: Float[Array, " B"],
    weights: Weights,
) -> Float[Array, "B H W C"]:
    """`kernel(x, keep, weights)` of images that may be split over all devices of the mesh.

    The compiler cannot cut a kernel in parts by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(kind == AxisType.Manual for kind in mesh.axis_types):  # no mesh, or cut already
        return kernel(x, keep, weights)
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(kernel, in_specs=(split, split, whole), out_specs=split, check_vma=False)(
        x, keep, weights
    )
