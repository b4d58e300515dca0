"""A dataset's own definitions: from its annotation file to the tokens of training and testing."""

import json

import numpy as np
import pytest
from concept_sources import source
from PIL import Image
from shared_data import lvis_categories
from stand_ins import encoded_names

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.sources import coco, lvis
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.evaluation import datasets
from detclipv2_jax.evaluation.measure import encode_names
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.inference.prompts import Prompter
from detclipv2_jax.text.checked import Meaning, read_table
from detclipv2_jax.text.definitions import Knowledge
from detclipv2_jax.text.tokenizer import normalize, tokenize


def instances(folder, categories, name="instances.json"):
    """Write an annotation file of one image with a box of the first category."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "1.jpg")
    image = {"id": 1, "height": 32, "width": 32, "file_name": "1.jpg"}
    box = {"id": 1, "image_id": 1, "category_id": categories[0]["id"], "bbox": [2, 2, 9, 9]}
    content = {"images": [image], "annotations": [box], "categories": categories}
    (folder / name).write_text(json.dumps(content))
    return folder / name


@pytest.fixture(scope="module")
def dictionary(tmp_path_factory):
    """The dictionary of a pre-training without LVIS, which defines many of LVIS's names."""
    folder = tmp_path_factory.mktemp("concepts")
    names = [normalize(c["name"].replace("_", " ")) for c in lvis_categories()][::2]
    return dictionary_writer.build(folder, [*names, "hot dog", "zebra"], {})


class Encoder:
    """Stands for a model that only shows the prompts it is given."""

    def encode(self, names, prompts=None):
        return encoded_names(names, prompts)


def test_every_name_of_lvis_is_trained_and_tested_with_the_same_text(tmp_path, dictionary):
    categories = lvis_categories()
    path = instances(tmp_path / "lvis", categories)
    archive = lvis.read(path, ImageFolder(tmp_path / "lvis"))
    prepared = prepare([archive], tmp_path / "to", name="lvis")
    vocabulary = Vocabulary({"lvis": prepared}, dictionary, defined=["detection"])
    names = vocabulary.names(vocabulary.lookup([n.replace("_", " ") for n in archive.names]))
    trained = vocabulary.tokens(vocabulary.lookup(names), "detection")
    # A checkpoint stores these definitions.
    stored = json.loads(json.dumps(vocabulary.definitions("detection")))
    prompter = Prompter.for_model(DetectConfig(), stored)
    truth = datasets.load_ground_truth(path)
    tested = tokenize(encode_names(Encoder(), truth, prompter).prompts)
    assert len(names) == len(truth.categories) == 1203
    assert (trained == tested).all(axis=1).sum() == 1203
    assert (trained != tokenize(names)).any(axis=1).sum() == 1203  # none of them is bare
    # A dataset without definitions asks for these names as they were trained, too.
    bare = Prompter.for_model(DetectConfig(), stored).encode(Encoder(), names).prompts
    np.testing.assert_array_equal(tokenize(bare), trained)


CATEGORIES = [
    {"id": 3, "name": "hot_dog", "def": "a sausage", "synset": "hotdog.n.02"},
    {"id": 1, "name": "Mouse", "synset": "mouse.n.04"},
    {"id": 4, "name": "Gadget", "definition": "a useful device"},  # V3Det's spelling
    {"id": 5, "name": "anchor"},
    {"id": 6, "name": "thing", "def": " ", "synset": "no_such_thing.n.01"},
    {"id": 7, "name": "mouse", "def": "not used: the name has a meaning already"},
]


def test_what_a_file_says_of_its_names_is_prepared(tmp_path):
    path = instances(tmp_path / "a", CATEGORIES)
    archive = coco.read(path, ImageFolder(tmp_path / "a"))
    mouse = Meaning(None, "mouse.n.04")
    assert archive.meanings == {
        "hot dog": Meaning("a sausage", "hotdog.n.02"),
        "mouse": mouse,
        "gadget": Meaning("a useful device"),
    }
    other = instances(tmp_path / "a", [{"id": 1, "name": "Gadget", "def": "second"}], "b.json")
    archives = [archive, coco.read(other, ImageFolder(tmp_path / "a"))]
    prepared = prepare(archives, tmp_path / "to", name="a")
    rows = {row["name"]: row for row in Source.open(tmp_path / "to").concepts}
    assert (rows["mouse"]["definition"], rows["mouse"]["synset"]) == (None, "mouse.n.04")
    assert rows["hot dog"]["definition"] == "a sausage"
    assert rows["gadget"]["definition"] == "a useful device"
    assert rows["anchor"]["definition"] is rows["anchor"]["synset"] is None
    counted = dictionary_writer.count([prepared])
    made = dictionary_writer.build(
        tmp_path / "dictionary", counted.chosen(min_count=1, size=9), {}, Knowledge(own=counted.own)
    )
    found = {row["name"]: row for row in made.rows}
    assert found["hot dog"]["origin"] == "own" and found["mouse"]["synsets"] == ["mouse.n.04"]
    assert found["mouse"]["definition"].startswith("a hand-operated electronic device")
    assert found["thing"]["origin"] == "none" and found["thing"]["definition"] is None
    # Of an old source, prepared before synsets were stored.
    old = source(tmp_path / "old", "detection", {"anchor": 1})
    assert dictionary_writer.count([old]).own == {}


def test_a_dataset_s_own_definition_comes_before_all_others(tmp_path, dictionary):
    path = instances(tmp_path / "a", CATEGORIES)
    prepared = prepare([coco.read(path, ImageFolder(tmp_path / "a"))], tmp_path / "to", name="a")
    corrections = {"hot dog": Meaning("not used"), "anchor": Meaning("what holds a ship")}
    corrections["zebra"] = Meaning()
    vocabulary = Vocabulary(
        {"a": prepared}, dictionary, defined=["detection"], corrections=corrections
    )
    found = vocabulary.definitions("detection")
    assert found["hot dog"] == "a sausage" and found["anchor"] == "what holds a ship"
    assert found["zebra"] == "" and dictionary.definitions["zebra"]
    rows = vocabulary.tokens(vocabulary.lookup(["hot dog", "zebra"]), "detection")
    np.testing.assert_array_equal(rows, tokenize(["hot dog, a sausage", "zebra"]))
    bare = vocabulary.tokens(
        vocabulary.lookup(["hot dog", "zebra", "anchor"]),
        "detection",
        np.array([True, True, False]),
    )
    expected = tokenize(["hot dog", "zebra", "anchor, what holds a ship"])
    np.testing.assert_array_equal(bare, expected)


def test_a_table_of_one_s_own(tmp_path):
    path = tmp_path / "mine.tsv"
    path.write_text(
        "name\tsynset\tdefinition\nHot  Dog\thot_dog.n.02\t\n# a comment\n\n"
        "kite\t\ta toy that flies\nthing\nmouse\tcomputer_mouse.n.01\t\n",
        encoding="utf-8",
    )
    assert read_table(path) == {
        "hot dog": Meaning(None, "hotdog.n.02"),
        "kite": Meaning("a toy that flies"),
        "thing": Meaning(),
        "mouse": Meaning(None, "mouse.n.04"),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns name, synset, definition, separated by tabs"),
        ("kite\tkite.n.03\t\n", "line 1: expected the columns"),
        ("name\tsynset\tdefinition\nkite\tkite.n.99\t", "line 2: 'kite.n.99' is not a noun"),
        ("name\tsynset\tdefinition\n\n\tkite.n.03\t", "line 3: has no name"),
        ("name\tsynset\tdefinition\nkite\t\ta\nKite\t\tb", "line 3: 'kite' is already defined"),
    ],
)
def test_a_table_that_is_not_valid(tmp_path, text, message):
    path = tmp_path / "mine.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_table(path)
    assert str(error.value).startswith(str(path))
    with pytest.raises(UserError, match=r"none\.tsv: no such file"):
        read_table(tmp_path / "none.tsv")
