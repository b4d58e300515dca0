"""The hand-checked senses of the datasets' names (text/assets/senses.tsv)."""

import collections
import re
from pathlib import Path

import pytest
from shared_data import objects365_names

from detclipv2_jax.data.prepare.sources.objects365 import NAMES
from detclipv2_jax.text import tokenizer
from detclipv2_jax.text.wordnet import wordnet

FILE = Path(tokenizer.__file__).parent / "assets" / "senses.tsv"
COUNTS = {"o365": 365, "coco": 80, "voc": 20, "oid": 600, "odinw": 256}
COCO = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant "
    "stop_sign parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe "
    "backpack umbrella handbag tie suitcase frisbee skis snowboard sports_ball kite baseball_bat "
    "baseball_glove skateboard surfboard tennis_racket bottle wine_glass cup fork knife spoon bowl "
    "banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch "
    "potted_plant bed dining_table toilet tv laptop mouse remote keyboard cell_phone microwave "
    "oven toaster sink refrigerator book clock vase scissors teddy_bear hair_drier toothbrush"
)
VOC = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
)
# ODinW's 13 sets as its reader yields them, without Pascal VOC's names.
ODINW13 = (
    "boat car dock jetski lift fish jellyfish penguin puffin shark starfish stingray rabbit hand "
    "flat_mushroom yellow_mushroom package pistol pothole raccoon crab lobster shrimp dog person "
    "ambulance bus motorcycle truck"
)
# Words of senses that no box shows. "ass", "defecation" and "crotch" are in right ones.
OBSCENE = re.compile(
    r"\b(sexual\w*|intercourse|prostitut\w*|genital\w*|penis|vagina\w*|testis|testicle\w*|"
    r"buttocks?|excre\w+|bowels?|obscene|vulgar|slang|slut|whore|bitch|shit|fuck\w*|drug\w*|"
    r"marijuana|narcotic\w*|derogatory|disparaging|offensive)\b"
)


@pytest.fixture(scope="module")
def rows():
    """Name -> (synset, definition, sources)."""
    head, *lines = FILE.read_text(encoding="utf-8").splitlines()
    assert head.split("\t") == ["name", "synset", "definition", "sources"]
    table = [line.split("\t") for line in lines]
    assert all(len(row) == 4 for row in table)
    names = [row[0] for row in table]
    assert names == sorted(set(names)), "sorted, each name once"
    return {row[0]: (row[1], row[2], row[3].split(",")) for row in table}


def gloss(row):
    synset, definition, _ = row
    return definition or (wordnet().definition(synset) if synset else None)


def test_names_are_normalized_and_sources_known(rows):
    for name, (_, _, sources) in rows.items():
        assert name == tokenizer.normalize(name) and name
        assert sources and set(sources) <= {"o365", "coco", "voc", "oid", "odinw", "caption"}, name


def test_a_row_has_a_synset_in_its_standard_name_or_a_short_definition(rows):
    for name, (synset, definition, _) in rows.items():
        assert not (synset and definition), name
        if synset:
            assert wordnet().canonical(synset) == synset, name
        if definition:
            words = definition.split()
            assert 2 <= len(words) <= 12 and definition == tokenizer.normalize(definition), name
            assert definition[-1] not in ".,;", name


def test_definitions_are_our_own_words(rows):
    glosses = {wordnet().definition(s) for _, (s, _, _) in rows.items() if s}
    for name, (_, definition, _) in rows.items():
        assert definition not in glosses, f"{name}: name the synset"


def test_the_lists_are_complete(rows):
    of = collections.defaultdict(set)
    for name, (_, _, sources) in rows.items():
        for source in sources:
            of[source].add(name)
    assert {source: len(of[source]) for source in COUNTS} == COUNTS
    assert of["coco"] == {name.replace("_", " ") for name in COCO.split()}
    assert of["voc"] == set(VOC.split())
    assert of["odinw"] >= {name.replace("_", " ") for name in ODINW13.split()} | of["voc"]
    assert "mouse" not in of["oid"]  # an animal there, a device in Objects365 and COCO


def test_only_names_without_a_photographable_meaning_of_their_own_are_bare(rows):
    """Parts of ODinW's 35 sets (letters, typefaces, gestures), and vague words of captions."""
    bare = {name: row[2] for name, row in rows.items() if gloss(row) is None}
    assert set(map(tuple, bare.values())) == {("odinw",), ("caption",)}
    assert not set(bare) & {name.replace("_", " ") for name in ODINW13.split()}
    assert {"a", "th", "12", "georgia", "land", "button", "object"} <= set(bare)


def test_every_name_of_objects365_as_its_reader_yields_it(rows):
    published = [name.replace("_", " ").strip() for name in objects365_names()]
    read = {tokenizer.normalize(NAMES.get(name.lower(), name)) for name in published}
    assert read == {name for name, row in rows.items() if "o365" in row[2]}


def test_the_text_that_is_encoded(rows):
    names = list(rows)
    texts = tokenizer.fitted(names, [gloss(row) for row in rows.values()])
    for name, row, text in zip(names, rows.values(), texts):
        if gloss(row):
            assert text.startswith(f"{name}, ") and len(text.split()) >= len(name.split()) + 2, text
        else:
            assert text == name
        assert not OBSCENE.search(text.removeprefix(name)), text


@pytest.mark.parametrize(
    ("name", "synset"),
    [
        line.split(" = ")
        for line in """
        alpaca = alpaca.n.03
        american football = football.n.02
        baseball = baseball.n.02
        bat = bat.n.01
        brush = brush.n.02
        bust = bust.n.03
        carriage = carriage.n.02
        crane = crane.n.04
        crown = crown.n.04
        cue = cue.n.04
        dock = pier.n.01
        french = french_horn.n.01
        hanger = coat_hanger.n.01
        hot dog = hotdog.n.02
        keyboard = computer_keyboard.n.01
        kite = kite.n.03
        lavender = lavender.n.01
        lifesaver = life_buoy.n.01
        lynx = lynx.n.02
        marker = marker.n.03
        microwave = microwave.n.02
        motorbike = motorcycle.n.01
        mouse = mouse.n.04
        nail = nail.n.02
        nuts = nut.n.01
        orange = orange.n.01
        organ = organ.n.05
        package = package.n.02
        raccoon = raccoon.n.02
        remote = remote_control.n.01
        ring = ring.n.08
        scale = scale.n.07
        scallop = scallop.n.04
        seal = seal.n.09
        skunk = skunk.n.04
        sneakers = gym_shoe.n.01
        soccer = soccer_ball.n.01
        squash = squash.n.02
        stool = stool.n.01
        swing = swing.n.02
        table = table.n.02
        table tennis = ping-pong_ball.n.01
        tart = tart.n.02
        tennis = tennis_ball.n.01
        tick = tick.n.02
        tie = necktie.n.01
        toaster = toaster.n.02
        trash bin can = ashcan.n.01
        turkey = turkey.n.01
        tv = television_receiver.n.01
        whale = whale.n.02
        yak = yak.n.02
        """.strip().splitlines()
        for line in [line.strip()]
    ],
)
def test_right_senses(rows, name, synset):
    assert rows[name][0] == synset


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("potted plant", "pot"),
        ("tissue", "paper"),
        ("kettle", "spout"),
        ("dumpling", "filling"),
        ("counter", "surface"),
        ("monitor/tv", "screen"),
        ("van", "vehicle"),
        ("cd", "disc"),
        ("tablet", "computer"),
        ("egg tart", "pastry"),
        ("leather shoes", "leather"),
        ("skating and skiing shoes", "boots"),
        ("cosmetics brush/eyeliner pencil", "makeup"),
        ("recorder", "sound"),
        ("extractor", "fan"),
        ("curling", "stone"),
        ("horn", "brass"),
        ("plant", "leaves"),
        ("lift", "boat"),
        ("stop sign", "red"),
    ],
)
def test_right_definitions(rows, name, words):
    assert words in rows[name][1].split()
