"""Rematerialization: which activations the backward pass recomputes (Chen et al. 2016)."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# What is stored of each block: "none": every activation; "dots": the outputs of its dense layers
# and convolutions; "blocks": only its input. The rest is recomputed.
Remat = Literal["none", "dots", "blocks"]

_DENSE_OUTPUT = "product"


def mark_dense_output(x: jax.Array) -> jax.Array:
    """Mark the output of a dense layer or a convolution: an activation that "dots" stores."""
    return checkpoint_name(x, _DENSE_OUTPUT)


def rematerialize(function: Callable, remat: Remat) -> Callable:
    """Wrap a function of a module and arrays so that it stores only what the policy allows."""
    if remat == "none":
        return function
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(_DENSE_OUTPUT)
    return nnx.remat(function, policy=policy)
