"""Pictures of a run's word-region alignment: captions with the best region of each phrase.

They are figure 1 of Yao et al. 2023, of the same few images of the image-text data at every
evaluation.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from PIL import Image

from detclipv2_jax.common import pictures
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import records
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.reader import RecordFiles
from detclipv2_jax.inference import drawing
from detclipv2_jax.inference.detections import PhraseRegions
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.training import sharding

_TRIES = 100  # records that are looked at for one whose caption has a phrase
_COLUMNS = 4


class _Captioned(NamedTuple):
    """An image with its caption and phrases; both normalized, as they are trained on."""

    image_id: str
    image: Image.Image
    caption: str
    phrases: tuple[str, ...]


class CaptionPictures:
    """Draws some image-text pairs of a run with the best region of each phrase."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        count: int,
        canvas: tuple[int, int],
        mesh: jax.sharding.Mesh,
    ):
        """Read the images.

        Args:
            sources: of image-text data, by name; may be empty.
            count: of images, evenly spread over the sources. An image without a phrase or that
                cannot be read is left out.
            canvas: (height, width) that images are scaled into: as in training, and one program if
                it is square.
            mesh: the devices to run on.
        """
        self._pairs = list(_read(sources, count))
        # Of all processes alike, even if one of them cannot read an image.
        self._count, self._canvas, self._mesh = count, canvas, mesh
        self._predictor: Predictor | None = None

    def __call__(self, graphdef: Any, params: Mapping[str, Any], path: Path | None) -> None:
        """Write the picture as a PNG. All processes call it; only those with a `path` write."""
        if not self._pairs:
            return
        if self._predictor is None:
            self._predictor = Predictor(
                graphdef,
                params,
                canvas=self._canvas,
                batch_size=self._count,
                batch_sharding=sharding.split(self._mesh),
            )
        self._predictor.params = params
        encoded = self._predictor.encode_each([pair.phrases for pair in self._pairs])
        stream = self._predictor.stream_phrases([pair.image for pair in self._pairs], encoded)
        found = cast(dict[int, PhraseRegions], dict(stream))  # images in memory are all readable
        if path is None:
            return
        drawn = [
            drawing.draw_caption(np.asarray(pair.image), pair.caption, found[number], side=480)
            for number, pair in enumerate(self._pairs)
        ]
        titles = [pair.image_id for pair in self._pairs]
        drawing.save_png(drawing.grid(drawn, titles, columns=_COLUMNS), path)


def _read(sources: Mapping[str, Source], count: int) -> Iterator[_Captioned]:
    """Yield up to `count` captioned images, evenly spread over the records of the sources."""
    files, names = RecordFiles(sources), list(sources)
    starts = np.cumsum([0, *map(len, sources.values())])
    count = min(count, int(starts[-1]))
    for place in np.linspace(0, starts[-1] - 1, count).round().astype(int):
        number = int(np.searchsorted(starts, place, side="right")) - 1
        record = _with_phrase(sources[names[number]], int(place - starts[number]))
        if record is not None and (pair := _decoded(files, names[number], record)) is not None:
            yield pair


def _with_phrase(source: Source, first: int) -> int | None:
    """Return the first record, from `first` on, whose caption has a phrase."""
    tried = range(first, min(first + _TRIES, len(source)))
    return next((record for record in tried if len(source.positives_of(record)) > 1), None)


def _decoded(files: RecordFiles, name: str, number: int) -> _Captioned | None:
    """Return a record's image and texts, or None if it cannot be read."""
    (content,) = files.read(name, np.array([number]))
    if content is None:
        return None
    try:
        record = records.decode(content)
        pixels = Image.fromarray(pictures.read(record.image, turn=False).pixels)
    except (UserError, pictures.PictureError):
        return None  # training counts and reports it
    caption, *phrases = record.concepts
    return _Captioned(record.image_id, pixels, caption, tuple(phrases)) if phrases else None
