"""Where a kernel can run, and how it runs there: on each device's share of the images."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

Weights = TypeVar("Weights")

_SHARE = 0.95  # of the fast memory that kernels may count on


def room() -> float:
    """Bytes of fast memory of the TPU that is traced for; 0: it is no TPU.

    It is that of the mesh that `jax.set_mesh` names, whose devices need not be here, else the one
    that is here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_tpu = jax.default_backend() == "tpu" if device is None else "TPU" in device.device_kind
    return _SHARE * pltpu.get_tpu_info().vmem_capacity_bytes if on_tpu else 0.0


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
