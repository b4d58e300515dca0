"""Text to tokens: CLIP's tokenizer, the normal form of a concept, and names with definitions.

A concept is a short text that the text tower encodes: a category name, a noun phrase or a whole
caption. Two concepts are the same if their normalized texts are; a 64-bit key identifies them.
"""

import functools
import gzip
import hashlib
import html
import string
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from jaxtyping import Int, Int32, UInt16, UInt64
from tokenizers import Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers

from detclipv2_jax.common.errors import UserError

CONTEXT = 16  # tokens per concept, start and end included (Yao et al. 2023, §4.1)
VOCABULARY_SIZE = 49408
START, END = 49406, 49407
TEMPLATE = "{name}, {definition}"  # how a name and its definition are joined [ours]
_MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
# CLIP's word pattern without its two special tokens, which are added, never read from a text.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_CHUNK = 65536  # texts given to the tokenizer at once: bounds its memory


def normalize(text: str) -> str:
    """Return a text as CLIP cleans it.

    ftfy fixes encodings, quotes and Unicode forms; then HTML is unescaped twice, spaces become
    single, and letters lower case.
    """
    if not (text.isascii() and text.isprintable()):  # in such text ftfy would only unescape HTML
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def enriched(name: str, definition: str | None, template: str = TEMPLATE) -> str:
    """Return the text to encode: a name, joined with its definition if it has one.

    This is the concept enrichment of Yao et al. 2022 (DetCLIP).
    """
    return template.format(name=name, definition=definition) if definition else name


def check_template(template: str, where: str) -> None:
    """Raise `UserError` unless a template has {name} and {definition}, each once, and no other
    field; `where` names the config field."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        parts = []
    if sorted(parts) != [("definition", "", None), ("name", "", None)]:
        raise UserError(
            f"{where} is {template!r}. It must contain {{name}} and {{definition}}, each once, "
            f"like {TEMPLATE!r}."
        )


def key(text: str) -> int:
    """Return a stable 64-bit key of a text, the same for any case, spacing or HTML escapes."""
    digest = hashlib.blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def keys(texts: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """Return the `key` of each text."""
    return np.fromiter((key(text) for text in texts), np.uint64, len(texts))


def byte_characters() -> list[str]:
    """Return the characters that represent the 256 bytes in byte-level BPE, in CLIP's order.

    Printable Latin-1 bytes represent themselves and come first; the others use the code points
    from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@functools.cache
def tokenizer() -> Tokenizer:
    """Return CLIP's byte-level BPE, numbered like OpenAI's, without start and end tokens.

    Its vocabulary: 256 bytes, 256 bytes that end a word, 48,894 merges, then two special tokens.
    """
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")
    characters = byte_characters()
    merges = [
        tuple(line.split()) for line in lines[1 : VOCABULARY_SIZE - 2 - 2 * len(characters) + 1]
    ]
    pieces = characters + [c + "</w>" for c in characters] + ["".join(pair) for pair in merges]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        end_of_word_suffix="</w>",
    )
    result = Tokenizer(model)
    result.normalizer = normalizers.Lowercase()
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return result


def tokenize(texts: Sequence[str], context: int = CONTEXT) -> Int32[np.ndarray, "n {context}"]:
    """Return the token ids of each text: start, its tokens, end, then zeros.

    A text that is too long keeps its first `context - 2` tokens: the text tower reads its feature
    at the end token, so there must be one. An empty text is start and end.
    """
    rows = np.zeros((len(texts), context), np.int32)
    rows[:, 0] = START
    for begin in range(0, len(texts), _CHUNK):
        for row, encoding in zip(rows[begin:], _encode(texts[begin : begin + _CHUNK])):
            ids = encoding.ids[: context - 2]
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = END
    return rows


def kept(texts: Sequence[str], context: int = CONTEXT) -> list[str]:
    """Return each text, normalized, as far as `tokenize` keeps it; a cut letter is left out."""
    found = [_valid(text) for text in texts]
    for number, encoding in enumerate(_encode(texts)):
        if len(encoding.ids) > context - 2:
            # The fast encoding has no offsets.
            offsets = tokenizer().encode(found[number]).offsets
            end, next_start = offsets[context - 3][1], offsets[context - 2][0]
            found[number] = found[number][: min(end, next_start)].rstrip()
    return found


def _encode(texts: Sequence[str]) -> list[Encoding]:
    return tokenizer().encode_batch_fast([_valid(text) for text in texts])


def _valid(text: str) -> str:
    # The tokenizer does not accept lone surrogates, which come from broken \u escapes in JSON.
    return normalize(text).encode("utf-8", "replace").decode("utf-8")


def fitted(
    names: Sequence[str],
    definitions: Sequence[str | None],
    template: str = TEMPLATE,
    context: int = CONTEXT,
) -> list[str]:
    """Return `enriched` texts of at most `context - 2` tokens, so that `tokenize` cuts nothing.

    Of a definition that is too long, as many whole words are kept as fit; if none fits, the text is
    the bare name. A name that is too long by itself stays whole, and `tokenize` cuts it.
    """
    names = [normalize(name) for name in names]
    words = [normalize(definition or "").split() for definition in definitions]
    lengths: dict[str, int] = {}
    # Binary search for all texts at once: `kept` words fit (0: the bare name), more than `most` do
    # not.
    kept = np.zeros(len(words), int)
    most = np.array([min(len(row), context - 2) for row in words], int)
    while (open_ := np.flatnonzero(kept < most)).size:
        middle = (kept[open_] + most[open_] + 1) // 2
        texts = [_joined(names[i], words[i][:n], template) for i, n in zip(open_, middle)]
        fits = _lengths(texts, lengths) <= context - 2
        kept[open_[fits]], most[open_[~fits]] = middle[fits], middle[~fits] - 1
    return [_joined(name, row[:n], template) for name, row, n in zip(names, words, kept)]


def _joined(name: str, words: Sequence[str], template: str) -> str:
    # A comma or an open bracket at the cut is removed too.
    return enriched(name, " ".join(words).rstrip(" ,;:([-"), template)


def _lengths(texts: Sequence[str], known: dict[str, int]) -> Int[np.ndarray, " n"]:
    """Return the number of tokens of each text, without start and end; `known` caches its words.

    No token crosses a space, so the tokens of a text are those of its words.
    """
    rows = [text.split() for text in texts]
    new = list({word for row in rows for word in row} - known.keys())
    known.update(zip(new, (len(encoding.ids) for encoding in _encode(new))))
    return np.array([sum(map(known.__getitem__, row)) for row in rows], int)


def pack_tokens(rows: Int32[np.ndarray, "n 16"]) -> UInt16[np.ndarray, "n 16"]:
    """Return token ids as uint16, as they are stored; the largest id is 49,407."""
    if rows.size and rows.max() >= VOCABULARY_SIZE:
        raise UserError("A token id is outside CLIP's vocabulary: make the tokens with `tokenize`.")
    return rows.astype(np.uint16)
