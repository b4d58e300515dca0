"""Canvases of several sizes: what is drawn when, and how full they are."""

import collections
import hashlib

import numpy as np
import pytest
from test_plan import one_kind, source, steps_equal, three_kinds

from detclipv2_jax.data import fill, rungs
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.training import config as config_lib
from detclipv2_jax.training import recipes

# Sizes (height, width) and shares of photos, as in COCO and Objects365.
PHOTOS = {
    (480, 640): 0.45,
    (682, 1024): 0.30,
    (640, 640): 0.08,
    (640, 480): 0.10,
    (1024, 682): 0.07,
}


def photos(count):
    sizes = [size for size, share in PHOTOS.items() for _ in range(round(count * share))]
    return np.random.default_rng(0).permutation(sizes)


def recipe(size="swin_t"):
    return config_lib.parse(recipes.load("pretrain").get_config(size).to_dict()).data


def photo_plan(config, count, batch_size=8, **fields):
    """A plan of detection data with the canvases of a config."""
    sources = {"boxes": source("boxes", "detection", [[0]] * count, 1, photos(count))}
    names = ("shapes", "rungs", "rung_phases", "scales", "crop")
    fields = {name: getattr(config, name) for name in names} | fields
    return one_kind(sources, batch_size=batch_size, table_size=8, **fields), sources["boxes"]


def placed_sizes(plan, found, steps):
    """The canvas, and the placed and stored sizes of every image, of some steps."""
    for step in steps:
        planned = plan.plan(step)
        records = planned.records[planned.records >= 0]
        seeds = transforms_lib.seeds(plan.seed, planned.epoch, "boxes", records)
        sizes = found.height[records], found.width[records]
        config = plan.kinds["detection"]
        placement = transforms_lib.place(config, planned.shape, *sizes, seeds)
        yield planned.shape, placement.size, np.stack(sizes, axis=1)


def test_without_rungs_a_plan_is_that_of_earlier_versions():
    """The digest was taken at the commit before rungs."""
    plan, _ = three_kinds(detection=dict(mosaic=0.5), image_text=dict(begin=0.5))
    digest = hashlib.sha256()
    for step in range(2 * plan.steps_per_epoch):
        p = plan.plan(step)
        digest.update(repr((p.step, p.epoch, p.kind, p.shape, p.positives, p.dropped)).encode())
        for array in ("sources", "records", "extra_sources", "extra_records", "texts", "concepts"):
            digest.update(getattr(p, array).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "0001ad5bf10418a5"


def test_sides_of_a_canvas_are_multiples_of_32():
    assert rungs.canvas((800, 1216), 1) == (800, 1216)
    assert rungs.canvas((500, 300), 1) == (500, 300), "the shape itself, whatever it is"
    assert rungs.canvas((800, 1216), 0.84) == (672, 1024)
    assert rungs.canvas((1216, 800), 0.72) == (864, 576)
    assert rungs.canvas((40, 64), 0.1) == (32, 32)


LADDER = dict(rungs=(0.5, 0.75, 1.0), shapes=((96, 128), (128, 96)))


def test_with_rungs_an_epoch_holds_each_record_once_and_only_canvases_change():
    plan, sources = three_kinds(detection=dict(LADDER), grounding=dict(shapes=((96, 128),)))
    plain, _ = three_kinds(
        detection=dict(LADDER, rungs=(1.0,)), grounding=dict(shapes=((96, 128),))
    )
    seen, shapes = collections.Counter(), collections.defaultdict(set)
    for step in range(20 * plan.steps_per_epoch):
        planned, other = plan.plan(step), plain.plan(step)
        for name in ("sources", "records", "concepts"):
            np.testing.assert_array_equal(getattr(planned, name), getattr(other, name))
        shapes[planned.kind, other.shape].add(planned.shape)
        for index, record in zip(planned.sources, planned.records):
            seen[planned.epoch, planned.kind, int(index), int(record)] += record >= 0
    assert {n for key, n in seen.items() if key[-1] >= 0} == {1}
    assert len([key for key in seen if key[-1] >= 0]) == 20 * sum(map(len, sources.values()))
    assert shapes == {
        ("detection", (96, 128)): {(64, 64), (64, 96), (96, 128)},
        ("detection", (128, 96)): {(64, 64), (96, 64), (128, 96)},
        ("grounding", (96, 128)): {(96, 128)},
        ("image_text", (32, 32)): {(32, 32)},
    }
    everything = {(kind, canvas) for (kind, _), found in shapes.items() for canvas in found}
    assert everything == set(plan.programs) and len(everything) == len(plan.programs)


def test_a_step_s_rung_depends_on_seed_and_step_alone():
    one, _ = three_kinds(detection=LADDER)
    backward, _ = three_kinds(detection=LADDER)
    other, _ = three_kinds(detection=LADDER, seed=1)
    steps = range(4 * one.steps_per_epoch)
    reverse = {step: backward.plan(step) for step in reversed(steps)}
    for step in steps:
        planned = one.plan(step)
        assert steps_equal(planned, reverse[step])
        assert one.program(step) == (planned.kind, planned.shape)
    epochs = np.array([one.program(step) for step in steps], object).reshape(4, -1, 2)
    assert (epochs[0] != epochs[1]).any()
    assert [one.program(s) for s in steps] != [other.program(s) for s in steps]


def test_rungs_are_drawn_by_their_weights_and_the_schedule():
    factors = (0.25, 0.5, 1.0)
    generator = np.random.default_rng(0)
    count = 200_000
    moments = np.linspace(0, 3, count, endpoint=False)
    schedule = ((0.0, (3.0, 1.0, 0.0)), (1.5, (0.0, 1.0, 1.0)))
    configs = [KindConfig(rungs=factors), KindConfig(rungs=factors, rung_phases=schedule)]
    kinds = np.arange(count) % 2
    drawn = rungs.draw(configs, kinds, moments, generator)
    share = lambda mask: np.bincount(drawn[mask], minlength=3) / mask.sum()
    first = moments < 1.5
    np.testing.assert_allclose(share(kinds == 0), [1 / 7, 2 / 7, 4 / 7], atol=0.006)
    np.testing.assert_allclose(share((kinds == 1) & first), [0.75, 0.25, 0], atol=0.008)
    np.testing.assert_allclose(share((kinds == 1) & ~first), [0, 0.5, 0.5], atol=0.008)


def test_a_schedule_changes_within_an_epoch_and_compiles_every_canvas_up_front():
    config = KindConfig(
        shapes=((128, 128),), rungs=(0.5, 1.0), rung_phases=((0, (1, 0)), (1.5, (0, 1)))
    )
    plan, _ = photo_plan(config, 400)
    assert plan.steps_per_epoch == 50
    sides = [plan.plan(step).shape[0] for step in range(150)]
    assert sides == [64] * 75 + [128] * 75
    assert plan.programs == [("detection", (64, 64)), ("detection", (128, 128))]


@pytest.mark.parametrize("size", ["swin_t", "swin_l"])
@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_images_of_the_recipe_cover_three_quarters_of_their_canvases(kind, size):
    config = getattr(recipe(size), kind)
    plan, found = photo_plan(config, 4000)
    covered = total = images = 0
    for canvas, sizes, _ in placed_sizes(plan, found, range(plan.steps_per_epoch)):
        assert (sizes <= canvas).all()
        covered += sizes.prod(axis=1).sum()
        total += np.prod(canvas) * 8
        images += len(sizes)
    assert images == 4000 and covered / total >= 0.75
    assert fill.expected(config, found.height, found.width).share == pytest.approx(
        covered / total, abs=0.01
    )


def test_the_recipe_s_short_sides_are_spread_like_those_of_one_range():
    """Short sides of 480 to 800 pixels, as if each image had drawn its own size evenly."""
    config = recipe().detection
    plan, found = photo_plan(config, 4000)
    drawn = placed_sizes(plan, found, range(3 * plan.steps_per_epoch))
    sides = np.sort(np.concatenate([sizes.min(axis=1) for _, sizes, _ in drawn]))
    assert 478 <= sides[0] <= 490 and 795 <= sides[-1] <= 800
    even = (sides - 480) / 320
    distance = np.abs(np.arange(1, len(sides) + 1) / len(sides) - even).max()
    assert distance < 0.04  # Kolmogorov and Smirnov's; that of one rung alone is 0.6
    assert np.diff(sides).max() <= 2, "no size is left out"


def test_images_of_a_step_have_nearly_one_size():
    plan, found = photo_plan(recipe().detection, 4000)
    for canvas, sizes, stored in placed_sizes(plan, found, range(100)):
        fits = (np.array(canvas) / stored).min(axis=1)
        scale = (sizes / stored).mean(axis=1) / fits
        assert (scale > 0.83).all() and (scale < 1.01).all()


@pytest.mark.parametrize("crop", [False, True])
def test_expected_fill_is_what_images_cover_on_average(crop):
    """Against an integral over the scales, image by image."""
    shapes = ((320, 480), (480, 320))
    config = KindConfig(shapes=shapes, scales=(0.8, 1.4), crop=crop)
    sizes = photos(200).astype(float)
    scales = np.linspace(0.8, 1.4, 2001)
    covered = total = 0.0
    for height, width in sizes:
        canvas = (
            shapes[0]
            if abs(np.log(height / width * 1.5)) <= abs(np.log(height / width / 1.5))
            else shapes[1]
        )
        fit = min(canvas[0] / height, canvas[1] / width)
        scale = scales * fit if crop else np.minimum(scales, 1) * fit
        inside = np.minimum(scale * height, canvas[0]) * np.minimum(scale * width, canvas[1])
        covered, total = covered + inside.mean(), total + canvas[0] * canvas[1]
    found = fill.expected(config, sizes[:, 0].astype(int), sizes[:, 1].astype(int))
    assert found.share == pytest.approx(covered / total, abs=0.004)
    assert found.canvas_pixels == 320 * 480
