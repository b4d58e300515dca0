"""Losses compared with plain Python, gradients with finite differences."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from detclipv2_jax.ops import losses

focal = jax.jit(losses.sigmoid_focal, static_argnames=("alpha", "gamma"))
focal_slope = jax.jit(
    jax.grad(lambda *a, **k: losses.sigmoid_focal(*a, **k).sum()),
    static_argnames=("alpha", "gamma"),
)
alignment = jax.jit(
    jax.value_and_grad(losses.alignment_loss, (0, 1, 2)), static_argnames=("block",)
)
giou_loss = jax.jit(losses.giou_loss)
cross_entropy = jax.jit(losses.binary_cross_entropy)
cross_entropy_slope = jax.jit(jax.grad(lambda *a: losses.binary_cross_entropy(*a).sum()))

LOGITS = np.array([-30.0, -5.0, -1.5, -1e-3, 0.0, 0.7, 4.0, 25.0])


def reference_focal(logit, target, alpha, gamma):
    # -log(p) and 1 - p, with p the probability of the target, accurate for large |z| in float64.
    z = logit if target else -logit
    miss, q = np.logaddexp(0, -z), 1 / (1 + math.exp(z))
    return (alpha if target else 1 - alpha) * q**gamma * miss


def grid(values):
    logits, targets = np.meshgrid(values, [0, 1])
    return logits.ravel(), targets.ravel()


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 0.5), (0.25, 3.0)])
def test_focal(alpha, gamma):
    logits, targets = grid(LOGITS)
    got = focal(np.float32(logits), targets, alpha=alpha, gamma=gamma)
    expected = [reference_focal(z, t, alpha, gamma) for z, t in zip(logits, targets)]
    np.testing.assert_allclose(
        got, expected, rtol=1e-5, atol=1.2e-38
    )  # the smallest normal float32


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 0.5), (0.25, 3.0)])
def test_focal_gradient_equals_finite_differences(alpha, gamma):
    logits, targets = grid(LOGITS)
    got = focal_slope(np.float32(logits), targets, alpha=alpha, gamma=gamma)
    for z, t, g in zip(logits, targets, got):
        above, below = (reference_focal(z + d, t, alpha, gamma) for d in (1e-5, -1e-5))
        assert g == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_finite_for_extreme_logits(gamma):
    logits, targets = grid([-1e30, -1e4, -200.0, 200.0, 1e4, 1e30])
    value = focal(np.float32(logits), targets, gamma=gamma)
    gradient = focal_slope(np.float32(logits), targets, gamma=gamma)
    assert np.isfinite(value).all() and np.isfinite(gradient).all()
    assert value[0] == 0 and value[-1] == 0  # confident and right
    assert gradient[-6] == pytest.approx(-0.25)  # confident and wrong: the slope of -log p


def test_focal_in_any_type():
    logits, targets = grid(LOGITS)
    expected = focal(np.float32(logits), targets)
    for kind in (bool, np.float32):
        got = focal(np.float32(logits), targets.astype(kind))
        np.testing.assert_array_equal(got, expected)
    half = focal(jnp.bfloat16(logits), targets)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=0.15)


def alignment_case(batch=3, anchors=7, concepts=5, dim=4, labels_per_box=2):
    """Return arguments of `alignment_loss` with every kind of pair."""
    rng = np.random.default_rng(0)
    regions = rng.normal(0, 1, (batch, anchors, dim)).astype(np.float32)
    texts = rng.normal(0, 1, (concepts, dim)).astype(np.float32)
    labels = rng.integers(-1, concepts, (batch, anchors, labels_per_box), dtype=np.int32)
    labels[1] = -1  # an image without boxes
    anchor_mask = rng.random((batch, anchors)) < 0.7
    anchor_mask[2] = False  # an empty slot
    concept_mask = rng.random(concepts) < 0.8
    scored = rng.random((batch, concepts)) < 0.6
    return regions, texts, np.float32(-2.0), labels, anchor_mask, concept_mask, scored


def reference_alignment(regions, texts, bias, labels, anchor_mask, concept_mask, scored):
    """Return the loss and its gradients by regions, texts and bias, pair by pair in float64."""
    regions, texts = regions.astype(np.float64), texts.astype(np.float64)
    loss, by_regions, by_texts = 0.0, np.zeros_like(regions), np.zeros_like(texts)
    by_bias, step = 0.0, 1e-5
    for b, k, m in np.ndindex(*regions.shape[:2], len(texts)):
        positive = m in labels[b, k]
        if not anchor_mask[b, k] or not concept_mask[m] or not (scored[b, m] or positive):
            continue
        logit = float(regions[b, k] @ texts[m] + bias)
        loss += reference_focal(logit, positive, 0.25, 2.0)
        above, below = (reference_focal(logit + d, positive, 0.25, 2.0) for d in (step, -step))
        slope = (above - below) / (2 * step)
        by_regions[b, k] += slope * texts[m]
        by_texts[m] += slope * regions[b, k]
        by_bias += slope
    return loss, (by_regions, by_texts, by_bias)


def assert_equals_reference(case, block=0):
    (loss, gradients), (expected, slopes) = (
        alignment(*case, block=block),
        reference_alignment(*case),
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    for got, wanted in zip(gradients, slopes):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("labels_per_box", [1, 2, 3])
def test_alignment_loss(labels_per_box):
    case = alignment_case(labels_per_box=labels_per_box)
    anchor_mask, concept_mask, scored = case[4:]
    assert anchor_mask.any() and concept_mask.any() and not concept_mask.all()
    assert scored.any() and not scored.all()
    assert_equals_reference(case)


def federated_case():
    """Return a case as in LVIS, of two images of three anchors and six concepts.

    Image 0: concept 0 is complete and 1 is not exhaustively annotated, 2 is verified to be absent.
    Image 1: a box with two phrases, 3 and 4, and 2 is verified to be absent. Nothing is known
    about the other concepts.
    """
    rng = np.random.default_rng(1)
    labels = np.full((2, 3, 2), -1, np.int32)
    labels[0, 0, 0], labels[0, 1, 0], labels[1, 0] = 0, 1, (4, 3)
    scored = np.zeros((2, 6), bool)
    scored[0, [0, 2]] = scored[1, [2, 3]] = True
    regions, texts = rng.normal(size=(2, 3, 8)), rng.normal(size=(6, 8))
    everything = np.ones((2, 3), bool), np.ones(6, bool)
    return np.float32(regions), np.float32(texts), np.float32(-1.0), labels, *everything, scored


def test_a_federated_alignment_loss():
    case = federated_case()
    assert_equals_reference(case)
    _, texts, *_ = case
    _, (_, by_texts, _) = alignment(*case)
    # Nothing is known about concept 5, and no image has it.
    assert (np.abs(by_texts).max(axis=1) > 0).tolist() == [True] * 5 + [False]
    # Concept 1 counts for its own anchor alone, since other instances may lack a box.
    alone = [np.zeros_like(array) for array in case[3:5]]
    alone[0][:], alone[1][0, 1] = -1, True
    alone[0][0, 1, 0] = 1
    one = (*case[:3], *alone, np.arange(6) == 1, case[6])
    np.testing.assert_allclose(alignment(*one)[1][1][1], by_texts[1], rtol=1e-6)


@pytest.mark.parametrize("devices", [1, 4])
def test_pairs_that_are_not_scored_have_no_gradient_at_all(devices):
    """Their features can be anything finite: neither the loss nor a bit of a gradient changes."""
    regions, texts, bias, labels, anchor_mask, concept_mask, scored = alignment_case(4, 20, 9)
    labels, anchor_mask[:], concept_mask[:] = labels % 4, True, True  # 4 to 8 label no box
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in (("data",), ()))

    def run(texts, scored):
        arrays = regions, texts, bias, labels, anchor_mask, concept_mask, scored
        layout = split, whole, whole, split, split, whole, split
        return jax.device_get(alignment(*map(jax.device_put, arrays, layout)))

    odd = np.arange(4) % 2 == 1
    scored[:, 4:] = ~odd[:, None]  # images 1 and 3 are no negatives of them
    larger = np.where(np.arange(9)[:, None] < 4, texts, 50 * texts)
    (before, gradients), (after, others) = run(texts, scored), run(larger, scored)
    np.testing.assert_array_equal(others[0][odd], gradients[0][odd])
    assert (others[0][~odd] != gradients[0][~odd]).any(axis=(1, 2)).all() and before != after

    scored[:, 4:] = False
    (before, gradients), (after, others) = run(texts, scored), run(larger, scored)
    assert before == after
    jax.tree.map(np.testing.assert_array_equal, gradients, others)
    assert not gradients[1][4:].any() and gradients[1][:4].all()


def plain_alignment(regions, texts, bias, labels, anchor_mask, concept_mask, scored):
    """Return the loss from all logits at once, to be differentiated by JAX."""
    logits = jnp.einsum("bkd,md->bkm", regions, texts) + bias
    targets = (labels[..., None] == jnp.arange(len(texts))).any(axis=-2)
    valid = anchor_mask[..., None] & concept_mask & (targets | scored[:, None])
    return jnp.where(valid, losses.sigmoid_focal(logits, targets), 0.0).sum()


@pytest.mark.parametrize("block", [0, 1, 64, 300, 1000])
def test_alignment_in_blocks_equals_the_plain_formula(block):
    case = alignment_case(3, 300, 70, 16)
    expected = jax.jit(jax.value_and_grad(plain_alignment, (0, 1, 2)))(*case)
    for got, wanted in zip(
        jax.tree.leaves(alignment(*case, block=block)), jax.tree.leaves(expected)
    ):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-6 * scale)
    alone = jax.jit(losses.alignment_loss, static_argnames=("block",))(*case, block=block)
    np.testing.assert_allclose(alone, expected[0], rtol=1e-5)


def test_alignment_scales_its_gradients_and_keeps_dtypes():
    regions, texts, bias, *pairs = alignment_case()
    halves = jnp.bfloat16(regions), jnp.bfloat16(texts)
    loss = lambda r, t, b: 3.0 * losses.alignment_loss(r, t, b, *pairs)
    by = jax.jit(jax.grad(loss, (0, 1, 2)))(*halves, bias)
    assert [g.dtype for g in by] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    _, expected = alignment(regions, texts, bias, *pairs)
    for got, wanted in zip(by, expected):
        wanted = 3.0 * np.asarray(wanted)
        error = np.abs(np.float32(got) - wanted).max()
        assert error < 0.05 * np.abs(wanted).max()


def test_alignment_ignores_masked_values_even_if_not_finite():
    regions, texts, bias, labels, anchor_mask, concept_mask, scored = alignment_case()
    scored[:] = True
    pairs = labels, anchor_mask, concept_mask, scored
    value, gradients = alignment(regions, texts, bias, *pairs)
    poisoned = (
        np.where(anchor_mask[..., None], regions, np.nan),
        np.where(concept_mask[:, None], texts, np.nan),
    )
    value_2, gradients_2 = alignment(*poisoned, bias, *pairs)
    assert value == value_2
    for a, b in zip(gradients, gradients_2):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(gradients[0]) != 0).any(axis=-1).sum() == anchor_mask.sum()
    assert (np.asarray(gradients[1]) != 0).any(axis=-1).sum() == concept_mask.sum()


@pytest.mark.parametrize("nothing", ["anchors", "concepts", "labels and scored"])
def test_alignment_of_nothing(nothing):
    regions, texts, bias, labels, anchor_mask, concept_mask, scored = alignment_case()
    if nothing == "anchors":
        anchor_mask = np.zeros_like(anchor_mask)
    elif nothing == "concepts":
        concept_mask = np.zeros_like(concept_mask)
    else:
        labels, scored = np.full_like(labels, -1), np.zeros_like(scored)
    value, gradients = alignment(regions, texts, bias, labels, anchor_mask, concept_mask, scored)
    assert value == 0 and not any(np.asarray(g).any() for g in gradients)


def test_giou_loss():
    a = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [3, 3, 3, 3]], np.float32)
    b = np.array([[0, 0, 10, 10], [10, 0, 20, 10], [3, 3, 3, 3]], np.float32)
    np.testing.assert_allclose(giou_loss(a, b), [0, 1, 1], atol=1e-6)
    far = giou_loss(a, a + 1000)
    assert 1.99 < far[0] < 2
    assert giou_loss(jnp.bfloat16(a), jnp.bfloat16(b)).dtype == jnp.float32


def test_giou_loss_moves_a_disjoint_box_closer():
    target = np.float32([[50, 50, 60, 60]])
    box = np.float32([[0, 0, 10, 10]])
    loss = jax.jit(jax.value_and_grad(lambda box: losses.giou_loss(box, target).sum()))
    value, gradient = loss(box)
    gradient = np.asarray(gradient)
    assert loss(box - 10 * gradient)[0] < value
    assert (gradient[0, 2:] < 0).all()  # the near edges move right and down


@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_binary_cross_entropy(target):
    targets = np.full(len(LOGITS), target, np.float32)
    got = cross_entropy(np.float32(LOGITS), targets)
    slope = cross_entropy_slope(np.float32(LOGITS), targets)
    for z, value, gradient in zip(LOGITS, got, slope):
        cross = lambda z: target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z)
        # The rounding error is proportional to the logit.
        assert value == pytest.approx(cross(z), rel=1e-5, abs=6e-8 * max(abs(z), 1))
        difference = (cross(z + 1e-5) - cross(z - 1e-5)) / 2e-5
        assert gradient == pytest.approx(difference, rel=1e-4, abs=1e-6)


def test_binary_cross_entropy_of_extreme_logits():
    logits = np.float32([-1e30, -1e3, 1e3, 1e30])
    value = cross_entropy(logits, np.float32([0, 0, 1, 1]))
    gradient = cross_entropy_slope(logits, np.float32([0.5] * 4))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_allclose(gradient, [-0.5, -0.5, 0.5, 0.5])
