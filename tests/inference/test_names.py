"""The names that people ask for: how they are separated, and what the model reads of them."""

import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.names import (
    cut_off_text,
    names_from_flags,
    names_from_text,
    text_from_names,
)
from detclipv2_jax.text.tokenizer import kept, normalize, tokenize

SIDE = "a person who wears a red jacket and a blue hat riding a bicycle on the {} side"
LEFT, RIGHT = SIDE.format("left"), SIDE.format("right")
EARLY = "word " * 14
IMAGE = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat, traffic light", ["cat", "traffic light"]),
        ("bow, knot\nhat", ["bow, knot", "hat"]),
        ("bow, knot\r\nhat\r\n", ["bow, knot", "hat"]),
        ("bow, knot\rhat", ["bow, knot", "hat"]),
        ("cat, dog\n", ["cat", "dog"]),
        ("\ufeffcat\n\n dog\t\n\xa0", ["cat", "dog"]),
        ("a\u2028b\nc\x0bd", ["a\u2028b", "c\x0bd"]),  # no line ends
        ('"bow, knot", hat', ["bow, knot", "hat"]),
        ('"a,b","c, d"', ["a,b", "c, d"]),
        ('5" pipe, "stop" sign', ['5" pipe', '"stop" sign']),
        ("-cat, [x], 7, <b>, {}, %s", ["-cat", "[x]", "7", "<b>", "{}", "%s"]),
        (" ,\n, ,", [",", ", ,"]),
        (", ,,", []),
        ("", []),
        ("\n \r\n", []),
    ],
)
def test_where_there_is_more_than_one_line_a_line_is_a_name(text, names):
    assert names_from_text(text) == names


@pytest.mark.parametrize("names", [["bow, knot"], ["cat"], ["a, b", "c"], ["a", "b"], ["x,"]])
def test_names_become_a_text_and_names_again(names):
    assert names_from_text(text_from_names(names)) == names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_in_a_file_every_line_is_a_name(tmp_path, encoding):
    path = tmp_path / "names.txt"
    path.write_bytes("bow, knot\r\n\r\n-7\n Über \n".encode(encoding))
    assert names_from_flags(None, str(path)) == ["bow, knot", "-7", "Über"]
    path.write_bytes('"bow, knot"'.encode(encoding))
    assert names_from_flags(None, str(path)) == ['"bow, knot"']
    path.write_bytes("bow, knot".encode(encoding))
    assert names_from_flags(None, str(path)) == ["bow, knot"]


def test_what_is_kept_of_a_text():
    assert kept(["Cat ", LEFT, "word " * 14, "word " * 15]) == [
        *("cat", LEFT.removesuffix(" on the left side"), *[("word " * 14).strip()] * 2)
    ]
    assert kept(["a" + "猫" * 8, "", "\ud800"]) == ["a" + "猫" * 4, "", "�"]  # 3 tokens a letter
    for text in ("🙂" * 20, "Straße " * 9, "naïve café " * 8, "x" * 99, "1" * 15):
        (found,) = kept([text])
        assert normalize(text).startswith(found) and found != normalize(text)
        # A longer text has other tokens only behind those that are read.
        np.testing.assert_array_equal(*tokenize([text, text + " dog"]))
    assert kept(["1" * 15]) == ["1" * 14]  # a token per digit


def test_the_case_of_two_names_cut_alike():
    detector = Detector(tiny_model.loaded(), cache="")
    expected = (
        r"name 2, .*right side', is the same as name 1 to the model, which reads 16 tokens "
        r"with start and end: both "
        r"are asked as 'a person .* a bicycle'. Shorten them"
    )
    with pytest.raises(UserError, match=expected):
        detector(IMAGE, [LEFT, RIGHT])
    with pytest.raises(UserError, match="name 3, .* is the same as name 2"):
        detector.encode(["cat", EARLY + "left", EARLY + "right"])
    sentence = "word " * 13 + "{}"
    with pytest.raises(UserError, match="is the same as name 1"):
        Detector(tiny_model.loaded(), cache="", prompts=[sentence])(IMAGE, ["red cat", "red dog"])


def test_a_name_that_is_cut_is_told():
    detector = Detector(tiny_model.loaded(), cache="")
    expected = (
        "1 of 2 names does not fit into the 16 tokens, start and end included, that the model "
        "reads: '.*' is asked as"
    )
    with pytest.warns(UserWarning, match=expected):
        detector(IMAGE, [LEFT, "cat"])
    encoded = detector.encode([LEFT, "cat"])
    assert (
        encoded.prompts[0] == LEFT.removesuffix(" on the left side") and encoded.prompts[1] == "cat"
    )
    assert cut_off_text(detector.encode(["cat"])) is None
    many = detector.encode([f"{n} {EARLY}" for n in range(9)])
    assert "9 of 9 names do not fit" in cut_off_text(many) and "and 6 more" in cut_off_text(many)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("data.yaml", "names:\n  0: cat\n  1: dog\n", "is YAML, not a list of names"),
        ("names.json", '["cat", "dog"]', "is JSON, not a list of names"),
        ("names.txt", '{"0": "cat", "1": "dog"}', "is JSON, not a list of names"),
        ("labels.txt", "0 cat\n1 dog\n", "its lines are numbered, as '0 cat'"),
        ("labels.txt", "0 skip button\n2 notice\n", "its lines are numbered"),
        ("labels.txt", "1: cat\n2: dog\n", "its lines are numbered"),
        ("labels.txt", "0,cat\n1,dog\n", "its lines are numbered"),
        ("labels.txt", "0\tcat\n1\tdog\n", "its lines are numbered"),
    ],
)
def test_files_that_are_no_list_of_names(tmp_path, name, text, problem):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=problem):
        names_from_flags(None, str(path))


@pytest.mark.parametrize(
    "names",
    [["1 euro coin", "2 euro coin"], ["7 up", "cat"], ["0 calorie drink"], ["3d printer", "4x4"]],
)
def test_names_that_begin_with_a_number(tmp_path, names):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    assert names_from_flags(None, str(path)) == names
