"""Compare what a source was made from with what is given now, wherever the folders lie today."""

import json
import os
from collections.abc import Mapping
from typing import Any


def same_inputs(stored: Any, given: Any) -> bool:
    """Return whether two results of `registry.fingerprint` are of the same files and options.

    The annotation files are compared by their content, in order. The folders of the images must be
    the same, or lie at the same place relative to the annotation files: a checkout that was moved,
    copied or mounted elsewhere has both under new paths.
    """
    stored, given = json.loads(json.dumps(stored)), json.loads(json.dumps(given))
    if stored == given:
        return True
    if not _is_fingerprint(stored) or not _is_fingerprint(given):
        return False
    if _rest(stored) != _rest(given):
        return False
    return stored["images"] == given["images"] or _relative(stored) == _relative(given)


def _is_fingerprint(inputs: Any) -> bool:
    return (
        isinstance(inputs, dict)
        and isinstance(inputs.get("files"), dict)
        and isinstance(inputs.get("images"), list)
        and all(isinstance(folder, str) for folder in inputs["images"])
    )


def _rest(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything but paths."""
    rest = {name: value for name, value in inputs.items() if name != "images"}
    return rest | {"files": list(inputs["files"].values())}


def _relative(inputs: Mapping[str, Any]) -> list[str]:
    first = next(iter(inputs["files"]), "/")
    return [os.path.relpath(folder, os.path.dirname(first)) for folder in inputs["images"]]
