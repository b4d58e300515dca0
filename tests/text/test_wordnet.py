"""WordNet's nouns against LVIS's synsets and the database files, if they are on this machine."""

import re
import time
from pathlib import Path

import pytest
from shared_data import lvis_categories

from detclipv2_jax.text import wordnet as wordnet_lib
from detclipv2_jax.text.wordnet import wordnet


def test_it_is_all_there_and_soon():
    started = time.process_time()
    nouns = wordnet_lib.WordNet()
    assert time.process_time() - started < 2  # a third of a second on an idle core
    assert len(nouns) == 82_115 and len(nouns._senses) == 117_798
    assert nouns.definition("entity.n.01").startswith("that which is perceived")
    assert '"' not in "".join(nouns._lines)
    assert wordnet() is wordnet()
    license = Path(wordnet_lib.__file__).parent / "assets/wordnet/LICENSE"
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in license.read_text()


def test_synsets_are_in_the_order_of_their_frequency():
    nouns = wordnet()
    assert nouns.synsets("bass")[:2] == ["bass.n.01", "bass.n.02"]
    assert nouns.synsets("Traffic light") == ["traffic_light.n.01"]
    assert nouns.synsets("no such word") == [] and nouns.synsets("") == []
    assert set(nouns.lemmas("sofa.n.01")) == {"sofa", "couch", "lounge"}
    # The same meaning by another of its words: one name.
    assert nouns.canonical("couch.n.01") == nouns.canonical("sofa.n.01") == "sofa.n.01"
    for wrong in ("sofa.n.99", "sofa.v.01", "sofa", "", "n.01", "🙂.n.01"):
        assert nouns.definition(wrong) is None and nouns.canonical(wrong) is None
        assert nouns.lemmas(wrong) == []


@pytest.mark.parametrize(
    ("phrase", "lemma"),
    [
        ("anchor", "anchor"),
        ("anchors", "anchor"),
        ("Traffic  Lights", "traffic_light"),
        ("buses", "bus"),
        ("bus", "bus"),
        ("glass", "glass"),
        ("glasses", "glasses"),  # a noun of its own: spectacles
        ("knives", "knife"),
        ("children", "child"),
        ("berries", "berry"),
        ("churches", "church"),
        ("dishes", "dish"),
        ("foxes", "fox"),
        ("firemen", "fireman"),
        ("men", "man"),
        ("boxesful", "boxful"),
        ("T shirt", "t-shirt"),
        ("hot air balloons", "hot-air_balloon"),
        ("wine glass", "wineglass"),
        ("air_conditioner", "air_conditioner"),
        ("hoverboards", None),
        ("as", "as"),  # arsenic; not the plural of "a"
        ("", None),
        ("  ", None),
        ("a", None),
        ("b a", None),  # not barium
        ("x ray", "x_ray"),
        ("10", None),
        ("🙂", None),
        ("日本語", None),
        ("word " * 40, None),
    ],
)
def test_the_singular_of_a_noun(phrase, lemma):
    assert wordnet().noun(phrase) == lemma


@pytest.mark.parametrize(
    ("phrase", "lemma"),
    [
        ("tall traffic light pole", "pole"),
        ("new traffic lights", "traffic_light"),
        ("black chess knights", "knight"),
        ("traffic light", "traffic_light"),
        ("word " * 39 + "hoverboard", None),
        ("formula 1", None),
        ("smiling 🙂", None),
        ("", None),
    ],
)
def test_the_head_of_a_phrase(phrase, lemma):
    assert wordnet().head(phrase) == lemma


def test_lvis_synsets_resolve():
    categories, nouns = lvis_categories(), wordnet()
    missing = [c["synset"] for c in categories if nouns.definition(c["synset"]) is None]
    assert len(categories) == 1203 and missing == ["stop_sign.n.01"]
    # LVIS mended some definitions by hand; most are WordNet's to the letter.
    same = sum(nouns.definition(c["synset"]) == c["def"] for c in categories)
    assert same >= 880
    for category in categories:
        if category["synset"] not in missing:
            assert nouns.canonical(category["synset"]) == category["synset"]


def test_every_synset_against_the_database_files():
    path = Path("/usr/share/wordnet/data.noun")
    if not path.is_file():
        pytest.skip(f"{path} is not there (Debian: wordnet-base)")
    nouns = wordnet()
    row = 0
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):
            continue
        head, gloss = line.split("|", 1)
        words = head.split()[4 : 4 + 2 * int(head.split()[3], 16) : 2]
        ours, told = nouns._lines[row].split("\t")
        assert ours.split()[::2] == list(dict.fromkeys(word.lower() for word in words))
        # Nothing of a definition is lost or added but examples, and what introduces them.
        assert re.sub(r"\W", "", gloss).startswith(re.sub(r"\W", "", told)) and told
        row += 1
    assert row == len(nouns)
