"""Where a name's definition comes from, with CLIP's own embeddings where they are at hand."""

import numpy as np
import pytest
from shared_data import embeddings, lvis_categories, objects365_names

from detclipv2_jax.text import definitions
from detclipv2_jax.text.definitions import NONE, define
from detclipv2_jax.text.tokenizer import normalize

DICTIONARY = {"anchor": "what holds a ship", "blue thing": "something blue"}


def refuse(texts):
    raise AssertionError("nothing was to be embedded")


def test_the_order_in_which_a_definition_is_looked_for():
    names = ["Anchor", "anchors", "trees", "mouse", "wild bird", "🙂", ""]
    found = define(names, synsets={"mouse": "mouse.n.04"}, dictionary=DICTIONARY)
    assert [d.origin for d in found] == [
        "dictionary",
        "dictionary",
        "wordnet",
        "synset",
        "head",
        "none",
        "none",
    ]
    assert found[0].text == "what holds a ship" and found[0].synset is None
    assert found[1] == found[0] and found[2].synset == "tree.n.01"
    assert found[3].text.startswith("a hand-operated electronic device")
    assert found[4].like == "bird" and found[4].synset is None
    assert found[5] == found[6] == NONE
    counts = definitions.origins(found)
    assert counts == {"synset": 1, "dictionary": 2, "wordnet": 1, "head": 1, "none": 2}
    assert list(counts) == ["synset", "dictionary", "wordnet", "head", "none"]


def test_a_synset_that_wordnet_lacks_is_passed_over():
    (found,) = define(["stop sign"], synsets={"stop sign": "stop_sign.n.01"})
    assert (found.origin, found.like) == ("head", "sign")


def test_a_synonym_keeps_its_own_meaning():
    """LVIS lists "man" among the synonyms of its category person."""
    given = {"person": "person.n.01", "man": "person.n.01", "toilet": "toilet.n.02"}
    assert definitions.synsets_of("man", given) == ["man.n.01", "person.n.01"]
    man, men, toilets, wide = define(["man", "men", "toilets", "wide toilets"], synsets=given)
    assert (man.origin, man.synset) == ("wordnet", "man.n.01") and men.text == man.text
    assert (toilets.origin, toilets.synset) == ("synset", "toilet.n.02")
    assert (wide.origin, wide.like, wide.text) == ("head", "toilet", toilets.text)


def test_a_head_noun_s_definition_is_the_dictionary_s():
    found = define(["two anchors", "big blue thing"], dictionary=DICTIONARY)
    assert [(d.origin, d.like) for d in found] == [("head", "anchor"), ("head", "thing")]
    assert found[0].text == "what holds a ship"


def test_an_unknown_name_borrows_from_the_nearest_concept():
    vectors = {"hoverboard": (1, 0.2), "blue thing": (0, 3), "anchor": (5, 0)}
    embed = lambda texts: np.array([vectors[text] for text in texts])
    (found,) = define(["Hoverboard"], dictionary=DICTIONARY, embed=embed)
    # By direction: the longer vector would win by its length.
    assert found.text == "what holds a ship"
    assert (found.origin, found.like, found.synset) == ("nearest", "anchor", None)
    vectors["hoverboard"] = (0.1, 1)
    assert define(["hoverboard"], dictionary=DICTIONARY, embed=embed)[0].like == "blue thing"


def test_without_a_dictionary_names_borrow_from_each_other():
    vectors = {"hoverboard": (1, 0), "tree": (0, 1), "boat": (1, 1)}
    embed = lambda texts: np.array([vectors[text] for text in texts])
    found = define(["hoverboard", "tree", "boat"], embed=embed)
    assert [d.origin for d in found] == ["nearest", "wordnet", "wordnet"]
    assert (found[0].like, found[0].text) == ("boat", found[2].text)


def test_nothing_is_embedded_in_vain():
    assert define([], embed=refuse) == []
    assert define(["tree"], dictionary=DICTIONARY, embed=refuse)[0].origin == "wordnet"
    # Nothing to borrow from: the head noun, or nothing.
    assert [d.origin for d in define(["wild bird", "🙂"], embed=refuse)] == ["head", "none"]


def test_nearest_in_pieces_and_at_edges(monkeypatch):
    rng = np.random.default_rng(0)
    queries, among = rng.normal(size=(37, 8)), rng.normal(size=(11, 8))
    expected = [
        int(np.argmax([q @ a / np.linalg.norm(a) for a in among])) for q in queries
    ]  # fmt: skip
    assert definitions.nearest(queries, among).tolist() == expected
    monkeypatch.setattr(definitions, "_CHUNK", 5)
    assert definitions.nearest(queries, among).tolist() == expected
    assert definitions.nearest(queries[:0], among).shape == (0,)
    assert definitions.nearest(np.zeros((1, 8)), among).tolist() == [0]  # no direction at all


@pytest.mark.parametrize(
    ("name", "readings"),
    [
        ("Anchor", ["anchor"]),
        ("bow_(decorative_ribbons)", ["bow"]),
        ("Picture/Frame", ["picture", "frame"]),
        ("washing machine/drying machine", ["washing machine", "drying machine"]),
        (
            "Cutting/chopping Board",
            ["cutting board", "chopping board", "cutting"],
        ),
        ("Tape Measure/ Ruler", ["tape measure", "tape ruler", "ruler"]),
        ("", [""]),
        ("/", [""]),
        ("🙂", ["🙂"]),
    ],
)
def test_readings(name, readings):
    assert definitions.readings(name)[: len(readings)] == readings


def test_a_name_of_many_slashes_is_read_in_no_time():
    assert len(definitions.readings("a/b " * 40 + "c")) < 70
    assert define(["a/b " * 40 + "hoverboard", "word " * 40]) == [NONE, *define(["word " * 40])]


def test_synsets_of_alternatives():
    assert definitions.synsets_of("Handbag/Satchel") == ["bag.n.04", "satchel.n.01"]
    assert definitions.synsets_of("couch") == definitions.synsets_of("sofas") == ["sofa.n.01"]
    given = {"mouse": "mouse.n.04", "hover-board": "board.n.03"}
    assert definitions.synsets_of("mouse", given) == ["mouse.n.04"]
    assert definitions.synsets_of("mice", given) == ["mouse.n.04"]
    assert definitions.synsets_of("hover-board", given) == ["board.n.03"]
    assert definitions.synsets_of("hoverboard") == []


def test_names_of_objects365_that_lvis_lacks():
    vectors, names = embeddings(), objects365_names()
    embed = lambda texts: np.stack([vectors[text] for text in texts])
    dictionary = {normalize(c["name"].replace("_", " ")): c["def"] for c in lvis_categories()}
    found = dict(zip(names, define(names, dictionary=dictionary, embed=embed)))
    assert definitions.origins(list(found.values())) == {
        "dictionary": 198,
        "wordnet": 125,
        "nearest": 42,
    }
    for name, like in {
        "Hoverboard": "skateboard",
        "Wild Bird": "bird",
        "Leather Shoes": "shoe",
        "Surveillance Camera": "camera",
        "Coffee Machine": "coffee maker",
        "Formula 1": "race car",
        "Trash bin Can": "trash can",
        "Stuffed Toy": "toy",
    }.items():
        assert (found[name].origin, found[name].like) == ("nearest", like)
        assert found[name].text == dictionary[like]
