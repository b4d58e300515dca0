"""Where kernels can run, and how they run on each device's share of the images."""

from collections.abc import Callable
from typing import Literal, TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

# "auto" runs a kernel on TPUs with enough VMEM for it; "xla" never runs one.
Kernels = Literal["auto", "xla"]

Images = TypeVar("Images")
Weights = TypeVar("Weights")
Outputs = TypeVar("Outputs")

_SHARE = 0.95  # of the VMEM that kernels may count on


def vmem_budget() -> float:
    """Return the bytes of VMEM that a kernel may use; 0 where the device is not a TPU.

    The device is that of the mesh set by `jax.set_mesh`, which need not be attached to this
    process (compilation for a topology), else the default device.
    """
    return _SHARE * pltpu.get_tpu_info().vmem_capacity_bytes if _is_tpu() else 0.0


def cores(items: int) -> int:
    """Return the number of a chip's cores that can share `items` equal pieces of work.

    1 where they do not divide evenly. Each core sums its own gradients. A simulation, where there
    is no TPU, has two cores, so that tests cover more than one.
    """
    number = pltpu.get_tpu_info().num_cores if _is_tpu() else 2
    return number if items % number == 0 else 1


def _is_tpu() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() == "tpu" if device is None else "TPU" in device.device_kind


def devices() -> int:
    """Return the number of devices that `on_each_device` splits its images over."""
    mesh = jax.sharding.get_abstract_mesh()
    # No mesh, or already inside a shard_map.
    if all(kind == AxisType.Manual for kind in mesh.axis_types):
        return 1
    return mesh.size


def on_each_device(
    kernel: Callable[[Images, Weights], Outputs], images: Images, weights: Weights
) -> Outputs:
    """Return `kernel(images, weights)`, with the images split over all devices of the mesh.

    XLA cannot partition a kernel by itself.

    Args:
      kernel: a function of its images and of the weights.
      images: an array or tree of arrays; the first axis is the batch. The outputs are alike.
      weights: an array or tree of arrays, replicated: each device sees all of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if devices() == 1:
        return kernel(images, weights)
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(kernel, in_specs=(split, whole), out_specs=split, check_vma=False)(
        images, weights
    )
