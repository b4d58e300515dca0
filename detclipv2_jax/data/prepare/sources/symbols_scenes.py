"""Draw the images of the built-in data: symbols, backgrounds and scenes.

A symbol is a pictograph of DejaVu Sans, the font that matplotlib ships. A scene is a background
with colored, scaled and rotated symbols on it, and the tight box of each.
"""

import csv
import dataclasses
import functools
import importlib.util
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from detclipv2_jax.common.errors import UserError

# Named colors, different enough that people agree with the names.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 38),
    "blue": (28, 78, 216),
    "green": (24, 140, 56),
    "yellow": (252, 220, 24),
    "purple": (126, 36, 170),
    "orange": (250, 128, 14),
    "black": (14, 14, 16),
    "white": (252, 252, 252),
    "pink": (255, 118, 186),
    "brown": (118, 68, 24),
    "cyan": (16, 192, 216),
}
# Base tones of backgrounds: six light, three medium and six dark ones, so that every color stands
# out from some of them (white and cyan need dark ones).
TONES: tuple[tuple[int, int, int], ...] = (
    *((242, 238, 226), (222, 232, 242), (226, 240, 222), (244, 226, 230), (236, 236, 236)),
    (240, 232, 208),
    *((176, 178, 186), (200, 180, 156), (160, 184, 170)),
    *((58, 62, 74), (72, 54, 60), (42, 66, 60), (52, 48, 76), (48, 48, 48), (70, 62, 44)),
)
BACKGROUNDS = ("plain", "gradient", "striped", "checked", "speckled", "blotchy")
# Least difference between a symbol and both tones of its background, in CIELAB units: distance,
# and difference in lightness alone.
MIN_CONTRAST, MIN_LIGHTNESS = 40.0, 18.0

_MASTER = 192  # pixels; long side of the mask from which all sizes of a symbol are resampled
_THIN = 0.055  # strokes thinner than this share of the long side are thickened
# Most pixels of the master mask that are added on each side of a stroke; more would hide detail.
_MAX_STROKE = 3
_INK = 64  # a pixel with at least this alpha (of 255) belongs to the symbol


@dataclasses.dataclass(frozen=True)
class Symbol:
    """One pictograph; `name` is a unique lower-case singular noun."""

    codepoint: int
    name: str
    plural: str
    family: str

    @property
    def character(self) -> str:
        """The pictograph as text."""
        return chr(self.codepoint)


@dataclasses.dataclass(frozen=True)
class Placed:
    """A symbol in a scene."""

    symbol: int  # position in `load_symbols()`
    color: str  # a key of COLORS
    box: tuple[float, float, float, float]  # tight (x_min, y_min, x_max, y_max) in pixels


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an image shows."""

    height: int  # pixels
    width: int
    background: str  # one of BACKGROUNDS
    objects: tuple[Placed, ...]


@dataclasses.dataclass(frozen=True)
class SceneStyle:
    """How scenes of one kind look; see `SymbolsOptions` for the fields."""

    objects: tuple[int, int]  # fewest and most
    size: tuple[float, float]  # smallest and largest long side of a symbol, in pixels
    rotation: float  # degrees, in both directions
    overlap: float
    difficulty: float


@functools.cache
def load_symbols() -> tuple[Symbol, ...]:
    """Return all symbols in the order of `symbols.csv`."""
    path = Path(__file__).with_name("symbols.csv")
    with path.open(encoding="utf-8", newline="") as lines:
        return tuple(
            Symbol(
                codepoint=int(row["codepoint"], 16),
                name=row["name"],
                plural=row["plural"] or plural(row["name"]),
                family=row["family"],
            )
            for row in csv.DictReader(lines)
        )


def plural(name: str) -> str:
    """Return the regular English plural of a noun phrase."""
    if name.endswith(("s", "x", "ch", "sh", "z")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def novel_symbols(symbols: tuple[Symbol, ...], count: int, seed: int) -> frozenset[int]:
    """Return the positions of the `count` symbols that never have a training box.

    Each family contributes its share: every symbol gets a random place in (0, 1), evenly spread
    within its family, and the symbols with the `count` smallest places are novel.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    places = np.empty(len(symbols))
    for family in sorted({symbol.family for symbol in symbols}):
        members = [i for i, symbol in enumerate(symbols) if symbol.family == family]
        places[members] = (rng.permutation(len(members)) + rng.random()) / len(members)
    return frozenset(int(i) for i in np.argsort(places, kind="stable")[:count])


def font_path() -> Path:
    """Return the path of matplotlib's DejaVu Sans; `UserError` if matplotlib is not installed."""
    spec = importlib.util.find_spec("matplotlib")  # importing it takes half a second per process
    if spec is None or spec.origin is None:
        raise UserError(
            "symbols: drawing them needs the font that matplotlib ships, and matplotlib is not "
            "installed. Run `pip install matplotlib`."
        )
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine does not need libraqm, so all machines draw the same.
    return ImageFont.truetype(str(font_path()), size, layout_engine=ImageFont.Layout.BASIC)


def _ink(character: str, size: int, stroke: int = 0) -> Image.Image:
    font = _font(size)
    left, top, right, bottom = font.getbbox(character, stroke_width=stroke)
    image = Image.new("L", (math.ceil(right - left) + 2, math.ceil(bottom - top) + 2))
    ImageDraw.Draw(image).text(
        (1 - left, 1 - top), character, font=font, fill=255, stroke_width=stroke
    )
    return image.crop(image.getbbox())


@functools.cache
def master(character: str) -> Image.Image:
    """Return a symbol's alpha mask with a long side of `_MASTER` pixels, thin strokes thickened."""
    probe = _ink(character, 256)
    size = max(8, round(256 * _MASTER / max(probe.size)))
    image = _ink(character, size)
    solid = np.asarray(image) >= 128
    padded = np.pad(solid, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    # A stroke of thickness t and length n has t*n pixels, 2n of which are on its edges.
    thickness = 2 * solid.sum() / max(1, (solid & ~inner).sum())
    stroke = min(_MAX_STROKE, math.ceil((_THIN * _MASTER - thickness) / 2))
    if stroke > 0:
        image = _ink(character, size, stroke)
    scale = _MASTER / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.LANCZOS)


def draw_symbol(character: str, size: float, angle: float) -> Image.Image:
    """Return the alpha mask of a symbol, cropped; its long side is `size` pixels before rotation.

    `angle` is in degrees. The mask is drawn at twice the size and reduced, so that rotation leaves
    no jagged edges.
    """
    full = master(character)
    scale = 2 * size / max(full.size)
    mask = full.resize(tuple(max(2, round(side * scale)) for side in full.size), Image.BOX)
    mask = mask.rotate(angle, Image.BILINEAR, expand=True).reduce(2)
    ink = np.asarray(mask) >= _INK
    columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    return mask.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


@functools.cache
def _lab_palette() -> Float[np.ndarray, "c 3"]:
    return _lab(np.array(list(COLORS.values()), float))


def _lab(rgb: np.ndarray) -> np.ndarray:
    # IEC 61966-2-1 (sRGB, D65) and CIE 15 (Lab).
    unit = rgb / 255
    linear = np.where(unit <= 0.04045, unit / 12.92, ((unit + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / (0.9505, 1.0, 1.089)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def readable_colors(tones: Float[np.ndarray, "n 3"]) -> list[str]:
    """Return the names of the colors that stand out from every tone (sRGB), at least the best one.

    Lightness must differ too, because fine detail is seen by lightness.
    """
    palette = _lab_palette()
    difference = np.abs(palette[:, None] - _lab(np.asarray(tones, float))[None])
    distance = np.sqrt((difference**2).sum(-1)).min(1)  # CIE 1976
    lightness = difference[..., 0].min(1)
    margin = np.minimum(distance / MIN_CONTRAST, lightness / MIN_LIGHTNESS)
    names = [name for name, value in zip(COLORS, margin) if value >= 1]
    return names or [list(COLORS)[int(margin.argmax())]]


def _pattern(
    rng: np.random.Generator, pattern: str, height: int, width: int
) -> Float[np.ndarray, "h w"]:
    """Return the share of the second tone in each pixel, 0 to 1."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 26)
    u = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    if pattern == "gradient":
        return (u - u.min()) / max(1.0, float(np.ptp(u)))
    if pattern == "striped":
        return np.clip(0.5 + 2 * np.sin(2 * np.pi * u / period), 0, 1)
    if pattern == "checked":
        v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
        waves = np.sin(np.pi * u / period) * np.sin(np.pi * v / period)
        return np.clip(0.5 + 4 * waves, 0, 1)
    if pattern == "speckled":
        grains = rng.random((height // 2 + 1, width // 2 + 1), np.float32)
        return np.kron(grains, np.ones((2, 2), np.float32))[:height, :width]
    if pattern == "blotchy":
        coarse = Image.fromarray(rng.random((5, 5), np.float32))
        return np.clip(np.asarray(coarse.resize((width, height), Image.BICUBIC)), 0, 1)
    return np.zeros((height, width), np.float32)


def draw_background(
    rng: np.random.Generator, pattern: str, height: int, width: int, difficulty: float
) -> tuple[Image.Image, Float[np.ndarray, "2 3"]]:
    """Return an image without symbols and its two tones (sRGB); all pixels are between them."""
    first = np.array(TONES[rng.integers(len(TONES))], float)
    # Darker or lighter, away from the nearer end of the scale, with a small change of hue.
    step = (16 + 64 * difficulty) * (1 if first.mean() < 128 else -1)
    second = np.clip(first + step + rng.uniform(-12, 12, 3), 0, 255)
    tones = np.rint([first, first if pattern == "plain" else second])
    grounds = [Image.new("RGB", (width, height), tuple(int(c) for c in tone)) for tone in tones]
    share = np.rint(255 * _pattern(rng, pattern, height, width)).astype(np.uint8)
    return Image.composite(grounds[1], grounds[0], Image.fromarray(share)), tones


def _cast(
    rng: np.random.Generator,
    chances: Float[np.ndarray, " s"],
    count: int,
    colors: list[str],
    first: int | None,
) -> list[tuple[int, str]]:
    """Draw `count` (symbol, color) pairs.

    Some symbols appear two or three times, and more than half of those in one color.

    Args:
        rng: random generator.
        chances: probability of each symbol, up to a factor.
        count: number of pairs.
        colors: to choose from.
        first: symbol of the first pair; None: drawn like the others.
    """
    cumulative = np.cumsum(chances)
    chosen: list[tuple[int, str]] = []
    while len(chosen) < count:
        symbol = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
        if first is not None and not chosen:
            symbol = first
        if any(symbol == other for other, _ in chosen):
            if np.count_nonzero(chances) <= len({other for other, _ in chosen}):
                break  # all symbols of the world are used
            continue
        copies = 1 if rng.random() < 0.78 else int(rng.integers(2, 4))
        shared = rng.random() < 0.6
        color = colors[rng.integers(len(colors))]
        for _ in range(min(copies, count - len(chosen))):
            chosen.append((symbol, color if shared else colors[rng.integers(len(colors))]))
    return chosen


def _overlaps(box: tuple[float, ...], others: list[Placed], limit: float) -> bool:
    """Return whether `box` and another box share more than `limit` of the smaller one's area."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    for other in others:
        x0, y0, x1, y1 = other.box
        shared = max(0.0, min(box[2], x1) - max(box[0], x0)) * max(
            0.0, min(box[3], y1) - max(box[1], y0)
        )
        if shared > limit * min(area, (x1 - x0) * (y1 - y0)):
            return True
    return False


def draw_scene(
    rng: np.random.Generator,
    chances: Float[np.ndarray, " s"],
    height: int,
    width: int,
    style: SceneStyle,
    first: int | None = None,
) -> tuple[Scene, Image.Image]:
    """Draw one scene.

    A symbol that does not fit is left out; the first one always fits.

    Args:
        rng: random generator.
        chances: probability of each symbol, up to a factor.
        height: of the image, in pixels.
        width: of the image, in pixels.
        style: of the scene.
        first: symbol that must be in the scene, if any.

    Returns:
        The scene and its RGB image.
    """
    symbols = load_symbols()
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    image, tones = draw_background(rng, background, height, width, style.difficulty)
    count = int(rng.integers(style.objects[0], style.objects[1] + 1))
    smallest, largest = style.size
    placed: list[Placed] = []
    for symbol, color in _cast(rng, chances, count, readable_colors(tones), first):
        size = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        angle = rng.uniform(-style.rotation, style.rotation)
        for _ in range(4):
            mask = draw_symbol(symbols[symbol].character, size, angle)
            box = _find_room(rng, mask.size, (height, width), placed, style.overlap)
            if box is not None:
                image.paste(COLORS[color], (int(box[0]), int(box[1])), mask)
                placed.append(Placed(symbol, color, box))
                break
            size = max(smallest, 0.8 * size)
    return Scene(height, width, background, tuple(placed)), image


def _find_room(
    rng: np.random.Generator,
    size: tuple[int, int],
    canvas: tuple[int, int],
    placed: list[Placed],
    overlap: float,
) -> tuple[float, float, float, float] | None:
    """Return a random box of `size` (width, height) on a canvas (height, width), or None."""
    w, h = size
    height, width = canvas
    if w > width or h > height:
        return None
    for _ in range(8):
        x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
        box = (float(x), float(y), float(x + w), float(y + h))
        if not _overlaps(box, placed, overlap):
            return box
    return None
