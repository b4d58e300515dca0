"""What values of JSON fields become: ids, numbers, flags, texts and boxes."""

import math

import numpy as np
import pytest

from detclipv2_jax.common import json_fields
from detclipv2_jax.common.json_fields import FieldError

NAN, INF = math.nan, math.inf


def refused(reader, value, message, **options):
    with pytest.raises(FieldError) as caught:
        reader({"f": value} if value is not ... else {}, *options.pop("field", ["f"]), **options)
    assert str(caught.value) == f"f {message}"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, 1), (0, 0), (-3, -3), (1.0, 1), ("1", 1), (" 1 ", 1), ("1.0", 1), ("1.", 1), ("-3", -3),
        (2**53 + 1, 2**53 + 1), (2**64 + 1, 2**64 + 1), (str(2**64 + 1), 2**64 + 1),
        ("000123", "000123"), ("img 7", "img 7"), ("1e3", "1e3"), ("1.5", "1.5"), ("nan", "nan"),
        ("٣", "٣"), ("1_0", "1_0"),
    ],
)  # fmt: skip
def test_identifier(value, found):
    result = json_fields.identifier({"f": value}, "f")
    assert result == found and type(result) is type(found)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"), (NAN, "NaN"), (INF, "Infinity"), (1.5, "1.5"), (True, "true"),
        (False, "false"), ("", '""'), (" ", '" "'), ([1], "[1]"), ("\ud800", '"\\ud800"'),
        (2.0**60, "1.152921504606847e+18"),
    ],
)  # fmt: skip
def test_not_an_identifier(value, shown):
    refused(json_fields.identifier, value, f"is {shown}, not a whole number or a text")


def test_missing_fields_are_named():
    for reader in (json_fields.identifier, json_fields.integer, json_fields.number):
        refused(reader, ..., "is missing")
    refused(json_fields.text, ..., "is missing")
    refused(json_fields.box, ..., "is missing; expected four numbers [x, y, width, height]")


def test_ids_that_differ_in_leading_zeros():
    assert "(123 is; a text with" in json_fields.similar_identifier("000123", {123})
    assert '("000123" is; a text' in json_fields.similar_identifier(123, {"000123", 1})
    for wanted, known in ((7, {123}), ("a", {123}), (7, {7}), ("x7", {7})):
        assert json_fields.similar_identifier(wanted, known) == ""


def test_lists_of_identifiers():
    assert json_fields.identifiers({"f": [1, "2", 3.0, "a"]}, "f") == (1, 2, 3, "a")
    assert json_fields.identifiers({"f": None}, "f") is json_fields.identifiers({}, "f") is None
    for value, shown in (("1,2", '"1,2"'), ([1, None], "[1, null]"), ([True], "[true]"), (3, "3")):
        refused(json_fields.identifiers, value, f"is {shown}, not a list of ids")


def test_integer_and_size():
    for value in (480, 480.0, "480", "480.0", " 480 ", "0480"):
        assert json_fields.integer({"f": value}, "f") == 480
        assert json_fields.size({"height": value, "width": 3}) == (480, 3)
    for value, shown in (
        (480.5, "480.5"), (NAN, "NaN"), (-INF, "-Infinity"), (True, "true"), ("", '""'),
        ("4 80", '"4 80"'), ("1e3", '"1e3"'), (None, "null"), (1e300, "1e+300"),
    ):  # fmt: skip
        refused(json_fields.integer, value, f"is {shown}, not a whole number")
    assert json_fields.size({"height": None, "width": 3}) is None
    assert json_fields.size({"height": 4}) is None
    for value in (0, -480, "0", 0.0):
        with pytest.raises(FieldError, match="width is .*, not a positive number of pixels"):
            json_fields.size({"height": 3, "width": value})


def test_number():
    for value in (0.5, "0.5", " .5", "5e-1", "+0.5"):
        assert json_fields.number({"f": value}, "f") == 0.5
    assert json_fields.number({"f": 2}, "f") == 2.0
    for value, shown in (
        (NAN, "NaN"), ("nan", '"nan"'), ("inf", '"inf"'), (INF, "Infinity"), ("0,5", '"0,5"'),
        ("1_0", '"1_0"'), (True, "true"), (None, "null"), ([1], "[1]"), ("1e999", '"1e999"'),
        (10**400, "1" + "0" * 56 + "..."),
    ):  # fmt: skip
        refused(json_fields.number, value, f"is {shown}, not a finite number")


def test_flag():
    for value in (0, 0.0, "0", "0.0", "false", "False", " no", "", None, False, ...):
        entry = {} if value is ... else {"f": value}
        assert json_fields.flag(entry, "f") is False
    for value in (1, 1.0, "1", "1.0", "true", "TRUE", "yes", True):
        assert json_fields.flag({"f": value}, "f") is True
    for value, shown in (
        (2, "2"), (-1, "-1"), (0.5, "0.5"), (NAN, "NaN"), ("maybe", '"maybe"'), ([], "[]")
    ):  # fmt: skip
        refused(json_fields.flag, value, f"is {shown}, not 0 or 1")


def test_text():
    assert json_fields.text({"f": " cat "}, "f") == " cat "
    for value, message in (
        (5, "is 5, not a text"), (None, "is null, not a text"), (NAN, "is NaN, not a text"),
        ("", 'is "", which is blank'), (" \t", 'is " \\t", which is blank'),
        ("a\ud800", 'is "a\\ud800", not valid Unicode'),
    ):  # fmt: skip
        refused(json_fields.text, value, message)
    assert json_fields.optional_text({"f": ""}, "f") is json_fields.optional_text({}, "f") is None


def test_box():
    for value in ([1, 2.5, 3, 4], [1.0, 2.5, 3.0, 4.0], ["1", "2.5", " 3", "4.0"]):
        found = json_fields.box({"f": value}, "f")
        assert found == (1.0, 2.5, 3.0, 4.0) and {type(v) for v in found} == {float}
    assert json_fields.box({"f": [1, 2, -3, 0]}, "f") == (1, 2, -3, 0)
    expected = "not four finite numbers [x, y, width, height]"
    for value, shown in (
        ([1, 2, 3], "[1, 2, 3]"), ([1, 2, 3, 4, 5], "[1, 2, 3, 4, 5]"), ("1,2,3,4", '"1,2,3,4"'),
        ([1, 2, 3, None], "[1, 2, 3, null]"), ([1, 2, NAN, 4], "[1, 2, NaN, 4]"),
        ([1.0, 2.0, INF, 4.0], "[1.0, 2.0, Infinity, 4.0]"), ([1, 2, 3, True], "[1, 2, 3, true]"),
        ([1, 2, 3, "x"], '[1, 2, 3, "x"]'), ({"x": 1}, '{"x": 1}'),
        ([[1, 2, 3, 4]], "[[1, 2, 3, 4]]"),
    ):  # fmt: skip
        refused(json_fields.box, value, f"is {shown}, {expected}")
    assert math.isnan(json_fields.box({"f": [NAN, 2, 3, 4]}, "f", finite=False)[0])
    for value in (None, []):
        shown = "null" if value is None else "[]"
        refused(json_fields.box, value, f"is {shown}; expected four numbers [x, y, width, height]")
    with pytest.raises(FieldError, match=r"bbox is missing \(the segmentation is not read\)"):
        json_fields.box({"segmentation": [[1, 2, 3, 4, 5, 6]]})


def test_locate():
    error = FieldError("height", "is null, not a whole number")
    assert json_fields.locate("a.json: images[3]", error) == (
        "a.json: images[3].height is null, not a whole number"
    )
    with pytest.raises(ValueError) as caught:
        json_fields.entry_object([1])
    assert json_fields.locate("a.json: images[3]", caught.value) == (
        "a.json: images[3]: [1] is not an object"
    )


def turned(xywh, **attributes):
    return {"bbox": xywh, "attributes": {"occluded": False, **attributes}}


@pytest.mark.parametrize("degrees", [0, 30, 45.5, 90, 135.0, 180, 270, 296.743, -20, 450])
def test_a_turned_box_becomes_the_upright_box_around_it(degrees):
    x, y, w, h = 8.0, 6.0, 20.0, 15.0
    center = complex(x + w / 2, y + h / 2)
    corners = np.array([complex(a, b) for a in (x, x + w) for b in (y, y + h)])
    found = (corners - center) * np.exp(1j * np.deg2rad(degrees)) + center
    low, high = (f(found.real) + 1j * f(found.imag) for f in (np.min, np.max))
    wanted = [low.real, low.imag, high.real - low.real, high.imag - low.imag]
    entry = turned([x, y, w, h], rotation=degrees)
    np.testing.assert_allclose(json_fields.box(entry), wanted, atol=1e-9)
    assert json_fields.rotation(entry) == degrees % 360


def test_what_is_no_turned_box():
    for attributes in ({}, {"rotation": None}, {"rotation": "90"}, {"rotation": True}):
        assert json_fields.box(turned([1, 2, 3, 4], **attributes)) == (1, 2, 3, 4)
    # The box of a segmentation is around it already.
    entry = turned([1, 2, 3, 4], rotation=90) | {"segmentation": [[1, 2, 4, 2, 4, 6]]}
    assert json_fields.box(entry) == (1, 2, 3, 4) and json_fields.rotation(entry) == 0
    assert json_fields.box(turned([1, 2, -3, 4], rotation=90)) == (1, 2, -3, 4)
    with pytest.raises(FieldError, match="rotation is NaN, not a finite number of degrees"):
        json_fields.box(turned([1, 2, 3, 4], rotation=NAN))
