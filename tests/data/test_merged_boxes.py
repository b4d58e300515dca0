"""Boxes of one image with the same coordinates become one box with several labels."""

import numpy as np
import pytest

from detclipv2_jax.data.slices import merge_boxes


def merged_slowly(boxes, labels, kept, room):
    """The same by loops over all pairs of boxes."""
    result, first, cut = np.full((*labels.shape, room), -1), np.zeros_like(kept), 0
    for image in range(len(boxes)):
        names = {}  # place of a box that stands for others → its labels
        for place in np.flatnonzero(kept[image]):
            same = [o for o in names if abs(boxes[image, o] - boxes[image, place]).max() <= 0.1]
            mine = names.setdefault(same[0] if same else place, [])
            if labels[image, place] >= 0 and labels[image, place] not in mine:
                mine.append(labels[image, place])
        for place, mine in names.items():
            first[image, place] = True
            result[image, place, : len(mine[:room])] = mine[:room]
            cut += len(mine[room:])
    return result, first, cut


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_it_equals_a_loop_over_pairs(seed, room):
    rng = np.random.default_rng(seed)
    different = rng.integers(0, 60, (4, 6, 4)).astype(np.float32)
    boxes = np.take_along_axis(different, rng.integers(0, 6, (4, 15, 1)), axis=1)
    boxes += rng.uniform(-0.02, 0.02, boxes.shape).astype(np.float32)
    labels, kept = rng.integers(-1, 9, (4, 15)), rng.random((4, 15)) < 0.8
    found = merge_boxes(boxes, labels, kept, room)
    expected = merged_slowly(boxes, labels, kept, room)
    np.testing.assert_array_equal(found.labels, expected[0])
    np.testing.assert_array_equal(found.kept, expected[1])
    assert found.cut == expected[2] and found.kept.sum() < kept.sum()


def test_one_box_under_two_phrases_has_both():
    boxes = np.float32([[[60, 60, 160, 180], [10, 10, 20, 20], [60.004, 60, 160, 179.98]]])
    found = merge_boxes(boxes, np.array([[4, 7, 2]]), np.ones((1, 3), bool), 2)
    assert found.labels.tolist() == [[[4, 2], [7, -1], [-1, -1]]]
    assert found.kept.tolist() == [[True, True, False]] and found.cut == 0


def test_boxes_of_two_images_and_near_boxes_stay_apart():
    boxes = np.float32([[[5, 5, 9, 9], [5, 5, 9, 9.2]], [[5, 5, 9, 9], [5, 5, 9, 9.2]]])
    found = merge_boxes(boxes, np.zeros((2, 2), int), np.ones((2, 2), bool), 2)
    assert found.kept.all() and (found.labels[..., 1] == -1).all()


def test_boxes_of_another_image_do_not_link_two_boxes():
    sides = np.float32([[5.0, 5.16], [5.08, 50.0]])
    boxes = np.stack([sides, sides, sides + 9, sides + 9], axis=-1)
    assert merge_boxes(boxes, np.zeros((2, 2), int), np.ones((2, 2), bool), 1).kept.all()


def test_the_second_name_counts_where_the_first_has_no_row():
    boxes = np.zeros((1, 3, 4), np.float32)
    found = merge_boxes(boxes, np.array([[-1, 3, 3]]), np.ones((1, 3), bool), 1)
    assert found.labels.tolist() == [[[3], [-1], [-1]]] and found.cut == 0


def test_no_boxes():
    found = merge_boxes(np.zeros((2, 0, 4)), np.zeros((2, 0), int), np.zeros((2, 0), bool), 2)
    assert found.labels.shape == (2, 0, 2) and found.cut == 0
