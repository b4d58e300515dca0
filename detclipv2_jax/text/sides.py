"""Texts that say left or right: an image with such a text must not be flipped."""

import functools

import numpy as np
from jaxtyping import Bool, Int

from detclipv2_jax.text.tokenizer import VOCABULARY_SIZE, tokenizer

_WORDS = ("left", "right")
_PIECES = ("lef", "righ")  # how the tokenizer begins "lefthand", "righthanded" and "rightward"


@functools.cache
def side_tokens() -> Bool[np.ndarray, " vocabulary"]:
    """Return for each token id whether it begins with "left" or "right".

    This is coarse on purpose: "right now", "leftovers" and "he left" count too. An image that is
    not flipped costs little, a wrong word teaches a wrong thing.
    """
    result = np.zeros(VOCABULARY_SIZE, bool)
    for piece, number in tokenizer().get_vocab().items():
        result[number] = piece.startswith(_WORDS) or piece in _PIECES
    return result


def name_a_side(tokens: Int[np.ndarray, "n 16"]) -> Bool[np.ndarray, " n"]:
    """Return which of n tokenized texts say left or right, within the tokens that they keep."""
    return side_tokens()[tokens].any(axis=1)
