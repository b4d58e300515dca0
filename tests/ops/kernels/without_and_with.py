"""A module's output and gradients without and with its kernel, which a simulated TPU runs."""

import jax
from flax import nnx
from jax.experimental.pallas import tpu as pltpu


def without_and_with(graph, state, x, slope, monkeypatch):
    """Twice the output and the gradients by `state` and by `x`, whose output's is `slope`."""
    module = type(nnx.merge(graph, state))

    def run(fused):
        monkeypatch.setattr(module, "has_kernels", lambda *_: fused)
        value, back = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return value, back(slope)

    with pltpu.force_tpu_interpret_mode():
        kernel = jax.jit(lambda: run(True))()
    return jax.jit(lambda: run(False))(), kernel
