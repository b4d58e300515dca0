"""Write a prepared source record by record in one process, for tests and tools."""

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from detclipv2_jax.data.index import KINDS, Source
from detclipv2_jax.data.prepare import index_writer, own_folders
from detclipv2_jax.data.records import Record, ShardWriter
from detclipv2_jax.text.checked import Meaning


class RecordWriter:
    """Writes a source from records that are added one by one.

    Everything is written to `directory + ".partial"`; `finish` moves it to `directory`. Use as a
    context manager: without `finish`, what was written is removed.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        kind: str,
        names: Sequence[str] = (),
        meanings: Mapping[str, Meaning] = MappingProxyType({}),
        shard_records: int = 1024,
    ):
        """Start an empty source.

        Args:
            directory: of the source.
            name: of the source.
            kind: one of `KINDS`.
            names: concepts that come first, whether or not a record has them (categories).
            meanings: normalized name → definition and synset, for names that the source defines.
            shard_records: records per shard.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
        self.directory = Path(directory)
        own_folders.refuse_foreign(self.directory)
        self._partial = own_folders.empty_partial(self.directory, {"inputs": None})
        self._meanings = dict(meanings)
        self._name, self._kind, self._shard_records = name, kind, shard_records
        self._indexer = index_writer.Indexer(kind, names)
        self._files: list[tuple[Path, int]] = []  # (path, records) of each shard
        self._shard = contextlib.ExitStack()
        (self._partial / "merged").mkdir()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_) -> None:
        self._shard.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def __len__(self) -> int:
        return len(self._indexer)

    def write(
        self, record: Record, absent: Sequence[str] | None = None, partial: Sequence[str] = ()
    ) -> None:
        """Append a record; `absent` and `partial` as in `Example`, for a federated source."""
        if len(self) % self._shard_records == 0:
            self._shard.close()
            path = self._partial / f"{len(self._files):06d}.array_record"
            self._writer = self._shard.enter_context(ShardWriter(path))
            self._files.append((path, 0))
        self._writer.write(record)
        self._indexer.add(record, absent, partial)
        path, count = self._files[-1]
        self._files[-1] = path, count + 1

    def finish(self, **info: Any) -> Source:
        """Move the source to its directory and open it. `info`: more fields of info.json."""
        self._shard.close()
        index = self._partial / "index.npz"
        self._indexer.finish().save(index, {})
        index_writer.assemble(
            self._partial / "merged",
            self._files,
            [index],
            name=self._name,
            kind=self._kind,
            info=info,
            meanings=self._meanings,
        )
        return index_writer.put_in_place(self._partial / "merged", self.directory)
