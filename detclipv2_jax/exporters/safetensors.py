"""The parameters by name, for fine-tuning, converting and sharing: `model.safetensors`."""

import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from detclipv2_jax.common import config_dict, safetensors_file
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.models.parameters import parameter_paths

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


def write(loaded: "LoadedModel", output: pathlib.Path) -> dict[str, str]:
    """Write the averaged parameters in float32, with all settings needed to use them.

    The settings are JSON in the file's metadata: the model's config (`model`), the fields of
    `DetectConfig` (`eval`), the names and definitions of the detection data, and the fitted score
    threshold or null (`threshold`).

    Returns:
      {'parameters': file name}.
    """
    metadata = {
        "format": "detclipv2_jax",
        "step": str(loaded.step),
        "model": json.dumps(loaded.model.to_dict()),
        "eval": json.dumps(config_dict.to_dict(loaded.detect)),
        "names": json.dumps(loaded.names),
        "definitions": json.dumps(loaded.definitions),
        "threshold": json.dumps(loaded.threshold),
    }
    write_tensors(output / "model.safetensors", loaded.params, metadata)
    return {"parameters": "model.safetensors"}


def write_tensors(
    path: pathlib.Path, params: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Write nested dicts of parameters as one file, atomically. Names are paths joined by dots."""
    tensors = {
        name.replace("/", "."): np.array(value, order="C")  # unlike asarray, keeps scalars scalar
        for name, value in parameter_paths(params).items()
    }
    with replacing(path) as temporary:
        safetensors_file.write(temporary, tensors, metadata)
