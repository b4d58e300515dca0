"""Where a kernel can run, and how it runs there: on each device's share of the images."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

# Whether TPUs run kernels of ours: "auto" where these can, "xla" never.
Kernels = Literal["auto", "xla"]

Images = TypeVar("Images")
Weights = TypeVar("Weights")
Outputs = TypeVar("Outputs")

_SHARE = 0.95  # of the fast memory that kernels may count on


def room() -> float:
    """Bytes of fast memory of the TPU that is traced for; 0: it is no TPU.

    It is that of the mesh that `jax.set_mesh` names, whose devices need not be here, else the one
    that is here.
    """
    return _SHARE * pltpu.get_tpu_info().vmem_capacity_bytes if _is_tpu() else 0.0


def cores(parts: int) -> int:
    """Among how many cores of such a chip a kernel can share so many equal parts.

    Each sums its gradients for itself. Two where there is no TPU: a simulation shows both.
    """
    number = pltpu.get_tpu_info().num_cores if _is_tpu() else 2
    return number if parts % number == 0 else 1


def _is_tpu() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "tpu" if device is None else "TPU" in device.device_kind


def devices() -> int:
    """Among how many devices `on_each_device` splits what it is given."""
    mesh = jax.sharding.get_abstract_mesh()
    if all(kind == AxisType.Manual for kind in mesh.axis_types):  # no mesh, or cut already
        return 1
    return mesh.size


def on_each_device(
    kernel: Callable[[Images, Weights], Outputs], images: Images, weights: Weights
) -> Outputs:
    """`kernel(images, weights)` of images that may be split over all devices of the mesh.

    Images and outputs are arrays or trees of arrays whose first axis is the batch's. The compiler
    cannot cut a kernel in parts by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if devices() == 1:
        return kernel(images, weights)
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(kernel, in_specs=(split, whole), out_specs=split, check_vma=False)(
        images, weights
    )
