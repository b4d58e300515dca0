"""What the backward pass computes again instead of keeping it, by the name of a policy."""

from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016. Of each block,
# "none": everything is kept; "dots": the outputs of its dense layers; "blocks": its input alone.
Remat = Literal["none", "dots", "blocks"]

_PRODUCT = "product"


def product(x: jax.Array) -> jax.Array:
    """Marks the output of a dense layer or a convolution: what "dots" keeps."""
    return checkpoint_name(x, _PRODUCT)


def block_of(function: Callable, remat: Remat, static: int | tuple[int, ...] = ()) -> Callable:
    """`function` of a module and arrays, with only what the policy keeps of its inside.

    `static`: positions of the arguments that are no arrays.
    """
    if remat == "none":
        return function
    policy = None
    if remat == "dots":
        policy = jax.checkpoint_policies.save_only_these_names(_PRODUCT)
    return nnx.remat(function, static_argnums=static, policy=policy)
