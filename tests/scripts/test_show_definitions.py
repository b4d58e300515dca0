"""The list of definitions that people check."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "show_definitions.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("show_definitions", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_with_sense_definition_and_source(script, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("Wild lemur\n\nkite\n")
    (tmp_path / "mine.tsv").write_text("name\tsynset\tdefinition\nkite\t\ta toy that flies\n")
    flags = [f"--names_file={tmp_path}/names.txt", f"--definitions_file={tmp_path}/mine.tsv"]
    assert script.main(["hot dog", "🙂", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "source", "synset", "definition"]
    assert lines[1].startswith("hot dog") and " checked " in lines[1] and "hotdog.n.02" in lines[1]
    assert lines[2].split() == ["🙂", "none"]
    assert " head (lemur) " in lines[3] and lines[4].endswith("a toy that flies")
    assert lines[5].startswith("3 of 4 names have a definition (corrected 1, checked 1, head 1")
    assert script.main(["kite", *flags, f"--to={tmp_path}/table.tsv"]) == 0
    rows = [line.split("\t") for line in (tmp_path / "table.tsv").read_text().splitlines()]
    assert rows[:2] == [
        ["name", "synset", "definition", "source"],
        ["kite", "", "a toy that flies", "corrected"],
    ]
    assert script.main(["hot dog", f"--to={tmp_path}/table.tsv"]) == 0  # its own table is replaced
    (tmp_path / "table.tsv").write_text("corrected by hand")
    assert script.main(["hot dog", f"--to={tmp_path}/table.tsv"]) == 2
    assert "table.tsv: exists, and this command did not write it" in capsys.readouterr().err
    assert (tmp_path / "table.tsv").read_text() == "corrected by hand"


def test_what_is_wrong_is_named(script, tmp_path, capsys):
    assert script.main([]) == 2
    assert "no names are given" in capsys.readouterr().err
    (tmp_path / "mine.tsv").write_text("name\tsynset\tdefinition\nkite\tkite.n.77\t\n")
    assert script.main(["kite", f"--definitions_file={tmp_path}/mine.tsv"]) == 2
    assert "mine.tsv, line 2: 'kite.n.77' is not a noun" in capsys.readouterr().err
