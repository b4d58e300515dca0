"""The contrastive loss and the proposal scores compared with plain loops in float64."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.ops import contrastive as ops

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


def reference_similarity(regions, mask, areas, concepts, ids, scale, cfg):
    result = np.zeros((len(regions), len(ids)))
    for b, t in np.ndindex(*result.shape):
        own = [j for j in ids[t] if j >= 0]
        valid = np.flatnonzero(mask[b])
        if not own or not len(valid):
            continue
        for j in own:
            s = np.array([scale * concepts[j] @ regions[b, k] for k in valid])
            if cfg.matching == "max":
                best = s.max()
            elif cfg.matching == "soft":
                weights = np.exp(s / cfg.soft_temperature)
                best = (weights / weights.sum()) @ s
            else:
                best = s[np.argmax(areas[b, valid])]
            result[b, t] += best / len(own)
    return result


def reference_loss(regions, mask, areas, concepts, ids, scale, cfg):
    similarity = reference_similarity(regions, mask, areas, concepts, ids, scale, cfg)
    valid = [b for b in range(len(regions)) if mask[b].any() and (ids[b] >= 0).any()]
    total = {"text_to_image": 0.0, "image_to_text": 0.0}
    for i in valid:
        for direction in total:
            row = [similarity[(b, i) if direction == "text_to_image" else (i, b)] for b in valid]
            row = np.array(row) / cfg.temperature
            log_p = dict(zip(valid, row - np.log(np.exp(row).sum())))
            e = cfg.label_smoothing
            loss = -(1 - e) * log_p[i] - e * sum(log_p.values()) / len(valid)
            total[direction] += loss / len(valid)
    if cfg.direction == "both":
        return sum(total.values()) / 2
    return total[cfg.direction]


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
    for arrays in (case(), with_gaps()):
        loss, gradients = loss_and_gradients(cfg, arrays, 3.0)
        assert loss == pytest.approx(reference_loss(*arrays, 3.0, cfg), rel=1e-5)
        check_differences(gradients, arrays, 3.0, cfg, range(0, 400, 23))


@pytest.mark.parametrize("matching", MATCHINGS)
def test_blocks_change_nothing(matching, monkeypatch):
    cfg = variant("both", matching)
    whole = loss_and_gradients(cfg, with_gaps(), 3.0)
    monkeypatch.setattr(ops, "_REGION_BLOCK", 3)  # 7 concepts: two blocks and a third of one
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

    ours = lambda regions, concepts: ops._best_matched(regions, mask, concepts)
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
    run = jax.jit(jax.grad(lambda r: ops._best_matched(r, mask, np.ones((1, 2), np.float32)).sum()))
    np.testing.assert_array_equal(run(regions)[0], [[0, 0], [1, 1], [0, 0]])


def test_similarity_of_images_with_other_texts():
    regions, mask, areas, concepts, _ = with_gaps()
    ids = np.array([[6, 0], [-1, -1]], np.int32)
    run = jax.jit(ops.image_text_similarity)
    got = np.asarray(run(*float32(regions, mask, areas, concepts, ids), 2.0))
    expected = reference_similarity(
        regions, mask, areas, concepts, ids, 2.0, ops.ContrastiveConfig()
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not got[1].any() and not got[:, 1].any() and got[0, 0] != 0


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


# Proposals ---------------------------------------------------------------------------------------

ANCHORS = 9


def proposal_case(seed=0, images=6):
    rng = np.random.default_rng(seed)
    regions = rng.normal(0, 1, (images, ANCHORS, DIM))
    concepts = rng.normal(0, 1, (CONCEPTS, DIM))
    ids = rng.choice(np.int32([-1, 0, 2, 3, 5]), (images, TEXTS))  # 1, 4 and 6 belong to no image
    return regions, concepts, ids, rng.normal(0, 1, (images, ANCHORS))


def grouped_scores(regions, concepts, ids, centerness, *, score, group, **rest):
    pools = ops.concept_pools(ids, score, group)
    return ops.proposal_scores(regions, concepts, pools, centerness, score=score, **rest)


def score_function():
    # A new function each time, since jit caches by function and a test changes a constant.
    run = jax.jit(lambda *a, **k: grouped_scores(*a, **k), static_argnames=("score", "group"))
    return lambda *a, scale=2.0, bias=-1.5, **k: np.asarray(run(*a, scale=scale, bias=bias, **k))


proposal_scores = score_function()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_scores(regions, concepts, ids, centerness, score, group, scale, bias):
    images = len(regions)
    if score == "centerness":
        return centerness
    result = np.full(regions.shape[:2], -np.inf)
    for b, k in np.ndindex(*result.shape):
        first = b // group * group
        own = {"sample": [b], "classification": range(images)}.get(
            score, range(first, first + group)
        )
        for j in {j for i in own for j in ids[i] if j >= 0}:
            result[b, k] = max(result[b, k], scale * regions[b, k] @ concepts[j] + bias)
    return sigmoid(result) * sigmoid(centerness) if score == "batch_centerness" else result


SCORES = ("batch", "sample", "classification", "centerness", "batch_centerness")


@pytest.mark.parametrize(
    ("score", "group"),
    [*((score, 2) for score in SCORES), ("batch", 1), ("batch", 6), ("batch_centerness", 6)],
)
def test_proposal_scores(score, group):
    # 3 texts per image, 7 concepts: small groups gather rows, large ones score the whole table.
    arrays = proposal_case()
    got = proposal_scores(*float32(*arrays), score=score, group=group)
    expected = reference_scores(*arrays, score, group, 2.0, -1.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [2, 6])
def test_proposal_blocks_change_nothing(group, monkeypatch):
    arrays = float32(*proposal_case())
    whole = proposal_scores(*arrays, score="batch", group=group)
    monkeypatch.setattr(ops, "_ANCHOR_BLOCK", 4)
    blocks = score_function()(*arrays, score="batch", group=group)
    np.testing.assert_allclose(blocks, whole, rtol=1e-6)


def test_other_groups_have_no_influence():
    regions, concepts, ids, centerness = proposal_case()
    run = lambda ids: proposal_scores(
        *float32(regions, concepts, ids, centerness), score="batch", group=2
    )
    before = run(ids)
    ids[4:] = (ids[4:] + 2) % CONCEPTS
    after = run(ids)
    np.testing.assert_array_equal(before[:4], after[:4])
    assert (before[4:] != after[4:]).any()


def test_a_group_without_concepts_scores_very_low():
    regions, concepts, ids, centerness = proposal_case()
    ids[2:4] = -1
    for score in ("batch", "sample", "batch_centerness"):
        got = proposal_scores(*float32(regions, concepts, ids, centerness), score=score, group=2)
        assert np.isfinite(got).all()
        assert got[2:4].max() < np.delete(got, [2, 3], axis=0).min()


@pytest.mark.parametrize("score", SCORES)
def test_scores_have_no_gradient(score):
    arrays = float32(*proposal_case())
    run = jax.grad(
        lambda r, t, c, a: grouped_scores(
            r, t, arrays[2], c, score=score, group=3, scale=a, bias=a
        ).sum(),
        (0, 1, 2, 3),
    )
    gradients = jax.jit(run)(arrays[0], arrays[1], arrays[3], 2.0)
    assert not any(np.asarray(g).any() for g in gradients)


def test_invalid_group_and_score_are_errors():
    arrays = float32(*proposal_case())
    with pytest.raises(UserError, match="4 images per group do not divide the batch of 6"):
        grouped_scores(*arrays, score="batch", group=4)
    with pytest.raises(UserError, match="'iou' is not one of batch, sample"):
        grouped_scores(*arrays, score="iou", group=2)
