"""Moving the batches of a run onto the devices, ahead of the steps that use them."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
from jax.sharding import Mesh

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training.sharding import batch_shardings

Planned = TypeVar("Planned")  # what comes with a batch; passed through
_SAME_IN_ALL_PROCESSES = ("tokens", "token_mask")


def put_batch(batch: Batch, shardings: Batch) -> Batch:
    """Return the global batch on the devices.

    Args:
        batch: this process's slice of the images and what belongs to them, in numpy arrays, and the
            whole concept table, which every process has.
        shardings: of each array of the global batch.
    """
    arrays = {}
    for name in (field.name for field in dataclasses.fields(Batch) if field.name != "kind"):
        array = getattr(batch, name)
        # Without a global shape JAX joins the slices of the processes.
        shape = array.shape if name in _SAME_IN_ALL_PROCESSES else None
        arrays[name] = jax.make_array_from_process_local_data(
            getattr(shardings, name), array, shape
        )
    return Batch(**arrays, kind=batch.kind)


def prefetch(
    feed: Iterable[tuple[Planned, Batch]], mesh: Mesh, size: int = 2
) -> Iterator[tuple[Planned, Batch]]:
    """Yield the items of a feed in order, with their batches on the devices.

    Up to `size` more batches are under way. `put_batch` only starts a copy, so they travel while
    the devices compute.

    Raises:
        Exception: any that the feed raises, after the batches before it.
    """
    ready: collections.deque[tuple[Planned, Batch]] = collections.deque()
    try:
        for planned, batch in feed:
            ready.append((planned, put_batch(batch, batch_shardings(mesh, batch))))
            if len(ready) > size:
                yield ready.popleft()
    except Exception:
        yield from ready  # complete: the error came after them
        raise
    yield from ready
