"""A checkpoint as files for other programs.

    python -m detclipv2_jax.export --checkpoint=DIR --format=safetensors --output=DIR

`safetensors` writes `model.safetensors`: the averaged parameters in float32, named by their path
(`backbone.layers.0.blocks.0.attn.qkv.kernel`; kernels are (in, out) and (height, width, in, out)),
with the model's config as JSON in the file's metadata. `--config.init.model=FILE` starts a run from
it. docs/weights.md lists the names.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detclipv2_jax.commands import status
from detclipv2_jax.files import replacing
from detclipv2_jax.models.detclip import parameter_paths


def write_safetensors(
    path: str | Path, params: Mapping[str, Any], metadata: Mapping[str, str]
) -> None:
    """Writes parameters (nested dicts) as one file, whole or not at all."""
    from safetensors.numpy import save_file

    tensors = {
        name.replace("/", "."): np.array(value, order="C")  # a scalar stays one
        for name, value in parameter_paths(params).items()
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata))


def run(args: argparse.Namespace) -> None:
    """Exports as the command line says."""
    from detclipv2_jax.checkpoint import load_model

    loaded = load_model(args.checkpoint, args.step)
    path = Path(args.output) / "model.safetensors"
    metadata = {
        "format": "detclipv2_jax",
        "step": str(loaded.step),
        "model": json.dumps(loaded.config["model"]),
        "names": json.dumps(loaded.names),
    }
    write_safetensors(path, loaded.params, metadata)
    count = len(parameter_paths(loaded.params))
    print(f"{path}: {count} parameters of step {loaded.step}, {path.stat().st_size / 1e6:.1f} MB")


def parser() -> argparse.ArgumentParser:
    """The command line of this module."""
    result = argparse.ArgumentParser(
        prog="python -m detclipv2_jax.export",
        description="Writes a checkpoint's model as a file for other programs.",
    )
    result.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="the workdir of a training run"
    )
    result.add_argument(
        "--format",
        choices=("safetensors",),
        default="safetensors",
        help="safetensors: the averaged parameters, float32, by name (default: %(default)s)",
    )
    result.add_argument("--output", required=True, metavar="DIR", help="where to write")
    result.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 2 if something that the user can mend went wrong, one sentence each."""
    return status(run, parser().parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
