"""Cross-entropy over class names, against a float64 loop and finite differences."""

import jax
import numpy as np
import pytest

from detclipv2_jax.ops.classification import class_cross_entropy

B, P, M, D = 6, 3, 7, 5


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((B, P), bool)
    mask[1, 1:], mask[4] = False, False  # one region; none
    own = np.array([2, 0, -1, 2, 3, 5])  # two images of one class, one without a name
    names = rng.standard_normal((M, D)).astype(np.float32)
    return rng.standard_normal((B, P, D)).astype(np.float32), mask, names, np.arange(M) != 6, own


def reference(regions, mask, names, name_mask, own, scale):
    losses = np.zeros(B)
    for b in range(B):
        if own[b] >= 0 and mask[b].any():
            logits = np.array([
                max(scale * np.float64(regions[b, p]) @ np.float64(names[m])
                    for p in range(P) if mask[b, p])
                for m in range(M)
            ])  # fmt: skip
            losses[b] = np.log(np.exp(logits[name_mask]).sum()) - logits[own[b]]
    return losses


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_against_a_loop(scale):
    found = jax.jit(class_cross_entropy)(*inputs(), scale)
    expected = reference(*inputs(), scale)
    assert (expected[[2, 4]] == 0).all() and (expected[[0, 1, 3, 5]] > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_images_of_one_class_do_not_repel_each_other():
    """What another image is changes nothing, whatever its class."""
    regions, mask, names, name_mask, own = inputs()
    before = np.array(class_cross_entropy(regions, mask, names, name_mask, own, 2.0))
    regions[3], own[1] = regions[0], 4
    after = np.array(class_cross_entropy(regions, mask, names, name_mask, own, 2.0))
    np.testing.assert_array_equal(before[[0, 5]], after[[0, 5]])
    assert after[3] == after[0]


def test_gradients_are_finite_differences():
    regions, mask, names, name_mask, own = inputs()
    run = lambda regions, names, scale: class_cross_entropy(
        regions, mask, names, name_mask, own, scale
    ).sum()
    gradients = jax.grad(run, argnums=(0, 1, 2))(regions, names, np.float32(2.0))
    values, h = (np.float64(regions), np.float64(names), np.float64(2.0)), 1e-5
    at = lambda r, n, s: reference(r, mask, n, name_mask, own, s).sum()
    for number, (value, gradient) in enumerate(zip(values, gradients)):
        expected = np.zeros_like(value)
        for place in np.ndindex(*value.shape):
            ends = []
            for sign in (1, -1):
                moved = [np.array(v) for v in values]
                moved[number][place] += sign * h
                ends.append(at(*moved))
            expected[place] = (ends[0] - ends[1]) / (2 * h)
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    gradients = [np.asarray(gradient) for gradient in gradients]
    assert not gradients[0][[2, 4]].any()  # no name, no region
    assert not gradients[1][6].any()  # padding
