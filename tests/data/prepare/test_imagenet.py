"""Images with one class each: ImageNet as published, and folders named like their classes."""

import json

import miniature_archives as miniature
import numpy as np
import pytest

from detclipv2_jax import prepare as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare.examples import Drops, ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.prepare import prepare
from detclipv2_jax.data.prepare.sources import imagenet

NAMES = [
    "tench", "crane bird", "Cardigan Welsh corgi", "cardigan", "construction crane", "maillot",
    "tank suit",
]  # fmt: skip


def command(*arguments) -> int:
    return door.main([*map(str, arguments)])


def captions(archive) -> dict[str, str]:
    return {example.image_id.split("/")[0]: example.caption for example in archive.examples}


def test_imagenet_as_kaggle_publishes_it(tmp_path):
    path = miniature.imagenet(tmp_path)
    assert imagenet.find(tmp_path) == [path]
    archive = imagenet.read(path, ImageFolder(tmp_path))
    assert archive.kind == "classification" and archive.total == 14
    examples = list(archive.examples)
    ids = [example.image_id for example in examples[:2]]
    assert ids == ["n01440764/n01440764_10026.JPEG", "n01440764/n01440764_7.JPEG"]
    assert [example.caption for example in examples[::2]] == NAMES
    assert archive.drops.changed == {"classes: other word": 4} and not archive.drops.dropped
    archive = imagenet.read(path, ImageFolder(tmp_path))
    source = prepare([archive], tmp_path / "to", name="x", options=PrepareOptions(jobs=1))
    assert source.kind == "classification" and len(source) == 13
    assert source.info["dropped"] == {"images: unreadable": 1}
    # A record has the name of its class as its only text, which counts once for each image.
    assert np.array_equal(np.diff(source.positives_offsets), np.ones(13))
    names = [concept["name"] for concept in source.concepts]
    assert names == [name.lower() for name in NAMES]
    assert [concept["count"] for concept in source.concepts] == [2] * 6 + [1]
    assert source.vocabulary.all()


@pytest.mark.parametrize("place", ["", "train", "images", "Data/CLS-LOC/train"])
def test_folders_named_like_their_classes(tmp_path, place, capsys):
    for name in ("golden_retriever", "tabby cat"):
        for number in range(3):
            data = miniature.jpeg(300, 400, seed=number)
            miniature.write_file(tmp_path / "from" / place / name / f"{number}.jpg", data)
    miniature.write_file(tmp_path / "from" / place / "tabby cat" / "notes.txt", b"mine")
    miniature.write_file(tmp_path / "from" / place / "tabby cat" / ".hidden.jpg", b"")
    (tmp_path / "from" / place / "empty").mkdir()
    line = ("imagenet", f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}", "--jobs=1")
    assert command(*line, "--store_side=100") == 0
    source = Source.open(tmp_path / "to")
    assert [concept["name"] for concept in source.concepts] == ["golden retriever", "tabby cat"]
    assert len(source) == 6 and set(source.width) == {100} and set(source.height) == {75}
    assert source.info["dropped"] == {"images: another format": 1}
    capsys.readouterr()
    assert command(*line, "--store_side=100") == 0
    assert "already prepared, 6 records of classification" in capsys.readouterr().out
    assert command(*line) == 2
    assert "other files or options" in capsys.readouterr().err


def test_ids_without_names_are_refused_with_the_remedy(tmp_path, capsys):
    names = miniature.imagenet(tmp_path / "from")
    moved = names.rename(tmp_path / "words.txt")
    line = ("imagenet", f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}", "--jobs=1")
    assert command(*line) == 2
    assert "n01440764: the class has an id, but no name. Put LOC_syn" in capsys.readouterr().err
    assert command(*line, f"--annotations={moved}") == 0
    assert len(Source.open(tmp_path / "to")) == 13


def test_no_folder_of_images(tmp_path, capsys):
    miniature.write_file(tmp_path / "from" / "a.jpg")
    line = ("imagenet", f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}")
    assert command(*line) == 2
    assert "no folder of images per class here, nor in" in capsys.readouterr().err
    miniature.write_file(tmp_path / "elsewhere" / "dog" / "a.jpg")
    assert command(*line, f"--images={tmp_path / 'elsewhere'}", "--jobs=1") == 0
    assert len(Source.open(tmp_path / "to")) == 1


def test_images_of_a_class_that_the_file_lacks_are_counted(tmp_path):
    path = miniature.imagenet(tmp_path)
    path.write_text("n01440764\ttench, Tinca tinca\n\nn02963159 cardigan\n")
    archive = imagenet.read(path, ImageFolder(tmp_path))
    assert captions(archive) == {"n01440764": "tench", "n02963159": "cardigan"}
    assert archive.drops.dropped == {"images: class without a name": 10}
    path.write_text("n00000000 nothing\n")
    with pytest.raises(UserError, match="has no name for .*n01440764"):
        imagenet.read(path, ImageFolder(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"n01440764 tench\nn01440764 fish\n", r"line 2: the class 'n01440764' is given twice"),
        (b"n01440764 tench\n\nn02012849\n", r"line 3: the class 'n02012849' has no name"),
        (b"n01440764 tench\xff\n", "line 1, byte 15 of the line: 0xff is not UTF-8 text"),
        (json.dumps({"0": ["n01440764", "tench"]}).encode(), "has no name for"),
    ],
)
def test_a_damaged_file_of_names(tmp_path, text, message):
    path = miniature.imagenet(tmp_path)
    path.write_bytes(text)
    with pytest.raises(UserError, match=message) as refused:
        imagenet.read(path, ImageFolder(tmp_path))
    assert "\n" not in str(refused.value)


def test_classes_that_share_their_words():
    def names(**words):
        drops = Drops()
        found = imagenet.class_names({key: text.split(", ") for key, text in words.items()}, drops)
        return [*found.values()], dict(drops.changed)

    assert names(a="cat, tabby", b="dog, tabby") == (["cat", "dog"], {})
    # Both have a word of their own; the second word of c is also that of d.
    moved = {"classes: other word": 2}
    assert names(a="bat, racket", b="Bat, flying mouse") == (["racket", "flying mouse"], moved)
    assert names(c="bat, club, stick", d="bat", e="club") == (
        ["stick", "bat", "club"],
        {"classes: other word": 1},
    )
    # Neither has one: they stay one class, and both are counted.
    assert names(a="bat", b="bat") == (["bat", "bat"], {"classes: same name": 2})
