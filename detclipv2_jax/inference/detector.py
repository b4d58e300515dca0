"""`Detector`: images and free names in, boxes with names and scores out."""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import Definitions
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.embedding_cache import EmbeddingCache, default_directory
from detclipv2_jax.inference.images import Source
from detclipv2_jax.inference.predictor import Predictor, Texts, check_names
from detclipv2_jax.inference.prompts import prompting
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


class Detector:
    """Asks a checkpoint, or a model's parts, for named things in images.

    >>> detector = Detector("runs/quickstart")
    >>> found, = detector(["street.jpg"], ["cat", "traffic light"])
    >>> found.names, found.scores, found.boxes

    The canvas and the suppression come from the config of the run that made the checkpoint. Names
    are encoded once and remembered, long lists of them on disk; asking for another number of names
    may compile another program.
    """

    def __init__(
        self,
        checkpoint: "str | os.PathLike | LoadedModel",
        *,
        step: int | None = None,
        score_threshold: float = 0.3,
        max_detections: int = 100,
        batch_size: int = 1,
        definitions: Definitions | None = None,
        prompts: Sequence[str] | None = None,
        cache: str | os.PathLike | None = None,
    ):
        """`checkpoint`: a run's workdir (the newest `step` by default), or a loaded model.

        `definitions`: ask for names with their definitions ('on', 'off'); by default as trained.
        `prompts`: or in sentences, as 'a photo of a {}.'; the mean of their embeddings is asked.
        `cache`: the directory that keeps the embeddings of long lists of names; None: the usual one
        (`vocabulary.default_directory`), '': none.
        """
        if isinstance(checkpoint, str | os.PathLike):
            from detclipv2_jax.inference.checkpoint import (
                load_model,  # orbax, which parts do not need
            )

            checkpoint = load_model(checkpoint, step)
        self.step = checkpoint.step
        config = dataclasses.replace(
            checkpoint.detect.decoding,
            score_threshold=score_threshold,
            max_detections=max_detections,
        )
        self.prompts = prompting(
            checkpoint.detect, checkpoint.definitions, checkpoint.template, definitions, prompts
        )
        directory = default_directory() if cache is None else cache
        self.predictor = Predictor(
            checkpoint.graphdef,
            checkpoint.params,
            canvas=checkpoint.detect.canvas,
            config=config,
            batch_size=batch_size,
            cache=EmbeddingCache(directory) if directory else None,
            upright=True,
        )

    def __call__(
        self,
        images: Source | Iterable[Source],
        names: Sequence[str],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[ImageDetections]:
        """What was found in each image, in their order; no images, no answers.

        Images are paths, uint8 RGB arrays (h, w, 3) or PIL images, of any sizes. A file that says
        in EXIF how it is to be turned is turned, so that boxes fit what viewers and OpenCV show;
        arrays and PIL images are taken as they are. Names that differ only in case or spacing are
        one name. `score_threshold` and `max_detections` hold for this call. Another threshold, or
        fewer detections than the detector's own, compiles nothing.

        Raises:
          UserError: no names, an empty one, one asked twice, or an image that cannot be read.
        """
        texts = self.encode(names)
        images = [images] if isinstance(images, Source) else list(images)
        config = self.predictor.config
        if score_threshold is not None:
            config = dataclasses.replace(config, score_threshold=score_threshold)
        if max_detections is not None:
            config = dataclasses.replace(config, max_detections=max_detections)
        at_least = dataclasses.replace(
            config, max_detections=max(config.max_detections, self.predictor.config.max_detections)
        )
        found: list[Any] = [None] * len(images)
        for number, answer in self.predictor.stream(images, texts, at_least):
            if isinstance(answer, UserError):
                raise answer
            found[number] = answer.best(config.max_detections)
        return found

    def encode(self, names: Sequence[str]) -> Texts:
        """The names, checked and encoded. Raises UserError as a call does."""
        if isinstance(names, str):
            raise UserError(f"names is the one text {names!r}; give a list of names.")
        names = list(names)
        check_names(names)
        first: dict[str, int] = {}
        for number, name in enumerate(names, start=1):
            if (other := first.setdefault(normalize(name), number)) != number:
                raise UserError(
                    f"name {number}, {name!r}, is the same as name {other}; ask for it once."
                )
        return self.prompts.encode(self.predictor, names)
