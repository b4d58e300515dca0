"""Comparisons of a module that runs a kernel with the same module without it."""

import jax
import numpy as np
from flax import nnx
from jax.experimental.pallas import tpu as pltpu


def without_and_with(graph, state, x, grad_out, monkeypatch):
    """Return (output, gradients) of a module without its kernel, and with it on a simulated TPU.

    The gradients are those of `state` and `x`, given the gradient of the output.
    """
    module = type(nnx.merge(graph, state))

    def run(fused):
        monkeypatch.setattr(module, "has_kernels", lambda *_: fused)
        value, back = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return value, back(grad_out)

    with pltpu.force_tpu_interpret_mode():
        kernel = jax.jit(lambda: run(True))()
    return jax.jit(lambda: run(False))(), kernel


def check_close(expected, found, tolerance=2e-6):
    """Check every array of two trees, up to `tolerance` times its largest value."""
    leaves = zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True)
    for (path, a), b in leaves:
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), jax.tree_util.keystr(path)


def check_as_accurate(exact, plain, kernel):
    """Check that the error of `kernel`, bfloat16, is about that of `plain`, bfloat16, or less."""
    for a, b, c in zip(*map(jax.tree.leaves, (exact, plain, kernel)), strict=True):
        a, b, c = (np.asarray(v, np.float64) for v in (a, b, c))
        assert np.linalg.norm(c - a) <= 1.2 * np.linalg.norm(b - a) + 1e-3 * np.linalg.norm(a)
