"""A command replaces its own files in its output folder, and no file of the user's."""

import os

import pytest

from detclipv2_jax.common.atomic import replacing_directory, write_new_text, write_text
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import RECORD, OutputFolder, guarded


def write(folder, name, text):
    with guarded(OutputFolder(folder)):
        write_text(folder / name, text)


def test_own_files_are_replaced_also_by_a_later_process(tmp_path):
    for text in ("one", "two", "two", "one"):
        write(tmp_path / "out", "deep/a.json", text)
        assert (tmp_path / "out/deep/a.json").read_text() == text
    assert OutputFolder(tmp_path / "out").is_own(tmp_path / "out/deep/a.json")


@pytest.mark.parametrize("kind", ["file", "edited", "link", "hard link", "replaced by a folder"])
def test_files_of_the_user_stay(tmp_path, kind):
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    photo.write_text("original")
    out.mkdir()
    if kind == "file":
        (out / "a.png").write_text("mine")
    elif kind == "edited":
        write(out, "a.png", "drawn")
        (out / "a.png").write_text("mine")
    elif kind == "link":
        (out / "a.png").symlink_to(photo)
    elif kind == "hard link":
        (out / "a.png").hardlink_to(photo)
    else:
        write(out, "a.png", "drawn")
        (out / "a.png").unlink()
        (out / "a.png").mkdir()
    with pytest.raises(UserError, match=r"a\.png: exists, .*choose another --output"):
        write(out, "a.png", "new")
    with pytest.raises(UserError, match=r"a\.png: exists"):
        OutputFolder(out).check(["b.png", "a.png"])
    assert photo.read_text() == "original"
    assert (out / "a.png").is_dir() or (out / "a.png").read_text() in ("mine", "original")
    write(out, "b.png", "free")


def test_a_run_that_was_killed_between_record_and_file(tmp_path):
    """The record knows the new content, the file has the old one: both are the command's."""
    write(tmp_path, "a.json", "old")
    folder = OutputFolder(tmp_path)
    (tmp_path / "new").write_text("new")
    folder.add(tmp_path / "a.json", tmp_path / "new")  # killed here
    write(tmp_path, "a.json", "newer")
    with open(tmp_path / RECORD, "a") as record:  # or while it wrote the record
        record.write('{"file": "a.js')
    write(tmp_path, "a.json", "newest")


def test_a_file_through_a_link_to_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.json").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "link", "a.json", "new")
    write(tmp_path / "real", "b.json", "one")
    write(tmp_path / "link", "b.json", "two")


def test_folders_are_replaced_if_nothing_was_added_to_them(tmp_path):
    out = tmp_path / "out"

    def write_folder(text):
        with guarded(OutputFolder(out)), replacing_directory(out / "model") as folder:
            (folder / "weights").write_text(text)

    write_folder("one")
    write_folder("two")
    (out / "model/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="model: exists"):
        write_folder("three")
    assert (out / "model/notes.txt").read_text() == "mine"


def test_only_the_guarded_folder_is_guarded(tmp_path):
    (tmp_path / "out/free").mkdir(parents=True)
    for name in ("out/free/a", "out/.a", "b"):
        (tmp_path / name).write_text("old")
    with guarded(OutputFolder(tmp_path / "out", free=("free",))):
        for name in ("out/free/a", "out/.a", "b"):
            write_text(tmp_path / name, "new")
    write_text(tmp_path / "out/free/a", "newer")


def test_an_output_that_is_a_file_or_read_only(tmp_path, make_read_only):
    (tmp_path / "a.jpg").write_text("photo")
    with pytest.raises(UserError, match=r"--output=.*a\.jpg: is not a folder"):
        OutputFolder(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory"):
        OutputFolder(tmp_path / "a.jpg" / "deep").begin([])
    (tmp_path / "locked").mkdir()
    make_read_only(tmp_path / "locked")
    with pytest.raises(UserError, match="locked: cannot be written"):
        OutputFolder(tmp_path / "locked").begin([])


def test_long_names(tmp_path):
    name = "x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".png"
    write(tmp_path, name, "drawn")
    assert (tmp_path / name).read_text() == "drawn"


def test_a_file_that_an_option_names_is_not_replaced_by_other_content(tmp_path):
    for _ in range(2):  # the same command again
        write_new_text(tmp_path / "a.json", "one", "--to")
    with pytest.raises(UserError, match=r"a\.json: exists.*another --to"):
        write_new_text(tmp_path / "a.json", "two", "--to")
    assert (tmp_path / "a.json").read_text() == "one"
