"""The vocabulary of several sources, against merging their texts in Python."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from detclipv2_jax.data.index import Source
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text import tokenizer


def source(names, *, kind="detection", captions=()) -> Source:
    """A source in memory that has concepts and no records."""
    none = np.zeros(0, np.int32)
    result = Source(
        directory=Path("nowhere"),
        name="s",
        kind=kind,
        info={},
        height=none,
        width=none,
        positives_offsets=np.zeros(1, np.int64),
        positives=none,
        tokens=tokenizer.pack_tokens(tokenizer.tokenize(names)),
        keys=tokenizer.keys(names),
        vocabulary=np.array([name not in captions for name in names], bool),
    )
    result.__dict__["concepts"] = [{"name": name} for name in names]
    return result


def test_vocabulary_merges_by_text():
    sources = {
        "boxes": source(["cat", "dog", "bus"]),
        "phrases": source(["red cat", "dog"], kind="grounding"),
        "pairs": source(
            ["a dog runs", "dog", "bus", "red cat"], kind="image_text", captions=["a dog runs"]
        ),
    }
    vocabulary = Vocabulary(sources)
    assert len(vocabulary) == 5
    for name, one in sources.items():
        ids = vocabulary.local_to_global[name]
        assert ids.dtype == np.int32
        texts = [row["name"] for row in one.concepts]
        assert vocabulary.names(ids) == texts
        np.testing.assert_array_equal(vocabulary.tokens(ids), tokenizer.tokenize(texts))
        np.testing.assert_array_equal(vocabulary.lookup(texts), ids)
    assert sorted(vocabulary.names(vocabulary.pool("detection"))) == ["bus", "cat", "dog"]
    assert sorted(vocabulary.names(vocabulary.pool("image_text"))) == ["bus", "dog", "red cat"]
    assert vocabulary.pool("nothing").shape == (0,)
    turned = Vocabulary(dict(reversed(sources.items())))
    for name in sources:
        np.testing.assert_array_equal(
            turned.local_to_global[name], vocabulary.local_to_global[name]
        )


def test_vocabulary_edges():
    vocabulary = Vocabulary({"a": source(["cat", "dog"]), "none": source([])})
    tokens = vocabulary.tokens(np.array([-1, 0, -1]))
    assert not tokens[[0, 2]].any() and tokens[1, 0] == 49406
    assert vocabulary.names(np.array([-1])) == [""]
    assert vocabulary.lookup(["unheard of"]).tolist() == [-1]
    assert vocabulary.tokens(np.zeros(0, int)).shape == (0, 16)
    for wrong in (2, -2):
        with pytest.raises(IndexError, match="-1 … 1"):
            vocabulary.tokens(np.array([wrong]))
    empty = Vocabulary({})
    assert len(empty) == 0 and empty.pool("detection").size == 0
    assert empty.lookup(["cat"]).tolist() == [-1]


def test_vocabulary_of_many_concepts():
    """Half a million a source, half of them shared, by arrays alone."""
    rng = np.random.default_rng(0)
    keys = rng.permutation(np.unique(rng.integers(0, 2**63, 750_000, dtype=np.uint64)))
    third = len(keys) // 3

    def big(part):
        tokens = np.zeros((len(part), 16), np.uint16)
        tokens[:, :4] = part[:, None].view(np.uint16)  # so that each concept's tokens tell its key
        mask = np.ones(len(part), bool)
        return dataclasses.replace(source([]), keys=part, tokens=tokens, vocabulary=mask)

    parts = {"a": keys[: 2 * third], "b": keys[third:]}
    vocabulary = Vocabulary({name: big(part) for name, part in parts.items()})
    assert len(vocabulary) == len(keys)
    for name, part in parts.items():
        some = rng.integers(0, len(part), 1000)
        ids = vocabulary.local_to_global[name][some]
        assert len(np.unique(vocabulary.local_to_global[name])) == len(part)
        tokens = vocabulary.tokens(ids)[:, :4].astype(np.uint16)
        np.testing.assert_array_equal(
            np.ascontiguousarray(tokens).view(np.uint64)[:, 0], part[some]
        )
