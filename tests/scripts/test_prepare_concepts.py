"""The command that makes the concept dictionary of prepared sources."""

import importlib.util
import json

import numpy as np
import pytest
import tiny_run
from weights.test_text_embedder import save_file, tensors, tower

from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.prepare.record_writer import RecordWriter
from detclipv2_jax.data.records import Record

JPEG = b"\xff\xd8\xff\xe0 not looked into"


def command():
    path = tiny_run.ROOT / "scripts" / "prepare_concepts.py"
    spec = importlib.util.spec_from_file_location("prepare_concepts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def data(tmp_path):
    boxes = np.array([[0, 0, 9, 9]] * 3, np.float32)
    for kind, concepts in {
        "detection": ("sofa", "wild bird"),
        "image_text": ("a red sofa by a lake", "red sofa", "lake"),
    }.items():
        with RecordWriter(tmp_path / "data" / kind, name=kind, kind=kind) as writer:
            for number in range(6):
                captioned = kind == "image_text"
                labels = [] if captioned else [0, 1, 1]
                writer.write(
                    Record(
                        image=JPEG,
                        height=20,
                        width=20,
                        image_id=str(number),
                        boxes=boxes[: len(labels)],
                        labels=np.array(labels, np.int32),
                        concepts=concepts,
                    )
                )
            writer.finish()
    # What a killed preparation left behind is not a source.
    (tmp_path / "data" / "more.partial").mkdir()
    (tmp_path / "data" / "more.partial" / "info.json").write_text("{")
    return tmp_path / "data"


def test_names_and_phrases_of_all_sources(data, capsys):
    to = data / "concepts"
    assert command()([f"--from={data}", f"--to={to}"]) == 0
    made = Dictionary.open(to)
    assert [(row["name"], row["count"]) for row in made.rows] == [
        ("wild bird", 12),
        ("lake", 6),
        ("red sofa", 6),
        ("sofa", 6),
    ]
    assert made.info["created_from"]["sources"] == {"detection": 6, "image_text": 6}
    printed = capsys.readouterr().out
    assert "4 names and phrases, 2 of them categories; 4 occur at least 5 times" in printed
    assert "like their head noun" in printed and "(like sofa)" in printed
    assert command()([f"--from={data}", f"--to={to}", "--min_count=7", "--size=2"]) == 0
    assert Dictionary.open(to).names == ["wild bird", "sofa"]


def test_synsets_and_the_nearest_concept(data, tmp_path, capsys):
    lvis = [{"name": "sofa", "synset": "sofa.n.01"}, {"name": "lake", "synset": "lake.n.03"}]
    (tmp_path / "lvis.json").write_text(json.dumps(lvis))
    save_file(tensors(tower()), tmp_path / "clip.safetensors")
    flags = [f"--from={data}", f"--to={data / 'concepts'}", f"--lvis={tmp_path / 'lvis.json'}"]
    assert command()([*flags, f"--text={tmp_path / 'clip.safetensors'}"]) == 0
    rows = {row["name"]: row for row in Dictionary.open(data / "concepts").rows}
    assert rows["lake"]["synsets"] == ["lake.n.03"] and rows["lake"]["origin"] == "synset"
    # By the embeddings of a random tower, and only if one is near: never by its head noun.
    assert rows["red sofa"]["origin"] in ("nearest", "none")
    assert rows["wild bird"]["origin"] == "checked"
    assert "by a hand-checked sense" in capsys.readouterr().out


def test_errors_are_one_line(data, tmp_path, capsys):
    def error(*flags):
        assert command()([f"--to={tmp_path / 'to'}", *flags]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    (tmp_path / "empty").mkdir()
    assert "no prepared source here" in error(f"--from={tmp_path / 'empty'}")
    assert "no prepared source here" in error(f"--from={tmp_path / 'nowhere'}")
    assert "none.pt: no such file" in error(f"--from={data}", "--text=none.pt")
    assert "none.json: no such file" in error(f"--from={data}", "--lvis=none.json")
    (data / "detection" / "info.json").write_text("{")
    assert "not a valid description" in error(f"--from={data}")
    assert not (tmp_path / "to").exists()
