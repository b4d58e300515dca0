"""Rows of the parity table, and our modules with the weights of reference packages."""

import contextlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from detclipv2_jax.models.parameters import parameter_paths
from detclipv2_jax.weights import convert
from detclipv2_jax.weights.layouts import Layout


def compare(part: str, reference: str, on: str, ours, theirs, tolerance: float) -> None:
    """Assert that arrays agree with a reference, and add a row to the parity table.

    The file of rows is named by the environment variable PARITY_ROWS; without it none are written.

    Args:
        part: what is compared.
        reference: the package that computes the reference, or a description.
        on: the inputs.
        ours: tree of arrays.
        theirs: tree of arrays of the same structure.
        tolerance: of the largest error over the largest reference value; 0 requires equality.
    """
    ours, theirs = jax.tree.leaves(ours), jax.tree.leaves(theirs)
    assert len(ours) == len(theirs) > 0
    error = 0.0
    for a, b in zip(map(np.asarray, ours), map(np.asarray, theirs)):
        assert a.shape == b.shape, f"{a.shape} and {b.shape}"
        if a.size:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            assert np.isfinite(b).all(), "the reference itself is not finite"
            error = max(error, np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
    _write_row(part, reference, on, error, tolerance)
    assert error <= tolerance, f"{part} on {on}: error {error:.2g}, allowed {tolerance:g}"


def _write_row(part: str, reference: str, on: str, error: float, tolerance: float) -> None:
    if "PARITY_ROWS" in os.environ:
        package = reference.split()[0]
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            version = importlib.metadata.version(package)
            reference = f"{package} {version}{reference.removeprefix(package)}"
        row = {"part": part, "reference": reference, "on": on, "error": float(error)}
        row |= {"tolerance": tolerance, "test": os.environ.get("PYTEST_CURRENT_TEST", "")}
        with open(os.environ["PARITY_ROWS"], "a") as file:
            file.write(json.dumps(row) + "\n")


def to_numpy(tensors) -> dict[str, np.ndarray]:
    """Convert a PyTorch state dict (or gradients by name) to NumPy."""
    return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


def filled(
    build: Callable[[], nnx.Module],
    tensors: Mapping[str, np.ndarray],
    layouts: Sequence[Layout],
) -> tuple[nnx.GraphDef, dict]:
    """Return our module's graph, and its parameters as nested dicts of a reference's tensors."""
    graphdef, state = nnx.split(nnx.eval_shape(build))
    params = nnx.to_pure_dict(state)
    return graphdef, converted(params, tensors, layouts)


def converted(params: dict, tensors: Mapping[str, np.ndarray], layouts: Sequence[Layout]) -> dict:
    """Return nested dicts like `params` of a reference's tensors (parameters or gradients)."""
    shapes = {name: leaf.shape for name, leaf in parameter_paths(_named(params)).items()}
    found, report = convert.convert(tensors, layouts, shapes, "part", "the reference")
    assert not report.not_loaded and not report.resized

    def pick(path, _):
        return found["/".join(str(entry.key) for entry in path)]

    return jax.tree_util.tree_map_with_path(pick, params)


def _named(tree):
    if not isinstance(tree, Mapping):
        return tree
    return {str(key): _named(value) for key, value in tree.items()}


def apply(graphdef: nnx.GraphDef, params: dict, *args):
    """Return our module's output."""
    run = lambda params, *args: nnx.merge(graphdef, nnx.State(params))(*args)
    return jax.jit(run)(params, *args)


def randomized(module, seed: int = 0, scale: float = 0.2):
    """Return a PyTorch module with random parameters: a 1 or a 0 may hide a mistake."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 1
        std = fan**-0.5 if parameter.ndim > 1 else scale
        with torch.no_grad():
            parameter.normal_(1.0 if _is_scale(name) else 0.0, std, generator=generator)
    module.eval()  # MMDetection's returns nothing
    return module


def _is_scale(name: str) -> bool:
    return name.endswith(".weight") and "norm" in name.lower()
