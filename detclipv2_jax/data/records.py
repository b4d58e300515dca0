"""The unified triplet (image, boxes, concepts) as a record, and the writer of a prepared source.

A record is a serialised `tf.train.Example` in an ArrayRecord file, readable by its number, the very
bytes that TensorFlow Datasets writes for the features of `builders.py`. It names its concepts by
their texts, so it means the same wherever it lies. The layout of the directory is told in
`index.py`, which opens it again.
"""

import array
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float32, Int32

# tf.train.Example under another name, without the ten seconds that TensorFlow takes to import.
from tensorflow_datasets.proto import tf_example_generated_pb2 as example_pb2
from tensorflow_datasets.proto import tf_feature_generated_pb2 as feature_pb2

from detclipv2_jax.data import concepts as concepts_lib
from detclipv2_jax.data.index import ARRAYS, FORMAT, KINDS, Source, shard_name
from detclipv2_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

_SHARD_BYTES = 1 << 29
# A group of one record: any record is read alone. JPEGs do not compress, so it is not tried.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_JPEG = b"\xff\xd8"


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image with what is known of it. Concepts are texts as `concepts.normalise` leaves them.

    Detection and grounding: `concepts` are the names or phrases of its boxes, in order of first
    appearance. Image-text: the caption, then its phrases.
    """

    image: bytes  # JPEG
    height: int  # pixels of the stored picture; EXIF orientation is ignored throughout
    width: int
    image_id: str
    boxes: Float32[
        np.ndarray, "n 4"
    ]  # (x_min, y_min, x_max, y_max), absolute pixels of the stored picture
    labels: Int32[np.ndarray, " n"]  # a box's place in `concepts`
    concepts: tuple[str, ...]  # each once


def encode(record: Record) -> bytes:
    """Serialise a record; `ValueError` if it contradicts itself (shapes, sizes, boxes outside).

    Equal records give equal bytes.
    """
    _check(record)
    features = {
        "image": _bytes([record.image]),
        "height": _int64([record.height]),
        "width": _int64([record.width]),
        "image_id": _bytes([record.image_id.encode("utf-8", "replace")]),
        "boxes": feature_pb2.Feature(
            float_list=feature_pb2.FloatList(value=record.boxes.reshape(-1))
        ),
        "labels": _int64(record.labels),
        "concepts": _bytes([concept.encode() for concept in record.concepts]),
    }
    example = example_pb2.Example(features=feature_pb2.Features(feature=features))
    return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
    """The inverse of `encode`, in Python: for tests, browsing and tools. Training uses `parse`."""
    try:
        feature = example_pb2.Example.FromString(data).features.feature
        return Record(
            image=feature["image"].bytes_list.value[0],
            height=feature["height"].int64_list.value[0],
            width=feature["width"].int64_list.value[0],
            image_id=feature["image_id"].bytes_list.value[0].decode(),
            boxes=np.array(feature["boxes"].float_list.value, np.float32).reshape(-1, 4),
            labels=np.array(feature["labels"].int64_list.value, np.int32),
            concepts=tuple(text.decode() for text in feature["concepts"].bytes_list.value),
        )
    except (
        Exception
    ) as error:  # protobuf's own error, a missing field, a count that is no multiple of four
        raise UserError("not a valid record; prepare its source again") from error


def parse(serialised: "tf.Tensor") -> dict[str, "tf.Tensor"]:
    """`decode` as a TensorFlow graph.

    Gives scalars `image`, `height`, `width`, `image_id`; `boxes` (n, 4), `labels` (n,), `concepts`
    (c,).
    """
    import tensorflow as tf  # nothing else here needs it

    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "height": tf.io.FixedLenFeature([], tf.int64),
        "width": tf.io.FixedLenFeature([], tf.int64),
        "image_id": tf.io.FixedLenFeature([], tf.string),
        "boxes": tf.io.FixedLenSequenceFeature([4], tf.float32, allow_missing=True),
        "labels": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True),
        "concepts": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
    }
    return tf.io.parse_single_example(serialised, features)


class RecordWriter:
    """Writes a prepared source to `directory`, which appears whole or not at all.

    Everything goes to `directory + ".partial"` (what a killed run left there is removed) and is
    renamed by `finish`. Use as a context manager: leaving it unfinished removes what was written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        name: str,
        kind: str,
        names: Sequence[str] = (),
        shard_bytes: int = _SHARD_BYTES,
    ):
        """Start an empty source of a kind; a shard is closed once it holds `shard_bytes` bytes.

        `names`: concepts that come first whether a record has them or not (a file's categories).
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        self.directory = Path(directory)
        # finish() replaces the directory: never one that holds something else.
        occupied = self.directory.is_dir() and any(self.directory.iterdir())
        if occupied and not (self.directory / "info.json").is_file():
            raise UserError(f"{directory}: not empty, and no prepared source; choose another")
        self._partial = self.directory.with_name(self.directory.name + ".partial")
        self._name, self._kind, self._shard_bytes = name, kind, shard_bytes
        self._height, self._width = array.array("H"), array.array("H")
        self._offsets, self._positives = array.array("q", [0]), array.array("i")
        self.concepts = concepts_lib.ConceptTable()
        for concept in names:
            self.concepts.add(concept, count=0)
        self._shards: list[int] = []
        self._bytes = 0
        self._writer = None
        shutil.rmtree(self._partial, ignore_errors=True)
        (self._partial / "index").mkdir(parents=True)

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_) -> None:
        self._close_shard()
        shutil.rmtree(self._partial, ignore_errors=True)  # gone already if finished

    def __len__(self) -> int:
        return len(self._height)

    def write(self, record: Record) -> None:
        """Append a record."""
        data = encode(record)
        if self._writer is None:
            path = self._partial / f"records-{len(self._shards):05d}"
            self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)
            self._shards.append(0)
            self._bytes = 0
        self._writer.write(data)
        self._shards[-1] += 1
        self._bytes += len(data)
        if self._bytes >= self._shard_bytes:
            self._close_shard()
        self._height.append(record.height)
        self._width.append(record.width)
        self._positives.extend(self._local_ids(record))
        self._offsets.append(len(self._positives))

    def finish(self, **info: Any) -> Source:
        """Write index, concepts and info.json, put the directory in place, and open it.

        `info`: more fields of info.json.
        """
        self._close_shard()
        for number in range(len(self._shards)):
            path = self._partial / f"records-{number:05d}"
            path.rename(self._partial / shard_name(self._name, number, len(self._shards)))
        self._write_arrays()
        with open(self._partial / "concepts.jsonl", "w", encoding="utf-8") as lines:
            table = self.concepts
            for name, count, vocabulary in zip(table.names, table.counts, table.vocabulary):
                row = {"name": name, "definition": None, "count": count, "vocabulary": vocabulary}
                lines.write(json.dumps(row) + "\n")
        self._write_info(info)
        _replace(self._partial, self.directory)
        return Source.open(self.directory)

    def _local_ids(self, record: Record) -> list[int]:
        """Ids of a record's concepts; counts a name for each of its boxes, a text once."""
        captioned = self._kind == "image_text"
        counts = np.bincount(record.labels, minlength=len(record.concepts))
        return [
            self.concepts.add(
                concept,
                vocabulary=not (captioned and place == 0),
                count=1 if captioned else int(counts[place]),
            )
            for place, concept in enumerate(record.concepts)
        ]

    def _write_arrays(self) -> None:
        texts = [concepts_lib.enriched(name, None) for name in self.concepts.names]
        arrays = {
            "height": np.array(self._height, np.uint16),
            "width": np.array(self._width, np.uint16),
            "positives_offsets": np.array(self._offsets, np.int64),
            "positives": np.array(self._positives, np.int32),
            "tokens": concepts_lib.pack_tokens(concepts_lib.tokenize(texts)),
            "keys": concepts_lib.keys(texts),
            "vocabulary": np.array(self.concepts.vocabulary, bool),
        }
        for field, values in arrays.items():
            np.save(self._partial / ARRAYS[field], values, allow_pickle=False)

    def _write_info(self, more: Mapping[str, Any]) -> None:
        count = len(self._shards)
        names = [shard_name(self._name, number, count) for number in range(count)]
        info = {
            "format": FORMAT,
            "name": self._name,
            "kind": self._kind,
            "records": len(self),
            "files": names,
            "shards": self._shards,
            "shard_bytes": [(self._partial / name).stat().st_size for name in names],
            **more,
        }
        (self._partial / "info.json").write_text(
            json.dumps(info, indent=1) + "\n", encoding="utf-8"
        )

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _int64(values: Sequence[int]) -> feature_pb2.Feature:
    return feature_pb2.Feature(int64_list=feature_pb2.Int64List(value=values))


def _bytes(values: Sequence[bytes]) -> feature_pb2.Feature:
    return feature_pb2.Feature(bytes_list=feature_pb2.BytesList(value=values))


def _check(record: Record) -> None:
    where = f"record {record.image_id!r}"
    if not record.image.startswith(_JPEG):
        raise ValueError(f"{where}: its image is no JPEG")
    if not (0 < record.height < 65536 and 0 < record.width < 65536):
        raise ValueError(f"{where}: size {record.height}x{record.width} is out of 1 … 65535 pixels")
    boxes = record.boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(record.labels):
        raise ValueError(f"{where}: {boxes.shape} boxes for {len(record.labels)} labels")
    concepts = record.concepts
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"{where}: a concept is there twice among {concepts}")
    if len(record.labels) and not 0 <= record.labels.min() <= record.labels.max() < len(concepts):
        raise ValueError(f"{where}: a label points to none of its {len(concepts)} concepts")
    limits = np.array([record.width, record.height] * 2, np.float32)
    # Written so that NaN fails too.
    if not ((boxes >= 0) & (boxes <= limits)).all() or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"{where}: a box lies outside the picture or has no area")


def _replace(new: Path, old: Path) -> None:
    """Put directory `new` in the place of `old`; a reader sees one, the other, or briefly none."""
    retired = old.with_name(old.name + ".old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)
