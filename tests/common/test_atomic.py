"""Files and directories appear complete or not at all."""

import pytest

from detclipv2_jax.common import atomic
from detclipv2_jax.common.errors import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new" / "results.json"
    atomic.write_json(path, {"AP": 0.5})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic.replacing(path) as partial:
        partial.write_text("half of it")
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["file/results.json", "directory"])
def test_a_write_error_is_a_user_error_or_a_warning(tmp_path, name, capsys):
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=f"{name}: cannot be written.*Check the path"):
        atomic.write_json(tmp_path / name, {})
    assert not capsys.readouterr().out
    with atomic.write_errors_are_warnings():
        atomic.write_json(tmp_path / name, {})
    assert f"{name}: cannot be written" in capsys.readouterr().out
    with pytest.raises(UserError):  # as before
        atomic.write_json(tmp_path / name, {})


def test_other_errors_do_not_become_warnings(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"), atomic.write_errors_are_warnings():
        atomic.write_json(tmp_path / "results.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(small_disk, fill, capsys):
    path = small_disk / "results.json"
    atomic.write_json(path, "old")
    before = path.read_bytes()
    fill(small_disk, 8192)
    with pytest.raises(UserError, match=r"No space left on device\). Free disk space, then run"):
        atomic.write_json(path, "x" * 100_000)
    with atomic.write_errors_are_warnings():
        atomic.write_json(path, "x" * 100_000)
    said = capsys.readouterr().out
    assert said.startswith("warning: ")
    assert "results.json: cannot be written (No space left on device); continuing" in said
    assert path.read_bytes() == before and len(list(small_disk.iterdir())) == 2


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "new" / "model"
    for text in ("old", "new"):
        with atomic.replacing_directory(path) as partial:
            assert not list(partial.iterdir())
            (partial / f"{text}.txt").write_text(text)
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    # What a killed process left is removed; a failed write keeps the old directory.
    (path.parent / ".model.partial").mkdir()
    (path.parent / ".model.partial" / "rest").touch()
    with pytest.raises(RuntimeError), atomic.replacing_directory(path) as partial:
        assert not list(partial.iterdir())
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["new.txt"]
    assert [entry.name for entry in path.parent.iterdir()] == ["model"]


def test_a_directory_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    failure = pytest.raises(UserError, match="file/model: cannot be written")
    with failure, atomic.replacing_directory(tmp_path / "file" / "model"):
        pass


def test_what_killed_processes_left_is_removed(tmp_path):
    with atomic.replacing(tmp_path / "a.json") as partial:
        partial.write_text("whole")
    left = tmp_path / ".b.json.123.partial"
    left.write_text("half")
    atomic.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
