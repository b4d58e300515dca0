"""Text embeddings on disk, so that a list of names is encoded once for all processes and runs.

One file holds the embeddings of one list of texts. The file name is a digest of everything that the
embeddings depend on, so no file is ever out of date. Any of them may be deleted at any time.
"""

import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.models.detclip import DetCLIPConfig
from detclipv2_jax.models.parameters import parameter_paths

#: Part of every file name. Increase it when the same parameters give other embeddings.
_VERSION = b"1"

#: A function from token ids to their text embeddings.
EncodeTokens = Callable[[Int[np.ndarray, "n L"]], Float[np.ndarray, "n D"]]


def text_tower_digest(config: DetCLIPConfig, params: Mapping[str, Any]) -> str:
    """Return a digest of everything that the embedding of given token ids depends on.

    Args:
      config: the model's config.
      params: the model's parameters; only those of the text tower count.
    """
    digest = hashlib.sha256(_VERSION)
    digest.update(repr((config.text, config.classes, config.dtype, config.similarity)).encode())
    for path, value in sorted(parameter_paths(params.get("text", {})).items()):
        array = np.ascontiguousarray(value)
        digest.update(repr((path, array.shape, array.dtype.str)).encode())
        digest.update(array.data)
    return digest.hexdigest()


class EmbeddingCache:
    """A directory with text embeddings, created when the first file is written.

    If it cannot be written, one warning is printed and nothing is stored.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = pathlib.Path(directory)
        self._writable = True

    def get_or_encode(
        self, tower_digest: str, tokens: Int[np.ndarray, "n L"], encode: EncodeTokens
    ) -> Float[np.ndarray, "n D"]:
        """Return the embeddings of the token ids from their file, or encode and store them.

        Args:
          tower_digest: the `text_tower_digest` of the model behind `encode`.
          tokens: token ids; the file is found by these and the digest.
          encode: called if the file is missing or damaged.
        """
        tokens = np.ascontiguousarray(tokens, "<i4")
        key = hashlib.sha256(f"{tower_digest} {tokens.shape}".encode() + tokens.tobytes())
        path = self._directory / f"{key.hexdigest()}.safetensors"
        embeddings = _load(path, len(tokens))
        if embeddings is None:
            embeddings = encode(tokens)
            self._save(path, embeddings)
        return embeddings

    def _save(self, path: pathlib.Path, embeddings: Float[np.ndarray, "n D"]) -> None:
        from safetensors.numpy import save

        if not self._writable:
            return
        embeddings = np.ascontiguousarray(embeddings, np.float32)
        content = save({"embeddings": embeddings}, {"sha256": _checksum(embeddings)})
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(content)
        except UserError as error:
            self._writable = False
            print(f"warning: text embeddings are not cached: {error}", file=sys.stderr)


def _load(path: pathlib.Path, rows: int) -> Float[np.ndarray, "n D"] | None:
    """Return the embeddings in a file; None if it is missing, damaged or of other `rows`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            embeddings = file.get_tensor("embeddings")
            checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    fits = embeddings.ndim == 2 and len(embeddings) == rows and embeddings.dtype == np.float32
    return embeddings if fits and checksum == _checksum(embeddings) else None


def _checksum(embeddings: Float[np.ndarray, "n D"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(embeddings).data).hexdigest()
