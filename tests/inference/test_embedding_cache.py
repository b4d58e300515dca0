"""Text embeddings on disk: read again, replaced when damaged, never of another model or text."""

import jax
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.cache import user_directory
from detclipv2_jax.inference import predictor as predictor_lib
from detclipv2_jax.inference.embedding_cache import (
    EmbeddingCache,
    text_tower_digest,
)
from detclipv2_jax.inference.predictor import Predictor

NAMES = [f"thing {n}" for n in range(80)]


def fresh(cache, change=0.0, seed=0):
    graphdef, params = tiny_model.parts(seed)
    if change:
        params = jax.tree.map(lambda a: a + change, params)
    return Predictor(graphdef, params, canvas=tiny_model.CANVAS, cache=cache)


@pytest.fixture
def calls(monkeypatch):
    """A list with one entry per call of the text tower."""
    calls, encode = [], predictor_lib._compiled_encode_text
    monkeypatch.setattr(
        predictor_lib, "_compiled_encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    return calls


def test_names_are_encoded_once_for_all_predictors(tmp_path, calls):
    wanted = fresh(None).encode(NAMES)
    first = fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES)
    again = fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES)
    assert len(calls) == 2 and len(list((tmp_path / "new").iterdir())) == 1
    for found in (first, again):
        np.testing.assert_array_equal(found.embeddings, wanted.embeddings)
    fresh(EmbeddingCache(tmp_path / "new")).encode(NAMES[:10])  # too few for the cache
    assert len(calls) == 3 and len(list((tmp_path / "new").iterdir())) == 1


def test_other_texts_and_other_parameters_have_other_files(tmp_path, calls):
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
        assert len(calls) == number == len(list(tmp_path.iterdir()))
    changing = fresh(cache)
    changing.encode(NAMES)
    changing.params = fresh(None, change=1e-3).params
    np.testing.assert_array_equal(
        changing.encode(NAMES).embeddings, fresh(None, change=1e-3).encode(NAMES).embeddings
    )


def test_digest_depends_on_the_text_tower_alone():
    _, params = tiny_model.parts()
    digest = text_tower_digest(tiny_model.CONFIG, params)
    other = {name: jax.tree.map(lambda a: a + 1, part) for name, part in params.items()}
    assert text_tower_digest(tiny_model.CONFIG, {**other, "text": params["text"]}) == digest
    assert text_tower_digest(tiny_model.CONFIG, {**params, "text": other["text"]}) != digest
    for field, value in {"dtype": "bfloat16", "similarity": "dot"}.items():
        config = tiny_model.CONFIG.to_dict() | {field: value}
        assert text_tower_digest(type(tiny_model.CONFIG).from_dict(config), params) != digest


@pytest.mark.parametrize("damage", ["empty", "half", "bit", "other rows", "text"])
def test_a_damaged_file_is_replaced(tmp_path, damage, calls):
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
    assert len(calls) == 2  # the second reads the new file


def test_one_warning_if_the_directory_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache(tmp_path / "file" / "below")
    predictor = fresh(cache)
    wanted = fresh(None).encode(NAMES).embeddings
    np.testing.assert_array_equal(predictor.encode(NAMES).embeddings, wanted)
    predictor.encode([f"more {n}" for n in range(80)])
    warning = capsys.readouterr().err
    assert (
        warning.startswith("warning: text embeddings are not cached: ") and warning.count("\n") == 1
    )


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_directory() == tmp_path / "detclipv2_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_directory().parts[-2:] == (".cache", "detclipv2_jax")
