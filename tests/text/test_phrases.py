"""How phrases are cleaned, and what spaCy finds in captions."""

import json
import subprocess
import sys

import pytest
import tiny_run

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text import phrases


@pytest.fixture(scope="module")
def pipeline():
    try:
        return phrases.load()
    except UserError as error:
        pytest.skip(f"no English spaCy pipeline: {error}")


@pytest.mark.parametrize(
    ("phrase", "cleaned"),
    [
        ("The two red anchors,", "red anchors"),
        ("  A  CAT ", "cat"),
        ("all of the 3 dogs", "dogs"),
        ("another person's hat", "person's hat"),
        ("10:30 train", "train"),
        ("1st place ribbon", "place ribbon"),
        ("them", ""),
        ("the two", ""),
        ("", ""),
        ("—", ""),
        ("t-shirt", "t-shirt"),
        ('"quoted" sign', "quoted sign"),
        ("half circle", "half circle"),
        ("theatre", "theatre"),
        ("Tom &amp; Jerry", "tom jerry"),
        ("der Hund", "der hund"),
        ("日本語 sign", "日本語 sign"),
    ],
)
def test_clean(phrase, cleaned):
    assert phrases.clean(phrase) == cleaned
    assert phrases.clean(cleaned) == cleaned


def test_distinct_keeps_order_and_limit():
    found = ["A dog", "the front", "two dogs", "The Dog", "them", "a cat", "the bird"]
    assert phrases.distinct(found, 7) == ["dog", "dogs", "cat", "bird"]
    assert phrases.distinct(found, 2) == ["dog", "dogs"]
    assert phrases.distinct([], 7) == []


def test_spanned_phrase():
    caption = "The red cat near two dogs"
    assert phrases.spanned_phrase(caption, [[0, 11]]) == "red cat"
    assert phrases.spanned_phrase(caption, [[4, 7], [21, 25]]) == "red dogs"
    assert phrases.spanned_phrase(caption, []) == ""
    for wrong in ([[0, 26]], [[5, 5]], [[-3, 4]], [[9, 4]]):
        with pytest.raises(ValueError, match="caption of 25 characters"):
            phrases.spanned_phrase(caption, wrong)


def test_noun_phrases(pipeline):
    captions = [
        "A man riding a wave on top of a surfboard.",
        "the red anchor left of two umbrellas",
        "",
        "Two bears, one running on some rocky soil.",
        "It is what it is",
    ]
    found = list(phrases.noun_phrases(captions))
    assert found[0] == ["man", "wave", "surfboard"]
    assert found[1] == ["red anchor", "umbrellas"]
    assert found[2] == [] and found[4] == []
    assert found[3] == ["bears", "rocky soil"]


def test_noun_phrases_limit_and_long_captions(pipeline):
    long = "a cat, " + ", ".join(f"a {color} dog" for color in ("red", "green", "blue") * 300)
    (found,) = phrases.noun_phrases([long], limit=3)
    assert len(found) == 3 and len(set(found)) == 3
    assert list(phrases.noun_phrases([long], limit=0)) == [[]]
    assert list(phrases.noun_phrases([])) == []


def test_a_missing_pipeline_is_said(pipeline):
    with pytest.raises(UserError, match="xx_no_such_model.*spacy download xx_no_such_model"):
        phrases.load("xx_no_such_model")


def test_the_faster_multiplication_finds_the_same_phrases(pipeline):
    """In a process of its own: OpenBLAS reads the number of its threads when NumPy is imported."""
    sentence = "a {} dog and the {} cats near an old {} bus, in London's {}"
    captions = [
        sentence.format(color, number, color, place)
        for number in (2, 7)
        for color in ("red", "dark green")
        for place in ("rain", "center")
    ]
    program = """
import json, sys
from detclipv2_jax.text import phrases
print(json.dumps(list(phrases.noun_phrases(json.loads(sys.argv[1])))))
assert not next(phrases.load().get_pipe("tok2vec").model.walk()).ops.use_blis
"""
    environment = tiny_run.environment() | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, json.dumps(captions)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == list(phrases.noun_phrases(captions))
    assert json.loads(process.stdout)[0][0] == "red dog"


@pytest.mark.parametrize(
    ("caption", "given", "found"),
    [
        ("A man, in the red shirt!", ["man", "red shirt"], [None, 0, None, None, 1, 1]),
        ("a red shirt by a shirt", ["shirt", "red shirt"], [None, 1, 1, None, None, 0]),
        ("Tom &amp; Jerry", ["tom jerry"], [0, 0, 0]),
        ("two dogs, dogs", ["dogs", "a cat", ""], [None, 0, None]),
        ("", ["dog"], []),
    ],
)
def test_words_of_phrases(caption, given, found):
    assert phrases.phrase_of_words(caption, given) == found


def test_found_phrases_have_their_words(pipeline):
    caption = "Two men in the red shirts ride a brown horse near an old wooden fence."
    (found,) = phrases.noun_phrases([caption])
    words = phrases.phrase_of_words(caption, found)
    for number, phrase in enumerate(found):
        own = [word for word, of in zip(caption.split(), words) if of == number]
        assert " ".join(own).rstrip(".") == phrase
