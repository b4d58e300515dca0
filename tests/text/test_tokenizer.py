"""Tokens against hand-checked ids of CLIP and against a plain byte-pair encoding."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text import tokenizer

ASSETS = Path(tokenizer.__file__).parent / "assets"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("A  Photo\tof a\nCAT ", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("", []),
        (" \n", []),
    ],
)
def test_known_ids(text, ids):
    expected = np.zeros(16, int)
    expected[: len(ids) + 2] = [49406, *ids, 49407]
    np.testing.assert_array_equal(tokenizer.tokenize([text])[0], expected)


def test_vocabulary_layout():
    vocabulary = tokenizer.tokenizer().get_vocab()
    assert sorted(vocabulary.values()) == list(range(49406))
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256
    assert vocabulary["in"] == 512  # the first merge
    assert vocabulary["a</w>"] == 320
    characters = tokenizer.byte_characters()
    assert len(set(characters)) == 256 and not any(c.isspace() for c in characters)


def naive_ids(text: str) -> list[int]:
    """Byte-pair encoding as published: merge the pair of best rank until none is left."""
    with gzip.open(ASSETS / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    ranks = {tuple(line.split()): i for i, line in enumerate(lines)}
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [b for b in range(256) if b not in order]
    character = {b: chr(b) for b in order[:188]}
    character |= {b: chr(256 + i) for i, b in enumerate(order[188:])}
    ids = {character[b]: i for i, b in enumerate(order)}
    ids |= {character[b] + "</w>": 256 + i for i, b in enumerate(order)}
    ids |= {"".join(pair): 512 + i for pair, i in ranks.items()}
    found = []
    words = re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+", text.lower())
    for word in words:
        pieces = [character[b] for b in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = list(zip(pieces, pieces[1:]))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
        found += [ids[piece] for piece in pieces]
    return found


def test_against_plain_bpe():
    texts = [
        "it's a dog's life, isn't it? we'll see: they've 42 umbrellas_and___more...",
        "Straßenbahn CAFÉ 日本語 naïve 🙂🙂 ☂ umbrella ♞!!",
        "don't  supercalifragilisticexpialidocious 2023-04 O'Neill's",
        "<|startoftext|> and <|endoftext|> are words here",
    ]
    rng = np.random.default_rng(0)
    alphabet = list("abcdefgh etaoin shrdlu'.,!-_0189éßñ日🙂")
    texts += ["".join(rng.choice(alphabet, 30)) for _ in range(20)]
    for text, row in zip(texts, tokenizer.tokenize(texts, context=120)):
        end = int(row.argmax())
        assert row[1:end].tolist() == naive_ids(text), text


def test_every_row_is_well_formed():
    """Start, at most 14 tokens, one end, zeros: whatever the text."""
    texts = ["x", "word " * 50, "a" * 100_000, "\0\x07", "\ud800 broken", "&amp;amp;", "🙂" * 40]
    rows = tokenizer.tokenize(texts)
    assert rows.shape == (len(texts), 16) and rows.dtype == np.int32
    for row in rows:
        end = int(row.argmax())
        assert row[0] == 49406 and row[end] == 49407 and 1 <= end <= 15
        assert not (row[1:end] >= 49406).any() and not row[end + 1 :].any()
    assert rows[1, 15] == 49407 and (rows[1, 1:15] == rows[1, 1]).all()
    np.testing.assert_array_equal(rows[5], tokenizer.tokenize(["&"])[0])
    assert tokenizer.tokenize([]).shape == (0, 16)
    np.testing.assert_array_equal(tokenizer.pack_tokens(rows), rows)


def test_key_is_stable_and_blind_to_spelling():
    # BLAKE2b of "cat", 8 bytes, little-endian: prepared sources on disk depend on it.
    assert tokenizer.key("cat") == 0x2F989D7B2CDD2733
    for same in ("CAT", "  cat ", "c&#97;t", "cat\n"):
        assert tokenizer.key(same) == tokenizer.key("cat")
    many = [f"concept {i}" for i in range(10_000)]
    values = tokenizer.keys(many)
    assert values.dtype == np.uint64 and len(np.unique(values)) == len(many)
    assert tokenizer.key("é") == tokenizer.key("e\u0301")


def test_enriched():
    assert tokenizer.enriched("bat", None) == "bat"
    assert tokenizer.enriched("bat", "a flying mammal") == "bat, a flying mammal"


def naive_fit(name: str, definition: str, template: str) -> str:
    """Word by word from the longest down, each tried in the plain BPE."""
    words = definition.split()
    for count in range(len(words), 0, -1):
        part = " ".join(words[:count]).rstrip(" ,;:([-")
        if part:
            text = template.format(name=name, definition=part)
            if len(naive_ids(text)) <= 14:
                return text
    return name


@pytest.mark.parametrize("template", [tokenizer.TEMPLATE, "{definition}: a {name}."])
def test_fitted_keeps_as_many_whole_words_as_fit(template):
    pairs = [
        ("aerosol can", "a dispenser that holds a substance under pressure"),
        ("bus", "a vehicle carrying many passengers; used for public transport, mostly in cities"),
        ("cat", "short"),
        ("supercalifragilistic thing", "of antidisestablishmentarianism and pneumonia, really"),
        ("x", "w" * 300 + " more"),
        ("x", "- , ( ; :"),
        ("🙂", "a face that smiles, and smiles, and smiles, and smiles (and smiles)"),
        ("don't", "it's what isn't, we'll see 1234 5678 9012 3456"),
    ]
    for length in range(1, 16):
        pairs.append(("a " * length + "b", "some words of which there are rather many in here now"))
    names, definitions = zip(*[(name.strip(), definition) for name, definition in pairs])
    expected = [naive_fit(*pair, template) for pair in zip(names, definitions)]
    assert tokenizer.fitted(names, definitions, template) == expected
    assert sum(text == name for text, name in zip(expected, names)) >= 3  # edges are among them


def test_fitted_edges():
    long = "word " * 40
    assert tokenizer.fitted([], []) == []
    assert tokenizer.fitted([" Cat "], [None]) == ["cat"] == tokenizer.fitted(["cat"], [""])
    assert tokenizer.fitted([long], ["a definition"]) == [long.strip()]
    row = tokenizer.tokenize(tokenizer.fitted([long], ["a definition"]))[0]
    np.testing.assert_array_equal(row, tokenizer.tokenize([long])[0])
    assert tokenizer.fitted(["cat"], ["a b c d"], context=6) == ["cat, a b"]
    broken = tokenizer.fitted(["\ud800 cat"], ["a \ud800 thing"])
    assert tokenizer.tokenize(broken).shape == (1, 16)


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{name}",
        "{definition}",
        "{name}, {definition}, {name}",
        "{name}, {meaning}",
        "{name!r}, {definition}",
        "{name:>9}, {definition}",
        "{name.__class__}, {definition}",
        "{}, {}",
        "{name, {definition}",
        "{name}, {definition} {",
    ],
)
def test_templates_that_make_no_sense(template):
    with pytest.raises(UserError, match="^config.data.template is .*each once"):
        tokenizer.check_template(template, "config.data.template")


def test_templates_that_make_sense():
    for template in (tokenizer.TEMPLATE, "{definition} ({name})", "{{{name}}} {definition}"):
        tokenizer.check_template(template, "here")
