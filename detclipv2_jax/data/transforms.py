"""Augmentation: from a stored image to its place on the canvas.

`place` decides, in numpy, what happens to an image before the image is read, from its size in the
index and a seed made of (seed, epoch, source, record). `decode_and_place` executes the decision in
the graph of tf.data, and `move_boxes` applies it to the boxes. So augmentation does not depend on
threads, processes or the order of reading.

TensorFlow is imported inside the function that needs it: the import takes ten seconds, which the
pipeline's thread spends while the first step compiles.
"""

import dataclasses
import zlib
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt64

from detclipv2_jax.data.config import KindConfig

if TYPE_CHECKING:
    import tensorflow as tf

_RATIOS = np.array([1, 2, 4, 8])  # a JPEG decoder can divide the size by these while decoding
_LEAST_SIDE = 1.0  # pixels of the canvas that each side of a box must keep
_LEAST_SHARE = 0.3  # share of its area that a box must keep


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What is done to each of n images, in this order."""

    ratio: Int32[np.ndarray, " n"]  # the decoder divides the size by this, rounding up
    crop: Int32[np.ndarray, "n 4"]  # window (y, x, height, width) in pixels of the decoded image
    size: Int32[np.ndarray, "n 2"]  # (height, width) that the window is resized to, in pixels
    flip: Bool[np.ndarray, " n"]

    def frames(self) -> Int32[np.ndarray, "n 8"]:
        """Return the placement as one row of numbers per image, for `decode_and_place`."""
        fits = (self.crop[:, 2:] == self.size).all(axis=1)  # no resizing is needed
        columns = np.log2(self.ratio), *self.crop.T, *self.size.T, 2 * fits + self.flip
        return np.stack(columns, axis=1).astype(np.int32)


def seeds(
    seed: int, epoch: int, source: str, records: Int[np.ndarray, " n"], repetition: int = 0
) -> UInt64[np.ndarray, " n"]:
    """Return one seed per record, the same on any process and at any step of a pass.

    Args:
        seed: of the run.
        epoch: number of the epoch.
        source: name of the source.
        records: numbers of its records.
        repetition: number of the pass in the epoch.
    """
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, zlib.crc32(source.encode()), *([repetition] * bool(repetition))):
        state = _mix(state + np.uint64(part))
    return _mix(state + np.asarray(records).astype(np.uint64))


def uniforms(seeds: UInt64[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n {count}"]:
    """Return `count` independent numbers in [0, 1) for each seed."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def place(
    config: KindConfig,
    shape: tuple[int, int] | Int[np.ndarray, "n 2"],
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    seeds: UInt64[np.ndarray, " n"],
) -> Placement:
    """Decide where images go on their canvas, and how large.

    Args:
        config: `flip`, `scales` and `crop` are used.
        shape: (height, width) in pixels of the room for all images, or for each: in a mosaic an
            image has a quarter of its canvas.
        heights: of the stored images, in pixels.
        widths: of the stored images, in pixels.
        seeds: of the images, from `seeds`.
    """
    stored = np.stack([heights, widths], axis=1).astype(np.float64)
    canvas = np.asarray(shape, np.int64)
    chance = uniforms(seeds, 4)
    fit = (canvas / stored).min(axis=1)
    low, high = config.scales
    scale = fit * (low + (high - low) * chance[:, 0])
    if not config.crop:
        scale = np.minimum(scale, fit)
    scaled = np.maximum(np.rint(stored * scale[:, None]), 1).astype(np.int64)
    # The decoder divides as often as possible. That leaves a bilinear downscale of less than two,
    # for which sampling two pixels per side misses none. Evaluation does the same in
    # `inference/images.py: fit_to_canvas`.
    possible = (stored[:, None] >= _RATIOS[:, None] * scaled[:, None]).all(axis=-1)
    ratio = _RATIOS[np.maximum(possible.sum(axis=1) - 1, 0)]
    decoded = np.ceil(stored / ratio[:, None]).astype(np.int64)
    size = np.minimum(scaled, canvas)
    window = np.clip(np.rint(decoded * (size / scaled)), 1, decoded).astype(np.int64)
    corner = np.floor(chance[:, 1:3] * (decoded - window + 1)).astype(np.int64)
    return Placement(
        ratio=ratio.astype(np.int32),
        crop=np.concatenate([corner, window], axis=1).astype(np.int32),
        size=size.astype(np.int32),
        flip=chance[:, 3] < config.flip,
    )


def move_boxes(
    placement: Placement, boxes: Float[np.ndarray, "n N 4"]
) -> tuple[Float32[np.ndarray, "n N 4"], Bool[np.ndarray, "n N"]]:
    """Return the boxes in pixels of the placed images, and which of them are kept.

    Boxes are clipped to the visible part of the image. A box that keeps less than a pixel of a side
    or less than 30 % of its area no longer shows its object: it is dropped [ours].

    Args:
        placement: of the n images.
        boxes: (x_min, y_min, x_max, y_max) in pixels of the stored images.

    Returns:
        The boxes, zeros where dropped, and the mask of those kept.
    """
    corner = placement.crop[:, None, [1, 0]]  # (x, y)
    window = placement.crop[:, None, [3, 2]]  # (width, height)
    extent = placement.size[:, None, ::-1]
    factor = extent / window
    points = boxes.reshape(*boxes.shape[:2], 2, 2).astype(np.float64)
    points = points / placement.ratio[:, None, None, None] - corner[:, :, None]
    points = points * factor[:, :, None]
    clipped = np.clip(points, 0, extent[:, :, None])
    sides, before = clipped[:, :, 1] - clipped[:, :, 0], points[:, :, 1] - points[:, :, 0]
    kept = (sides >= _LEAST_SIDE).all(-1) & (sides.prod(-1) >= _LEAST_SHARE * before.prod(-1))
    x = clipped[..., 0]
    x = np.where(placement.flip[:, None, None], extent[:, :, :1] - x[..., ::-1], x)
    moved = np.stack([x, clipped[..., 1]], axis=-1).reshape(boxes.shape)
    return np.where(kept[..., None], moved, 0).astype(np.float32), kept


def decode_and_place(jpeg: "tf.Tensor", frame: "tf.Tensor") -> "tf.Tensor":
    """Decode, crop, resize and flip one image in a TensorFlow graph.

    The accurate integer DCT and bilinear sampling without antialiasing agree with OpenCV's to
    within one gray level, so evaluation may use either.

    Args:
        jpeg: the encoded image, a string scalar.
        frame: one row of `Placement.frames`.

    Returns:
        uint8, (height, width, 3).

    Raises:
        tf.errors.InvalidArgumentError: the bytes are not a whole JPEG, or the image is too small
            for the window.
    """
    import tensorflow as tf

    def decoder(ratio):
        return lambda: tf.io.decode_and_crop_jpeg(
            jpeg, frame[1:5], channels=3, ratio=ratio, dct_method="INTEGER_ACCURATE"
        )

    def resized():
        floats = tf.raw_ops.ResizeBilinear(
            images=tf.expand_dims(image, 0), size=frame[5:7], half_pixel_centers=True
        )
        return tf.cast(tf.squeeze(floats, 0) + 0.5, tf.uint8)

    image = tf.switch_case(frame[0], [decoder(ratio) for ratio in _RATIOS.tolist()])
    # Four branches, because a slice with step -1 and a reversal along no axis are both slow.
    return tf.switch_case(
        frame[7],
        [
            resized,
            lambda: tf.reverse(resized(), [1]),
            lambda: image,
            lambda: tf.reverse(image, [1]),
        ],
    )


def _mix(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Return SplitMix64's finalizer (Steele, Lea, Flood 2014): it makes neighbors unrelated."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
