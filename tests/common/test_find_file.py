"""The file that an annotation names is found however the name is spelled, and no other file is."""

import os
import unicodedata
from pathlib import Path

import pytest

from detclipv2_jax.common import find_file
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.find_file import ImageFolder

NFC, NFD = (unicodedata.normalize(form, "café é") + ".jpg" for form in ("NFC", "NFD"))


def write(root: Path, *files: str) -> None:
    """Write files whose contents differ."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(os.fsencode(f"picture {file}"))


def find(root: Path, name: str, *others: str) -> find_file.Found:
    """Return what is found for `name`, in an annotation file that also has `others`."""
    images = ImageFolder(root)
    images.expect(lambda: [(n,) for n in (name, *others)])
    return images.find(name)


SPELLED = {  # name of the entry: the file on disk
    "set a/1.jpg": "set a/1.jpg",
    "./set a//1.jpg": "set a/1.jpg",
    "/images/1.jpg": "images/1.jpg",
    "set a\\1.jpg": "set a/1.jpg",
    "..\\set a\\1.jpg": "set a/1.jpg",
    ".\\a\\..\\b\\1.jpg": "b/1.jpg",
    "C:\\Users\\me\\data\\1.jpg": "data/1.jpg",
    "d:/data/1.jpg": "1.jpg",
    "\\\\server\\share\\data\\1.jpg": "share/data/1.jpg",
    "file:///home/me/data/1%20a.jpg": "data/1 a.jpg",
    "file:///C:/data/1.jpg": "data/1.jpg",
    "a%20b/c%23%25.jpg": "a b/c#%.jpg",
    "100%.jpg": "100%.jpg",
    "a%20b.jpg": "a%20b.jpg",  # the literal name goes first
    "a [1] #2 *?.jpg": "a [1] #2 *?.jpg",
    "a\nb.jpg": "a\nb.jpg",
    "1.jpg\r": "1.jpg",
    "http://images.org/train2017/1.jpg?size=2": "train2017/1.jpg",
    "https://x.org/a/b%20c.jpg": "a/b c.jpg",
    "/data/local-files/?d=set%20a%5C1.jpg": "set a/1.jpg",
    "/data/upload/3/0a1b2c3d-photo.jpg": "photo.jpg",
    "images\\0a1b2c3d-photo.jpg": "images/photo.jpg",
    "images/v1/patch8/1.jpg": "patch8/1.jpg",
    NFC: NFD,
    f"a/{NFD}": f"a/{NFC}",
    f"{NFD}/1.jpg": f"{NFC}/1.jpg",
    "1.jpg": "1.JPG",
    "x/y/1.PNG": "y/1.png",
    os.fsdecode(b"caf\xe9.jpg"): os.fsdecode(b"caf\xe9.jpg"),
    r"caf\xe9.jpg": os.fsdecode(b"caf\xe9.jpg"),  # as our own JSON files name it
}


@pytest.mark.parametrize("name", SPELLED, ids=ascii)
def test_spellings(tmp_path, name):
    write(tmp_path, SPELLED[name], "other/2.jpg")
    assert find(tmp_path, name, "other/2.jpg").path == tmp_path / SPELLED[name]


def test_another_spelling_is_told_and_missing_folders_are_not(tmp_path):
    write(tmp_path, "a b.JPG", "patch8/1.jpg")
    found = find(tmp_path, "a b.jpg")
    assert found.spelled.startswith("a b.jpg is taken for ") and "a b.JPG" in found.spelled
    assert find(tmp_path, "v1/patch8/1.jpg").spelled == ""
    assert find(tmp_path, "patch8/1.jpg").spelled == ""


@pytest.mark.parametrize(
    ("name", "others", "files"),
    [
        # Folders are taken off only where no other entry and no other file ends so.
        ("cam2/1.jpg", ["cam1/1.jpg"], ["1.jpg"]),
        ("cam2/1.jpg", ["1.jpg"], ["1.jpg"]),
        ("cam2/1.jpg", [], ["1.jpg", "cam1/1.jpg"]),
        ("a/cam2/1.jpg", ["b/cam2/1.jpg"], ["cam2/1.jpg"]),
        ("C:\\new\\1.jpg", ["C:\\old\\1.jpg"], ["1.jpg"]),
        ("http://a.org/x/1.jpg", ["http://b.org/y/1.jpg"], ["1.jpg"]),
        ("x/1.jpg", ["y/1.JPG"], ["1.jpg"]),
        # Suffixes and accents are equal only where one file is meant.
        ("1.jpg", [], ["1.JPG", "1.Jpg"]),
        ("1.jpg", ["1.JPG"], ["1.JPG"]),
        # Label Studio: two uploads of one name.
        ("11111111-a.jpg", ["22222222-a.jpg"], ["a.jpg"]),
        ("11111111-a.jpg", ["a.jpg"], ["a.jpg"]),
    ],
)
def test_a_file_that_may_be_another_entrys_is_not_taken(tmp_path, name, others, files):
    write(tmp_path, *files)
    found = find(tmp_path, name, *others)
    assert found.path is None and ("not taken for it" in found.why or "differ" in found.why)
    assert "--images=DIR" in found.why


def test_an_ending_that_only_one_entry_and_one_file_have(tmp_path):
    write(tmp_path, "cam1/1.jpg", "cam2/1.jpg", "1.jpg")
    names = ["x/train/cam1/1.jpg", "x/train/cam2/1.jpg"]
    assert find(tmp_path, *names).path == tmp_path / "cam1" / "1.jpg"
    assert find(tmp_path, *names[::-1]).path == tmp_path / "cam2" / "1.jpg"


def test_one_name_in_two_folders_is_certain_only_if_the_files_are_equal(tmp_path):
    write(tmp_path, "a/1.jpg", "b/1.jpg")
    found = ImageFolder(tmp_path / "a", tmp_path / "b").find("1.jpg")
    assert found.problem == "ambiguous" and "a/1.jpg or" in found.why
    first = ImageFolder(tmp_path / "b", first=[tmp_path / "a"])
    assert first.find("1.jpg").path == tmp_path / "a" / "1.jpg"
    (tmp_path / "b" / "1.jpg").write_bytes((tmp_path / "a" / "1.jpg").read_bytes())
    found = ImageFolder(tmp_path / "a", tmp_path / "b").find("1.jpg")
    assert found.path == tmp_path / "a" / "1.jpg"


def test_nothing_outside_the_folders_is_taken(tmp_path):
    write(tmp_path, "data/images/1.jpg", "secret.jpg", "data2/secret.jpg")
    root = tmp_path / "data"
    hostile = [
        str(tmp_path / "secret.jpg"),
        f"file://{tmp_path}/secret.jpg",
        "../secret.jpg",
        "..\\secret.jpg",
        "%2e%2e/secret.jpg",
        "images/../../secret.jpg",
        f"{root}/../secret.jpg",
        str(tmp_path / "data2" / "secret.jpg"),  # its path begins as the folder's does
        "/etc/passwd",
    ]
    for name in hostile:
        found = find(root, name)
        assert (found.path, found.problem) == (None, "outside the folder"), name
        assert "--images=DIR" in found.why
    assert find(tmp_path, str(tmp_path / "secret.jpg")).path == tmp_path / "secret.jpg"
    assert find(root, f"{root}/images/1.jpg").path == root / "images" / "1.jpg"
    assert find(root, "../data/images/1.jpg").path.samefile(root / "images" / "1.jpg")


def test_links_inside_the_folder_are_followed(tmp_path):
    write(tmp_path, "far/1.jpg", "far/2.jpg")
    root = tmp_path / "data"
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "far")
    (root / "3.jpg").symlink_to(tmp_path / "far" / "2.jpg")
    (root / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "self.jpg").symlink_to("self.jpg")
    assert find(root, "images/1.jpg").path == root / "images" / "1.jpg"
    assert find(root, "x/3.jpg").path == root / "3.jpg"
    assert find(root, str(tmp_path / "far" / "1.jpg")).path is None
    # The folder itself may be a link, and absolute names may lead to where it is.
    (tmp_path / "alias").symlink_to(root)
    assert find(tmp_path / "alias", f"{root}/images/1.jpg").path is not None
    assert "nowhere.jpg, which does not exist" in find(root, "gone.jpg").why
    assert "leads to itself" in find(root, "self.jpg").why


def test_what_is_no_file(tmp_path):
    (tmp_path / "1.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "1.jpg is a folder, not a file" in find(tmp_path, "1.jpg").why
    assert find(tmp_path, "pipe.jpg").path is None
    assert "is a URL" in find(tmp_path, "https://x.org/2.jpg").why
    assert 'also with "/"' in find(tmp_path, "a\\2.jpg").why
    for name in ("", ".", "..", "/", "a\0.jpg", "\ud800.jpg", "a" * 300 + ".jpg", "%00"):
        assert (found := find(tmp_path, name)).path is None and found.problem == "missing"
        found.why.encode()


def test_a_folder_without_permission(tmp_path, monkeypatch):
    write(tmp_path, "private/1.jpg")
    real = os.stat

    def refuse(path, *args, **options):
        if str(path).endswith("1.jpg"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **options)

    monkeypatch.setattr(find_file.os, "stat", refuse)
    found = find(tmp_path, "private/1.jpg")
    assert found.path is None and "permission denied" in found.why


@pytest.mark.parametrize("given", ["data", "./data/", "../{}/data", "link"])
def test_relative_folders(tmp_path, monkeypatch, given):
    write(tmp_path, "data/images/1.jpg", "data/train/2.jpg")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    root = Path(given.format(tmp_path.name))
    images = ImageFolder(root / "images", root).also(root / "train")
    for name in ("1.jpg", "2.jpg", str(tmp_path / "data/train/2.jpg"), "../train/2.jpg"):
        found = images.find(name).path
        assert found is not None and found.samefile(next((tmp_path / "data").rglob(name[-5:])))


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match="no such directory.*--images=DIR"):
        ImageFolder(tmp_path / "none")
