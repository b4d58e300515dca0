"""From a model's parts and pictures to detections: the pure function, and its compiled form."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.detections import Detections, ImageDetections
from detclipv2_jax.inference.embedding_cache import EmbeddingCache, tower_key
from detclipv2_jax.inference.images import Placed, Source, place
from detclipv2_jax.inference.predict import predict
from detclipv2_jax.models.detclip import DetCLIPConfig, build
from detclipv2_jax.text.tokenizer import enriched, normalize, tokenize

_TEXTS_AT_ONCE = 256  # that the text tower encodes together


_WORTH_A_FILE = 64  # texts; fewer are encoded sooner than the tower's parameters are digested


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "replicated"))
def _predict(graphdef, params, images, sizes, texts, text_mask, threshold, *, config, replicated):
    model = build(graphdef, params)
    detections = predict(
        model, images, sizes, texts, text_mask, config=config, score_threshold=threshold
    )
    if replicated is not None:  # so that every process can read all of it
        detections = jax.lax.with_sharding_constraint(detections, replicated)
    return detections


@functools.partial(jax.jit, static_argnames=("graphdef", "replicated"))
def _encode_text(graphdef, params, tokens, *, replicated):
    features = build(graphdef, params).encode_text(tokens)
    if replicated is not None:
        features = jax.lax.with_sharding_constraint(features, replicated)
    return features


def prompt(name: str, definition: str | None = None) -> str:
    """The text that stands for a name, as in training: the bare name without a definition."""
    return enriched(normalize(name), definition)


def check_names(names: Sequence[str]) -> None:
    """`UserError` where there are no names, or one of them is empty or no text."""
    if not len(names):
        raise UserError("no names were given; name at least one thing to look for.")
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str):
            raise UserError(f"name {number} of {len(names)} is {name!r}; give it as a text.")
        if not normalize(name):
            raise UserError(f"name {number} of {len(names)} is empty; leave it out or spell it.")


def table_size(count: int) -> int:
    """Rows to compile for when `count` names are asked: few programs, little waste."""
    if count <= 256:
        return max(8, 1 << (count - 1).bit_length())
    return -(-count // 256) * 256


@dataclasses.dataclass(frozen=True)
class Texts:
    """Encoded names, padded with rows outside `mask` to `table_size` rows."""

    names: tuple[str, ...]
    prompts: tuple[str, ...]  # what stands for each name; several texts are joined by ' | '
    embeddings: Float[np.ndarray, "P D"]
    mask: Bool[np.ndarray, " P"]


class Predictor:
    """A model's parts, compiled to answer batches of pictures.

    `params` may be replaced at any time (training does, before each evaluation): nothing is
    compiled anew. On several devices give `batch_sharding`, how the batch axis is laid out; with
    several processes each must make the same calls, and each gets all answers.
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
        upright: bool = False,
    ):
        """`canvas`: the (height, width) that pictures are scaled into, turned with each picture.

        `batch_size` is rounded up to a multiple of the devices. `cache` keeps the embeddings of
        long lists of names on disk; with several processes, which must do the same, it is not used.
        `upright` turns image files as their EXIF orientation says.
        """
        if batch_size < 1 or min(canvas) < 1:
            raise UserError(f"batch_size {batch_size} and canvas {canvas} must be at least 1.")
        self._graphdef = graphdef
        self._cache = cache if jax.process_count() == 1 else None
        self.params = params
        self.canvas = (int(canvas[0]), int(canvas[1]))
        self.config = config
        shards = 1 if batch_sharding is None else batch_sharding.mesh.size
        self._upright = upright
        self.batch_size = -(-batch_size // shards) * shards
        self._sharding = batch_sharding
        self._replicated = batch_sharding and jax.sharding.NamedSharding(
            batch_sharding.mesh, jax.sharding.PartitionSpec()
        )

    @property
    def params(self) -> Mapping[str, Any]:
        """The model's parameters; setting them forgets the encoded names."""
        return self._params

    @params.setter
    def params(self, params: Mapping[str, Any]) -> None:
        self._params = params
        self._tower: str | None = None
        self._encoded: dict[str, np.ndarray] = {}

    def encode(
        self, names: Sequence[str], prompts: Sequence[str | Sequence[str]] | None = None
    ) -> Texts:
        """Encodes names, each text once for as long as the parameters stay.

        `prompts`: the text that stands for each; by default the name itself. Of several texts for a
        name, the mean of their embeddings stands for it, of unit length again where the model
        compares by cosines.

        Raises:
          UserError: no names, or one of them is empty.
        """
        check_names(names)
        prompts = [prompt(name) for name in names] if prompts is None else prompts
        groups = [(texts,) if isinstance(texts, str) else tuple(texts) for texts in prompts]
        texts = dict.fromkeys(text for group in groups for text in group)
        if new := [text for text in texts if text not in self._encoded]:
            self._encoded.update(zip(new, self._encode_texts(new)))
        rows = np.stack([self._mean([self._encoded[text] for text in group]) for group in groups])
        padding = table_size(len(rows)) - len(rows)
        return Texts(
            names=tuple(names),
            prompts=tuple(" | ".join(group) for group in groups),
            embeddings=np.pad(rows, ((0, padding), (0, 0))),
            mask=np.arange(len(rows) + padding) < len(rows),
        )

    def _encode_texts(self, texts: list[str]) -> Float[np.ndarray, "n D"]:
        tokens = tokenize(texts)
        if self._cache is None or len(texts) < _WORTH_A_FILE:
            return self._encode_tokens(tokens)
        if self._tower is None:
            self._tower = tower_key(self._model_config, self._params)
        return self._cache.embeddings(self._tower, tokens, self._encode_tokens)

    def _encode_tokens(self, tokens: Int[np.ndarray, "n L"]) -> Float[np.ndarray, "n D"]:
        padding = tokenize([""])
        features = []
        for start in range(0, len(tokens), _TEXTS_AT_ONCE):
            piece = tokens[start : start + _TEXTS_AT_ONCE]
            rest = np.repeat(padding, table_size(len(piece)) - len(piece), axis=0)
            with self._on_its_devices():
                encoded = _encode_text(
                    self._graphdef,
                    self._params,
                    np.concatenate([piece, rest]),
                    replicated=self._replicated,
                )
            features.append(encoded)
        # Fetched at the end: until then the device need not wait for this process.
        return np.concatenate([np.asarray(x, np.float32) for x in features])[: len(tokens)]

    def _mean(self, embeddings: list[np.ndarray]) -> Float[np.ndarray, " D"]:
        if len(embeddings) == 1:
            return embeddings[0]
        mean = np.mean(embeddings, axis=0)
        if self._model_config.similarity == "cosine":
            mean = mean / max(np.linalg.norm(mean), 1e-6)
        return mean

    @functools.cached_property
    def _model_config(self) -> DetCLIPConfig:
        return build(self._graphdef, self._params).cfg

    def predict(
        self,
        images: UInt8[np.ndarray, "B H W 3"],
        sizes: Int[np.ndarray, "B 2"],
        texts: Texts,
        config: DecodeConfig | None = None,
    ) -> Detections:
        """`predict` of a batch of canvases on the device, with NumPy arrays out.

        `config` may stand for the predictor's; another threshold compiles nothing.
        """
        config = config or self.config
        with self._on_its_devices():
            detections = _predict(
                self._graphdef,
                self._params,
                self._laid_out(images),
                self._laid_out(sizes),
                texts.embeddings,
                texts.mask,
                np.float32(config.score_threshold),
                config=dataclasses.replace(config, score_threshold=0.0),
                replicated=self._replicated,
            )
        return jax.tree.map(np.asarray, detections)

    def _on_its_devices(self) -> contextlib.AbstractContextManager:
        """Tells a TPU's kernels which devices share the images, or the names."""
        if self._sharding is None:
            return contextlib.nullcontext()
        return jax.set_mesh(self._sharding.mesh)

    def _laid_out(self, array: np.ndarray) -> Array:
        if self._sharding is None:
            return array
        return jax.make_array_from_callback(array.shape, self._sharding, lambda part: array[part])

    def stream(
        self, sources: Iterable[Source], texts: Texts, config: DecodeConfig | None = None
    ) -> Iterator[tuple[int, ImageDetections | UserError]]:
        """Yields (number of the source, what was found or why it could not be read).

        Pictures are read in threads while the device works, and gathered into full batches by the
        way their canvas is turned; so the order is not quite that of the sources, but always the
        same. `config` as in `predict`.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, Placed]]] = {}
        for number, picture in self._read_ahead(sources):
            if isinstance(picture, UserError):
                yield number, picture
                continue
            batch = waiting.setdefault(picture.canvas.shape, [])
            batch.append((number, picture))
            if len(batch) == self.batch_size:
                yield from self._answer(batch, texts, config)
                batch.clear()
        for batch in waiting.values():
            if batch:
                yield from self._answer(batch, texts, config)

    def _read_ahead(self, sources: Iterable[Source]) -> Iterator[tuple[int, Placed | UserError]]:
        threads = min(16, os.cpu_count() or 1)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            rest = iter(sources)
            start = lambda count: [
                pool.submit(self._place_or_error, source)
                for source in itertools.islice(rest, count)
            ]
            ahead = collections.deque(start(2 * self.batch_size))
            for number in itertools.count():
                if not ahead:
                    return
                picture = ahead.popleft().result()
                ahead.extend(start(1))
                yield number, picture

    def _place_or_error(self, source: Source) -> Placed | UserError:
        try:
            return place(source, self.canvas, upright=self._upright)
        except UserError as error:
            return error

    def _answer(
        self, batch: list[tuple[int, Placed]], texts: Texts, config: DecodeConfig | None
    ) -> Iterator[tuple[int, ImageDetections]]:
        images = np.zeros((self.batch_size, *batch[0][1].canvas.shape), np.uint8)
        sizes = np.zeros((self.batch_size, 2), np.int32)
        for slot, (_, picture) in enumerate(batch):
            images[slot], sizes[slot] = picture.canvas, picture.size
        found = self.predict(images, sizes, texts, config)
        for slot, (number, picture) in enumerate(batch):
            yield number, _in_own_pixels(found, slot, picture, texts.names)


def _in_own_pixels(
    found: Detections, slot: int, picture: Placed, names: tuple[str, ...]
) -> ImageDetections:
    kept = found.mask[slot]
    (height, width), (original_height, original_width) = picture.size, picture.original
    scale = np.tile([original_width / width, original_height / height], 2)
    limits = np.tile([original_width, original_height], 2)
    labels = found.labels[slot][kept]
    return ImageDetections(
        boxes=np.minimum(found.boxes[slot][kept] * scale, limits).astype(np.float32),
        scores=found.scores[slot][kept],
        labels=labels,
        names=tuple(names[label] for label in labels),
        size=picture.original,
    )
