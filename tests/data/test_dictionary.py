"""The prepared dictionary: what is chosen, what is one thing, what a damaged file is told."""

import dataclasses
import json
import time

import numpy as np
import pytest
from concept_sources import source
from shared_data import clip_text, lvis_categories

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import dictionary as dictionary_lib
from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.prepare import dictionary_writer
from detclipv2_jax.data.vocabulary import Meanings, Vocabulary
from detclipv2_jax.text import tokenizer

LONG = "word " * 40


@pytest.fixture
def sources(tmp_path):
    return {
        "boxes": source(tmp_path / "boxes", "detection", {"sofa": 9, "bus": 3, "levitator": 0}),
        "phrases": source(
            tmp_path / "phrases",
            "grounding",
            {"couch": 7, "red bus": 6, "sofa": 2, "🙂": 5, "rare lemur": 1, LONG.strip(): 5},
        ),
        "pairs": source(
            tmp_path / "pairs",
            "image_text",
            {"levitators": 8, "rare lemur": 3},
            captions=["a caption", "tree"],
        ),
    }


def made(sources, to, *, min_count=5, size=100, **options) -> Dictionary:
    counted = dictionary_writer.count(sources.values())
    names = counted.chosen(min_count=min_count, size=size)
    return dictionary_writer.build(to, names, counted.counts, **options)


def test_names_and_frequent_phrases_are_chosen(sources):
    counted = dictionary_writer.count(sources.values())
    assert counted.counts["sofa"] == 11 and counted.counts["rare lemur"] == 4
    assert "a caption" not in counted.counts and "tree" not in counted.counts
    assert counted.categories == {"sofa", "bus", "levitator"}
    chosen = counted.chosen(min_count=5, size=100)
    assert chosen == [
        "sofa",
        "levitators",
        "couch",
        "red bus",
        LONG.strip(),
        "🙂",
        "bus",
        "levitator",
    ]
    # Categories stay whatever the size; of phrases the most frequent.
    assert counted.chosen(min_count=5, size=5) == [
        "sofa",
        "levitators",
        "couch",
        "bus",
        "levitator",
    ]
    assert counted.chosen(min_count=5, size=0) == ["sofa", "bus", "levitator"]
    assert len(counted.chosen(min_count=1, size=100)) == len(counted.counts)


def test_a_dictionary_comes_back_as_it_was_made(sources, tmp_path):
    made(sources, tmp_path / "to", created_from={"min_count": 5})
    opened = Dictionary.open(tmp_path / "to")
    assert opened.names[:3] == ["sofa", "levitators", "couch"] and len(opened) == 8
    assert opened.info["created_from"] == {"min_count": 5}
    rows = {row["name"]: row for row in opened.rows}
    assert rows["sofa"]["synsets"] == rows["couch"]["synsets"] == ["sofa.n.01"]
    assert (rows["red bus"]["origin"], rows["red bus"]["like"]) == ("head", "bus")
    assert rows["🙂"]["definition"] is None and opened.definitions["🙂"] == ""
    assert rows["sofa"]["count"] == 11
    np.testing.assert_array_equal(opened.keys, tokenizer.keys(opened.names))
    np.testing.assert_array_equal(opened.tokens, tokenizer.tokenize(opened.names))
    first = (tmp_path / "to" / dictionary_lib.FILE).read_bytes()
    made(sources, tmp_path / "to", created_from={"min_count": 5})
    assert (tmp_path / "to" / dictionary_lib.FILE).read_bytes() == first
    assert [path.name for path in (tmp_path / "to").iterdir()] == [dictionary_lib.FILE]


def test_the_nearest_concept_lends_its_definition(sources, tmp_path):
    vectors = {"levitator": (1, 0.1), "red bus": (0.1, 1), "sofa": (1, 0), "couch": (-1, 0)}
    embed = lambda texts: np.array([vectors.get(text, (0, 1)) for text in texts])
    rows = {row["name"]: row for row in made(sources, tmp_path / "to", embed=embed).rows}
    assert (rows["levitator"]["origin"], rows["levitator"]["like"]) == ("nearest", "sofa")
    assert rows["red bus"]["definition"] == rows["bus"]["definition"]
    assert rows["🙂"]["origin"] == "nearest"


def test_synonyms_are_one_group(sources, tmp_path):
    opened = made(sources, tmp_path / "to")
    group = dict(zip(opened.names, opened.groups.tolist()))
    assert group["sofa"] == group["couch"]
    assert group["levitator"] == group["levitators"]  # WordNet knows neither
    assert len(set(group.values())) == 6
    asked = ["Sofas", "couches", "levi-tator", "motorbus", "tree", "🙂", "🙁", "", "as"]
    found = opened.groups_of(asked).tolist()
    expected = ["sofa", "sofa", "levitator", "bus", None, "🙂", None, None, None]
    assert found == [group[name] if name else -1 for name in expected]


def test_groups_join_through_a_third():
    names = ["a", "b", "c", "d", "e"]
    synsets = [["x"], ["y"], ["x", "y"], [], ["z"]]
    assert dictionary_writer.group(names, synsets) == [0, 0, 0, 1, 2]
    assert dictionary_writer.group(list(reversed(names)), list(reversed(synsets))) == [
        0,
        1,
        2,
        2,
        2,
    ]
    assert dictionary_writer.group([], []) == []
    spelt = ["t-shirt", "t shirts", "glass", "glas", "!!", "??", "日本"]
    assert dictionary_writer.group(spelt, [[]] * 7) == [0, 0, 1, 2, 3, 4, 5]


def test_lvis_synsets(tmp_path):
    path = clip_text() / "lvis_v1_train_cat_info.json"
    found = dictionary_writer.lvis_synsets(path)
    assert found["aerosol can"] == found["spray can"] == "aerosol.n.02"
    assert found["mouse (computer equipment)"] == found["mouse"] == "mouse.n.04"
    # Two sorts of bows: which is meant by the bare word is not known.
    assert found["bow (weapon)"] == "bow.n.04" and "bow" not in found
    whole = tmp_path / "lvis.json"
    whole.write_text(json.dumps({"categories": lvis_categories(), "images": []}))
    assert dictionary_writer.lvis_synsets(whole) == found


@pytest.mark.parametrize("content", ["", "[1]", "{}", '[{"name": "cat"}]', '{"categories": 3}'])
def test_a_file_that_is_not_of_lvis(tmp_path, content):
    (tmp_path / "lvis.json").write_text(content)
    with pytest.raises(UserError, match=r"lvis\.json: (empty|.* Give LVIS's file)"):
        dictionary_writer.lvis_synsets(tmp_path / "lvis.json")
    with pytest.raises(UserError, match="none.json: no such file"):
        dictionary_writer.lvis_synsets(tmp_path / "none.json")


def change(number, **fields):
    def apply(lines):
        row = json.loads(lines[number]) | fields
        lines[number] = json.dumps({k: v for k, v in row.items() if v != "gone"})

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines.clear(), "line 1: not a JSON object"),
        (change(0, format=9), "format 9, but this version reads 2"),
        (change(0, format="gone"), "line 1: 'format' is .*not valid"),
        (lambda lines: lines.pop(), "has 7 concepts, but its first line says 8"),
        (lambda lines: lines.__setitem__(3, lines[3][:-9]), "line 4: not a JSON object"),
        (change(2, definition=7), "line 3: 'definition' is .*not valid"),
        (change(5, group="gone"), "line 6: 'group' is .*not valid"),
        (change(5, synsets=None), "line 6: 'synsets' is .*not valid"),
        (change(5, synsets=[["sofa.n.01"]]), "line 6: 'synsets' is .*not valid"),
        (change(4, group=-1), "line 5: 'group' is .*not valid"),
        (change(4, group=2**31), "line 5: 'group' is .*not valid"),
        (change(4, name=" "), "line 5: 'name' is .*not valid"),
        (lambda lines: lines.insert(3, ""), "line 4: not a JSON object"),
        (lambda lines: lines.__setitem__(1, "[]"), "line 2: not a JSON object"),
    ],
)
def test_a_damaged_file_is_told_by_its_line(sources, tmp_path, damage, message):
    made(sources, tmp_path / "to")
    path = tmp_path / "to" / dictionary_lib.FILE
    lines = path.read_text(encoding="utf-8").splitlines()
    damage(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=f"{message}.*detclip prepare concepts") as error:
        Dictionary.open(tmp_path / "to")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_flipped_bits_are_found(sources, tmp_path):
    made(sources, tmp_path / "to")
    path = tmp_path / "to" / dictionary_lib.FILE
    before = path.read_bytes()
    start = before.index(b"\n") + 1
    for bit in np.random.default_rng(0).integers(8 * start, 8 * len(before), 40):
        content = bytearray(before)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError, match="dictionary.jsonl"):
            Dictionary.open(tmp_path / "to")


def test_a_file_that_somebody_edited(sources, tmp_path):
    made(sources, tmp_path / "to")
    path = tmp_path / "to" / dictionary_lib.FILE
    lines = path.read_text(encoding="utf-8").split("\n")
    change(1, name=" Sofa ", definition="what one\u2028sits on")(lines)
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match='damaged or edited.*remove "digest" from the first line'):
        Dictionary.open(tmp_path / "to")
    lines[0] = json.dumps({k: v for k, v in json.loads(lines[0]).items() if k != "digest"})
    path.write_text("\n".join(lines), encoding="utf-8")
    opened = Dictionary.open(tmp_path / "to")
    assert opened.definitions["sofa"] == "what one\u2028sits on"
    vocabulary = Vocabulary(sources, opened, defined=["detection"])
    row = vocabulary.tokens(vocabulary.lookup(["sofa"]), "detection")
    np.testing.assert_array_equal(row, tokenizer.tokenize(["sofa, what one sits on"]))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="dictionary.jsonl: no such file.*detclip prepare concepts"):
        Dictionary.open(tmp_path)
    (tmp_path / dictionary_lib.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="dictionary.jsonl: cannot be read"):
        Dictionary.open(tmp_path)


def test_an_empty_dictionary(sources, tmp_path):
    empty = dictionary_writer.build(tmp_path / "to", [], {})
    assert (
        len(empty) == 0
        and empty.definitions == {}
        and "0 concepts" in dictionary_writer.report(empty)
    )
    vocabulary = Vocabulary(sources, empty, defined=["detection"])
    assert len(vocabulary) == len(Vocabulary(sources))
    assert vocabulary.pool("grounding").size == 0
    assert (vocabulary.meanings.groups == -1).all()
    # The names of the sources are defined all the same.
    found = vocabulary.definitions("detection")
    assert found["sofa"] and found["bus"] and found["levitator"] == ""


def test_a_run_s_concepts_with_their_definitions(sources, tmp_path):
    opened = made(sources, tmp_path / "to", min_count=6)
    bare = Vocabulary(sources)
    vocabulary = Vocabulary(sources, opened, defined=["detection"])
    ids = vocabulary.lookup(["sofa", "levitator", "bus", "tree", "rare lemur"])
    texts = tokenizer.fitted(["sofa", "bus"], [opened.definitions[n] for n in ("sofa", "bus")])
    rows = vocabulary.tokens(ids, "detection")
    np.testing.assert_array_equal(rows[[0, 2]], tokenizer.tokenize(texts))
    names = ["levitator", "tree", "rare lemur"]  # not defined; a caption; not in the dictionary
    np.testing.assert_array_equal(rows[[1, 3, 4]], tokenizer.tokenize(names))
    for kind in ("grounding", "image_text", None):
        np.testing.assert_array_equal(
            vocabulary.tokens(ids, kind), bare.tokens(bare.lookup(vocabulary.names(ids)))
        )
    np.testing.assert_array_equal(vocabulary.tokens([-1], "detection"), np.zeros((1, 16)))
    assert vocabulary.definitions("detection")["couch"] == opened.definitions["couch"]
    assert vocabulary.definitions("grounding") == {} == bare.definitions("detection")
    # Grounding draws from the dictionary, detection from its own names.
    pool = vocabulary.names(vocabulary.pool("grounding"))
    assert sorted(pool) == sorted(opened.names)
    assert set(vocabulary.names(vocabulary.pool("detection"))) == {"sofa", "bus", "levitator"}
    assert vocabulary.names(vocabulary.lookup(opened.names)) == opened.names


def test_kinds_and_template_can_be_chosen(sources, tmp_path):
    opened = made(sources, tmp_path / "to", min_count=6)
    template = "{definition}: a {name}"
    vocabulary = Vocabulary(sources, opened, defined=["grounding", "image_text"], template=template)
    ids = vocabulary.lookup(["couch", "rare lemur", "a caption", "tree"])
    rows = vocabulary.tokens(ids, "image_text")
    assert not np.array_equal(rows[1], tokenizer.tokenize(["rare lemur"])[0])  # as its head noun
    np.testing.assert_array_equal(rows[2:], tokenizer.tokenize(["a caption", "tree"]))
    text = tokenizer.fitted(["couch"], [opened.definitions["couch"]], template)
    np.testing.assert_array_equal(rows[:1], tokenizer.tokenize(text))
    np.testing.assert_array_equal(vocabulary.tokens(ids, "grounding"), rows)
    assert not np.array_equal(vocabulary.tokens(ids, "detection"), rows)


def test_names_beside_the_dictionary_have_their_group(sources, tmp_path):
    opened = made(sources, tmp_path / "to", min_count=1000)  # categories alone
    groups = Vocabulary(sources, opened).meanings.groups
    ids = Vocabulary(sources, opened).lookup
    assert groups[ids(["couch"])] == groups[ids(["sofa"])] >= 0
    assert groups[ids(["rare lemur"])] == groups[ids(["a caption"])] == -1


def test_ids_do_not_depend_on_the_order_of_the_sources(sources, tmp_path):
    opened = made(sources, tmp_path / "to")
    one = Vocabulary(sources, opened, defined=["detection"])
    other = Vocabulary(dict(reversed(sources.items())), opened, defined=["detection"])
    np.testing.assert_array_equal(one.keys, other.keys)
    np.testing.assert_array_equal(one.meanings.groups, other.meanings.groups)
    everything = np.arange(len(one))
    np.testing.assert_array_equal(
        one.tokens(everything, "detection"), other.tokens(everything, "detection")
    )


def test_fourteen_thousand_concepts_are_ready_soon(sources, tmp_path):
    from detclipv2_jax.text.wordnet import wordnet

    nouns = wordnet()
    names = [name.replace("_", " ") for name in list(nouns._senses)[:70_000:5]]
    opened = dictionary_writer.build(tmp_path / "to", names, {})
    assert len(opened) == 14_000
    started = time.process_time()
    vocabulary = Vocabulary(sources, Dictionary.open(tmp_path / "to"), defined=["detection"])
    assert time.process_time() - started < 5  # 0.9 s, most of it tokens
    assert len(vocabulary.definitions("detection")) > 13_900
    ids = vocabulary.pool("grounding")
    rows = vocabulary.tokens(ids, "detection")
    assert (rows.max(axis=1) == tokenizer.END).all() and (rows[:, 15] <= tokenizer.END).all()


def test_the_report_tells_how_many_and_some(sources, tmp_path):
    report = dictionary_writer.report(made(sources, tmp_path / "to"))
    assert "8 concepts" in report and "sofa, an upholstered seat" in report
    assert "red bus, " in report and "(like bus)" in report and "not defined" in report
    assert "with synonyms among the others" in report and report.strip().endswith("4")


def test_meanings_find_their_places():
    none = Meanings(
        groups=np.zeros(0, np.int32),
        kinds=frozenset(["detection"]),
        definitions={},
        ids=np.zeros(0, np.int32),
        tokens=np.zeros((0, 16), np.int32),
    )
    assert [part.tolist() for part in none.places(np.array([-1, 3]))] == [[], []]
    some = dataclasses.replace(none, ids=np.array([2, 5], np.int32))
    found = some.places(np.array([5, -1, 4, 2, 5, 9]))
    assert [part.tolist() for part in found] == [[0, 3, 4], [1, 0, 1]]
