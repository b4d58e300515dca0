"""Records: the unified triplet (image, boxes, concepts), its serialized form, and shards of them.

A record is stored as a serialized `tf.train.Example` in an ArrayRecord file and can be read by its
number. The bytes are those that TensorFlow Datasets writes for the same `features`. A record names
its concepts by their texts, so it does not depend on the source that it is in. `index.py` describes
the directory of a source.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Float32, Int32
from tensorflow_datasets.proto import tf_example_generated_pb2 as example_pb2
from tensorflow_datasets.proto import tf_feature_generated_pb2 as feature_pb2

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf
    import tensorflow_datasets as tfds


# A group is one record, so that any record can be read alone. JPEGs do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_JPEG = b"\xff\xd8"


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One image with its boxes and concepts.

    Detection and grounding: `concepts` are the names or phrases of the boxes, in order of first
    appearance. Image-text: the caption, then its phrases.
    """

    image: bytes  # JPEG
    height: int  # of the stored image, in pixels; EXIF in it is ignored (older sources have some)
    width: int
    image_id: str
    boxes: Float32[np.ndarray, "n 4"]  # (x_min, y_min, x_max, y_max), pixels of the stored image
    labels: Int32[np.ndarray, " n"]  # each box's place in `concepts`
    concepts: tuple[str, ...]  # normalized texts (`tokenizer.normalize`), each once


def encode(record: Record) -> bytes:
    """Return a record serialized. Equal records give equal bytes.

    Raises:
        ValueError: the record contradicts itself, e.g. a box is outside the image.
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
    """Return a record deserialized in Python, for tools and tests. Training uses `parse`.

    Raises:
        UserError: the bytes are not a record.
    """
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
    except Exception as error:  # protobuf's own, a missing field, boxes not a multiple of 4 numbers
        raise UserError("Not a valid record. Prepare its source again.") from error


def parse(serialized: "tf.Tensor") -> dict[str, "tf.Tensor"]:
    """Return the fields of a serialized record in a TensorFlow graph.

    Returns:
        `image`, `height`, `width` and `image_id`, scalars; `boxes` (n, 4), `labels` (n,) and
        `concepts` (c,).
    """
    import tensorflow as tf  # slow to import, and only needed here

    features = {
        "image": tf.io.FixedLenFeature([], tf.string),
        "height": tf.io.FixedLenFeature([], tf.int64),
        "width": tf.io.FixedLenFeature([], tf.int64),
        "image_id": tf.io.FixedLenFeature([], tf.string),
        "boxes": tf.io.FixedLenSequenceFeature([4], tf.float32, allow_missing=True),
        "labels": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True),
        "concepts": tf.io.FixedLenSequenceFeature([], tf.string, allow_missing=True),
    }
    return tf.io.parse_single_example(serialized, features)


def features() -> "tfds.features.FeaturesDict":
    """Return the fields of a record as TensorFlow Datasets describes them."""
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "image_id": tfds.features.Text(),
            "height": tfds.features.Scalar(np.int64),
            "width": tfds.features.Scalar(np.int64),
            "boxes": tfds.features.Tensor(shape=(None, 4), dtype=np.float32),
            "labels": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "concepts": tfds.features.Sequence(tfds.features.Text()),
        }
    )


class ShardWriter:
    """Writes records to a file, which appears complete or not at all. Use as a context manager.

    Without any record, no file is written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._writer = None
        self._open = contextlib.ExitStack()  # the temporary file and its writer

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def write(self, record: Record) -> None:
        """Append a record; `UserError` if the disk is full."""
        data = encode(record)
        with self._explained():
            if self._writer is None:
                temporary = self._open.enter_context(replacing(self._path))
                self._writer = array_record_module.ArrayRecordWriter(
                    str(temporary), _WRITER_OPTIONS
                )
                self._open.push(self._close)
            self._writer.write(data)

    def _close(self, kind, *_) -> None:
        try:
            with self._explained():
                self._writer.close()
        except UserError:
            if kind is None:  # otherwise the first error is the one to report
                raise

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            why = str(error).partition(";")[0]
            raise UserError(
                f"{self._path}: {why}. Free disk space, then run the same command again."
            ) from error


def _int64(values: Sequence[int]) -> feature_pb2.Feature:
    return feature_pb2.Feature(int64_list=feature_pb2.Int64List(value=values))


def _bytes(values: Sequence[bytes]) -> feature_pb2.Feature:
    return feature_pb2.Feature(bytes_list=feature_pb2.BytesList(value=values))


def _check(record: Record) -> None:
    where = f"record {record.image_id!r}"
    if not record.image.startswith(_JPEG):
        raise ValueError(f"{where}: the image is not a JPEG")
    if not (0 < record.height < 65536 and 0 < record.width < 65536):
        raise ValueError(f"{where}: size {record.height}x{record.width} is not in 1 … 65535 pixels")
    boxes = record.boxes
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != len(record.labels):
        raise ValueError(f"{where}: {boxes.shape} boxes for {len(record.labels)} labels")
    concepts = record.concepts
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"{where}: a concept occurs twice in {concepts}")
    if len(record.labels) and not 0 <= record.labels.min() <= record.labels.max() < len(concepts):
        raise ValueError(f"{where}: a label is not in 0 … {len(concepts) - 1}, its concepts")
    limits = np.array([record.width, record.height] * 2, np.float32)
    # Written so that NaN fails too.
    if not ((boxes >= 0) & (boxes <= limits)).all() or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise ValueError(f"{where}: a box is outside the image or has no area")
