"""Write captions for a scene of symbols, with the span and the objects of every phrase."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from detclipv2_jax.data.prepare.sources.symbols_scenes import Placed, Scene, load_symbols

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_AN = re.compile("(?!uni|euro|ura)[aeiou]")  # a union, a euro, a uranus
_NEXT = 16.0  # pixels between two symbols that are "next to" each other


@dataclasses.dataclass(frozen=True)
class Mention:
    """Objects of one symbol that a single phrase names."""

    symbol: int  # position in `load_symbols()`
    color: str | None  # None: the phrase does not name the color
    members: tuple[int, ...]  # positions in `Scene.objects` of all objects that the phrase fits


@dataclasses.dataclass(frozen=True)
class Caption:
    """A caption; `spans[i]` is the range [start, end) of the characters of `mentions[i]`."""

    text: str
    mentions: tuple[Mention, ...]
    spans: tuple[tuple[int, int], ...]


def mentions_of(
    rng: np.random.Generator, objects: Sequence[Placed], color_share: float
) -> list[Mention]:
    """Group all objects into mentions, in random order; each object is in exactly one.

    With probability `color_share` the objects of one symbol get one mention per color, which names
    the color. Otherwise they share one mention without color.
    """
    mentions = []
    for symbol in dict.fromkeys(placed.symbol for placed in objects):
        members = [i for i, placed in enumerate(objects) if placed.symbol == symbol]
        colors = list(dict.fromkeys(objects[i].color for i in members))
        if rng.random() < color_share:
            for color in colors:
                own = tuple(i for i in members if objects[i].color == color)
                mentions.append(Mention(symbol, color, own))
        else:
            mentions.append(Mention(symbol, None, tuple(members)))
    return [mentions[i] for i in rng.permutation(len(mentions))]


def phrase(mention: Mention, article: str) -> str:
    """Return "a red anchor", "the red anchor" or "two umbrellas"; `article`: "a", "the" or ""."""
    symbol = load_symbols()[mention.symbol]
    count = len(mention.members)
    words = ([mention.color] if mention.color else []) + [
        symbol.name if count == 1 else symbol.plural
    ]
    if count > 1:
        words.insert(0, _NUMBERS[count] if count < len(_NUMBERS) else str(count))
    elif article and symbol.name != "scissors":  # always plural
        an = article == "a" and _AN.match(words[0])
        words.insert(0, "an" if an else article)
    return " ".join(words)


def relation(first: Mention, second: Mention, objects: Sequence[Placed]) -> list[str]:
    """Return every relation that holds between all members of `first` and all of `second`."""
    a, b = _hull(first, objects), _hull(second, objects)
    found = []
    if a[2] <= b[0]:
        found += ["left of", "to the left of"]
    if a[0] >= b[2]:
        found.append("to the right of")  # "an arrow right of" would parse as an "arrow right"
    if a[3] <= b[1]:
        found.append("above")
    if a[1] >= b[3]:
        found.append("below")
    apart = max(a[0] - b[2], b[0] - a[2])
    if 0 <= apart <= _NEXT and min(a[3], b[3]) > max(a[1], b[1]):
        found.append("next to")
    return found


def _hull(mention: Mention, objects: Sequence[Placed]) -> tuple[float, float, float, float]:
    boxes = np.array([objects[i].box for i in mention.members])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


# A caption under construction: words, and (mention, article) in the place of each phrase.
_Pieces = list[str | tuple[Mention, str]]


def _listing(mentions: Sequence[Mention], article: str) -> _Pieces:
    pieces: _Pieces = []
    for i, mention in enumerate(mentions):
        if i:
            pieces.append(" and " if i == len(mentions) - 1 and article else ", ")
        pieces.append((mention, article))
    return pieces


def _assemble(pieces: _Pieces, capital: bool) -> Caption:
    text, mentions, spans = "", [], []
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
            continue
        words = phrase(*piece)
        mentions.append(piece[0])
        spans.append((len(text), len(text) + len(words)))
        text += words
    if capital:
        text = text[0].upper() + text[1:]
    return Caption(text, tuple(mentions), tuple(spans))


def _related(rng: np.random.Generator, scene: Scene, mentions: list[Mention]) -> _Pieces | None:
    """Return "the red anchor left of two umbrellas, with a sun"; None if no relation holds."""
    for i, j in rng.permutation(
        [(i, j) for i in range(len(mentions)) for j in range(len(mentions))]
    ):
        choices = relation(mentions[i], mentions[j], scene.objects) if i != j else []
        if choices:
            article = ("a", "the")[rng.integers(2)]
            words = f" {choices[rng.integers(len(choices))]} "
            rest = [mention for k, mention in enumerate(mentions) if k not in (i, j)]
            pieces: _Pieces = [(mentions[i], article), words, (mentions[j], article)]
            return [*pieces, ", with ", *_listing(rest, "a")] if rest else pieces
    return None


def _ground(rng: np.random.Generator, scene: Scene) -> str:
    """Return " on a striped background": the background in words."""
    return f" on a {scene.background} {('background', 'ground')[rng.integers(2)]}"


def grounded_caption(rng: np.random.Generator, scene: Scene, color_share: float) -> Caption:
    """Return a caption that mentions every object of the scene, for phrase grounding."""
    mentions = mentions_of(rng, scene.objects, color_share)
    style = rng.random()
    if style < 0.5 and (related := _related(rng, scene, mentions)):
        pieces = related
    elif style < 0.7:
        plural = len(mentions[0].members) > 1
        pieces = ["There are " if plural else "There is ", *_listing(mentions, "a"), "."]
    else:
        pieces = _listing(mentions, ("a", "the")[rng.integers(2)])
    if style > 0.9:
        pieces.append(_ground(rng, scene))
    return _assemble(pieces, capital=bool(rng.random() < 0.3))


def image_caption(rng: np.random.Generator, scene: Scene, color_share: float) -> Caption:
    """Return a caption or alt text in the style of the web; it mentions every object."""
    mentions = mentions_of(rng, scene.objects, color_share)
    listing = _listing(mentions, "a")
    style = rng.random()
    if style < 0.2 and (related := _related(rng, scene, mentions)):
        pieces = related
    elif style < 0.45:
        pieces = listing
    elif style < 0.65:
        openings = ("a picture of ", "a drawing of ", "an illustration with ", "an image showing ")
        pieces = [openings[rng.integers(len(openings))], *listing]
    elif style < 0.75:
        plural = len(mentions[0].members) > 1
        pieces = ["there are " if plural else "there is ", *listing, " in the picture"]
    elif style < 0.85:
        pieces = [*_listing(mentions, ""), (", clip art", ", vector graphic")[rng.integers(2)]]
    else:
        pieces = [*listing, _ground(rng, scene)]
    return _assemble(pieces, capital=bool(rng.random() < 0.4))
