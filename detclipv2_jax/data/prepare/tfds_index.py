"""A dataset that TensorFlow Datasets built becomes a source that training reads, where it lies.

Only what training needs beside the records is written (index.py): the records stay as they are.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from tqdm import tqdm

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import ARRAYS, KINDS, Source
from detclipv2_jax.data.prepare import index_writer
from detclipv2_jax.data.prepare.workers import run
from detclipv2_jax.data.records import decode, features

_TOLD = 64  # records after which a worker tells how far it is
_PARTIAL = "index.partial"


def add_index(directory: Path, *, split: str = "train", jobs: int = 1) -> Source:
    """Write the index of a split of a dataset that `builders.py` built, and open it.

    What an interrupted call finished is used by the next one. `UserError` where the directory is
    no such dataset.
    """
    dataset = _dataset(directory)
    kind, metadata = dataset.metadata["kind"], dataset.metadata
    if split not in dataset.splits:
        raise UserError(f"{directory}: no split {split!r}; it has {', '.join(dataset.splits)}")
    lengths = dataset.splits[split].shard_lengths
    shards = {path.name: count for path, count in zip(dataset.splits[split].filepaths, lengths)}
    if (source := _indexed_before(directory, list(shards))) is not None:
        return source
    partial = directory / _PARTIAL
    partial.mkdir(exist_ok=True)
    indexer = _ShardIndexer(partial, kind)
    missing = (
        (number, directory / name)
        for number, name in enumerate(shards)
        if not indexer.finished(number, directory / name)
    )
    with tqdm(desc=dataset.name, total=sum(lengths), unit=" records", disable=None) as bar:
        run(indexer.write, missing, jobs, bar.update)
    names = partial / "names.npz"
    index_writer.Indexer(kind, metadata.get("names", ())).finish().save(names, {})
    index_writer.write_index(partial, [names, *(indexer.index(i) for i in range(len(shards)))])
    (directory / "index").mkdir(exist_ok=True)
    for path in (*ARRAYS.values(), "concepts.jsonl"):
        os.replace(partial / path, directory / path)
    more = {field: metadata.get(field, {}) for field in ("dropped", "mended", "explained")}
    more |= {"created_from": {"tfds": dataset.full_name}}
    index_writer.write_info(directory, name=dataset.name, kind=kind, shards=shards, more=more)
    shutil.rmtree(partial)
    return Source.open(directory)


@dataclasses.dataclass(frozen=True)
class _ShardIndexer:
    """Writes the index of a file of records to a directory."""

    directory: Path
    kind: str

    def write(self, number: int, shard: Path, told: Callable[[int], None]) -> None:
        """Index `shard`, which is the source's file `number`."""
        indexer, about = index_writer.Indexer(self.kind), _about(shard)
        reader = array_record_module.ArrayRecordReader(str(shard))
        try:
            for done in range(1, reader.num_records() + 1):
                try:
                    indexer.add(decode(reader.read([done - 1])[0]))
                except (RuntimeError, ValueError) as error:
                    raise UserError(
                        f"{shard}, record {done - 1}: {error}; build the dataset again"
                    ) from error
                if done % _TOLD == 0 or done == reader.num_records():
                    told((done - 1) % _TOLD + 1)
        finally:
            reader.close()
        indexer.finish().save(self.index(number), about)

    def finished(self, number: int, shard: Path) -> bool:
        """Whether `shard` is indexed already."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return index_writer.about(self.index(number)) == _about(shard)
        return False

    def index(self, number: int) -> Path:
        """The file of a shard's index."""
        return self.directory / f"{number:06d}.npz"


def _about(shard: Path) -> dict[str, Any]:
    """What tells a file from another one of its name."""
    status = shard.stat()
    return {"shard": shard.name, "bytes": status.st_size, "modified": status.st_mtime_ns}


def _dataset(directory: Path) -> Any:
    """The `tfds.core.DatasetInfo` of a directory, if it is of our records."""
    import tensorflow_datasets as tfds  # without TensorFlow itself

    if not (directory / "dataset_info.json").is_file():
        raise UserError(
            f"{directory}: no dataset of TensorFlow Datasets; name the folder that has its "
            "dataset_info.json, such as DATA_DIR/objects365/1.0.0"
        )
    info = tfds.builder_from_directory(directory).info
    if info.file_format.value != "array_record":
        raise UserError(
            f"{directory}: its files are {info.file_format.value}; build it as array_record"
        )
    if info.features.get_serialized_info() != features().get_serialized_info():
        raise UserError(f"{directory}: its features are not those of builders.py; build it again")
    kind = (info.metadata or {}).get("kind")
    if kind not in KINDS:
        raise UserError(
            f'{directory}: "kind" in its metadata.json is {kind!r}, none of {", ".join(KINDS)}; '
            "build it with detclipv2_jax.data.builders"
        )
    return info


def _indexed_before(directory: Path, files: list[str]) -> Source | None:
    with contextlib.suppress(UserError):
        source = Source.open(directory)
        if source.info["files"] == files:
            return source
    return None
