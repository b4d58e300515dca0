"""Text embeddings kept on disk, so that a vocabulary is encoded once, whoever asks for it.

A file holds the embeddings of one list of texts. Its name is made of all that they depend on, so
nothing in the directory is ever out of date, and all of it may be deleted at any time.
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

_VERSION = b"1"  # of what a text tower computes from the same parameters; part of every name

#: Tokens in, their embeddings out.
Encode = Callable[[Int[np.ndarray, "n L"]], Float[np.ndarray, "n D"]]


def default_directory() -> pathlib.Path:
    """`$XDG_CACHE_HOME/detclipv2_jax`, in `~/.cache` where that is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "detclipv2_jax"


def tower_key(config: DetCLIPConfig, params: Mapping[str, Any]) -> str:
    """A digest of all that the embedding of given tokens depends on; `params` are the model's."""
    digest = hashlib.sha256(_VERSION)
    digest.update(repr((config.text, config.dtype, config.similarity)).encode())
    for path, value in sorted(parameter_paths(params["text"]).items()):
        array = np.ascontiguousarray(value)
        digest.update(repr((path, array.shape, array.dtype.str)).encode())
        digest.update(array.data)
    return digest.hexdigest()


class EmbeddingCache:
    """Embeddings in files of `directory`, made when the first is written.

    Where it cannot be written, that is said once and nothing is kept.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = pathlib.Path(directory)
        self._writable = True

    def embeddings(
        self, tower: str, tokens: Int[np.ndarray, "n L"], encode: Encode
    ) -> Float[np.ndarray, "n D"]:
        """The file's, or what `encode` makes of the tokens; `tower` is their `tower_key`.

        A file that is damaged is made anew.
        """
        tokens = np.ascontiguousarray(tokens, "<i4")
        key = hashlib.sha256(f"{tower} {tokens.shape}".encode() + tokens.tobytes()).hexdigest()
        path = self._directory / f"{key}.safetensors"
        found = _load(path, len(tokens))
        if found is None:
            found = encode(tokens)
            self._save(path, found)
        return found

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
            print(f"warning: text embeddings are not kept: {error}", file=sys.stderr)


def _load(path: pathlib.Path, rows: int) -> Float[np.ndarray, "n D"] | None:
    """None where the file is missing or not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            embeddings = file.get_tensor("embeddings")
            checksum = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    whole = embeddings.ndim == 2 and len(embeddings) == rows and embeddings.dtype == np.float32
    return embeddings if whole and checksum == _checksum(embeddings) else None


def _checksum(embeddings: Float[np.ndarray, "n D"]) -> str:
    return hashlib.sha256(np.ascontiguousarray(embeddings).data).hexdigest()
