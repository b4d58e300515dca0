"""Random access to the serialized records of prepared sources."""

import resource
from collections.abc import Mapping
from concurrent import futures

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source

_THREADS = 16  # reads wait for disks and networks, not for cores
_READ_BYTES = 1 << 16  # per read of a file: about one image, because the next one is elsewhere
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access


class RecordFiles:
    """The record files of several sources, each opened on first use.

    One thread at a time may call `read`, which uses threads of its own.
    """

    def __init__(self, sources: Mapping[str, Source]):
        self._paths = {name: source.shard_paths for name, source in sources.items()}
        self._starts = {name: source.shard_starts for name, source in sources.items()}
        self._open: dict[str, array_record_module.ArrayRecordReader] = {}
        self._pool = futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="records")
        _allow_open_files(sum(map(len, self._paths.values())))

    def read(self, name: str, numbers: Int[np.ndarray, " n"]) -> list[bytes | None]:
        """Return serialized records of source `name` by number; None for each unreadable one.

        Raises:
            UserError: a file cannot be opened.
        """
        starts = self._starts[name]
        shards = np.searchsorted(starts, numbers, side="right") - 1
        groups = [np.flatnonzero(shards == shard) for shard in np.unique(shards)]
        paths = [self._paths[name][shards[group[0]]] for group in groups]
        local = [(numbers - starts[shards])[group].tolist() for group in groups]
        result: list[bytes | None] = [None] * len(numbers)
        for group, contents in zip(groups, self._pool.map(self._read_shard, paths, local)):
            for place, content in zip(group, contents):
                result[place] = content
        return result

    def _read_shard(self, path: str, numbers: list[int]) -> list[bytes | None]:
        # `read` makes one group per file, so no two threads share a reader.
        if path not in self._open:
            self._open[path] = _open(path)
        # One by one: given a list, the reader starts threads of its own. They cost more than they
        # save where a file is cached; from each of a large source's many files a step needs only
        # one or two records.
        return [_read_one(self._open[path], number) for number in numbers]


def _read_one(reader: array_record_module.ArrayRecordReader, number: int) -> bytes | None:
    try:
        return reader.read([number])[0]
    except RuntimeError:  # this part of the file is damaged; other records are still readable
        return None


def _open(path: str) -> array_record_module.ArrayRecordReader:
    reader = array_record_module.ArrayRecordReader(
        path, _OPTIONS, file_reader_buffer_size=_READ_BYTES
    )
    if not reader.ok():
        raise UserError(f"{path}: cannot be opened as a record file. Prepare its source again.")
    return reader


def _allow_open_files(count: int) -> None:
    """Raise this process's limit of open files where the system allows it.

    Web-scale sources have many files.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024  # for everything else that the process opens
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
