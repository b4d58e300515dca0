"""Digests of what was written, so that a later reader trusts no damaged file."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PIECE = 1 << 22  # bytes that are read at once


def of_bytes(content: bytes | memoryview) -> str:
    """Return the digest of some bytes: SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def of_file(path: Path) -> str:
    """Return the digest of a file's bytes; `OSError` if it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:  # of etils: it may be in a bucket
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def of_json(value: Mapping[str, Any]) -> str:
    """Return the digest of a JSON object, whatever the order of its keys and its white space."""
    return of_bytes(json.dumps(value, sort_keys=True, allow_nan=False).encode())
