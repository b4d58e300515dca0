"""Prompts of names: in a run, of a checkpoint, and with the definitions of a dataset."""

import dataclasses
import json

import numpy as np
import pytest
import tiny_model

from detclipv2_jax import detect, evaluate
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.evaluation import coco, datasets
from detclipv2_jax.inference.config import DetectConfig
from detclipv2_jax.inference.detector import Detector
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.inference.prompts import Prompter
from detclipv2_jax.models.detclip import create
from detclipv2_jax.text.definitions import Knowledge, define
from detclipv2_jax.text.tokenizer import TEMPLATE, fitted

DICTIONARY = {"anchor": "what holds a ship", "blue thing": "something blue"}
LONG = "word " * 40


@pytest.fixture(scope="module")
def predictor():
    graphdef, params = tiny_model.parts()
    return Predictor(graphdef, params, canvas=tiny_model.CANVAS)


def loaded(definitions, **evaluation):
    return dataclasses.replace(tiny_model.loaded(**evaluation), definitions=definitions)


def test_bare_names(predictor):
    texts = Prompter().encode(predictor, ["Anchor", LONG], [("a definition", None)] * 2)
    assert texts.names == ("Anchor", LONG) and texts.prompts == ("anchor", LONG[:69])
    assert Prompter().settings(texts) == {"definitions": False, "names_cut": 1}
    assert texts.is_cut == (False, True) and texts.same_as == (0, 1)


def test_names_with_definitions(predictor):
    prompter = Prompter(True, DICTIONARY)
    names = ["Anchor", "sofa", "bus", LONG, "mouse"]
    given = [(None, None), (None, None), ("a long car", "bus.n.01"), (None, None)]
    texts = prompter.encode(predictor, names, [*given, (None, "mouse.n.04")])
    assert texts.names == tuple(names)
    assert texts.prompts[0] == "anchor, what holds a ship"
    assert texts.prompts[1].startswith("sofa, an upholstered seat for more than one person")
    assert texts.prompts[2] == "bus, a long car"
    assert texts.prompts[3] == LONG[:69]  # too long even without a definition: 14 of its words
    assert texts.prompts[4].startswith("mouse, a hand-operated electronic device")
    rows = predictor.encode(list(texts.prompts)).embeddings
    np.testing.assert_array_equal(texts.embeddings, rows)
    assert prompter.settings(texts) == {
        "definitions": True,
        "template": TEMPLATE,
        "names_defined": 4,
        "names_cut": 1,
    }


def test_an_unknown_name_gets_the_definition_of_the_most_similar_name(predictor):
    dictionary = {f"{word} thing": f"something {word}" for word in ("blue", "red", "big", "new")}
    dictionary |= DICTIONARY | {"levitator": "what floats"}
    names = ["levitators", "yoyodyne", "🙂"]
    embed = lambda texts: predictor.encode(texts).embeddings[: len(texts)]
    found = define(names, Knowledge(dictionary=dictionary), embed=embed)
    prompts = Prompter(True, dictionary).encode(predictor, names).prompts
    assert prompts == tuple(fitted(names, [one.text for one in found]))
    assert prompts[0] == "levitators, what floats"  # a plural; the others are near or bare
    for name, prompt in zip(names[1:], prompts[1:]):
        assert prompt == name or prompt.split(", ")[1] in dictionary.values()
    # Without a dictionary, as for a model that was trained without definitions.
    alone = Prompter(True).encode(predictor, ["levitator", "wild bird", "🙂"])
    assert alone.prompts[0] == "levitator" and alone.prompts[2] == "🙂"


def test_a_name_that_was_trained_bare_is_asked_bare(predictor):
    prompter = Prompter(True, {"umbrella": "", "anchor": "what holds a ship"})
    prompts = prompter.encode(predictor, ["umbrella", "umbrellas", "anchor"]).prompts
    assert prompts == ("umbrella", "umbrellas", "anchor, what holds a ship")
    assert prompter.dictionary_prompts()["umbrella"] == "umbrella"


def test_another_template(predictor):
    prompter = Prompter(True, DICTIONARY, "{definition} ({name})")
    assert prompter.encode(predictor, ["anchor"]).prompts == ("what holds a ship (anchor)",)
    assert (
        prompter.settings(prompter.encode(predictor, ["anchor"]))["template"] == prompter.template
    )


SENTENCES = ("a photo of a {}.", "a {} in the snow")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_mean_embedding_of_sentences_stands_for_a_name(similarity):
    config = dataclasses.replace(tiny_model.CONFIG, similarity=similarity)
    predictor = Predictor(*create(config, 0), canvas=tiny_model.CANVAS)
    texts = Prompter(sentences=SENTENCES).encode(predictor, ["Sofa", "red  {bus}"])
    assert texts.names == ("Sofa", "red  {bus}")
    assert texts.prompts[1] == "a photo of a red {bus}. | a red {bus} in the snow"
    each = predictor.encode(["a photo of a sofa.", "a sofa in the snow"]).embeddings[:2]
    mean = np.mean(np.float64(each), axis=0)
    if similarity == "cosine":
        mean /= np.linalg.norm(mean)
    np.testing.assert_allclose(texts.embeddings[0], mean, rtol=1e-5, atol=1e-7)
    assert Prompter(sentences=SENTENCES).settings(texts) == {
        "definitions": False,
        "prompts": list(SENTENCES),
    }
    (alone,) = Prompter(sentences=SENTENCES[:1]).encode(predictor, ["sofa"]).embeddings[:1]
    np.testing.assert_array_equal(alone, each[0])


def test_precedence_of_sentences():
    config = DetectConfig(prompts=SENTENCES, definitions="on")
    assert Prompter.for_model(config, DICTIONARY).sentences == SENTENCES
    assert not Prompter.for_model(config, DICTIONARY).with_definitions
    prompter = Prompter.for_model(config, DICTIONARY, choice="on")
    assert prompter.with_definitions and not prompter.sentences
    alone = Prompter.for_model(DetectConfig(), DICTIONARY, sentences=SENTENCES[:1])
    assert alone.sentences == SENTENCES[:1]
    assert Prompter.for_model(config, DICTIONARY, sentences=[]).with_definitions
    with pytest.raises(UserError, match="not both"):
        Prompter.for_model(config, DICTIONARY, choice="on", sentences=SENTENCES)


@pytest.mark.parametrize("sentence", ["a photo", "{} and {}", "{name}", "{0}", "{", "{!r}"])
def test_sentences_without_one_place_for_the_name_are_refused(sentence):
    with pytest.raises(UserError, match="must contain {} exactly once"):
        Prompter(sentences=(sentence,))


@pytest.mark.parametrize(
    ("definitions", "configured", "choice", "enabled"),
    [
        (DICTIONARY, None, None, True),
        ({}, None, None, False),
        (DICTIONARY, "off", None, False),
        (DICTIONARY, "off", "as_trained", True),
        (DICTIONARY, "as_trained", "off", False),
        ({}, "as_trained", "on", True),
        ({}, "on", None, True),
    ],
)
def test_precedence_of_definitions(definitions, configured, choice, enabled):
    config = DetectConfig(definitions=configured or "as_trained")
    prompter = Prompter.for_model(config, definitions, choice=choice)
    assert prompter.with_definitions == enabled and prompter.template == TEMPLATE
    template = "{name}: {definition}"
    assert Prompter.for_model(config, definitions, template, choice).template == template


def test_a_detector_uses_definitions_if_its_model_trained_with_them():
    names = ["anchor", "sofa"]
    texts = Detector(loaded(DICTIONARY)).encode(names)
    assert (
        texts.prompts[0] == "anchor, what holds a ship" and ", an upholstered" in texts.prompts[1]
    )
    assert Detector(loaded({})).encode(names).prompts == ("anchor", "sofa")
    assert Detector(loaded(DICTIONARY), definitions="off").encode(names).prompts == tuple(names)
    detector = Detector(loaded(DICTIONARY))
    assert len(detector(np.zeros((64, 64, 3), np.uint8), names)) == 1
    with pytest.raises(UserError, match="name 1 of 2 is empty"):
        detector.encode(["", "anchor"])
    with pytest.raises(UserError, match="no names"):
        detector.encode([])


@pytest.fixture
def checkpoint(monkeypatch):
    tiny_model.be_checkpoint(monkeypatch, lambda: loaded(DICTIONARY))


def test_detect_command_has_a_flag_for_definitions(checkpoint, tmp_path):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    output = tmp_path / "out"
    flags = ["--checkpoint=run", "--names=anchor", f"--output={output}", f"{tmp_path}/a.png"]
    for extra, prompts in (
        ([], ["anchor, what holds a ship"]),
        (["--definitions=off"], ["anchor"]),
    ):
        assert detect.main([*extra, *flags]) == 0
        found = json.loads((output / "detections.json").read_text())
        assert (found["names"], found["prompts"]) == (["anchor"], prompts)
        assert found["settings"]["definitions"] == (not extra)


@pytest.mark.parametrize("federated", [True, False])
def test_evaluation_uses_the_definitions_of_the_dataset(checkpoint, tmp_path, federated):
    from test_evaluate import make_set

    path = make_set(tmp_path, federated=federated, images=2)
    content = json.loads(path.read_text())
    content["categories"][0] |= {"def": "a hook for boats", "synset": "anchor.n.01"}
    content["categories"][2] |= {"synset": "umbrella.n.01"}
    content["categories"][3] |= {"def": "", "synset": 7}  # ignored: empty, and not a string
    path.write_text(json.dumps(content))
    truth = datasets.load_ground_truth(path)
    assert truth.categories[0].definition == "a hook for boats"
    assert truth.categories[3] == coco.Category(3, "snowman")
    output = tmp_path / "out"
    flags = ["--checkpoint=run", f"--dataset={path}", f"--output={output}"]
    assert evaluate.main(flags) == 0
    settings = json.loads((output / "results.json").read_text())["settings"]
    assert settings["definitions"] and settings["names_defined"] == 3  # a knight is a man, too
    assert evaluate.main([*flags, "--definitions=off", f"--output={output}/bare"]) == 0
    settings = json.loads((output / "bare" / "results.json").read_text())["settings"]
    assert settings["definitions"] is False and "template" not in settings


def test_given_definitions_and_synsets_are_preferred(predictor):
    categories = [("anchor", "a hook for boats", None), ("sofa", None, "sofa.n.01")]
    texts = Prompter(True, DICTIONARY).encode(
        predictor, [name for name, *_ in categories], [tuple(rest) for _, *rest in categories]
    )
    assert texts.prompts[0] == "anchor, a hook for boats"
    definition = "an upholstered seat for more than one person"
    assert texts.prompts[1] == fitted(["sofa"], [definition])[0]


@pytest.mark.parametrize("sentence", ["word " * 14 + "{}", "word " * 20 + "{} word"])
def test_a_sentence_that_leaves_no_room_for_the_name_is_refused(predictor, sentence):
    with pytest.raises(UserError, match="has 14 or more tokens before the name"):
        Prompter(sentences=(sentence,)).encode(predictor, ["cat", "dog"])
    short = Prompter(sentences=("word " * 13 + "{}",)).encode(predictor, ["cat", "red dog"])
    assert short.is_cut == (False, True)  # of "red dog" one word is read
