"""The contrastive loss and the proposal scores compared with plain loops in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.ops import contrastive as ops
from detclipv2_jax.ops import similarity

IMAGES, REGIONS, CONCEPTS, TEXTS, DIM = 5, 4, 7, 3, 6
DIRECTIONS = ("text_to_image", "image_to_text", "both")
MATCHINGS = ("max", "soft", "max_size")


def case(seed=0):
    rng = np.random.default_rng(seed)
    regions = rng.normal(0, 0.5, (IMAGES, REGIONS, DIM))
    concepts = rng.normal(0, 0.5, (CONCEPTS, DIM))
    region_mask = rng.random((IMAGES, REGIONS)) < 0.7
    region_mask[:, 0] = True
    areas = rng.uniform(1, 100, (IMAGES, REGIONS))
    text_ids = np.array([[0, 1, 2], [3, -1, -1], [4, 4, 5], [1, 6, -1], [2, 5, -1]], np.int32)
    return regions, region_mask, areas, concepts, text_ids


def with_gaps(seed=0):
    """Return a case with an image without regions and another without a text."""
    regions, region_mask, areas, concepts, text_ids = case(seed)
    region_mask[1] = False
    text_ids[3] = -1
    return regions, region_mask, areas, concepts, text_ids


def match(s, matching, temperature):
    """Return one similarity from those of several regions or words."""
    if matching == "max":
        return s.max()
    weights = np.exp(s / temperature)
    return (weights / weights.sum()) @ s


def reference_similarity(regions, mask, areas, concepts, ids, scale, cfg, direction):
    """Return s^T or s^I of every image with every text, pair by pair in float64."""
    result = np.zeros((len(regions), len(ids)))
    if cfg.matching == "max_size":
        cfg, ids = dataclasses.replace(cfg, matching="max"), ids[:, :1]
        largest = np.argmax(np.where(mask, areas, -1), axis=1)
        mask = mask & (np.arange(mask.shape[1]) == largest[:, None])
    for b, t in np.ndindex(*result.shape):
        own = [j for j in ids[t] if j >= 0]
        valid = np.flatnonzero(mask[b])
        if not own or not len(valid):
            continue
        s = np.array([[scale * concepts[j] @ regions[b, k] for k in valid] for j in own])
        s = s if direction == "text_to_image" else s.T
        result[b, t] = np.mean([match(row, cfg.matching, cfg.soft_temperature) for row in s])
    return result


def same_text(first, second):
    caption = first[0] >= 0 and first[0] == second[0]
    return caption or set(first) == set(second)


def reference_loss(regions, mask, areas, concepts, ids, scale, cfg):
    """Return L_cts in float64; images with the same text are not choices of each other."""
    owned = ids[:, :1] if cfg.matching == "max_size" else ids
    valid = [b for b in range(len(regions)) if mask[b].any() and (owned[b] >= 0).any()]
    total = {"text_to_image": 0.0, "image_to_text": 0.0}
    for direction in total:
        similarity = reference_similarity(
            regions, mask, areas, concepts, ids, scale, cfg, direction
        )
        for i in valid:
            choices = [b for b in valid if b == i or not same_text(owned[b], owned[i])]
            row = [similarity[(b, i) if direction == "text_to_image" else (i, b)] for b in choices]
            row = np.array(row) / cfg.temperature
            log_p = dict(zip(choices, row - np.log(np.exp(row).sum())))
            e = cfg.label_smoothing
            loss = -(1 - e) * log_p[i] - e * sum(log_p.values()) / len(choices)
            total[direction] += loss / len(valid)
    if cfg.direction == "both":
        return sum(total.values()) / 2
    return total[cfg.direction]


def with_equal_texts(seed=0):
    """Return a case with two equal captions, and two equal sets whose caption has no row."""
    regions, region_mask, areas, concepts, _ = case(seed)
    ids = np.array([[0, 1, 2], [-1, 3, 4], [0, 5, -1], [-1, 4, 3], [-1, 4, 5]], np.int32)
    return regions, region_mask, areas, concepts, ids


def float32(*arrays):
    return [np.float32(a) if a.dtype == np.float64 else a for a in arrays]


def variant(direction="both", matching="max"):
    """Return one config per variant, so that each is compiled once; no number is the default."""
    return ops.ContrastiveConfig(
        direction, matching, 0.4, label_smoothing=0.2, soft_temperature=0.7
    )


def compile_for(cfg):
    def loss(regions, concepts, scale, mask, areas, ids):
        return ops.word_region_contrastive(regions, mask, areas, concepts, ids, scale, cfg)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


compiled = functools.cache(compile_for)


def loss_and_gradients(cfg, arrays, scale, function=None):
    regions, mask, areas, concepts, ids = float32(*arrays)
    function = function or compiled(cfg)
    return jax.device_get(function(regions, concepts, np.float32(scale), mask, areas, ids))


def check_differences(got, arrays, scale, cfg, indices):
    """Compare d loss / d (regions, concepts, scale) with central differences at a few places."""
    arrays, step = list(arrays), 1e-5
    for which, array in ((0, arrays[0]), (1, arrays[3])):
        for flat in indices:
            at = np.unravel_index(flat % array.size, array.shape)
            kept, values = array[at], []
            for move in (step, -step):
                array[at] = kept + move
                values.append(reference_loss(*arrays, scale, cfg))
            array[at] = kept
            difference = (values[0] - values[1]) / (2 * step)
            assert got[which][at] == pytest.approx(difference, rel=1e-3, abs=1e-5)
    above, below = (reference_loss(*arrays, scale + d, cfg) for d in (step, -step))
    assert got[2] == pytest.approx((above - below) / (2 * step), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("direction", "matching"), list(itertools.product(DIRECTIONS, MATCHINGS)))
def test_every_variant(direction, matching):
    cfg = variant(direction, matching)
    for arrays in (case(), with_gaps(), with_equal_texts()):
        loss, gradients = loss_and_gradients(cfg, arrays, 3.0)
        assert loss == pytest.approx(reference_loss(*arrays, 3.0, cfg), rel=1e-5)
        check_differences(gradients, arrays, 3.0, cfg, range(0, 400, 23))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_blocks_change_nothing(matching, monkeypatch):
    cfg = variant("both", matching)
    whole = loss_and_gradients(cfg, with_gaps(), 3.0)
    # 7 concepts: two blocks and a third of one. 5 texts of 3 words: blocks of one text.
    monkeypatch.setattr(similarity, "_REGION_BLOCK", 3)
    blocks = loss_and_gradients(cfg, with_gaps(), 3.0, compile_for(cfg))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, blocks)


@pytest.mark.parametrize("regions_per_image", [1, 256, 257])
def test_the_best_match_equals_a_plain_maximum(regions_per_image):
    """Values and gradients agree, also where a region's number needs more than a byte."""
    rng = np.random.default_rng(regions_per_image)
    regions = rng.normal(size=(3, regions_per_image, 8)).astype(np.float32)
    concepts = rng.normal(size=(150, 8)).astype(np.float32)  # more than one block
    mask = rng.random((3, regions_per_image)) < 0.9
    mask[0, 0], mask[2] = True, False
    pull = rng.normal(size=(150, 3)).astype(np.float32)

    def plain(regions, concepts):
        dots = jnp.where(mask[:, :, None], jnp.einsum("bpd,md->bpm", regions, concepts), -jnp.inf)
        return jnp.where(mask.any(axis=1), dots.max(axis=1).T, 0.0)

    ours = lambda regions, concepts: similarity._best_matched(regions, mask, concepts)
    results = []
    for match in (ours, plain):
        value = lambda *a, match=match: (match(*a) * pull).sum()
        results.append(jax.jit(lambda *a, f=match, v=value: (f(*a), jax.grad(v, (0, 1))(*a))))
    got, expected = (jax.tree.leaves(run(regions, concepts)) for run in results)
    for a, b in zip(got, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert not np.asarray(got[1])[2].any()


def test_of_equal_regions_the_first_gets_the_gradient():
    regions = np.ones((1, 3, 2), np.float32)
    mask = np.array([[False, True, True]])
    run = jax.jit(
        jax.grad(lambda r: similarity._best_matched(r, mask, np.ones((1, 2), np.float32)).sum())
    )
    np.testing.assert_array_equal(run(regions)[0], [[0, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize("direction", ["text_to_image", "image_to_text"])
def test_similarity_of_images_with_other_texts(direction):
    regions, mask, areas, concepts, _ = with_gaps()
    ids = np.array([[6, 0], [-1, -1]], np.int32)
    run = jax.jit(similarity.image_text_similarity, static_argnames=("direction",))
    got = np.asarray(run(*float32(regions, mask, concepts, ids), 2.0, direction=direction))
    cfg = ops.ContrastiveConfig()
    expected = reference_similarity(regions, mask, areas, concepts, ids, 2.0, cfg, direction)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not got[1].any() and not got[:, 1].any() and got[0, 0] != 0


def test_image_to_text_is_not_the_transpose_of_text_to_image():
    """FILIP's s^I is a mean over regions. A background region lowers it, but not s^T."""
    regions, concepts = np.eye(3, dtype=np.float32)[None, :2], np.eye(3, dtype=np.float32)
    ids = np.array([[0, 1]], np.int32)
    run = lambda regions, direction: similarity.image_text_similarity(
        regions, np.ones(regions.shape[:2], bool), concepts, ids, 1.0, direction
    )
    more = np.concatenate([regions, np.eye(3, dtype=np.float32)[None, 2:]], axis=1)
    assert run(regions, "text_to_image") == run(more, "text_to_image") == 1
    np.testing.assert_allclose(run(regions, "image_to_text"), 1)
    np.testing.assert_allclose(run(more, "image_to_text"), 2 / 3, rtol=1e-6)


def test_same_text():
    ids = np.array(
        [[0, 1, 2], [0, 3, -1], [-1, 1, 2], [-1, 2, 1], [-1, 1, 1], [-1, -1, -1], [-1, -1, -1]],
        np.int32,
    )
    got = np.asarray(ops.same_text(ids))
    expected = np.eye(7, dtype=bool)
    expected[0, 1] = expected[1, 0] = expected[2, 3] = expected[3, 2] = True
    expected[5, 5] = expected[6, 6] = False
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_captions_are_not_negatives_of_each_other(direction):
    """The features of an image do not influence another image with the same text."""
    cfg = variant(direction)
    regions, mask, areas, concepts, ids = case()
    ids[1:] = ids[0]
    loss, gradients = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 3.0)
    # Every image is its own only choice: the loss is log 1.
    assert abs(loss) < 1e-6 and all((np.abs(g) < 1e-6).all() for g in gradients)
    ids[3:] = [[5, -1, -1], [6, -1, -1]]
    arrays = regions, mask, areas, concepts, ids
    loss, _ = loss_and_gradients(cfg, arrays, 3.0)
    assert loss == pytest.approx(reference_loss(*arrays, 3.0, cfg), rel=1e-5)
    assert loss > 0.1


def test_max_size_compares_the_largest_region_with_the_caption_alone():
    regions, mask, areas, concepts, ids = case()
    cfg = variant("both", "max_size")
    loss, gradients = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 3.0)
    largest = np.argmax(np.where(mask, areas, -1), axis=1)
    moved = np.abs(gradients[0]).max(axis=-1) > 0
    np.testing.assert_array_equal(moved, np.arange(REGIONS) == largest[:, None])
    captions = np.isin(np.arange(CONCEPTS), ids[:, 0])
    np.testing.assert_array_equal(np.abs(gradients[1]).max(axis=-1) > 0, captions)
    ids[2:, 0] = -1  # images whose caption has no row take no part
    arrays = regions, mask, areas, concepts, ids
    two = tuple(a[:2] for a in arrays)
    two = (*two[:3], concepts, two[4])
    found, alone = (loss_and_gradients(cfg, case, 3.0)[0] for case in (arrays, two))
    assert found == pytest.approx(alone, rel=1e-6) and found != pytest.approx(loss)


def test_identical_images_have_the_loss_of_a_random_guess():
    regions, mask, areas, concepts, ids = case()
    regions[:], mask[:] = regions[0], True
    cfg = variant("text_to_image")
    loss, _ = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 5.0)
    assert loss == pytest.approx(math.log(IMAGES), rel=1e-6)


def test_descent_finds_the_images():
    _, mask, areas, concepts, _ = case()
    regions = np.random.default_rng(1).normal(0, 0.1, (IMAGES, REGIONS, DIM))
    ids = np.array([[0], [1], [2], [3], [4]], np.int32)
    cfg = ops.ContrastiveConfig(temperature=0.5, label_smoothing=0.0)
    loss, gradients = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 10.0)
    for _ in range(20):
        regions = regions - 0.1 * np.asarray(gradients[0], np.float64)
        new, gradients = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 10.0)
    assert new < 0.1 * loss


@pytest.mark.parametrize("matching", MATCHINGS)
@pytest.mark.parametrize("missing", ["regions", "texts", "both", "all but one"])
def test_nothing_to_contrast(missing, matching):
    regions, mask, areas, concepts, ids = case()
    if missing in ("regions", "both"):
        mask[:] = False
    if missing in ("texts", "both"):
        ids[:] = -1
    if missing == "all but one":
        mask[1:] = False
    cfg = variant("both", matching)
    loss, gradients = loss_and_gradients(cfg, (regions, mask, areas, concepts, ids), 3.0)
    # An image that is its only candidate has the loss log 1, up to rounding.
    tolerance = 1e-6 if missing == "all but one" else 0
    assert abs(loss) <= tolerance
    assert all((np.abs(g) <= tolerance).all() for g in gradients)


def test_images_have_either_regions_or_a_text():
    # There are regions and texts, but no image has both.
    regions, mask, areas, concepts, ids = case()
    mask[:2], ids[2:] = False, -1
    loss, gradients = loss_and_gradients(
        variant("text_to_image"), (regions, mask, areas, concepts, ids), 3.0
    )
    assert loss == 0 and not any(np.asarray(g).any() for g in gradients)


def test_extreme_similarities_stay_finite():
    regions, mask, areas, concepts, ids = with_gaps()
    for matching in MATCHINGS:
        arrays = (100 * regions, mask, areas, 100 * concepts, ids)
        loss, gradients = loss_and_gradients(variant("both", matching), arrays, 1e4)
        assert np.isfinite(loss) and all(np.isfinite(g).all() for g in gradients)


def test_half_precision_features_give_a_float32_loss():
    regions, mask, areas, concepts, ids = float32(*case())
    cfg = variant("text_to_image")
    loss, gradients = compiled(cfg)(
        regions.astype(jnp.bfloat16), concepts.astype(jnp.bfloat16), np.float32(3), mask, areas, ids
    )
    assert gradients[0].dtype == jnp.bfloat16
    assert loss.dtype == jnp.float32
    assert loss == pytest.approx(reference_loss(*case(), 3.0, cfg), rel=0.02)


@pytest.mark.parametrize("field", ["direction", "matching"])
def test_a_misspelled_choice_is_an_error(field):
    with pytest.raises(UserError, match=f"{field}.*'txt2img'.*(max_size|image_to_text)"):
        ops.ContrastiveConfig(**{field: "txt2img"})
