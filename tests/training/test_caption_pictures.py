"""The pictures of captions that an evaluation in training draws."""

import jax
import numpy as np
import pytest
import tiny_model
import tiny_run
from PIL import Image

from detclipv2_jax.data.index import Source
from detclipv2_jax.data.reader import RecordFiles
from detclipv2_jax.training import caption_pictures, sharding
from detclipv2_jax.training.caption_pictures import CaptionPictures


@pytest.fixture(scope="module")
def source(made_once):
    return Source.open(made_once("symbols", tiny_run.prepare) / "image_text")


def test_pairs_are_spread_over_the_sources_and_have_phrases(source):
    pairs = list(caption_pictures._read({"a": source, "b": source}, 6))
    ids = [pair.image_id for pair in pairs]
    # Of twice 40 records; the images are numbered from 1.
    assert ids == [f"{number:09d}.jpg" for number in (1, 17, 33, 8, 24, 40)]
    for pair in pairs:
        assert pair.phrases and all(phrase in pair.caption for phrase in pair.phrases)
    again = list(caption_pictures._read({"a": source, "b": source}, 6))
    assert [pair.image_id for pair in again] == ids
    assert len(list(caption_pictures._read({"a": source}, 10_000))) <= len(source)


def test_a_record_without_a_phrase_is_skipped():
    class Records(list):
        def positives_of(self, record):
            return self[record]

    source = Records([[1, 2], [3], [4], [5, 6, 7], *[[8]] * 200])
    assert [caption_pictures._with_phrase(source, n) for n in (0, 1, 3, 4)] == [0, 3, 3, None]


def test_unreadable_records_and_no_sources(source, monkeypatch):
    assert (
        list(caption_pictures._read({}, 8)) == [] == list(caption_pictures._read({"a": source}, 0))
    )
    monkeypatch.setattr(RecordFiles, "read", lambda self, name, numbers: [b"damaged"])
    assert list(caption_pictures._read({"a": source}, 8)) == []
    monkeypatch.setattr(RecordFiles, "read", lambda self, name, numbers: [None])
    assert list(caption_pictures._read({"a": source}, 8)) == []


def test_picture(source, tmp_path):
    graphdef, params = tiny_model.parts()
    mesh = sharding.make_mesh(1, 1)
    draw = CaptionPictures({"a": source}, 3, (64, 64), mesh)
    assert draw(graphdef, params, tmp_path / "folder" / "a.png") is None
    with Image.open(tmp_path / "folder" / "a.png") as picture:
        assert picture.width > 3 * 480 and picture.height > 480
        first = np.asarray(picture)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    draw(graphdef, other, tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size != first.shape[1::-1] or (np.asarray(picture) != first).any()
    draw(graphdef, params, None)
    CaptionPictures({}, 3, (64, 64), mesh)(graphdef, params, tmp_path / "none.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.png", "folder"]
