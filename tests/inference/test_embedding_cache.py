"""Text embeddings on disk: found again, made anew when damaged, and never wrong."""

import jax
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.inference import embedding_cache
from detclipv2_jax.inference import predictor as predictor_lib
from detclipv2_jax.inference.embedding_cache import EmbeddingCache
from detclipv2_jax.inference.predictor import Predictor

NAMES = [f"thing {n}" for n in range(80)]


def fresh(cache, change=0.0, seed=0):
    graphdef, params = tiny_model.parts(seed)
    if change:
        params = jax.tree.map(lambda a: a + change, params)
    return Predictor(graphdef, params, canvas=tiny_model.CANVAS, cache=cache)


@pytest.fixture
def asked(monkeypatch):
    """One entry for each pass through the text tower."""
    passes, encode = [], predictor_lib._encode_text
    monkeypatch.setattr(
        predictor_lib, "_encode_text", lambda *a, **k: passes.append(1) or encode(*a, **k)
    )
    return passes


def test_a_vocabulary_is_encoded_once_for_all_processes(tmp_path, asked):
    wanted = fresh(None).encode(NAMES)
    first = fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES)
    again = fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES)
    assert len(asked) == 2 and len(list((tmp_path / "new").iterdir())) == 1
    for found in (first, again):
        np.testing.assert_array_equal(found.embeddings, wanted.embeddings)
    fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES[:10])  # sooner than reading
    assert len(asked) == 3 and len(list((tmp_path / "new").iterdir())) == 1


def test_other_texts_and_other_towers_have_other_files(tmp_path, asked):
    cache = EmbeddingCache(tmp_path)
    for number, ask in enumerate(
        (
            lambda: fresh(cache).encode(NAMES),
            lambda: fresh(cache).encode(NAMES[::-1]),
            lambda: fresh(cache).encode(NAMES[1:]),
            lambda: fresh(cache, change=1e-3).encode(NAMES),
        ),
        start=1,
    ):
        ask()
        assert len(asked) == number == len(list(tmp_path.iterdir()))
    changing = fresh(cache)
    changing.encode(NAMES)
    changing.params = fresh(None, change=1e-3).params
    np.testing.assert_array_equal(
        changing.encode(NAMES).embeddings, fresh(None, change=1e-3).encode(NAMES).embeddings
    )


def test_the_key_depends_on_the_text_tower_alone():
    _, params = tiny_model.parts()
    key = embedding_cache.tower_key(tiny_model.CONFIG, params)
    other = {name: jax.tree.map(lambda a: a + 1, part) for name, part in params.items()}
    assert embedding_cache.tower_key(tiny_model.CONFIG, {**other, "text": params["text"]}) == key
    assert embedding_cache.tower_key(tiny_model.CONFIG, {**params, "text": other["text"]}) != key
    for field, value in {"dtype": "bfloat16", "similarity": "dot"}.items():
        config = tiny_model.CONFIG.to_dict() | {field: value}
        assert embedding_cache.tower_key(type(tiny_model.CONFIG).from_dict(config), params) != key


@pytest.mark.parametrize("damage", ["empty", "half", "bit", "other rows", "text"])
def test_a_damaged_file_is_made_anew(tmp_path, damage, asked):
    wanted = fresh(EmbeddingCache(tmp_path)).encode(NAMES).embeddings
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if damage == "other rows":
        EmbeddingCache(tmp_path)._save(path, np.zeros((3, 8), np.float32))
    else:
        content[-5] ^= 1
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "bit": content, "text": b"{}"}[
                damage
            ]
        )
    for _ in range(2):
        found = fresh(EmbeddingCache(tmp_path)).encode(NAMES).embeddings
        np.testing.assert_array_equal(found, wanted)
    assert len(asked) == 2  # mended


def test_a_place_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "below")
    predictor = fresh(cache)
    wanted = fresh(None).encode(NAMES).embeddings
    np.testing.assert_array_equal(predictor.encode(NAMES).embeddings, wanted)
    predictor.encode([f"more {n}" for n in range(80)])
    said = capsys.readouterr().err
    assert said.startswith("warning: text embeddings are not kept: ") and said.count("\n") == 1


def test_the_usual_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert embedding_cache.default_directory() == tmp_path / "detclipv2_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedding_cache.default_directory().parts[-2:] == (".cache", "detclipv2_jax")
