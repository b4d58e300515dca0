import pytest

from detclipv2_jax.common import atomic
from detclipv2_jax.common.errors import UserError


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    atomic.write_json(path, {"AP": 0.5})
    before = path.read_bytes()
    with pytest.raises(RuntimeError), atomic.replacing(path) as partial:
        partial.write_text("half of it")
        raise RuntimeError
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("name", ["file/results.json", "directory"])
def test_what_cannot_be_written_is_one_sentence_or_left_out(tmp_path, name, capsys):
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=f"{name}: cannot be written"):
        atomic.write_json(tmp_path / name, {})
    assert not capsys.readouterr().out
    with atomic.only_said():
        atomic.write_json(tmp_path / name, {})
    assert f"{name}: cannot be written" in capsys.readouterr().out
    with pytest.raises(UserError):  # as before
        atomic.write_json(tmp_path / name, {})


def test_only_files_are_left_out(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"), atomic.only_said():
        atomic.write_json(tmp_path / "results.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_on_the_disk_leaves_the_old_file(small_disk, fill, capsys):
    path = small_disk / "results.json"
    atomic.write_json(path, "old")
    before = path.read_bytes()
    fill(small_disk, 8192)
    with pytest.raises(UserError, match="No space left on device.; make room, then start again"):
        atomic.write_json(path, "x" * 100_000)
    with atomic.only_said():
        atomic.write_json(path, "x" * 100_000)
    assert "results.json: cannot be written (No space left on device): left out" in (
        capsys.readouterr().out
    )
    assert path.read_bytes() == before and len(list(small_disk.iterdir())) == 2
