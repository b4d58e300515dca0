"""`Detector`: images and names in; boxes, names and scores out. Start here to use a checkpoint."""

import dataclasses
import numbers
import os
import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from detclipv2_jax.common import cache as user_cache
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import Definitions
from detclipv2_jax.inference.detections import ImageDetections
from detclipv2_jax.inference.embedding_cache import EmbeddingCache
from detclipv2_jax.inference.images import ImageSource, check_source
from detclipv2_jax.inference.names import check_asked, check_distinct, check_names, cut_off_text
from detclipv2_jax.inference.predictor import EncodedNames, Predictor
from detclipv2_jax.inference.prompts import Prompter
from detclipv2_jax.inference.threshold import threshold

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


class Detector:
    """A trained model that finds named things in images.

    >>> from detclipv2_jax import Detector
    >>> detector = Detector("runs/quickstart")
    >>> (found,) = detector("street.jpg", ["cat", "traffic light"])
    >>> for name, score, box in zip(found.names, found.scores, found.boxes):
    ...     print(name, score, box)  # box: x_min, y_min, x_max, y_max in pixels of the image

    The names may be any words or short phrases, also ones that the model never saw boxes of.

    The canvas size, suppression and prompts are those of the training run's config. Embeddings of
    names are kept in memory, and those of 64 or more names on disk. The first call compiles the
    model; a later call with many more names compiles it again.

    Attributes:
      step: training step of the checkpoint.
      threshold: the score threshold, and where it comes from (`Threshold`).
      predictor: the compiled model (`Predictor`).
      prompter: turns names into prompts (`Prompter`).
    """

    def __init__(
        self,
        checkpoint: "str | os.PathLike | LoadedModel",
        *,
        step: int | None = None,
        score_threshold: float | None = None,
        max_detections: int = 300,
        batch_size: int = 1,
        definitions: Definitions | None = None,
        prompts: Sequence[str] | None = None,
        cache: str | os.PathLike | None = None,
    ):
        """Load a checkpoint.

        Args:
          checkpoint: the workdir of a training run, or a `LoadedModel`.
          step: which of the run's checkpoints to load. None: the newest or, where training
            measured it, the best.
          score_threshold: only detections with a higher score are returned, 0 <= threshold < 1.
            None: the checkpoint's own, fitted on its validation set, or 0.1 if it has none.
          max_detections: at most this many boxes per image, the best of all names together.
          batch_size: images per call of the model; more is faster and needs more memory.
          definitions: 'on' asks for each name with its definition, 'off' with the name alone,
            'as_trained' like the names of the detection data in training. None: as the run's
            config says.
          prompts: sentences that contain {} where the name goes, for example
            ['a photo of a {}.']; the mean of their embeddings stands for the name. None: as the
            run's config says. Sentences exclude definitions.
          cache: directory for the embeddings of long lists of names. None:
            $XDG_CACHE_HOME/detclipv2_jax or ~/.cache/detclipv2_jax. '': no cache on disk.

        Raises:
          UserError: there is no such checkpoint, or an argument is not valid.
        """
        _check_options(step, score_threshold, max_detections, batch_size, prompts, cache)
        if isinstance(checkpoint, str | os.PathLike):
            # Imported here: a `LoadedModel` from elsewhere does not need orbax.
            from detclipv2_jax.inference.checkpoint import load_model

            checkpoint = load_model(checkpoint, step)
        elif isinstance(checkpoint, bytes | int | float | bool | None) or not all(
            hasattr(checkpoint, field) for field in ("graphdef", "params", "detect")
        ):
            raise UserError(
                f"checkpoint is {reprlib.repr(checkpoint)} ({type(checkpoint).__name__}). Give the "
                "workdir of a training run, or a LoadedModel."
            )
        self.step = checkpoint.step
        self.threshold = threshold(score_threshold, checkpoint.threshold)
        config = dataclasses.replace(
            checkpoint.detect.decoding,
            score_threshold=self.threshold.score_threshold,
            max_detections=max_detections,
        )
        self.prompter = Prompter.for_model(
            checkpoint.detect, checkpoint.definitions, checkpoint.template, definitions, prompts
        )
        directory = user_cache.user_directory() if cache is None else cache
        self.predictor = Predictor(
            checkpoint.graphdef,
            checkpoint.params,
            canvas=checkpoint.detect.canvas,
            config=config,
            batch_size=batch_size,
            cache=EmbeddingCache(directory) if directory else None,
        )

    def __call__(
        self,
        images: ImageSource | Iterable[ImageSource],
        names: Sequence[str],
        *,
        score_threshold: float | None = None,
        max_detections: int | None = None,
    ) -> list[ImageDetections]:
        """Find the named things in one or more images.

        Args:
          images: one image or an iterable of images of any sizes. An image is a path, a binary
            file, the bytes of one, a uint8 RGB array (height, width, 3) or a PIL image. Files are
            turned as their EXIF orientation says, so that boxes fit what viewers show; arrays and
            PIL images are taken as they are. Transparent parts are white.
          names: what to look for. Names that differ only in case or spacing are the same name.
          score_threshold: replaces the detector's for this call, without a new compilation.
          max_detections: replaces the detector's for this call. More than the detector's compiles
            the model again.

        Returns:
          One `ImageDetections` per image, in the order of the images: `boxes` (n, 4) as
          (x_min, y_min, x_max, y_max) in pixels of the image, `scores`, `names`, and `labels`, the
          index of each name in the list of names.

        Raises:
          UserError: there are no names, a name is empty or given twice, or an image cannot be
            read.
        """
        encoded = self.encode(names)
        if sentence := cut_off_text(encoded):
            warnings.warn(sentence, stacklevel=2)
        images = _as_images(images)
        config = self.predictor.config
        _check_options(None, score_threshold, max_detections)
        if score_threshold is not None:
            config = dataclasses.replace(config, score_threshold=score_threshold)
        if max_detections is not None:
            config = dataclasses.replace(config, max_detections=max_detections)
        # Not fewer than the detector's own, which would compile another program.
        most = max(config.max_detections, self.predictor.config.max_detections)
        found: list[Any] = [None] * len(images)
        stream = self.predictor.stream(
            images, encoded, dataclasses.replace(config, max_detections=most)
        )
        for number, result in stream:
            if isinstance(result, UserError):
                raise result
            found[number] = result.best(config.max_detections)
        return found

    def encode(self, names: Sequence[str]) -> EncodedNames:
        """Return the names with their text embeddings, for `predictor.stream`.

        Raises:
          UserError: there are no names, a name is empty or given twice, or the model reads two
            names as the same tokens.
        """
        if isinstance(names, str | bytes):
            raise UserError(f"names is the string {names!r}. Give a list of names.")
        if isinstance(names, Mapping) or not isinstance(names, Iterable):
            kind = type(names).__name__
            raise UserError(f"names is {reprlib.repr(names)} ({kind}). Give a list of names.")
        names = [str(name) if isinstance(name, np.str_) else name for name in names]
        check_names(names)
        check_distinct(names)
        encoded = self.prompter.encode(self.predictor, names)
        check_asked(encoded)
        return encoded


def _as_images(images: Any) -> list[ImageSource]:
    """Return the images of a call as a list.

    Raises:
      UserError: it is not an image, or one of several is not.
    """
    if isinstance(images, np.ndarray):
        images = list(images) if images.ndim == 4 else [images]
    elif isinstance(images, ImageSource):
        images = [images]
    elif isinstance(images, Mapping) or not isinstance(images, Iterable) or _is_tensor(images):
        check_source(images, "images")  # raises
    images = list(images)
    for number, image in enumerate(images, start=1):
        check_source(image, "the image" if len(images) == 1 else f"image {number} of {len(images)}")
    return images


def _is_tensor(value: Any) -> bool:
    """Return whether a value is an array of another library, which iterates over its rows."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _check_options(
    step: Any,
    score_threshold: Any = None,
    max_detections: Any = None,
    batch_size: Any = None,
    prompts: Any = None,
    cache: Any = None,
) -> None:
    """Raise `UserError` for an option of a wrong type; their values are checked elsewhere."""
    counts = {"step": step, "max_detections": max_detections, "batch_size": batch_size}
    for name, value in counts.items():
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if value is not None and not is_whole:
            raise UserError(f"{name} is {value!r}, expected a whole number.")
    if score_threshold is not None and (
        isinstance(score_threshold, bool) or not isinstance(score_threshold, numbers.Real)
    ):
        raise UserError(f"score_threshold is {score_threshold!r}, expected a number from 0 to 1.")
    if isinstance(prompts, str):
        raise UserError(f"prompts is the string {prompts!r}. Give a list of sentences.")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise UserError(f"cache is {cache!r}. Give a directory, or '' for no cache.")
