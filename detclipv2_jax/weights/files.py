"""Read tensors by name from safetensors and PyTorch files without executing anything in them.

PyTorch's formats need PyTorch installed, except OpenAI's CLIP files. Those are TorchScript
archives, which PyTorch can only open by loading their code, so `torchscript.py` reads their tensors
itself.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import torchscript

_REMEDY = "Download it again, or convert it to safetensors."
# Keys under which training code stores the model, next to optimizer state and other entries.
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "ema", "state_dict_ema")


def read(path: str | Path) -> Mapping[str, Any]:
    """Return the tensors of a file by name, as NumPy arrays.

    Tensors of safetensors files are read one by one, on access.

    Args:
        path: a `.safetensors` file, or PyTorch's `.pth`, `.pt`, `.bin` or `.ckpt`.

    Raises:
        UserError: the file does not exist, is incomplete, has another format, or is a pickle that
            contains more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path of the weights.")
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        return torchscript.read(path) if torchscript.is_archive(path) else _read_torch(path)
    raise UserError(
        f"{path}: {path.suffix or 'a file without suffix'} is not a known format of weights. Use "
        "a .safetensors, .pth, .pt, .bin or .ckpt file."
    )


def metadata(path: str | Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file; nothing for other formats and damaged files."""
    if Path(path).suffix != ".safetensors":
        return {}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # `read` reports it


def as_float32(array: Any, name: str, path: str | Path) -> np.ndarray:
    """Return a floating-point tensor as float32.

    Args:
        array: the tensor.
        name: of the tensor, for errors.
        path: of the file, for errors.

    Raises:
        UserError: the tensor is not floating-point or has non-finite values.
    """
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        raise UserError(
            f"{path}: {name} has type {array.dtype}. Use a file of floating-point weights."
        )
    array = np.asarray(array, np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path}: {name} has values that are not finite. Download the file again.")
    return array


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading {path.suffix} files needs PyTorch. Run `pip install torch`, or "
            "convert the file to safetensors."
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged and refused files
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: not a complete file of tensors ({reason}). {_REMEDY}") from None
    for key in _MODEL_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path}: contains a {type(content).__name__}, not tensors by name. {_REMEDY}"
        )
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: _to_numpy(tensor) for name, tensor in tensors.items()}


def _to_numpy(tensor: Any) -> np.ndarray:
    """Convert a PyTorch tensor; bfloat16, which NumPy does not have, becomes float32 exactly."""
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


class _Safetensors(Mapping):
    """A safetensors file as a mapping that reads each tensor on access."""

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: not a complete safetensors file ({error}). {_REMEDY}"
            ) from None
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
