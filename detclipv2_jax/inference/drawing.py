"""Drawing detections: boxes with labels on an image, a caption with its phrases, and grids."""

import colorsys
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.inference.detections import PhraseRegions
from detclipv2_jax.text.phrases import phrase_of_words

_FONTS = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_MARGIN = 8  # pixels between the images of a grid
_LABEL_WIDTH = 0.4  # of the image's width: a label may be this wide even if its box is narrower
# Luminance at which black and white text have the same contrast by WCAG 2's formula.
_MIDDLE_LUMINANCE = 0.179
# Of a caption's phrases, in turn; all can be read on white.
_PHRASE_COLORS = (
    (205, 25, 30),
    (20, 90, 210),
    (15, 125, 50),
    (135, 45, 175),
    (180, 85, 0),
    (0, 120, 135),
    (200, 20, 130),
    (105, 105, 0),
)

_Color = tuple[int, int, int]


class _Rectangle(NamedTuple):
    """Corners in pixels."""

    x_min: float
    y_min: float
    x_max: float
    y_max: float


class _Label(NamedTuple):
    """A label and where it is drawn."""

    place: _Rectangle
    text: str
    color: _Color


def draw_boxes(
    image: UInt8[np.ndarray, "h w 3"],
    boxes: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Float[np.ndarray, " n"] | Sequence[float] | None = None,
    *,
    side: int = 640,
    colors: Mapping[str, _Color] | None = None,
) -> Image.Image:
    """Return the image with a frame and a label for each box, in one color per name.

    The font shrinks as the number of boxes grows. Labels stay inside the image and avoid each other
    where there is room. The first boxes get the best places and are drawn on top.

    Args:
      image: RGB.
      boxes: (x_min, y_min, x_max, y_max) in pixels of the image, best first.
      names: the name of each box.
      scores: shown after the names.
      side: an image whose longer side is below this many pixels is enlarged to it, so that labels
        are small compared with the objects.
      colors: of the names. None: `name_color`.
    """
    color = name_color if colors is None else colors.__getitem__
    factor = max(1.0, side / max(image.shape[:2]))
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    result = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(result)
    line = max(2, round(max(size) / 320))
    font = _font(max(12, round(max(size) / (45 + len(names) / 2))))
    frames = np.asarray(boxes, np.float64).reshape(-1, 4) * factor

    for frame, name in reversed(list(zip(frames, names))):
        _draw_frame(draw, frame, color(name), line, size)

    labels: list[_Label] = []
    for number, (frame, name) in enumerate(zip(frames, names)):
        score = "" if scores is None else f" {scores[number]:.2f}"
        room = max(frame[2] - frame[0], _LABEL_WIDTH * size[0])
        text = _shortened(name, score, font, min(room, size[0]) - 2 * line)
        place = _label_place(frame, text, font, size, line, [label.place for label in labels])
        labels.append(_Label(place, text, color(name)))

    for label in reversed(labels):
        draw.rectangle(label.place, fill=label.color, outline="black")
        ink = "black" if _luminance(label.color) > _MIDDLE_LUMINANCE else "white"
        corner = (label.place.x_min + line, label.place.y_min)
        draw.text(corner, label.text, fill=ink, font=font)
    return result


def draw_caption(
    image: UInt8[np.ndarray, "h w 3"],
    caption: str,
    regions: PhraseRegions,
    *,
    side: int = 640,
) -> Image.Image:
    """Return the image with the best region of each phrase, and the caption below it.

    Each phrase has a color of its own, that of its box and of its words in the caption: figure 1 of
    Yao et al. 2023. Of several phrases at the same region, the later ones have smaller frames.

    Args:
      image: RGB.
      caption: the text below the image.
      regions: the phrases and their boxes, in pixels of the image.
      side: as in `draw_boxes`.
    """
    palette = [_PHRASE_COLORS[n % len(_PHRASE_COLORS)] for n in range(len(regions.phrases))]
    colors = dict(zip(regions.phrases, palette))
    boxes = _nested(regions.boxes, max(image.shape[:2]) / 100)
    picture = draw_boxes(image, boxes, regions.phrases, regions.scores, side=side, colors=colors)
    inks: list[_Color] = [
        (0, 0, 0) if number is None else palette[number]
        for number in phrase_of_words(caption, regions.phrases)
    ]
    text = _wrapped(list(zip(caption.split(), inks)), picture.width)
    result = Image.new("RGB", (picture.width, picture.height + text.height), "white")
    result.paste(picture, (0, 0))
    result.paste(text, (0, picture.height))
    return result


def grid(images: Sequence[Image.Image], titles: Sequence[str], *, columns: int) -> Image.Image:
    """Return one image with all `images` in rows of `columns`, each under its title.

    Raises:
      ValueError: there are no images, or their number is not that of the titles.
    """
    if not images or len(images) != len(titles):
        raise ValueError("a grid needs at least one image, and one title for each")
    font = _font(18)
    title_height = sum(font.getmetrics()) + 2
    rows = [range(n, min(n + columns, len(images))) for n in range(0, len(images), columns)]
    heights = [max(images[n].height for n in row) + title_height + _MARGIN for row in rows]
    cell = max(image.width for image in images) + _MARGIN
    sheet = Image.new("RGB", (len(rows[0]) * cell + _MARGIN, sum(heights) + _MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    y = _MARGIN
    for row, height in zip(rows, heights):
        for column, number in enumerate(row):
            x = _MARGIN + column * cell
            title = _shortened(titles[number], "", font, cell - _MARGIN)
            draw.text((x, y), title, fill="black", font=font)
            sheet.paste(images[number], (x, y + title_height))
        y += height
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Write a PNG atomically; its directory is created."""
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def name_color(name: str) -> tuple[int, int, int]:
    """Return a vivid RGB color that depends on the name alone, so it is the same in every image."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=2).digest()
    hue, value = digest[0] / 256, 0.75 + 0.25 * (digest[1] % 2)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONTS / f"DejaVuSans{'-Bold' * bold}.ttf"), size)


def _nested(boxes: Float[np.ndarray, "n 4"], step: float) -> Float[np.ndarray, "n 4"]:
    """Return boxes of which each is smaller by `step` pixels for every equal box before it.

    Boxes whose corners differ by less than a step count as equal.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    apart = np.abs(boxes[:, None] - boxes[None]).max(-1)
    before = np.tril(apart < step, -1).sum(1, keepdims=True)
    room = np.minimum(boxes[:, 2:] - boxes[:, :2], step * before * 2) / 2
    return np.concatenate([boxes[:, :2] + room, boxes[:, 2:] - room], axis=1)


def _wrapped(words: Sequence[tuple[str, _Color]], width: int) -> Image.Image:
    """Return a white strip with words in their colors, in lines of at most `width` pixels."""
    size = max(14, round(width / 36))
    height, gap = round(size * 1.4), size // 3
    x, y, placed = _MARGIN, _MARGIN, []
    for word, ink in words:
        font = _font(size, bold=any(ink))
        word = _shortened(word, "", font, width - 2 * _MARGIN)
        length = font.getlength(word)
        if x > _MARGIN and x + length > width - _MARGIN:
            x, y = _MARGIN, y + height
        placed.append(((x, y), word, ink, font))
        x += round(length) + gap
    strip = Image.new("RGB", (width, y + height + _MARGIN), "white")
    draw = ImageDraw.Draw(strip)
    for place, word, ink, font in placed:
        draw.text(place, word, fill=ink, font=font)
    return strip


def _luminance(rgb: tuple[int, int, int]) -> float:
    """Return the relative luminance defined by WCAG 2, from 0 to 1."""
    channels = np.asarray(rgb) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _shortened(name: str, end: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return `name` + `end` on one line of at most `width` pixels, with '…' for what is cut."""
    name = " ".join(name.split())
    if font.getlength(name + end) <= width:
        return name + end
    while name and font.getlength(name + "…" + end) > width:
        name = name[:-1]
    return name + "…" + end


def _draw_frame(
    draw: ImageDraw.ImageDraw,
    frame: np.ndarray,
    rgb: tuple[int, int, int],
    line: int,
    size: tuple[int, int],
) -> None:
    """Draw a colored frame between two thin dark lines, which is visible on any background."""
    limits = np.tile(size, 2) - 1
    x_min, y_min, x_max, y_max = np.clip(np.round(frame), 0, limits).tolist()
    for inset, width, ink in ((0, line + 2, (0, 0, 0)), (1, line, rgb)):
        corners = (x_min + inset, y_min + inset, x_max - inset, y_max - inset)
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            draw.rectangle(corners, outline=ink, width=width)


def _label_place(
    frame: np.ndarray,
    text: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    line: int,
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Return the place above, below or inside a box that overlaps the `taken` places the least."""
    width = font.getlength(text) + 2 * line
    height = sum(font.getmetrics()) + 1
    x_min, y_min, x_max, y_max = frame.tolist()
    choices = [
        (x, y)
        for y in (y_min - height, y_min, y_max, y_max - height)
        for x in (x_min, x_max - width, (x_min + x_max - width) / 2)
    ]
    places = []
    for x, y in choices:
        x = float(np.clip(x, 0, max(size[0] - width - 1, 0)))
        y = float(np.clip(y, 0, max(size[1] - height - 1, 0)))
        places.append(_Rectangle(x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: _Rectangle, b: _Rectangle) -> float:
    """Return the area that two rectangles share, in pixels."""
    width = min(a.x_max, b.x_max) - max(a.x_min, b.x_min)
    height = min(a.y_max, b.y_max) - max(a.y_min, b.y_min)
    return max(width, 0.0) * max(height, 0.0)
