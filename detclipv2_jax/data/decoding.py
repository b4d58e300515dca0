"""Decoding with tf.data: serialized records in, stacks of images on their canvases out.

TensorFlow is imported by the functions that need it. The import takes ten seconds, which the
pipeline's thread spends while the caller compiles its first step.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

# Imported here and not in the thread: while TensorFlow Datasets is imported, it replaces the import
# function of all threads, including those that trace a step.
from detclipv2_jax.data import records as records_lib
from detclipv2_jax.data import transforms as transforms_lib

if TYPE_CHECKING:
    import tensorflow as tf


def decoded_steps(
    undecoded: Callable[[], Iterator[dict[str, np.ndarray]]], parallel: int
) -> "tf.data.Dataset":
    """Return the tf.data graph that decodes the records of each step.

    Args:
        undecoded: makes the iterator over the steps. A step has q records, in arrays:
            tile: int32 (q,), a number that identifies each record in the output.
            record: strings (q,), the serialized records.
            frame: int32 (q, 8), rows of `Placement.frames`.
            concepts: int32 (q,), how many concepts the index says each record has.
            canvas: int32 (2,), (height, width) that images are padded to.
        parallel: how many records to decode at once.

    Returns:
        A dataset of one element per step, in order, with the r <= q records that could be decoded:
            tile: int32 (r,).
            image: uint8 (r, height, width, 3), zeros around each image.
            boxes: float32 (r, N, 4), in pixels of the stored images, zeros pad.
            labels: int32 (r, N), places among each record's concepts, -1 pads.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # no banner about this processor
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    keep_freed_memory()

    @tf.autograph.experimental.do_not_convert
    def stack(step: dict[str, Any]) -> Any:
        return _stacked(step, parallel)

    steps = tf.data.Dataset.from_generator(
        undecoded,
        output_signature={
            "tile": tf.TensorSpec([None], tf.int32),
            "record": tf.TensorSpec([None], tf.string),
            "frame": tf.TensorSpec([None, 8], tf.int32),
            "concepts": tf.TensorSpec([None], tf.int32),
            "canvas": tf.TensorSpec([2], tf.int32),
        },
    ).prefetch(1)
    # Two steps are in progress at once, so that no core waits for the last image of a stack.
    stacks = steps.interleave(stack, cycle_length=2, num_parallel_calls=2, deterministic=True)
    options = tf.data.Options()
    # Nothing here can be tuned, and with autotuning the end of the data took up to 40 s.
    options.autotune.enabled = False
    return stacks.prefetch(1).with_options(options)


def _stacked(step: dict[str, Any], parallel: int) -> "tf.data.Dataset":
    """Return a dataset of one element: the decoded records of a step, padded to one shape."""
    import tensorflow as tf

    canvas = step["canvas"]
    rows = tuple(step[name] for name in ("tile", "record", "frame", "concepts"))
    records = tf.data.Dataset.from_tensor_slices(rows)
    decode = tf.autograph.experimental.do_not_convert(_decoded)
    records = records.map(decode, num_parallel_calls=parallel).ignore_errors()
    count = tf.maximum(tf.size(step["tile"], out_type=tf.int64), 1)
    # Batching pads each image to the canvas in the one copy that it makes anyway.
    shape = tf.concat([tf.cast(canvas, tf.int64), [3]], axis=0)
    shapes = {"tile": [], "image": shape, "boxes": [None, 4], "labels": [None]}
    padding = {"tile": -1, "image": tf.constant(0, tf.uint8), "boxes": 0.0, "labels": -1}
    batches = records.padded_batch(count, shapes, padding)
    # A step without any readable record needs an element too.
    nothing = {
        "tile": tf.zeros([0], tf.int32),
        "image": tf.zeros([0, canvas[0], canvas[1], 3], tf.uint8),
        "boxes": tf.zeros([0, 0, 4]),
        "labels": tf.zeros([0, 0], tf.int32),
    }
    return batches.concatenate(tf.data.Dataset.from_tensors(nothing)).take(1)


def _decoded(tile: Any, record: Any, frame: Any, concepts: Any) -> dict[str, Any]:
    """Parse and decode one record; an error if it contradicts itself or its index."""
    import tensorflow as tf

    fields = records_lib.parse(record)
    labels = tf.cast(fields["labels"], tf.int32)
    counts = tf.shape(fields["boxes"])[0], tf.shape(fields["concepts"])[0]
    agree = tf.reduce_all(tf.stack(counts) == tf.stack([tf.shape(labels)[0], concepts]))
    in_range = tf.reduce_all((labels >= 0) & (labels < concepts))
    # The raw operation: `tf.debugging` adds a condition around it, which costs time per image.
    valid = tf.raw_ops.Assert(condition=agree & in_range, data=["contradictory"])
    with tf.control_dependencies([valid]):
        image = transforms_lib.decode_and_place(fields["image"], frame)
    return {"tile": tile, "image": image, "boxes": fields["boxes"], "labels": labels}


def explain(serialized: bytes | None) -> str:
    """Return why a record could not be used, with its image id if that can be read."""
    if serialized is None:
        return "its file is damaged there"
    import tensorflow as tf

    try:
        record = records_lib.decode(serialized)
    except ValueError:
        return "it is not a valid record"
    try:
        height, width = tf.io.decode_jpeg(record.image, channels=3).shape[:2]
    except tf.errors.InvalidArgumentError:
        return f"image {record.image_id!r} cannot be decoded"
    return f"image {record.image_id!r}, {height}x{width} pixels, does not fit its index or labels"


def keep_freed_memory() -> None:
    """Make malloc reuse the memory of decoded images instead of returning it to the system.

    Each image allocates and frees some megabytes. Without this, mapping their pages again takes a
    tenth of the pipeline's time. Only glibc has these settings; it limits the threshold to 32 MiB.
    """
    mmap_threshold, trim_threshold, top_pad = -3, -1, -2
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 1 << 30)
        mallopt(top_pad, 64 << 20)  # the size of a thread's heap, so that no heap is unmapped
