import numpy as np
import pytest

from detclipv2_jax.text.sides import name_a_side
from detclipv2_jax.text.tokenizer import tokenize


@pytest.mark.parametrize(
    "text, expected",
    [
        ("the left man", True),
        ("a dog on the right.", True),
        ("Left", True),
        ("leftmost person", True),
        ("the right-hand side", True),
        ("lower-left corner", True),
        ("a righthanded batter", True),
        ("a lefthand glove", True),
        ("facing rightward", True),
        # Not surely a side: not flipped either.
        ("all right", True),
        ("a bowl of leftovers", True),
        # Words that only contain one.
        ("a bright room", False),
        ("an upright piano", False),
        ("a cleft lip", False),
        ("copyright notice", False),
        ("two men", False),
        ("", False),
    ],
)
def test_texts_that_say_left_or_right(text, expected):
    assert name_a_side(tokenize([text]).astype(np.uint16)).tolist() == [expected]


def test_what_the_tokens_do_not_keep_does_not_count():
    """The model cannot read it either."""
    long = "a man and a woman and a boy and a girl and a dog and a cat on the left"
    assert not name_a_side(tokenize([long])).any()
    assert name_a_side(tokenize(["left " + long])).all()
