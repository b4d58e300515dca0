"""The device mesh, and where every array of a run lies on it."""

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from detclipv2_jax.errors import UserError
from detclipv2_jax.optimizer import match_rules
from detclipv2_jax.structures import Batch

Planned = TypeVar("Planned")  # what a feed says of a batch; not looked at

# (regular expression on a parameter's path, its partition): every parameter is held whole by every
# device. Optimizer and moving average follow their parameter.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = ((r".*", PartitionSpec()),)


def make_mesh(data: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, `data`, over which the batch is split; -1 takes every device."""
    devices = list(jax.devices() if devices is None else devices)
    size = len(devices) if data == -1 else data
    if not 1 <= size <= len(devices):
        raise UserError(
            f"config.mesh.data is {data}, the devices are {len(devices)}: use 1 to that, or -1."
        )
    return Mesh(np.array(devices[:size]), ("data",), axis_types=(AxisType.Auto,))


def parameter_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """A sharding for every parameter, by the rules above."""
    specs = match_rules(PARAMETER_RULES, params, "sharding")
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Held whole by every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
    """Split over `data` along its first axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def batch_shardings(mesh: Mesh, batch: Batch) -> Batch:
    """Images and what belongs to them split over `data`; the concept table held by all."""
    images, whole = split(mesh), replicated(mesh)
    return Batch(
        images=images, sizes=images, boxes=images, labels=images, texts=images,
        tokens=whole, token_mask=whole, kind=batch.kind,
    )  # fmt: skip


def put_batch(batch: Batch, shardings: Batch) -> Batch:
    """Each process hands in its slice of the images and its copy of the concept table."""
    return jax.tree.map(jax.make_array_from_process_local_data, shardings, batch)


def prefetch(
    feed: Iterable[tuple[Planned, Batch]], mesh: Mesh, size: int = 2
) -> Iterator[tuple[Planned, Batch]]:
    """The feed with its batches on the devices, `size` of them ahead of the one handed out.

    A copy only begins when a batch is put and nothing waits for it, so the next batches travel
    while the device computes; each array is copied once. Order and content are the feed's.

    Raises:
      Whatever the feed raises, once the batches before it are handed out.
    """
    ready: collections.deque[tuple[Planned, Batch]] = collections.deque()
    try:
        for planned, batch in feed:
            ready.append((planned, put_batch(batch, batch_shardings(mesh, batch))))
            if len(ready) > size:
                yield ready.popleft()
    except Exception:
        yield from ready  # what was read before is good
        raise
    yield from ready
