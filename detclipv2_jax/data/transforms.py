"""From a stored picture to its place on the canvas: geometry in numpy, pixels in TensorFlow.

What happens to a picture is decided before it is read, from its size in the index and a seed made
of (seed, epoch, source, record): `place`. `draw` only executes it, in the graph of tf.data, and
`move_boxes` applies the same numbers to the boxes. So augmentation depends on no thread, process or
order of reading.

TensorFlow is imported inside the function that needs it: it takes ten seconds, which the pipeline's
thread spends while the first step compiles.
"""

import dataclasses
import zlib

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, UInt64

from detclipv2_jax.common.errors import UserError

_RATIOS = np.array([1, 2, 4, 8])  # what a JPEG decoder can divide the size by while decoding
_LEAST_SIDE = 1.0  # pixels of the canvas that a box must keep a side,
_LEAST_SHARE = 0.3  # and the share of its area


@dataclasses.dataclass(frozen=True)
class TransformConfig:
    """Augmentation of one kind of data.

    `scales` is a range to draw from, relative to the scale at which a picture just fits its canvas:
    on an 800 x 1344 canvas (0.6, 1.0) is the multi-scale training with short sides 480 to 800. A
    picture scaled past its canvas is cropped at random if `crop`, else it is scaled to fit.
    """

    flip: float = 0.0  # probability of a horizontal flip
    scales: tuple[float, float] = (1.0, 1.0)
    crop: bool = False

    def __post_init__(self):
        if not 0 <= self.flip <= 1:
            raise UserError(f"transform: `flip` is {self.flip}, must be a probability")
        if len(self.scales) != 2 or not 0 < self.scales[0] <= self.scales[1]:
            raise UserError(
                f"transform: `scales` is {self.scales}, must be (low, high), 0 < low <= high"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """What is done to each of n pictures, in this order."""

    ratio: Int32[np.ndarray, " n"]  # the decoder divides the size by this, rounding up
    crop: Int32[np.ndarray, "n 4"]  # window (y, x, height, width) in pixels of the decoded picture
    size: Int32[
        np.ndarray, "n 2"
    ]  # (height, width) the window is resized to: its place on the canvas
    flip: Bool[np.ndarray, " n"]

    def frames(self) -> Int32[np.ndarray, "n 8"]:
        """The same as rows of numbers, for `draw`."""
        fits = (self.crop[:, 2:] == self.size).all(axis=1)  # nothing is left to resize
        columns = np.log2(self.ratio), *self.crop.T, *self.size.T, 2 * fits + self.flip
        return np.stack(columns, axis=1).astype(np.int32)


def seeds(
    seed: int, epoch: int, source: str, records: Int[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """One seed a record: the same wherever and whenever that record is read in that epoch."""
    state = np.zeros(1, np.uint64)
    for part in (seed, epoch, zlib.crc32(source.encode())):
        state = _mix(state + np.uint64(part))
    return _mix(state + np.asarray(records).astype(np.uint64))


def uniforms(seeds: UInt64[np.ndarray, " n"], count: int) -> Float[np.ndarray, "n {count}"]:
    """`count` independent numbers in [0, 1) for each seed."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(seeds[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def place(
    config: TransformConfig,
    shape: tuple[int, int] | Int[np.ndarray, "n 2"],
    heights: Int[np.ndarray, " n"],
    widths: Int[np.ndarray, " n"],
    seeds: UInt64[np.ndarray, " n"],
) -> Placement:
    """Decide how pictures of given sizes (pixels) come onto a canvas of `shape` (height, width).

    `shape` may be one for all, or one a picture: of a mosaic each has a quarter of the canvas.
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
    # The decoder divides as often as it can; a bilinear down-scale of less than two is left, and
    # sampling two pixels a side then misses none. `images.place` does the same for evaluation.
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
    """Boxes of the stored pictures (xyxy, pixels) on the canvas, and which of them are kept.

    Boxes are clipped to what is left of the picture. One that keeps less than a pixel of a side or
    less than 30 % of its area no longer shows its object and is dropped (its row is zeros) [ours].
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


def draw(jpeg, frame):
    """Execute one row of `Placement.frames` in a TensorFlow graph: uint8, (height, width, 3).

    Raises the graph's `InvalidArgumentError` where the bytes are no whole JPEG, or one too small
    for the window. The accurate integer DCT and bilinear sampling without antialiasing are OpenCV's
    too, to within one grey level, so that evaluation may use either.
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
    # Reversed along its axis or not at all: a slice with step -1, and a reversal along no axis,
    # are slower than they look.
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
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): neighbors become unrelated numbers."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
