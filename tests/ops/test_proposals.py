"""The scores that select regions compared with plain loops in float64."""

from typing import get_args

import jax
import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.ops import proposals as ops

CONCEPTS, TEXTS, DIM = 7, 3, 6


def float32(*arrays):
    return [np.float32(a) if a.dtype == np.float64 else a for a in arrays]


ANCHORS = 9


def proposal_case(seed=0, images=6):
    rng = np.random.default_rng(seed)
    regions = rng.normal(0, 1, (images, ANCHORS, DIM))
    concepts = rng.normal(0, 1, (CONCEPTS, DIM))
    ids = rng.choice(np.int32([-1, 0, 2, 3, 5]), (images, TEXTS))  # 1, 4 and 6 belong to no image
    return regions, concepts, ids, rng.normal(0, 1, (images, ANCHORS))


def grouped_scores(regions, concepts, ids, centerness, *, score, group, **rest):
    pools = ops.concept_pools(ids, score, group)
    logits = {"centerness": centerness, "foreground": centerness + 1, "iou": centerness - 2}
    return ops.proposal_scores(regions, concepts, pools, logits, score=score, **rest)


def score_function():
    # A new function each time, since jit caches by function and a test changes a constant.
    run = jax.jit(lambda *a, **k: grouped_scores(*a, **k), static_argnames=("score", "group"))
    return lambda *a, scale=2.0, bias=-1.5, **k: np.asarray(run(*a, scale=scale, bias=bias, **k))


proposal_scores = score_function()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference_scores(regions, concepts, ids, centerness, score, group, scale, bias):
    images = len(regions)
    if score in ops.HEAD_SCORES:
        return centerness + {"centerness": 0, "foreground": 1, "iou": -2}[score]
    result = np.full(regions.shape[:2], -np.inf)
    for b, k in np.ndindex(*result.shape):
        first = b // group * group
        own = {"sample": [b], "step": range(images)}.get(score, range(first, first + group))
        for j in {j for i in own for j in ids[i] if j >= 0}:
            result[b, k] = max(result[b, k], scale * regions[b, k] @ concepts[j] + bias)
    return sigmoid(result) * sigmoid(centerness) if score == "batch_centerness" else result


SCORES = get_args(ops.ProposalScore)


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
    with pytest.raises(UserError, match="'best' is not one of batch, sample"):
        grouped_scores(*arrays, score="best", group=2)
