"""Write the index of a dataset that TensorFlow Datasets built, so that training can read it.

Only what training needs in addition to the records is written (data/index.py). The records are not
touched.
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
from detclipv2_jax.data.index import ARRAYS, CONCEPTS, KINDS, Source
from detclipv2_jax.data.prepare import index_writer
from detclipv2_jax.data.prepare.workers import run
from detclipv2_jax.data.records import decode, features
from detclipv2_jax.text.checked import Meaning

_PROGRESS_RECORDS = 64  # records between two reports of progress
_PARTIAL = "index.partial"


def add_index(directory: Path, *, split: str = "train", jobs: int = 1) -> Source:
    """Write the index of one split of a dataset that `tfds_builders.py` built, and open it.

    Shards that an interrupted call has indexed are not read again.

    Args:
        directory: of the dataset, such as DATA_DIR/objects365/1.0.0.
        split: which split of the dataset.
        jobs: processes.

    Raises:
        UserError: the directory is not such a dataset, or a record is damaged.
    """
    dataset = _open_dataset(directory)
    kind, metadata = dataset.metadata["kind"], dataset.metadata
    if split not in dataset.splits:
        raise UserError(
            f"{directory}: no split {split!r}. Choose --split from {', '.join(dataset.splits)}."
        )
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
    indices = [names, *(indexer.index_file(number) for number in range(len(shards)))]
    meanings = {name: Meaning(*both) for name, both in metadata.get("meanings", {}).items()}
    index_writer.write_index(partial, indices, meanings)
    (directory / "index").mkdir(exist_ok=True)
    for path in (*ARRAYS.values(), CONCEPTS):
        os.replace(partial / path, directory / path)
    more = {field: metadata.get(field, {}) for field in ("dropped", "mended", "explained")}
    more |= {"created_from": {"tfds": dataset.full_name}}
    index_writer.write_info(directory, name=dataset.name, kind=kind, shards=shards, more=more)
    shutil.rmtree(partial)
    return Source.open(directory)


@dataclasses.dataclass(frozen=True)
class _ShardIndexer:
    """Writes the index of each shard of records to a directory."""

    directory: Path
    kind: str

    def write(self, number: int, shard: Path, progress: Callable[[int], None]) -> None:
        """Index `shard`, the shard of this number; see `workers.run` for `progress`."""
        indexer, identity = index_writer.Indexer(self.kind), _identity(shard)
        reader = array_record_module.ArrayRecordReader(str(shard))
        try:
            for done in range(1, reader.num_records() + 1):
                try:
                    indexer.add(decode(reader.read([done - 1])[0]))
                except (RuntimeError, ValueError) as error:
                    raise UserError(
                        f"{shard}, record {done - 1}: {error}. Build the dataset again."
                    ) from error
                if done % _PROGRESS_RECORDS == 0 or done == reader.num_records():
                    progress((done - 1) % _PROGRESS_RECORDS + 1)
        finally:
            reader.close()
        indexer.finish().save(self.index_file(number), identity)

    def finished(self, number: int, shard: Path) -> bool:
        """Return whether `shard` is indexed and unchanged since."""
        with contextlib.suppress(Exception):  # a damaged archive can raise anything
            return index_writer.read_summary(self.index_file(number)) == _identity(shard)
        return False

    def index_file(self, number: int) -> Path:
        """Return the path of a shard's index."""
        return self.directory / f"{number:06d}.npz"


def _identity(shard: Path) -> dict[str, Any]:
    """Return what distinguishes a file from an earlier one of the same name."""
    status = shard.stat()
    return {"shard": shard.name, "bytes": status.st_size, "modified": status.st_mtime_ns}


def _open_dataset(directory: Path) -> Any:
    """Return the `tfds.core.DatasetInfo` of a directory; `UserError` if it lacks our records."""
    import tensorflow_datasets as tfds  # does not import TensorFlow

    if not (directory / "dataset_info.json").is_file():
        raise UserError(
            f"{directory}: not a dataset of TensorFlow Datasets. Give the folder that has its "
            "dataset_info.json, such as DATA_DIR/objects365/1.0.0."
        )
    builders = "detclipv2_jax.data.prepare.tfds_builders"
    info = tfds.builder_from_directory(directory).info
    if info.file_format.value != "array_record":
        raise UserError(
            f"{directory}: its file format is {info.file_format.value}. Build it as array_record."
        )
    if info.features.get_serialized_info() != features().get_serialized_info():
        raise UserError(
            f"{directory}: its features are not those of {builders}. Build it again with "
            f"--imports={builders}."
        )
    kind = (info.metadata or {}).get("kind")
    if kind not in KINDS:
        raise UserError(
            f'{directory}/metadata.json: "kind" is {kind!r}, not one of {", ".join(KINDS)}. '
            f"Build it again with --imports={builders}."
        )
    return info


def _indexed_before(directory: Path, files: list[str]) -> Source | None:
    with contextlib.suppress(UserError):
        source = Source.open(directory)
        if source.info["files"] == files:
            return source
    return None
