"""Tensors by name from safetensors and PyTorch files; nothing in a file is executed.

PyTorch's own formats need PyTorch installed, except OpenAI's CLIP files: those are TorchScript
archives, which PyTorch can only open by loading their code, so `torchscript.py` reads their
tensors by itself.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import torchscript

_HELP = "download it again, or convert it to safetensors"
# The sections under which training codes keep a model beside other things.
_SECTIONS = ("state_dict", "model_state_dict", "model", "module", "ema", "state_dict_ema")


def read(path: str | Path) -> Mapping[str, Any]:
    """The tensors of a file by name, as NumPy arrays; safetensors are read one by one when asked.

    Args:
        path: `.safetensors`, or PyTorch's `.pth`, `.pt` or `.bin`.

    Raises:
        UserError: no such file, cut off, not of these formats, or a pickle with more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path of the weights")
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return torchscript.read(path) if torchscript.is_archive(path) else _read_torch(path)
    raise UserError(
        f"{path}: {path.suffix or 'a file without suffix'} is no format of weights that is known; "
        "give a .safetensors, .pth, .pt, .bin or .ckpt file"
    )


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading {path.suffix} needs PyTorch (`pip install torch`, for this once); "
            "or convert the file to safetensors"
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no exception of its own for a damaged or refused file
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a whole file of tensors ({reason}); {_HELP}") from None
    for section in _SECTIONS:
        if isinstance(content, Mapping) and isinstance(content.get(section), Mapping):
            content = content[section]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds a {type(content).__name__}, not tensors by name; {_HELP}")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}


def _to_numpy(tensor: Any) -> np.ndarray:
    """NumPy knows no bfloat16 of PyTorch's; float32 holds all its values."""
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def as_float32(array: Any, name: str, path: str | Path) -> np.ndarray:
    """A tensor of any float precision in float32; `UserError` if a value is not finite."""
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        raise UserError(f"{path}: {name} holds {array.dtype}, not floating-point weights")
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} has values that are not finite; download the file again")
    return array


class _Safetensors(Mapping):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self._path, self._error = path, SafetensorError
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file ({error}); {_HELP}") from None
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
