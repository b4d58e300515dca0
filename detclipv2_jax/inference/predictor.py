"""`Predictor`: the compiled model, which encodes names and detects them in a stream of images."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import (
    BestRegions,
    Detections,
    ImageDetections,
    PhraseRegions,
)
from detclipv2_jax.inference.embedding_cache import EmbeddingCache, text_tower_digest
from detclipv2_jax.inference.images import CanvasImage, ImageSource, fit_to_canvas
from detclipv2_jax.inference.names import check_names
from detclipv2_jax.inference.predict import best_regions, predict
from detclipv2_jax.models.detclip import DetCLIPConfig, build
from detclipv2_jax.text.tokenizer import kept, normalize, tokenize

_TEXTS_AT_ONCE = 256  # texts per call of the text tower
_CACHE_FROM = 64  # texts; encoding fewer is faster than computing the text tower's digest
_Answer = TypeVar("_Answer")


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "replicated"))
def _compiled_predict(
    graphdef, params, images, sizes, embeddings, name_mask, threshold, *, config, replicated
):
    model = build(graphdef, params)
    detections = predict(
        model, images, sizes, embeddings, name_mask, config=config, score_threshold=threshold
    )
    if replicated is not None:  # so that every process can read all detections
        detections = jax.lax.with_sharding_constraint(detections, replicated)
    return detections


@functools.partial(jax.jit, static_argnames=("graphdef", "replicated"))
def _compiled_best_regions(graphdef, params, images, sizes, embeddings, phrase_mask, *, replicated):
    found = best_regions(build(graphdef, params), images, sizes, embeddings, phrase_mask)
    if replicated is not None:
        found = jax.lax.with_sharding_constraint(found, replicated)
    return found


@functools.partial(jax.jit, static_argnames=("graphdef", "replicated"))
def _compiled_encode_text(graphdef, params, tokens, *, replicated):
    embeddings = build(graphdef, params).encode_text(tokens)
    if replicated is not None:
        embeddings = jax.lax.with_sharding_constraint(embeddings, replicated)
    return embeddings


def padded_count(count: int) -> int:
    """Return the number of rows that `count` texts are padded to: few programs, little waste."""
    if count <= 256:
        return max(8, 1 << (count - 1).bit_length())
    return -(-count // 256) * 256


@dataclasses.dataclass(frozen=True)
class EncodedNames:
    """Names with their text embeddings, padded to P = `padded_count(len(names))` rows.

    Attributes:
      names: as the user wrote them.
      prompts: the text that was encoded for each name, as far as the model reads it; several are
        joined by ' | '.
      embeddings: one row per name, then zeros.
      mask: True for the rows of names.
      is_cut: whether a prompt of the name is longer than what the model reads.
      same_as: index of the first name with the same tokens, mostly the name itself.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    embeddings: Float[np.ndarray, "P D"]
    mask: Bool[np.ndarray, " P"]
    is_cut: tuple[bool, ...] = ()
    same_as: tuple[int, ...] = ()


class Predictor:
    """A compiled model: encodes names and detects them in images.

    `Detector` is the friendlier interface. Use a `Predictor` for a model that is still being
    trained, on several devices, or in several processes. In several processes each must make the
    same calls, and each gets all results.

    >>> predictor = Predictor(graphdef, params, canvas=(800, 1344))
    >>> names = predictor.encode(["cat", "traffic light"])
    >>> for number, found in predictor.stream(["street.jpg", "park.jpg"], names):
    ...     print(number, found.names, found.scores, found.boxes)

    Attributes:
      params: the model's parameters. They may be replaced at any time, without a new compilation.
      canvas: (height, width) in pixels.
      config: score threshold, suppression and limits.
      batch_size: images per call of the compiled program.
    """

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        params: Mapping[str, Any],
        *,
        canvas: tuple[int, int],
        config: DecodeConfig = DecodeConfig(),  # noqa: B008 - frozen
        batch_size: int = 8,
        batch_sharding: jax.sharding.NamedSharding | None = None,
        cache: EmbeddingCache | None = None,
    ):
        """Create a predictor; nothing is compiled before the first call.

        Args:
          graphdef: structure of the model, for `detclip.build(graphdef, params)`.
          params: the model's parameters.
          canvas: (height, width) in pixels that images are scaled into; transposed for an image
            that is then larger.
          config: how the model's output becomes detections.
          batch_size: images per call; rounded up to a multiple of the number of devices.
          batch_sharding: how the batch axis is split over several devices. None: one device.
          cache: keeps the embeddings of 64 or more names on disk. Not used with several processes,
            which must all do the same.

        Raises:
          UserError: `batch_size` or a side of the canvas is below 1.
        """
        if batch_size < 1 or min(canvas) < 1:
            raise UserError(f"batch_size {batch_size} and canvas {canvas} must be at least 1.")
        self._graphdef = graphdef
        self._cache = cache if jax.process_count() == 1 else None
        self.params = params
        self.canvas = (int(canvas[0]), int(canvas[1]))
        self.config = config
        devices = 1 if batch_sharding is None else batch_sharding.mesh.size
        self.batch_size = -(-batch_size // devices) * devices
        self._sharding = batch_sharding
        self._replicated = batch_sharding and jax.sharding.NamedSharding(
            batch_sharding.mesh, jax.sharding.PartitionSpec()
        )

    @property
    def params(self) -> Mapping[str, Any]:
        """The model's parameters. Setting them discards the embeddings of names."""
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self._digest: str | None = None
        self._embedding_of: dict[str, np.ndarray] = {}

    @functools.cached_property
    def _model_config(self) -> DetCLIPConfig:
        return build(self._graphdef, self._params).cfg

    # ---- Names to embeddings.

    def encode(
        self, names: Sequence[str], prompts: Sequence[str | Sequence[str]] | None = None
    ) -> EncodedNames:
        """Encode names. Embeddings are kept, so a text is encoded once per set of parameters.

        Args:
          names: what to look for.
          prompts: the text that stands for each name, or several texts, whose mean embedding then
            stands for it (scaled to unit length if the model compares by cosine similarity). None:
            the name itself.

        Raises:
          UserError: there are no names, or a name is empty.
        """
        check_names(names)
        prompts = [normalize(name) for name in names] if prompts is None else prompts
        groups = [(texts,) if isinstance(texts, str) else tuple(texts) for texts in prompts]
        texts = dict.fromkeys(text for group in groups for text in group)
        self._check_classes(texts)
        if new := [text for text in texts if text not in self._embedding_of]:
            self._embedding_of.update(zip(new, self._encode_texts(new)))
        rows = np.stack(
            [self._mean([self._embedding_of[text] for text in group]) for group in groups]
        )
        padding = padded_count(len(rows)) - len(rows)
        asked = dict(zip(texts, kept(list(texts))))
        tokens = dict(zip(texts, (row.tobytes() for row in tokenize(list(texts)))))
        first: dict[tuple[bytes, ...], int] = {}
        keys = [tuple(tokens[text] for text in group) for group in groups]
        return EncodedNames(
            names=tuple(names),
            prompts=tuple(" | ".join(asked[text] for text in group) for group in groups),
            embeddings=np.pad(rows, ((0, padding), (0, 0))),
            mask=np.arange(len(rows) + padding) < len(rows),
            is_cut=tuple(any(asked[x] != normalize(x) for x in group) for group in groups),
            same_as=tuple(first.setdefault(key, number) for number, key in enumerate(keys)),
        )

    def encode_each(self, phrases: Sequence[Sequence[str]]) -> list[EncodedNames]:
        """Encode the phrases of several captions, bare, as captions are encoded in training.

        Args:
          phrases: of each caption; a caption may have none.

        Raises:
          UserError: no caption has a phrase, or a phrase is empty.
        """
        width = self.encode(list(dict.fromkeys(itertools.chain(*phrases)))).embeddings.shape[1]
        none = EncodedNames((), (), np.zeros((0, width), np.float32), np.zeros(0, bool))
        return [self.encode(own) if len(own) else none for own in phrases]

    def _check_classes(self, texts: Iterable[str]) -> None:
        """Raise `UserError` for a text that a model with a closed label space does not know."""
        classes = self._model_config.classes
        known = set(map(normalize, classes))
        unknown = [text for text in texts if text not in known] if classes else []
        if unknown:
            raise UserError(
                f"the model has a closed label space of {len(classes)} names, and {unknown[0]!r} "
                f"is not one of them. Ask for names such as {', '.join(classes[:3])}, or use a "
                "model with an open vocabulary."
            )

    def _encode_texts(self, texts: list[str]) -> Float[np.ndarray, "n D"]:
        tokens = tokenize(texts)
        if self._cache is None or len(texts) < _CACHE_FROM:
            return self._encode_tokens(tokens)
        if self._digest is None:
            self._digest = text_tower_digest(self._model_config, self._params)
        return self._cache.get_or_encode(self._digest, tokens, self._encode_tokens)

    def _encode_tokens(self, tokens: Int[np.ndarray, "n L"]) -> Float[np.ndarray, "n D"]:
        empty = tokenize([""])
        embeddings = []
        for start in range(0, len(tokens), _TEXTS_AT_ONCE):
            chunk = tokens[start : start + _TEXTS_AT_ONCE]
            padding = np.repeat(empty, padded_count(len(chunk)) - len(chunk), axis=0)
            with self._mesh_context():
                encoded = _compiled_encode_text(
                    self._graphdef,
                    self._params,
                    np.concatenate([chunk, padding]),
                    replicated=self._replicated,
                )
            embeddings.append(encoded)
        # Fetched at the end, so that the device does not wait for this process in between.
        return np.concatenate([np.asarray(x, np.float32) for x in embeddings])[: len(tokens)]

    def _mean(self, embeddings: list[np.ndarray]) -> Float[np.ndarray, " D"]:
        if len(embeddings) == 1:
            return embeddings[0]
        mean = np.mean(embeddings, axis=0)
        if self._model_config.similarity != "dot":
            mean = mean / max(np.linalg.norm(mean), 1e-6)
        return mean

    # ---- Images to detections.

    def stream(
        self,
        sources: Iterable[ImageSource],
        names: EncodedNames,
        config: DecodeConfig | None = None,
    ) -> Iterator[tuple[int, ImageDetections | UserError]]:
        """Yield (index of the source, its detections, or the error if it cannot be read).

        Threads read images while the device works. Images are batched by the orientation of their
        canvas, so the order of the results is not that of the sources, but is always the same.

        Args:
          sources: paths, arrays or PIL images of any sizes.
          names: what to look for, from `encode`.
          config: replaces the predictor's; another `score_threshold` needs no new compilation.
        """
        return self._in_batches(sources, lambda batch: self._detect(batch, names, config))

    def stream_phrases(
        self, sources: Iterable[ImageSource], phrases: Sequence[EncodedNames]
    ) -> Iterator[tuple[int, PhraseRegions | UserError]]:
        """Yield (index of the source, the best region of each of its phrases, or the error).

        Images with up to eight phrases share one program for each canvas. The order is that of
        `stream`. A phrase without a region, because the model's outputs are not finite, is left
        out.

        Args:
          sources: paths, arrays or PIL images of any sizes.
          phrases: of each source, from `encode`.
        """
        rows = max((len(one.mask) for one in phrases), default=0)
        return self._in_batches(sources, lambda batch: self._align(batch, phrases, rows))

    def _in_batches(
        self,
        sources: Iterable[ImageSource],
        answer: Callable[[list[tuple[int, CanvasImage]]], Iterator[tuple[int, _Answer]]],
    ) -> Iterator[tuple[int, _Answer | UserError]]:
        """Yield what `answer` yields for batches of images that share a canvas, and the errors."""
        batches: dict[tuple[int, ...], list[tuple[int, CanvasImage]]] = {}  # by canvas
        for number, image in self._read_ahead(sources):
            if isinstance(image, UserError):
                yield number, image
                continue
            batch = batches.setdefault(image.pixels.shape, [])
            batch.append((number, image))
            if len(batch) == self.batch_size:
                yield from answer(batch)
                batch.clear()
        for batch in batches.values():
            if batch:
                yield from answer(batch)

    def _read_ahead(
        self, sources: Iterable[ImageSource]
    ) -> Iterator[tuple[int, CanvasImage | UserError]]:
        """Yield the images in order, with two batches being read in threads."""
        threads = min(16, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            remaining = iter(sources)
            submit = lambda count: [
                pool.submit(self._read_or_error, source)
                for source in itertools.islice(remaining, count)
            ]
            pending = collections.deque(submit(2 * self.batch_size))
            for number in itertools.count():
                if not pending:
                    return
                image = pending.popleft().result()
                pending.extend(submit(1))
                yield number, image

    def _read_or_error(self, source: ImageSource) -> CanvasImage | UserError:
        try:
            return fit_to_canvas(source, self.canvas)
        except UserError as error:
            return error

    def _detect(
        self,
        batch: list[tuple[int, CanvasImage]],
        names: EncodedNames,
        config: DecodeConfig | None,
    ) -> Iterator[tuple[int, ImageDetections]]:
        """Yield (index of the source, detections) of images that share a canvas."""
        found = self.run_batch(*self._stacked(batch), names, config)
        threshold = (config or self.config).score_threshold
        for slot, (number, image) in enumerate(batch):
            yield number, _in_image_pixels(found, slot, image, names.names, threshold)

    def _align(
        self, batch: list[tuple[int, CanvasImage]], phrases: Sequence[EncodedNames], rows: int
    ) -> Iterator[tuple[int, PhraseRegions]]:
        """Yield (index of the source, best regions) of images that share a canvas.

        `rows` is the length that the phrases of an image are padded to.
        """
        pixels, sizes = self._stacked(batch)
        width = phrases[batch[0][0]].embeddings.shape[1]
        embeddings = np.zeros((self.batch_size, rows, width), np.float32)
        mask = np.zeros((self.batch_size, rows), bool)
        for slot, (number, _) in enumerate(batch):
            own = phrases[number]
            embeddings[slot, : len(own.mask)] = own.embeddings
            mask[slot, : len(own.mask)] = own.mask
        with self._mesh_context():
            arrays = map(self._sharded, (pixels, sizes, embeddings, mask))
            found = _compiled_best_regions(
                self._graphdef, self._params, *arrays, replicated=self._replicated
            )
        found = jax.tree.map(np.asarray, found)
        for slot, (number, image) in enumerate(batch):
            yield number, _phrases_in_image_pixels(found, slot, image, phrases[number].names)

    def _stacked(
        self, batch: list[tuple[int, CanvasImage]]
    ) -> tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, "B 2"]]:
        """Return the pixels and sizes of images that share a canvas; empty slots at the end."""
        pixels = np.zeros((self.batch_size, *batch[0][1].pixels.shape), np.uint8)
        sizes = np.zeros((self.batch_size, 2), np.int32)
        for slot, (_, image) in enumerate(batch):
            pixels[slot], sizes[slot] = image.pixels, image.size
        return pixels, sizes

    def run_batch(
        self,
        images: UInt8[np.ndarray, "B H W 3"],
        sizes: Int[np.ndarray, "B 2"],
        names: EncodedNames,
        config: DecodeConfig | None = None,
    ) -> Detections:
        """Run the compiled `predict` on one batch; return NumPy arrays.

        Args:
          images: RGB; each image is in the top-left corner of its canvas.
          sizes: (height, width) in pixels of each image on its canvas; (0, 0) for an empty slot.
          names: what to look for, from `encode`.
          config: replaces the predictor's; another `score_threshold` needs no new compilation.
        """
        config = config or self.config
        with self._mesh_context():
            detections = _compiled_predict(
                self._graphdef,
                self._params,
                self._sharded(images),
                self._sharded(sizes),
                names.embeddings,
                names.mask,
                np.float32(config.score_threshold),
                config=dataclasses.replace(config, score_threshold=0.0),
                replicated=self._replicated,
            )
        return jax.tree.map(np.asarray, detections)

    def _mesh_context(self) -> contextlib.AbstractContextManager:
        """Tell a TPU's kernels which devices share the images, or the names."""
        if self._sharding is None:
            return contextlib.nullcontext()
        mesh = self._sharding.mesh  # of devices, never an abstract one
        return jax.set_mesh(mesh)  # pyright: ignore[reportArgumentType]

    def _sharded(self, array: np.ndarray) -> Array | np.ndarray:
        if self._sharding is None:
            return array
        return jax.make_array_from_callback(array.shape, self._sharding, lambda part: array[part])


def _in_image_pixels(
    found: Detections, slot: int, image: CanvasImage, names: tuple[str, ...], threshold: float
) -> ImageDetections:
    """Return the detections of one slot, with boxes in pixels of the original image."""
    kept = found.mask[slot]
    labels = np.asarray(found.labels[slot][kept])
    return ImageDetections(
        boxes=_uncanvassed(np.asarray(found.boxes[slot][kept]), image),
        scores=np.asarray(found.scores[slot][kept]),
        labels=labels,
        names=tuple(names[label] for label in labels),
        size=image.original_size,
        best_score=float(found.best_scores[slot]),
        best_name=names[found.best_labels[slot]] if found.best_scores[slot] else None,
        threshold=threshold,
    )


def _phrases_in_image_pixels(
    found: BestRegions, slot: int, image: CanvasImage, phrases: tuple[str, ...]
) -> PhraseRegions:
    """Return the best regions of one slot, with boxes in pixels of the original image."""
    kept = np.flatnonzero(found.mask[slot])
    return PhraseRegions(
        phrases=tuple(phrases[number] for number in kept),
        boxes=_uncanvassed(np.asarray(found.boxes[slot][kept]), image),
        scores=np.asarray(found.scores[slot][kept]),
        similarities=np.asarray(found.similarities[slot][kept]),
        size=image.original_size,
    )


def _uncanvassed(boxes: Float[np.ndarray, "n 4"], image: CanvasImage) -> Float[np.ndarray, "n 4"]:
    """Return boxes in pixels of the original image instead of the canvas."""
    (height, width), (original_height, original_width) = image.size, image.original_size
    scale = np.tile([original_width / width, original_height / height], 2)
    limits = np.tile([original_width, original_height], 2)
    return np.minimum(boxes * scale, limits).astype(np.float32)
