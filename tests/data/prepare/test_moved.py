"""A prepared source is recognized after its checkout was moved, copied or linked."""

import copy
import json
import shutil

import pytest
from miniature_archives import coco, write_images, write_json

from detclipv2_jax import prepare
from detclipv2_jax.data.prepare.moved import same_inputs

STORED = {"images": ["/old/in/images", "/old/in"], "files": {"/old/in/a.json": "d1"}}


def make(root):
    root.mkdir()
    write_images(root)
    write_json(root / "train.json", coco(["0.jpg", "1.jpg"]))


def run(root, to, capsys):
    assert prepare.main(["coco", f"--from={root}", f"--to={to}", "--jobs=1"]) == 0
    return capsys.readouterr().out


def test_moved_copied_and_linked(tmp_path, monkeypatch, capsys):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / "in")
    assert "records" in run(tmp_path / "a/in", tmp_path / "a/to", capsys)
    # The absolute paths of another machine, as older versions stored them.
    info = tmp_path / "a/to/info.json"
    assert str(tmp_path / "a/in") in json.dumps(json.loads(info.read_text())["created_from"])
    (tmp_path / "a").rename(tmp_path / "b")
    assert "already prepared" in run(tmp_path / "b/in", tmp_path / "b/to", capsys)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    (tmp_path / "link").symlink_to("c")
    monkeypatch.chdir(tmp_path)
    for root in ("c", "link", "./c/"):
        assert "already prepared" in run(f"{root}/in", f"{root}/to", capsys)
    (tmp_path / "c/in/train.json").write_text((tmp_path / "c/in/train.json").read_text() + " ")
    assert prepare.main(["coco", "--from=c/in", "--to=c/to"]) == 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"images": ["/new/in/images", "/new/in"], "files": {"/new/in/a.json": "d1"}}, True),
        ({"files": {"/new/in/a.json": "d1"}}, True),  # the same images
        ({"files": {"/old/in/a.json": "d2"}}, False),
        ({"images": ["/elsewhere"]}, False),
        ({"images": ["/new/x/images", "/new/x"], "files": {"/new/in/a.json": "d1"}}, False),
        ({"store_side": 448}, False),
        ({"files": {"/old/in/a.json": "d1", "/old/in/b.json": "d1"}}, False),
    ],
)
def test_same_inputs(change, same):
    assert same_inputs(STORED, copy.deepcopy(STORED) | change) is same
    assert not same_inputs(None, STORED) and not same_inputs({"files": 3}, STORED)
