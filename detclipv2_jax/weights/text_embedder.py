"""Text embeddings by a published CLIP text tower, to compare the meanings of texts."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float
from tqdm import tqdm

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.text import TextConfig, TextTower
from detclipv2_jax.text.tokenizer import tokenize
from detclipv2_jax.weights import activation, clip, files
from detclipv2_jax.weights.convert import convert
from detclipv2_jax.weights.layouts import Layout

_BATCH = 256


def text_embedder(path: str | Path) -> Callable[[Sequence[str]], Float[np.ndarray, "n d"]]:
    """Return a function that embeds texts by the text tower in a file of CLIP weights.

    Args:
        path: file of a CLIP of any size (docs/weights.md). If it has no projection, the embeddings
            are the features before the projection.

    Returns:
        A function from n texts to n float32 embeddings, which are not normalized.

    Raises:
        UserError: the file cannot be read or contains no CLIP text tower.
    """
    tensors = files.read(path)
    found_activation = activation.stated(path)
    print(f"{path}: {found_activation}")
    config = dataclasses.replace(
        _config(tensors), activation=found_activation.activation or activation.ASSUMED
    )
    graphdef, state = jax.eval_shape(lambda: nnx.split(TextTower(config, rngs=Draws())))
    leaves = {"text/" + "/".join(map(str, p)): (p, v.shape) for p, v in nnx.to_flat_state(state)}
    shapes = {name: shape for name, (_, shape) in leaves.items()}
    found, report = convert(tensors, clip.LAYOUTS, shapes, "text", str(path))
    if "text/text_projection" in report.not_loaded:
        found["text/text_projection"] = np.eye(config.width, dtype=np.float32)
    params = nnx.from_flat_state([(leaves[name][0], value) for name, value in found.items()])
    encode = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens))

    def embed(texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        rows = tokenize(texts, config.context)
        rows = np.pad(rows, ((0, -len(rows) % _BATCH), (0, 0)))
        starts = tqdm(range(0, len(rows), _BATCH), "encoding texts", disable=None, leave=False)
        batches = [encode(params, rows[i : i + _BATCH]) for i in starts]
        features = np.concatenate([np.asarray(batch) for batch in batches] or [np.zeros((0, 1))])
        return features[: len(texts)]

    return embed


def _config(tensors: Mapping[str, Any]) -> TextConfig:
    """Return the sizes of the tower in a file; the default if its layout is unknown."""
    for layout in clip.LAYOUTS:
        prefix = layout.prefix(tensors)
        if prefix is not None:
            return _config_in(tensors, layout, prefix)
    return TextConfig()  # `convert` reports the unknown layout


def _config_in(tensors: Mapping[str, Any], layout: Layout, prefix: str) -> TextConfig:
    def shape(path: str) -> tuple[int, ...] | None:
        (name,) = layout.names(path)
        for spelling in (prefix + name, name):
            if spelling in tensors:
                return tensors[spelling].shape
        return None

    vocab, width = shape("token_embedding")
    projection = shape("text_projection") or (width,)
    layers = itertools.takewhile(lambda i: shape(f"resblocks/{i}/ln_1/scale"), itertools.count())
    return TextConfig(
        width=width,
        layers=sum(1 for _ in layers),
        heads=max(width // 64, 1),  # the same for all CLIP models
        vocab=vocab,
        # OpenAI stores (in, out), Hugging Face (out, in).
        embed_dim=next((size for size in projection if size != width), width),
    )
