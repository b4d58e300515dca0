"""Canvases and table sizes against exhaustive search and plain loops."""

import itertools

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.prepare import canvases


def image_sizes(n, seed=0):
    rng = np.random.default_rng(seed)
    sizes = rng.choice([(480, 640), (640, 480), (427, 640), (640, 640), (300, 1500)], n)
    return sizes[:, 0] + rng.integers(0, 60, n), sizes[:, 1]


def slow_efficiency(heights, widths, shapes):
    """The efficiency by a loop: every image on the canvas that it fills best."""
    covered = total = 0.0
    for height, width in zip(heights, widths):
        fills = []
        for canvas in shapes:
            scale = min(canvas[0] / height, canvas[1] / width)
            fills.append((height * width * scale**2 / (canvas[0] * canvas[1]), canvas))
        fill, canvas = max(fills)
        covered += fill * canvas[0] * canvas[1]
        total += canvas[0] * canvas[1]
    return covered / total


@pytest.mark.parametrize(
    "shapes", [((320, 320),), ((800, 1344), (1344, 800)), ((800, 1344), (1088, 1088), (64, 2048))]
)
def test_padding_is_what_a_loop_over_images_counts(shapes):
    heights, widths = image_sizes(200)
    found = canvases.padding(heights, widths, shapes)
    assert found.efficiency == pytest.approx(slow_efficiency(heights, widths, shapes), abs=1e-6)
    assert sum(found.shares) == pytest.approx(1)
    assert all(0 <= efficiency <= 1 for efficiency in found.efficiencies)


def test_images_of_the_aspect_of_a_canvas_need_no_padding():
    found = canvases.padding(np.array([400, 50]), np.array([672, 84]), ((800, 1344), (9, 90)))
    assert found.efficiency == pytest.approx(1)
    assert found.shares == (1, 0)
    assert found.efficiencies == (pytest.approx(1), 0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_chosen_set_is_the_best_of_all_sets(count, seed):
    heights, widths = image_sizes(300, seed)
    area, tolerance = 320 * 320, 0.03
    aspects = np.log(heights / widths)

    def score(shapes):
        targets = np.log([height / width for height, width in shapes])
        return np.exp(-np.abs(aspects[:, None] - targets)).max(axis=1).mean()

    chosen = canvases.choose(heights, widths, count, area, tolerance=tolerance)
    every = itertools.combinations(canvases.possible_canvases(area, tolerance=tolerance), count)
    assert score(chosen) == pytest.approx(max(map(score, every)), abs=1e-12)
    assert len(set(chosen)) == count
    assert list(chosen) == sorted(chosen, key=lambda s: s[0] / s[1])


def test_candidates_are_multiples_of_about_the_area():
    found = canvases.possible_canvases(800 * 1344)
    assert (800, 1344) in found and (1344, 800) in found
    for height, width in found:
        assert height % 32 == width % 32 == 0
        assert abs(height * width / (800 * 1344) - 1) <= 0.05
    aspects = [height / width for height, width in found]
    assert aspects == sorted(set(aspects))
    # Squares of 1024 and 1056 pixels have one aspect: only the nearer in area is offered.
    assert [s for s in found if s[0] == s[1]] == [(1024, 1024)]


def test_one_size_needs_one_canvas_and_more_do_not_hurt():
    heights, widths = np.full(5, 480), np.full(5, 640)
    area = 480 * 640
    for count in (1, 2, 3):
        shapes = canvases.choose(heights, widths, count, area)
        assert canvases.padding(heights, widths, shapes).efficiency == pytest.approx(1)


@pytest.mark.parametrize("count", [0, 1000])
def test_too_many_canvases_are_refused(count):
    with pytest.raises(UserError, match="only [0-9]+ exist"):
        canvases.choose(np.array([4]), np.array([4]), count, 320 * 320)


def test_table_use_counts_what_finds_no_row():
    wanted = [3, 5, 10, 10]
    small, exact, large = canvases.table_use(wanted, (4, 10, 20))
    assert (small.rows, small.overflowing, small.dropped) == (4, 0.75, 13 / 4)
    assert small.dropped_share == pytest.approx(13 / 28)
    assert small.filled == pytest.approx((0.75 + 3) / 4)
    assert exact.overflowing == exact.dropped == large.dropped_share == 0
    assert large.filled == pytest.approx(28 / 4 / 20)
