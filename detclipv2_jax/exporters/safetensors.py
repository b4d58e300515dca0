"""The parameters by name, for whoever has a DetCLIPv2 in code: `model.safetensors`."""

import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from detclipv2_jax.common import config_dict
from detclipv2_jax.common.atomic import replacing
from detclipv2_jax.models.parameters import parameter_paths

if TYPE_CHECKING:
    from detclipv2_jax.inference.checkpoint import LoadedModel


def write(loaded: "LoadedModel", output: pathlib.Path) -> dict[str, str]:
    """Writes the averaged parameters in float32, and what using them needs as JSON in the metadata.

    That is the model's config, the names and the definitions that its detection data had, and how
    it is asked (`eval`, the fields of `DetectConfig`). Returns the file by its role.
    """
    metadata = {
        "format": "detclipv2_jax",
        "step": str(loaded.step),
        "model": json.dumps(loaded.model.to_dict()),
        "eval": json.dumps(config_dict.to_dict(loaded.detect)),
        "names": json.dumps(loaded.names),
        "definitions": json.dumps(loaded.definitions),
    }
    write_tensors(output / "model.safetensors", loaded.params, metadata)
    return {"parameters": "model.safetensors"}


def write_tensors(
    path: pathlib.Path, params: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes parameters (nested dicts) as one file, whole or not at all."""
    from safetensors.numpy import save_file

    tensors = {
        name.replace("/", "."): np.array(value, order="C")  # a scalar stays one
        for name, value in parameter_paths(params).items()
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata))
