"""The device mesh, and the sharding of every array of a run."""

from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models.parameters import match_rules
from detclipv2_jax.training.state import TrainState

# (regular expression on a parameter's path, the axis that is split over `fsdp`; None: replicated).
# Large parameters are split along their output axis, which is even in every model. The moments and
# the moving average are sharded like their parameter.
PARAMETER_RULES: tuple[tuple[str, int | None], ...] = (
    (r".*/kernel|text/(token_embedding|text_projection)", -1),
    (r".*", None),
)


BATCH = ("data", "fsdp")  # the mesh axes over which a batch is split: all of them


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    # The stub of jaxlib takes the class for a variable.
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """Return a mesh of `data` × `fsdp` devices.

    The batch is split over both axes. Parameters are split over `fsdp` and replicated over `data`.

    Args:
      data: copies of the parameters; -1 for as many as there are devices for.
      fsdp: devices that share a copy of the parameters.
      devices: all devices of JAX if None.

    Raises:
      UserError: there are not enough devices, or their number is not a multiple of `fsdp`.
    """
    devices = list(jax.devices() if devices is None else devices)
    if fsdp < 1 or (data == -1 and len(devices) % fsdp):
        raise UserError(
            f"config.mesh.fsdp is {fsdp}, which does not divide the number of devices, "
            f"{len(devices)}. Use a divisor, or 1 for a copy of the parameters on each device."
        )
    data = len(devices) // fsdp if data == -1 else data
    if not 1 <= data * fsdp <= len(devices):
        raise UserError(
            f"config.mesh.data × config.mesh.fsdp is {data} × {fsdp}, but the number of devices is "
            f"{len(devices)}. Set data to -1 to use all."
        )
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, BATCH, axis_types=(AxisType.Auto,) * 2)


def parameter_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Return the sharding of every parameter, by `PARAMETER_RULES`.

    A parameter whose axis is not divisible by `fsdp` is replicated; those are small, such as the 27
    channels of the deformable convolution's offsets.
    """
    axes = match_rules(PARAMETER_RULES, params, "sharding")

    def sharding(axis: int | None, value: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if axis is None or value.shape[axis] % mesh.shape["fsdp"]:
            return replicated(mesh)
        spec: list[str | None] = [None] * value.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, axes, params, is_leaf=lambda axis: axis is None)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is split over all devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Return the shardings of a batch: images, their annotations and the concept table are split.

    Each device encodes its share of the concepts, and the step gathers the features. If the number
    of rows is not divisible by the number of devices, every device encodes the whole table.
    """
    # Shardings take the place of the arrays.
    images, whole = cast(Any, split(mesh)), cast(Any, replicated(mesh))
    tokens = whole if len(batch.tokens) % mesh.size else images
    return Batch(
        images=images, sizes=images, boxes=images, labels=images, scored=images,
        texts=images, tokens=tokens, token_mask=whole, kind=batch.kind,
    )  # fmt: skip


def state_shardings(mesh: jax.sharding.Mesh, state: TrainState) -> TrainState:
    """Return the shardings of a state.

    Moments and moving average are sharded like their parameter; the counters are replicated.
    """
    like_params = parameter_shardings(mesh, state.params)
    whole, structure = replicated(mesh), jax.tree.structure(state.params)

    def is_params(node: PyTree) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: like_params if is_params(node) else whole, state, is_leaf=is_params
    )
