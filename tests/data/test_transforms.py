import io

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.transforms import Placement
from detclipv2_jax.inference import images


def augmentation(flip=0.0, scales=(1.0, 1.0), crop=False):
    return KindConfig(flip=flip, scales=scales, crop=crop)


CONFIGS = [
    augmentation(),
    augmentation(flip=1.0),
    augmentation(scales=(0.3, 0.9)),
    augmentation(scales=(0.5, 2.0), crop=True),
    augmentation(flip=0.5, scales=(1.2, 4.0), crop=True),
    augmentation(flip=0.5, scales=(0.8, 3.0)),
]
SHAPES = [(96, 128), (128, 96), (64, 64)]

draw = tf.function(
    transforms_lib.decode_and_place,
    input_signature=[
        tf.TensorSpec([], tf.string),
        tf.TensorSpec([8], tf.int32),
    ],
    autograph=False,
)


def jpeg(pixels, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    image.save(buffer, "JPEG", **{"quality": 98, "subsampling": 0, **options})
    return buffer.getvalue()


def smooth(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def place(config, shape, sizes, seed=0):
    sizes = np.asarray(sizes)
    seeds = transforms_lib.seeds(seed, 0, "source", np.arange(len(sizes)))
    return transforms_lib.place(config, shape, sizes[:, 0], sizes[:, 1], seeds)


def random_sizes(count, seed=0):
    return np.exp(np.random.default_rng(seed).uniform(0, np.log(3000), (count, 2))).astype(int)


def test_seeds_tell_every_argument_apart():
    records = np.arange(1000)
    reference = transforms_lib.seeds(3, 4, "a", records)
    assert np.array_equal(reference, transforms_lib.seeds(3, 4, "a", records))
    assert np.array_equal(reference[500:], transforms_lib.seeds(3, 4, "a", records[500:]))
    others = [
        transforms_lib.seeds(*a, records)
        for a in ((4, 4, "a"), (3, 5, "a"), (3, 4, "b"), (4, 3, "a"))
    ]
    assert np.array_equal(reference, transforms_lib.seeds(3, 4, "a", records, 0))
    others += [transforms_lib.seeds(3, 4, "a", records, repetition) for repetition in (1, 2)]
    everything = np.concatenate([reference, *others])
    assert len(np.unique(everything)) == len(everything)


def test_uniforms_are_uniform_and_independent():
    seeds = transforms_lib.seeds(0, 0, "a", np.arange(20000))
    values = transforms_lib.uniforms(seeds, 4)
    assert values.shape == (20000, 4)
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert abs(counts - 1000).max() < 5 * np.sqrt(950)
    neighbors = np.concatenate([values[:-1], values[1:]], axis=1)
    correlation = np.corrcoef(neighbors.T) - np.eye(8)
    assert abs(correlation).max() < 5 / np.sqrt(20000)
    # The first numbers of a seed do not depend on how many are asked.
    assert np.array_equal(values[:, :2], transforms_lib.uniforms(seeds, 2))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_stays_on_its_canvas_and_keeps_its_aspect(config, shape):
    sizes = random_sizes(3000)
    placed = place(config, shape, sizes)
    decoded = -(-sizes // placed.ratio[:, None])
    corner, window = placed.crop[:, :2], placed.crop[:, 2:]
    assert (placed.size >= 1).all()
    assert (placed.size <= shape).all()
    assert (corner >= 0).all()
    assert (window >= 1).all()
    assert (corner + window <= decoded).all()
    if not config.crop:
        assert (window == decoded).all()
    # The same factor on both sides, to within the rounding to whole pixels (and to reduced ones).
    factor = placed.size / (window * placed.ratio[:, None])
    rounding = 1 / placed.size + 1 / window
    large = rounding.max(axis=1) < 0.1
    assert large.sum() > 200
    assert (abs(factor[:, 0] / factor[:, 1] - 1) < 1.5 * rounding.sum(axis=1))[large].all()


@pytest.mark.parametrize("config", CONFIGS)
def test_scales_are_drawn_from_the_range(config):
    sizes = random_sizes(3000) + 300
    placed = place(config, (96, 128), sizes)
    fit = np.min(np.array([96, 128]) / sizes, axis=1)
    factor = placed.size / (placed.crop[:, 2:] * placed.ratio[:, None]) / fit[:, None]
    wide = placed.size.min(axis=1) > 30
    low, high = config.scales
    if not config.crop:
        low, high = min(low, 1), min(high, 1)
    assert factor[wide].min() > low * 0.93
    assert factor[wide].max() < high * 1.07
    if config.scales[1] <= 1 and low < high:
        spread = factor[wide].mean(axis=1)
        assert spread.min() < low + 0.1 * (high - low)
        assert spread.max() > high - 0.1 * (high - low)
    assert abs(placed.flip.mean() - config.flip) < 0.05


def test_the_decoder_leaves_less_than_a_factor_of_two():
    sizes = random_sizes(5000)
    placed = place(augmentation(scales=(0.4, 1.0)), (96, 128), sizes)
    left = (sizes / (placed.ratio[:, None] * placed.size)).min(axis=1)
    assert (left[placed.ratio < 8] < 2).all()
    # … and never decodes to less than is needed.
    assert (left[placed.ratio > 1] >= 1).all()
    assert set(placed.ratio) == {1, 2, 4, 8}


def test_a_crop_reaches_every_part():
    placed = place(augmentation(scales=(2.0, 2.0), crop=True), (50, 50), [(100, 100)] * 2000)
    assert (placed.crop[:, 2:] == 50).all()
    for axis in (0, 1):
        assert set(placed.crop[:, axis]) == set(range(51))


def scalar_move(placement, index, box):
    """One box by plain float64 arithmetic; None if it is dropped."""
    ratio, flip = int(placement.ratio[index]), bool(placement.flip[index])
    y, x, window_h, window_w = (int(v) for v in placement.crop[index])
    height, width = (int(v) for v in placement.size[index])
    left, top, right, bottom = (float(v) for v in box)
    left, right = ((v / ratio - x) * width / window_w for v in (left, right))
    top, bottom = ((v / ratio - y) * height / window_h for v in (top, bottom))
    area = (right - left) * (bottom - top)
    left, right = (min(max(v, 0.0), width) for v in (left, right))
    top, bottom = (min(max(v, 0.0), height) for v in (top, bottom))
    if right - left < 1 or bottom - top < 1 or (right - left) * (bottom - top) < 0.3 * area:
        return None
    return (width - right, top, width - left, bottom) if flip else (left, top, right, bottom)


@pytest.mark.parametrize("config", CONFIGS)
def test_boxes_follow_as_a_plain_loop_says(config):
    rng = np.random.default_rng(0)
    sizes = random_sizes(60) + 20
    placement = place(config, (96, 128), sizes)
    low = rng.uniform(0, 0.9, (60, 12, 2))
    high = low + rng.uniform(0.005, 1, (60, 12, 2)) * (1 - low)
    boxes = (np.concatenate([low, high], -1) * np.tile(sizes[:, None, ::-1], 2)).astype(np.float32)
    moved, kept = transforms_lib.move_boxes(placement, boxes)
    assert moved.dtype == np.float32
    assert kept.any()
    for i in range(60):
        for j in range(12):
            expected = scalar_move(placement, i, boxes[i, j])
            assert kept[i, j] == (expected is not None)
            np.testing.assert_allclose(moved[i, j], expected or (0, 0, 0, 0), rtol=1e-5, atol=1e-3)


def test_a_box_that_loses_its_object_is_dropped():
    # A 100 x 100 picture, of which the right half is kept and enlarged twice.
    placement = Placement(
        ratio=np.ones(1, np.int32),
        crop=np.array([[0, 50, 100, 50]], np.int32),
        size=np.array([[200, 100]], np.int32),
        flip=np.zeros(1, bool),
    )
    boxes = {
        (60, 10, 80, 20): (20, 20, 60, 40),  # whole
        (30, 10, 80, 20): (0, 20, 60, 40),  # 60 % of it
        (10, 10, 61, 20): None,  # 11 of 51 pixels: 22 %
        (0, 0, 40, 40): None,  # outside
        (60, 10, 60.4, 50): None,  # 0.8 pixels wide
        (60, 10, 60.6, 50): (20, 20, 21.2, 100),
        (0, 0, 0, 0): None,  # padding
    }
    moved, kept = transforms_lib.move_boxes(placement, np.array([list(boxes)], np.float32))
    assert kept[0].tolist() == [expected is not None for expected in boxes.values()]
    for row, expected in zip(moved[0], boxes.values()):
        np.testing.assert_allclose(row, expected or (0, 0, 0, 0), rtol=1e-4)
    none, kept = transforms_lib.move_boxes(placement, np.zeros((1, 0, 4)))
    assert none.shape == (1, 0, 4)
    assert kept.shape == (1, 0)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", [(300, 400), (611, 317), (50, 70), (96, 128)])
def test_a_drawn_rectangle_is_found_where_its_box_went(config, size):
    rng = np.random.default_rng(size[0])
    found = 0
    for trial in range(6):
        placement = place(config, (96, 128), [size], seed=trial)
        low = rng.uniform(0.05, 0.5, 2) * size
        high = low + rng.uniform(0.2, 0.45, 2) * size
        (top, left), (bottom, right) = np.rint(low).astype(int), np.rint(high).astype(int)
        pixels = np.zeros((*size, 3), np.uint8)
        pixels[..., 2] = 90
        pixels[top:bottom, left:right] = (255, 0, 0)
        boxes = np.array([[[left, top, right, bottom]]], np.float32)
        moved, kept = transforms_lib.move_boxes(placement, boxes)
        image = draw(jpeg(pixels), placement.frames()[0]).numpy()
        rows, columns = np.nonzero(image[..., 0] > 127)
        if not kept[0, 0]:
            continue
        found += 1
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(moved[0, 0], seen, atol=1.3)
        assert image[..., 0].max() > 200
    assert found


@pytest.mark.parametrize("config", CONFIGS)
def test_pixels_are_opencv_s(config):
    sizes = [(300, 400), (611, 317), (50, 70), (96, 128), (1003, 801)]
    placement = place(config, (96, 128), sizes)
    for i, size in enumerate(sizes):
        data = jpeg(smooth(*size))
        ratio = int(placement.ratio[i])
        reduced = {
            1: cv2.IMREAD_COLOR,
            **{r: getattr(cv2, f"IMREAD_REDUCED_COLOR_{r}") for r in (2, 4, 8)},
        }
        whole = cv2.imdecode(np.frombuffer(data, np.uint8), reduced[ratio])[..., ::-1]
        y, x, height, width = placement.crop[i]
        h, w = placement.size[i]
        part = np.ascontiguousarray(whole[y : y + height, x : x + width])
        expected = cv2.resize(part, (int(w), int(h)), interpolation=cv2.INTER_LINEAR)
        if placement.flip[i]:
            expected = expected[:, ::-1]
        image = draw(data, placement.frames()[i]).numpy()
        assert image.dtype == np.uint8
        assert image.shape == (h, w, 3)
        assert abs(image.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 400), (479, 640), (1003, 801), (50, 70), (96, 128)])
def test_evaluation_sees_the_same_picture(size, tmp_path):
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg(smooth(*size)))
    evaluated = images.fit_to_canvas(path, (96, 128))
    shape = evaluated.pixels.shape[:2]
    placement = place(augmentation(), shape, [size])
    trained = draw(path.read_bytes(), placement.frames()[0]).numpy()
    height, width = evaluated.size
    assert trained.shape == (height, width, 3)
    assert abs(trained.astype(int) - evaluated.pixels[:height, :width]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_other_jpegs_come_out_as_rgb(mode, options):
    data = jpeg(Image.fromarray(smooth(96, 128)).convert(mode), **options)
    placement = place(augmentation(), (96, 128), [(96, 128)])
    image = draw(data, placement.frames()[0]).numpy()
    expected = np.asarray(Image.fromarray(smooth(96, 128)).convert(mode).convert("RGB"))
    assert image.shape == (96, 128, 3)
    assert abs(image.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("broken", ["cut", "noise", "empty", "small"])
def test_what_cannot_be_drawn_raises(broken):
    data = jpeg(smooth(96, 128))
    noise = np.random.default_rng(0).bytes(len(data))
    data = {
        "cut": data[: len(data) // 2],
        "noise": data[:2] + noise,
        "empty": b"",
        "small": jpeg(smooth(90, 128)),
    }[broken]
    placement = place(augmentation(), (96, 128), [(96, 128)])
    with pytest.raises(tf.errors.InvalidArgumentError):
        draw(data, placement.frames()[0])
