"""The device mesh, and where every array of a run lies on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.models.parameters import match_rules
from detclipv2_jax.training.state import TrainState

# (regular expression on a parameter's path, the axis that is split over `fsdp`; None: held whole).
# What is large is split along what it gives out: an even number in every model. The rest is small.
# Optimizer and moving average follow their parameter.
PARAMETER_RULES: tuple[tuple[str, int | None], ...] = (
    (r".*/kernel|text/(token_embedding|text_projection)", -1),
    (r".*", None),
)


BATCH = ("data", "fsdp")  # the axes over which a batch is split: all of them


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` × `fsdp` devices; -1 takes all that are left.

    The batch is split over both axes. Parameters are split over `fsdp` and held by each of `data`.

    Raises:
      UserError: there are not so many devices, or `fsdp` does not divide them.
    """
    devices = list(jax.devices() if devices is None else devices)
    if fsdp < 1 or (data == -1 and len(devices) % fsdp):
        raise UserError(
            f"config.mesh.fsdp is {fsdp}, which does not divide {len(devices)} devices: use a "
            "divisor, 1 to hold all parameters on each device."
        )
    data = len(devices) // fsdp if data == -1 else data
    if not 1 <= data * fsdp <= len(devices):
        raise UserError(
            f"config.mesh.data × config.mesh.fsdp is {data} × {fsdp}, the devices are "
            f"{len(devices)}: use as many at most, or data -1."
        )
    grid = np.array(devices[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, BATCH, axis_types=(AxisType.Auto,) * 2)


def parameter_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """A sharding for every parameter, by the rules above.

    An axis that `fsdp` does not divide is not split: a head of 27 channels costs nothing.
    """
    axes = match_rules(PARAMETER_RULES, params, "sharding")

    def sharding(axis: int | None, value: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        if axis is None or value.shape[axis] % mesh.shape["fsdp"]:
            return replicated(mesh)
        spec = [None] * value.ndim
        spec[axis] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, axes, params, is_leaf=lambda axis: axis is None)


def replicated(mesh: Mesh) -> NamedSharding:
    """Held whole by every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Split over all devices along its first axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Images and what belongs to them split over all devices; so is the table of concepts.

    Each device encodes its share of the concepts; the step gathers the embeddings. A table whose
    rows the devices do not divide is encoded by each of them.
    """
    images, whole = split(mesh), replicated(mesh)
    tokens = whole if len(batch.tokens) % mesh.size else images
    return Batch(
        images=images, sizes=images, boxes=images, labels=images, texts=images,
        tokens=tokens, token_mask=whole, kind=batch.kind,
    )  # fmt: skip


def state_shardings(mesh: jax.sharding.Mesh, state: TrainState) -> TrainState:
    """Parameters by their rules, moments and average like their parameter, counters everywhere."""
    like_params = parameter_shardings(mesh, state.params)
    whole, structure = replicated(mesh), jax.tree.structure(state.params)

    def is_params(node: PyTree) -> bool:
        return jax.tree.structure(node) == structure

    return jax.tree.map(
        lambda node: like_params if is_params(node) else whole, state, is_leaf=is_params
    )
