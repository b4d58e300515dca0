"""The command prepares every archive in its published form and reports what it dropped."""

import miniature_archives as miniature
import pytest
from test_published_sources import write_odinw

from detclipv2_jax import prepare as door
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import registry
from detclipv2_jax.text import phrases


def command(*arguments) -> int:
    return door.main([*map(str, arguments)])


def webdataset(root):
    for shard in range(2):
        miniature.webdataset(root, miniature.shard_entries(5, shard), shard)


ARCHIVES = {
    "objects365": (miniature.objects365_v2, 3),
    "goldg": (miniature.goldg, 4),
    "lvis": (miniature.lvis, 1),
    "coco": (miniature.coco2017, 2),
    "odinw": (write_odinw, None),
    "conceptual_captions": (webdataset, 6),
    "imagenet": (miniature.imagenet, 13),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_as_it_was_published(name, tmp_path, capsys):
    write, count = ARCHIVES[name]
    if name == "conceptual_captions":
        try:
            phrases.load()
        except UserError as error:
            pytest.skip(f"no English spaCy pipeline: {error}")
    write(tmp_path / "from")
    arguments = (name, f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}", "--jobs=1")
    assert command(*arguments) == 0
    source = Source.open(tmp_path / "to")
    assert len(source) == count or count is None and len(source) > 2
    assert f"  records{'':<29}{len(source):>10,}" in capsys.readouterr().out
    assert command(*arguments) == 0
    assert "already prepared" in capsys.readouterr().out


def test_options_of_a_reader_belong_to_the_inputs(tmp_path, capsys):
    miniature.objects365_v2(tmp_path / "from")
    to = f"--to={tmp_path / 'to'}"
    arguments = ("objects365", f"--from={tmp_path / 'from'}", to, "--jobs=1")
    assert command(*arguments, "--subset=2") == 0
    assert Source.open(tmp_path / "to").info["dropped"]["images: not in the subset"] == 2
    assert command(*arguments) == 2
    assert "other files or options" in capsys.readouterr().err
    assert command(*arguments, "--overwrite") == 0
    assert len(Source.open(tmp_path / "to")) == 3


def test_roboflow(tmp_path, capsys):
    miniature.roboflow(tmp_path / "from")
    to = f"--to={tmp_path / 'to'}"
    assert command("custom", f"--from={tmp_path / 'from'}", to, "--jobs=1") == 0
    assert len(Source.open(tmp_path / "to" / "detection")) == 2
    printed = capsys.readouterr().out
    assert printed.count("skipped, its name says that it is for evaluation") == 1
    assert "images for validation with" in printed


def test_minival(tmp_path, capsys):
    _, val = miniature.lvis(tmp_path / "from")
    to = tmp_path / "minival.json"
    assert command("minival", f"--from={val}", f"--to={to}") == 0
    assert to.is_file() and "images" in capsys.readouterr().out
    assert command("minival", f"--from={tmp_path}/none.json", f"--to={to}") == 2
    assert "no such file" in capsys.readouterr().err


def test_captions_in_shards_or_next_to_folders_of_images(tmp_path):
    webdataset(tmp_path / "cc")
    (tmp_path / "cc" / "cc12m.tsv").write_text("http://a.b/c.jpg\ta caption\n")
    source = registry.SOURCES["conceptual_captions"]
    assert source.files(tmp_path / "cc") == [tmp_path / "cc"]
    assert source.open_all(tmp_path / "cc")[0].kind == "image_text"
    (tmp_path / "cc" / "cc12m.tsv").unlink()
    assert registry.discover(tmp_path / "cc") == ({"image_text": [tmp_path / "cc"]}, {})
    (tmp_path / "mine" / "2021").mkdir(parents=True)  # images by year are not shards
    assert registry.discover(tmp_path / "mine") == ({}, {})
    pairs = tmp_path / "mine" / "pairs.jsonl"
    pairs.write_text('{"image": "2021/a.jpg", "caption": "a cat"}\n')
    assert registry.discover(tmp_path / "mine") == ({"image_text": [pairs]}, {})


def test_the_fingerprint_of_a_folder_of_shards_depends_on_its_files(tmp_path):
    webdataset(tmp_path)
    images = registry.image_folder(tmp_path, "image_text")
    before = registry.fingerprint([tmp_path], images, None)
    assert before == registry.fingerprint([tmp_path], images, None)
    (tmp_path / "00002.tar").write_bytes(b"more")
    assert before != registry.fingerprint([tmp_path], images, None)


def test_a_missing_pipeline_is_noticed_before_anything_is_drawn(tmp_path, capsys):
    """Not after a minute of work on the kinds that need none."""
    line = ["symbols", f"--to={tmp_path / 'to'}", "--spacy_model=xx_none"]
    assert command(*line) == 2
    assert "xx_none is not installed" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()
