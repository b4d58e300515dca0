"""What `detect` looks at, and what it says of the rest."""

import os

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax.common.atomic import write_text
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.outputs import OutputFolder, guarded
from detclipv2_jax.inference.input_files import input_files


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name, format="PNG")


def names_of(inputs):
    return [os.path.basename(file.path) for file in inputs.files]


def test_a_folder_counts_what_is_left_out(tmp_path):
    make(tmp_path, "IMG_1.JPG", "deep/b.png", "IMG_2.HEIC", "IMG_3.heic", "x.MOV", "y.mpg", "z")
    make(tmp_path, ".hidden.png", ".DS_Store", ".thumbs/a.png", "notes.txt")
    (tmp_path / "gone.png").symlink_to("nowhere")
    found = input_files([str(tmp_path)])
    assert names_of(found) == ["IMG_1.JPG", "b.png"]
    assert found.left_out == {
        ".heic": 2, ".mov": 1, ".mpg": 1, "without a suffix": 1, "hidden": 1, "hidden folders": 1,
        ".txt": 1, "broken links": 1,
    }  # fmt: skip
    line = found.left_out_line()
    assert line.startswith("left out: 2 .heic, ") and "1 .mov" in line
    assert "give videos by their names" in line and "to JPEG or PNG" in line


def test_folders_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path, "phone/a.HEIC", "phone/b.MOV", "good/a.png")
    with pytest.raises(UserError, match=r"empty: contains no image\. Give a folder with images\."):
        input_files([str(tmp_path / "empty")])
    with pytest.raises(UserError, match=r"phone: contains no image.*left out: 1 \.heic, 1 \.mov"):
        input_files([str(tmp_path / "phone")])
    found = input_files([str(tmp_path / name) for name in ("phone", "good", "empty")])
    assert names_of(found) == ["a.png"] and list(found.failed) == [
        str(tmp_path / "phone"),
        str(tmp_path / "empty"),
    ]


def test_links_are_followed_once(tmp_path):
    make(tmp_path, "real/a.png", "photos/b.png")
    (tmp_path / "photos/more").symlink_to(tmp_path / "real")
    (tmp_path / "photos/circle").symlink_to(tmp_path / "photos")
    found = input_files([str(tmp_path / "photos")])
    assert sorted(names_of(found)) == ["a.png", "b.png"]


def test_a_file_given_twice_is_looked_at_once(tmp_path):
    make(tmp_path, "a.png", "b.png")
    (tmp_path / "same.png").hardlink_to(tmp_path / "a.png")
    paths = [str(tmp_path / name) for name in ("a.png", "b.png", "a.png", "same.png")]
    found = input_files([*paths, str(tmp_path)])
    assert names_of(found) == ["a.png", "b.png", "same.png"]
    assert found.left_out == {"given twice": 4}
    assert len(input_files(paths, each=True).files) == 4


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("http://example.org/a.jpg", "http://example.org/a.jpg: is an address.*Download it"),
        ("https://example.org/a.jpg?w=3", "https://example.org/a.jpg.*is an address"),
        ("s3://bucket/a.png", "s3://bucket/a.png: is an address"),
        ("-", "standard input"),
        ("", "is empty"),
        ("none/*.jpg", r"none/\*\.jpg: no such file: the pattern matches nothing"),
    ],
)
def test_arguments_that_are_no_files(path, reason):
    with pytest.raises(UserError, match=reason):
        input_files([path])


def test_a_pattern_can_be_a_name_and_one_without_a_match_does_not_stop_the_rest(tmp_path):
    make(tmp_path, "a[1].png")
    found = input_files([str(tmp_path / "a[1].png"), str(tmp_path / "*.jpg")])
    assert names_of(found) == ["a[1].png"] and list(found.failed) == [str(tmp_path / "*.jpg")]


def test_each_drawing_has_a_name_of_its_own(tmp_path):
    make(tmp_path, "a/1.jpg", "a/1.png", "b/1.jpg", "c/A.png", "c/a.jpg", "c/x.png/y.jpg")
    make(tmp_path, "c/x.jpg", "c/e\u0301.png", "c/\u00e9.jpg", "c/a-2.jpg")
    found = input_files([str(tmp_path / folder) for folder in ("a", "b", "c")])
    drawn = [file.drawn for file in found.files]
    assert drawn[:3] == ["1.png", "1-2.png", "1-3.png"]
    assert len({name.casefold() for name in drawn}) == len(drawn) == 10
    folders = {os.path.dirname(name) for name in drawn}
    assert not folders & set(drawn)


def test_earlier_drawings_are_no_images_wherever_they_lie(tmp_path):
    make(tmp_path, "photos/a.jpg", "photos/out/mine.png")
    with guarded(OutputFolder(tmp_path / "photos/out")):
        write_text(tmp_path / "photos/out/a.png", "drawn")
        write_text(tmp_path / "photos/out/detections.json", "{}")
    found = input_files([str(tmp_path / "photos")])
    assert names_of(found) == ["a.jpg", "mine.png"] and not found.left_out


def test_drawings_of_long_names_can_be_written(tmp_path):
    long = ["a" * 251 + ".jpg", "é" * 125 + ".jpg", "a" * 250 + ".jpg", "a" * 250 + ".png"]
    latin = b"\xe9" * 240 + b".jpg"  # which is escaped: four bytes for each
    make(tmp_path, *long, "sub/" + long[0])
    make(tmp_path, os.fsdecode(latin))
    found = input_files([str(tmp_path)])
    assert len(found.files) == 6
    out = tmp_path / "out"
    for file in found.files:
        write_text(out / file.drawn, "drawn")
    assert len([path for path in out.rglob("*") if path.is_file()]) == 6
    short = input_files([str(tmp_path / long[0])]).files[0].drawn
    assert short.startswith("a" * 200) and short.endswith(".png")


def test_pipes_and_devices_are_not_waited_for(tmp_path):
    make(tmp_path, "photos/a.jpg")
    for name in ("photos/pipe.jpg", "pipe.png"):
        os.mkfifo(tmp_path / name)
    found = input_files([str(tmp_path / "photos"), str(tmp_path / "pipe.png"), "/dev/zero"])
    assert names_of(found) == ["a.jpg"] and dict(found.left_out) == {"pipes and devices": 1}
    assert [text.split(": ")[1] for text in found.failed.values()] == [
        "is a pipe or a device. Save the image as a file, and give it."
    ] * 2
