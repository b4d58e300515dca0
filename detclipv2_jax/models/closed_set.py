"""A closed label space in place of the text tower: plain ATSS, as a supervised baseline."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from detclipv2_jax.common.errors import UserError


class ClosedSet(nnx.Module):
    """Gives each of C classes its own unit vector, so that channel c of a region is a logit.

    The head's last convolution then has C outputs, and the logits are those of ATSS (Zhang et al.
    2020), without any text. The model has no other use of the classes' names.

    Args:
        names: of the classes.

    Raises:
        UserError: two names have the same tokens.
    """

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)
        seen: dict[bytes, str] = {}
        for name, row in zip(self.names, _tokens(self.names)):
            if (other := seen.setdefault(row.tobytes(), name)) != name:
                raise UserError(
                    f"config.model.classes: {name!r} and {other!r} have the same tokens. Rename "
                    "one of them."
                )

    def __call__(self, tokens: Int[Array, "M L"]) -> Float[Array, "M C"]:
        """Return the unit vector of each name; zeros for padding and for any other name."""
        table = jnp.asarray(_tokens(self.names)[:, : tokens.shape[1]])
        return jnp.all(tokens[:, None] == table, axis=-1).astype(jnp.float32)


def _tokens(names: Sequence[str]) -> Int[np.ndarray, "C L"]:
    from detclipv2_jax.text.tokenizer import tokenize  # a machine that only measures may lack ftfy

    return tokenize(names)
