"""Preparation empties and replaces its own folders, and no folder of somebody else."""

import json

import numpy as np
import pytest
from PIL import Image

from detclipv2_jax import prepare
from detclipv2_jax.common import atomic
from detclipv2_jax.data.index import Source, is_source
from detclipv2_jax.data.prepare import own_folders


@pytest.fixture
def photos(tmp_path):
    """A folder with two photos and their boxes, one of them for validation."""
    folder = tmp_path / "photos"
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(("train", "val")):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
        content = {
            "images": [{"id": 1, "file_name": f"{name}.png", "height": 40, "width": 48}],
            "annotations": [
                {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400}
            ],
            "categories": [{"id": 1, "name": "cat"}],
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def command(photos, to, *options):
    return prepare.main(["custom", f"--from={photos}", f"--to={to}", "--jobs=1", *options])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["detection.partial", "validation.partial", "validation"])
@pytest.mark.parametrize("file", ["thesis.txt", "shards/0.npz", "images/1.jpg", "stamp.json"])
def test_a_folder_of_somebody_else_is_not_emptied(photos, tmp_path, capsys, where, file):
    own = tmp_path / "to" / where / file
    own.parent.mkdir(parents=True)
    own.write_text('{"of": "mine"}')
    assert command(photos, tmp_path / "to", "--overwrite") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'to' / where}: is in the way")
    assert own.read_text() == '{"of": "mine"}'


def test_overwrite_replaces_sources_only(photos, tmp_path, capsys):
    to = tmp_path / "to"
    (to / "detection").mkdir(parents=True)
    own = to / "detection" / "info.json"
    for text in (
        '{"name": "my app"}',
        "[1]",
        '{"format": 2, "concepts": 9}',
        "{",
        '{"format": "x"}',
    ):
        own.write_text(text)
        assert not is_source(to / "detection")
        assert command(photos, to, "--overwrite") == 2
        assert "not a prepared source" in capsys.readouterr().err
        assert own.read_text() == text


def test_a_source_is_replaced_also_a_damaged_or_old_one(photos, tmp_path, capsys):
    to = tmp_path / "to"
    assert command(photos, to) == 0
    info = to / "detection" / "info.json"
    for text in ("{", json.dumps(json.loads(info.read_text()) | {"format": 1})):
        info.write_text(text)
        assert is_source(to / "detection")
        assert command(photos, to, "--overwrite") == 0
        assert len(Source.open(to / "detection")) == 1
    assert sorted(path.name for path in to.iterdir()) == ["detection", "validation"]


def test_what_a_killed_preparation_left_is_used(photos, tmp_path, capsys):
    """A lock alone, or a stamp with anything."""
    for name in ("detection", "validation"):
        partial = own_folders.make_partial(tmp_path / "to" / name)
        (partial / "lock").touch()
        (partial / ".stamp.json.77.partial").touch()
    assert command(photos, tmp_path / "to") == 0
    for name in ("detection", "validation"):
        partial = own_folders.empty_partial(tmp_path / "other" / name, {"inputs": {"of": "others"}})
        (partial / "merged").mkdir()
        (partial / "merged" / "tokens.npy").touch()
    assert command(photos, tmp_path / "other") == 0
    for to in ("to", "other"):
        names = sorted(path.name for path in (tmp_path / to).iterdir())
        assert names == ["detection", "validation"]


def test_replacing_a_folder_keeps_a_copy_of_the_users(tmp_path):
    for name in ("new", "data", "data.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    atomic.replace_directory(tmp_path / "new", tmp_path / "data")
    found = {path.parent.name: text.decode() for path, text in contents(tmp_path).items()}
    assert found == {"data": "new", "data.old": "data.old"}
