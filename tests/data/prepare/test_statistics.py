import io

import cv2
import numpy as np
import pytest
from miniature_archives import jpeg
from PIL import Image

from detclipv2_jax.data.prepare import statistics


def photo(seed, height=120, width=160):
    """A smooth image with structure, like a photo."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(pixels, quality=95):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def bits(a, b):
    return bin(int(a) ^ int(b)).count("1")


def test_a_hash_survives_scaling_and_compression_and_separates_images():
    first = [statistics.image_hash(encoded(photo(seed))) for seed in range(20)]
    for seed, one in enumerate(first):
        small = cv2.resize(photo(seed), (100, 75), interpolation=cv2.INTER_AREA)
        assert bits(one, statistics.image_hash(encoded(small, 60))) <= 3
        assert bits(one, statistics.image_hash(encoded(photo(seed), 50))) <= 3
    assert min(bits(a, b) for i, a in enumerate(first) for b in first[:i]) > 8


def test_an_image_of_one_color_matches_nothing():
    flat = statistics.image_hash(encoded(np.full((50, 60, 3), 128, np.uint8)))
    broken = [statistics.image_hash(content) for content in (b"", b"\xff\xd8", jpeg()[:40])]
    assert flat == 0 and not any(broken)
    zeros = np.zeros(3, np.uint64)
    assert len(statistics.match_hashes(zeros, zeros)) == 0 and statistics.count_repeated(zeros) == 0


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(60, 80), (1, 200), (0, 5), (5, 0)])
def test_match_hashes_finds_every_pair(n, m, distance):
    rng = np.random.default_rng(n + m + distance)
    second = rng.integers(0, 2**63, m, dtype=np.uint64)
    first = rng.integers(0, 2**63, n, dtype=np.uint64)
    for i in range(min(n, m) // 2):  # copies with 0 to 5 bits turned over
        turned = rng.choice(64, int(rng.integers(0, 6)), replace=False)
        first[i] = second[i] ^ np.uint64(sum(1 << int(bit) for bit in turned))
    expected = [(i, j) for i in range(n) for j in range(m) if bits(first[i], second[j]) <= distance]
    assert statistics.match_hashes(first, second, distance).tolist() == sorted(map(list, expected))


def test_many_equal_hashes_are_compared_in_chunks():
    counts = np.array([5, 0, 7, 1, 1, 100, 2])
    slices = list(statistics._chunks(counts, 8))
    assert [s.stop for s in slices[:-1]] == [s.start for s in slices[1:]]
    assert slices[0].start == 0 and slices[-1].stop == len(counts)
    assert all(counts[s].sum() <= 8 or s.stop - s.start == 1 for s in slices)
    assert list(statistics._chunks(np.zeros(0, int), 8)) == []
    with pytest.raises(ValueError, match="distance 4"):
        statistics.match_hashes(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 4)


def test_repeats_and_overlaps_are_counted():
    a = np.array([5, 5, 9, 0, 0, 5], np.uint64)
    b = np.array([9, 1 << 40], np.uint64)
    assert statistics.count_repeated(a) == 2
    # 5 and 9 differ in two bits, so all of a but the flat ones match the second image.
    assert statistics.count_overlaps({"a": a, "b": b}) == {("a", "b"): 4}
    assert statistics.count_overlaps({"a": a}) == {}


def test_box_sizes_are_those_of_coco():
    boxes = np.array([[0, 0, 16, 16], [0, 0, 32, 32], [0, 0, 95, 95], [0, 0, 96, 96]], np.float32)
    found = statistics.box_statistics(np.array([3, 1, 0]), boxes)
    assert (found["small"], found["medium"], found["large"]) == (0.25, 0.5, 0.25)
    assert found["side"][0] == 16 and found["side"][-1] == 96
    assert found["without_boxes"] == pytest.approx(1 / 3, abs=1e-6)
    nothing = statistics.box_statistics(np.zeros(0, int), np.zeros((0, 4)))
    assert nothing["side"] is None and nothing["small"] is None
