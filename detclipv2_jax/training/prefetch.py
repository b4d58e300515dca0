"""Moving the batches of a run onto the devices, ahead of the steps that use them."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.training.sharding import batch_shardings

Planned = TypeVar("Planned")  # what a feed says of a batch; not looked at


def put_batch(batch: Batch, shardings: Batch) -> Batch:
    """Each process hands in its slice of the images and its copy of the concept table."""

    def put(sharding: NamedSharding, array: np.ndarray, whole: bool) -> jax.Array:
        shape = array.shape if whole else None  # None: the processes' slices, one after another
        return jax.make_array_from_process_local_data(sharding, array, shape)

    everybodys = {"tokens", "token_mask"}
    names = [field.name for field in dataclasses.fields(Batch) if field.name != "kind"]
    arrays = {n: put(getattr(shardings, n), getattr(batch, n), n in everybodys) for n in names}
    return Batch(**arrays, kind=batch.kind)


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
