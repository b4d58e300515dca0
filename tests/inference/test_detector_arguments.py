"""Wrong arguments of `Detector` are one sentence that says what is accepted."""

import numpy as np
import pytest
import tiny_model
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.detector import Detector


@pytest.fixture(scope="module")
def detector():
    return Detector(tiny_model.loaded(), score_threshold=0.05)


class Tensor:
    """Like a tensor of another library."""

    shape, dtype = (3, 8, 8), "float32"

    def __iter__(self):
        return iter(range(3))


@pytest.mark.parametrize("checkpoint", [3, None, b"runs", [], {}, True, object()])
def test_checkpoints(checkpoint):
    with pytest.raises(UserError, match="checkpoint is .*Give the workdir of a training run"):
        Detector(checkpoint)


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (None, "images is a NoneType, expected a path"),
        (3, "images is a int"),
        ({"image": "a.png"}, "images is a dict"),
        ([None], "the image is a NoneType"),
        (["a.png", 3.5], "image 2 of 2 is a float"),
        ([["a.png"]], "the image is a list"),
        (Tensor(), r"Tensor of shape \(3, 8, 8\).*numpy\.asarray"),
        ([Tensor()], r"Tensor of shape \(3, 8, 8\).*numpy\.asarray"),
        (np.zeros((8, 8, 3)), "type float64.*ends? at 1 or at 255"),
        (np.zeros((3, 8, 9), np.uint8), r"channels come first: use array\.transpose\(1, 2, 0\)"),
        (np.zeros((8, 8, 3), np.int64), "type int64, expected uint8"),
        (np.zeros((8, 8, 2), np.uint8), r"shape \(8, 8, 2\)"),
        (np.zeros((8, 0, 3), np.uint8), r"shape \(8, 0, 3\)"),
        (np.zeros(8, np.uint8), r"shape \(8,\)"),
        (np.array("a.png"), r"shape \(\)"),
    ],
)
def test_images(detector, images, reason):
    with pytest.raises(UserError, match=reason):
        detector(images, ["cat"])


def test_a_batch_is_several_images_and_gray_is_an_image(detector):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 60, 3), np.uint8)
    for found, wanted in zip(detector(pixels, ["cat"]), detector(list(pixels), ["cat"])):
        np.testing.assert_array_equal(found.boxes, wanted.boxes)
    gray = pixels[0, ..., 0]
    (found,), (wanted,) = detector(gray, ["cat"]), detector(Image.fromarray(gray), ["cat"])
    np.testing.assert_array_equal(found.boxes, wanted.boxes)
    assert detector(iter([]), ["cat"]) == []


@pytest.mark.parametrize("names", [None, 3, b"cat", {"cat": 1}, "cat"])
def test_names(detector, names):
    with pytest.raises(UserError, match="names is .*Give a list of names"):
        detector(np.zeros((8, 8, 3), np.uint8), names)


@pytest.mark.parametrize("names", [[None], [7], ["cat", b"dog"], [["cat"]]])
def test_names_that_are_no_strings(detector, names):
    with pytest.raises(UserError, match="expected a string"):
        detector(np.zeros((8, 8, 3), np.uint8), names)


def test_names_of_an_array(detector):
    names = np.array(["cat", "dog"])
    (found,) = detector(np.zeros((8, 8, 3), np.uint8), names, score_threshold=0.0)
    assert set(map(type, found.names)) == {str}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": "4"}, "batch_size is '4', expected a whole number"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"step": "newest"}, "step is 'newest'"),
        ({"score_threshold": "0.3"}, "score_threshold is '0.3', expected a number"),
        ({"score_threshold": float("nan")}, "score_threshold is nan"),
        ({"max_detections": None, "prompts": "a {}"}, "prompts is the string"),
        ({"cache": 3}, "cache is 3"),
    ],
)
def test_options(options, reason):
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises(UserError, match=reason):
        Detector(tiny_model.loaded(), **options)


def test_options_of_one_call(detector):
    image = np.zeros((8, 8, 3), np.uint8)
    for options in ({"score_threshold": "high"}, {"max_detections": 2.5}):
        with pytest.raises(UserError, match=f"{next(iter(options))} is "):
            detector(image, ["cat"], **options)
