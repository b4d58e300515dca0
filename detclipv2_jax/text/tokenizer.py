"""Concepts: text to tokens, and the dictionaries of several sources merged without their strings.

A concept is a short text that the text tower encodes: a category name, a noun phrase, a whole
caption. Inside a prepared source it is a *local* id, the line number in `concepts.jsonl`; across
the sources of a run it is a *global* id, which `Dictionary` gives from 64-bit keys of normalized
texts.
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

CONTEXT = 16  # tokens a concept, start and end included (paper.md §2)


VOCABULARY = 49408


START, END = 49406, 49407


TEMPLATE = "{name}, {definition}"  # of a name with its definition; ours: the paper gives none


_MERGES = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"


# CLIP's word pattern without its two special tokens: those are put around a text, never read in it.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


_CHUNK = 65536  # texts handed to the tokenizer at once: bounds its memory


def normalize(text: str) -> str:
    """A concept as CLIP cleans text: by ftfy (NFC, straight quotes, mended encodings, …), HTML
    unescaped twice, single spaces, lower case."""
    if not (text.isascii() and text.isprintable()):  # in which ftfy finds nothing but HTML to mend
        text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text))
    return " ".join(text.split()).lower()


def enriched(name: str, definition: str | None, template: str = TEMPLATE) -> str:
    """The text that is encoded: a name, joined with its definition if it has one (paper.md §1)."""
    return template.format(name=name, definition=definition) if definition else name


def check_template(template: str, where: str) -> None:
    """`UserError` unless a template names {name} and {definition}, each once and nothing else."""
    try:
        parts = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError:
        parts = []
    if sorted(parts) != [("definition", "", None), ("name", "", None)]:
        raise UserError(
            f"{where} is {template!r}; it must hold {{name}} and {{definition}}, each once, "
            f"as {TEMPLATE!r} does"
        )


def key(text: str) -> int:
    """Stable 64-bit identity of a text, whatever its case, spacing or HTML escapes."""
    digest = hashlib.blake2b(normalize(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def keys(texts: Sequence[str]) -> UInt64[np.ndarray, " n"]:
    """`key` of each text."""
    return np.fromiter((key(text) for text in texts), np.uint64, len(texts))


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-level BPE, in CLIP's vocabulary order.

    Printable Latin-1 bytes stand for themselves and come first; the others take the code points
    from 256 up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    printable += range(ord("®"), ord("ÿ") + 1)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


@functools.cache
def tokenizer() -> Tokenizer:
    """CLIP's byte-level BPE, without start and end; the vocabulary is numbered as OpenAI's is.

    256 bytes, 256 bytes that end a word, 48,894 merges, then the two special tokens.
    """
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").split("\n")
    characters = byte_characters()
    merges = [tuple(line.split()) for line in lines[1 : VOCABULARY - 2 - 2 * len(characters) + 1]]
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
    """Token ids of each text: start, its tokens, end, then zeros.

    A text too long keeps its first `context - 2` tokens, so that the end, where the text tower
    reads its feature, is always there. No text is refused: an empty one is start and end.
    """
    rows = np.zeros((len(texts), context), np.int32)
    rows[:, 0] = START
    for begin in range(0, len(texts), _CHUNK):
        for row, encoding in zip(rows[begin:], _encode(texts[begin : begin + _CHUNK])):
            ids = encoding.ids[: context - 2]
            row[1 : len(ids) + 1] = ids
            row[len(ids) + 1] = END
    return rows


def _encode(texts: Sequence[str]) -> list[Encoding]:
    # Lone surrogates (broken \u escapes in somebody's JSON) cannot cross into the tokenizer.
    clean = [normalize(text).encode("utf-8", "replace").decode("utf-8") for text in texts]
    return tokenizer().encode_batch_fast(clean)


def fitted(
    names: Sequence[str],
    definitions: Sequence[str | None],
    template: str = TEMPLATE,
    context: int = CONTEXT,
) -> list[str]:
    """`enriched` texts that the tower reads to their end, in `context - 2` tokens.

    Of a definition that is too long as many whole words are kept as fit; the bare name where not
    one does. A name that is too long by itself stays whole: `tokenize` cuts it.
    """
    names = [normalize(name) for name in names]
    words = [normalize(definition or "").split() for definition in definitions]
    lengths: dict[str, int] = {}
    # By halving, for all texts at once: `kept` words fit (0: the bare name), beyond `most` none do.
    kept = np.zeros(len(words), int)
    most = np.array([min(len(row), context - 2) for row in words], int)
    while (open_ := np.flatnonzero(kept < most)).size:
        middle = (kept[open_] + most[open_] + 1) // 2
        texts = [_joined(names[i], words[i][:n], template) for i, n in zip(open_, middle)]
        fits = _lengths(texts, lengths) <= context - 2
        kept[open_[fits]], most[open_[~fits]] = middle[fits], middle[~fits] - 1
    return [_joined(name, row[:n], template) for name, row, n in zip(names, words, kept)]


def _joined(name: str, words: Sequence[str], template: str) -> str:
    # What a cut leaves open, a comma or a bracket, goes too.
    return enriched(name, " ".join(words).rstrip(" ,;:([-"), template)


def _lengths(texts: Sequence[str], known: dict[str, int]) -> Int[np.ndarray, " n"]:
    """Tokens of each text, start and end not counted; `known` keeps those of its words.

    No token reaches over a space, so a text has as many as its words have together.
    """
    rows = [text.split() for text in texts]
    new = list({word for row in rows for word in row} - known.keys())
    known.update(zip(new, (len(encoding.ids) for encoding in _encode(new))))
    return np.array([sum(map(known.__getitem__, row)) for row in rows], int)


def pack_tokens(rows: Int32[np.ndarray, "n 16"]) -> UInt16[np.ndarray, "n 16"]:
    """Token ids as they are stored: 49,407 fits 16 bits."""
    if rows.size and rows.max() >= VOCABULARY:
        raise UserError("a token id lies outside CLIP's vocabulary")
    return rows.astype(np.uint16)
