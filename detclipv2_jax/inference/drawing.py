"""Pictures for people: boxes with names, grids of them, loss curves."""

import colorsys
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from detclipv2_jax.common.atomic import replacing

_FONT = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


_MARGIN = 8


_LABEL_WIDTH = 0.4  # of the picture's, what a label may have beside a narrower box


_MIDDLE = 0.179  # luminance on which black and white are read equally well (WCAG 2's contrast)


def draw_boxes(
    image: UInt8[np.ndarray, "h w 3"],
    boxes: Float[np.ndarray, "n 4"],
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    *,
    side: int = 640,
) -> Image.Image:
    """The picture with a frame and a label for each box (xyxy pixels), a color for each name.

    A picture whose longer side is under `side` pixels is enlarged to it, so that labels stay small
    beside what they name. Labels keep inside the picture and, where there is room, off each other;
    the more there are, the smaller they are. The first boxes, the best, get the best places and lie
    on top.
    """
    factor = max(1.0, side / max(image.shape[:2]))
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(picture)
    line = max(2, round(max(size) / 320))
    font = _font(max(12, round(max(size) / (45 + len(names) / 2))))
    frames = np.asarray(boxes, np.float64).reshape(-1, 4) * factor
    for frame, name in reversed(list(zip(frames, names))):
        _frame(canvas, frame, color(name), line, size)
    labels = []
    for number, (frame, name) in enumerate(zip(frames, names)):
        score = "" if scores is None else f" {scores[number]:.2f}"
        room = max(frame[2] - frame[0], _LABEL_WIDTH * size[0])
        text = _shortened(name, score, font, min(room, size[0]) - 2 * line)
        labels.append((_label_place(frame, text, font, size, line, labels), text, name))
    for place, text, name in reversed(labels):
        canvas.rectangle(place, fill=color(name), outline="black")
        ink = "black" if _luminance(color(name)) > _MIDDLE else "white"
        canvas.text((place[0] + line, place[1]), text, fill=ink, font=font)
    return picture


def grid(pictures: Sequence[Image.Image], titles: Sequence[str], *, columns: int) -> Image.Image:
    """Pictures in rows of `columns`, each under its title.

    Raises:
      ValueError: no pictures, or not one title each.
    """
    if not pictures or len(pictures) != len(titles):
        raise ValueError("a grid needs at least one picture, and a title for each")
    font = _font(18)
    head = sum(font.getmetrics()) + 2
    rows = [range(n, min(n + columns, len(pictures))) for n in range(0, len(pictures), columns)]
    heights = [max(pictures[n].height for n in row) + head + _MARGIN for row in rows]
    cell = max(picture.width for picture in pictures) + _MARGIN
    sheet = Image.new("RGB", (len(rows[0]) * cell + _MARGIN, sum(heights) + _MARGIN), "white")
    canvas = ImageDraw.Draw(sheet)
    y = _MARGIN
    for row, height in zip(rows, heights):
        for column, number in enumerate(row):
            x = _MARGIN + column * cell
            title = _shortened(titles[number], "", font, cell - _MARGIN)
            canvas.text((x, y), title, fill="black", font=font)
            sheet.paste(pictures[number], (x, y + head))
        y += height
    return sheet


def save(picture: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG, whole or not at all; makes its directory."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


def color(name: str) -> tuple[int, int, int]:
    """A vivid RGB color that depends on the name alone: the same in every picture."""
    digest = hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=2).digest()
    hue, value = digest[0] / 256, 0.75 + 0.25 * (digest[1] % 2)
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(255 * red), round(255 * green), round(255 * blue)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT), size)


def _luminance(rgb: tuple[int, int, int]) -> float:
    """Relative luminance as WCAG 2 defines it, 0 to 1."""
    channels = np.asarray(rgb) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _shortened(name: str, end: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`name` + `end` on one line of at most `width` pixels; a name too long ends in '…'."""
    name = " ".join(name.split())
    if font.getlength(name + end) <= width:
        return name + end
    while name and font.getlength(name + "…" + end) > width:
        name = name[:-1]
    return name + "…" + end


def _frame(
    canvas: ImageDraw.ImageDraw,
    frame: np.ndarray,
    rgb: tuple[int, int, int],
    line: int,
    size: tuple[int, int],
) -> None:
    """A colored frame between two dark hairlines: seen on any background."""
    limits = np.tile(size, 2) - 1
    x_min, y_min, x_max, y_max = np.clip(np.round(frame), 0, limits).tolist()
    for inset, width, ink in ((0, line + 2, (0, 0, 0)), (1, line, rgb)):
        corners = (x_min + inset, y_min + inset, x_max - inset, y_max - inset)
        if corners[2] >= corners[0] and corners[3] >= corners[1]:
            canvas.rectangle(corners, outline=ink, width=width)


def _label_place(
    frame: np.ndarray,
    text: str,
    font: ImageFont.FreeTypeFont,
    size: tuple[int, int],
    line: int,
    taken: Sequence[tuple[tuple[float, ...], str, str]],
) -> tuple[float, float, float, float]:
    """Where a label covers the least of the labels already placed: above, below, or in its box."""
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
        places.append((x, y, x + width, y + height))
    return min(places, key=lambda place: sum(_shared(place, other) for other, _, _ in taken))


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """Area that two xyxy rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
