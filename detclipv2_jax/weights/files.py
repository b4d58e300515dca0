"""Read tensors by name from safetensors and PyTorch files without executing anything in them.

PyTorch's formats need PyTorch installed, except OpenAI's CLIP files. Those are TorchScript
archives, which PyTorch can only open by loading their code, so `torchscript.py` reads their tensors
itself.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detclipv2_jax.common import lfs_pointer
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.json_file import read_json
from detclipv2_jax.common.safetensors_file import SafetensorsFile
from detclipv2_jax.weights import archives, torchscript

_REMEDY = "Download it again, or convert it to safetensors."
# Keys under which training code stores the model, next to optimizer state and other entries.
_MODEL_KEYS = ("state_dict", "model_state_dict", "model", "module", "ema", "state_dict_ema")
_EIGHT_BIT_FLOATS = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
_OF_TORCH = {
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
_FLOATS = {
    np.dtype(one)
    for one in (
        *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16),
        *_EIGHT_BIT_FLOATS.values(),
    )
}
# How quantized files name the scale that belongs to the tensor `{}`, next to it.
_SCALES = ("{}_scale", "{}_scale_inv", "{}_scales", "scale_{}", "{}_absmax", "{}.absmax", "SCB")


def read(path: str | Path) -> Mapping[str, Any]:
    """Return the tensors of a file by name, as NumPy arrays.

    Tensors of safetensors files are read one by one, on access.

    Args:
        path: a `.safetensors` file, PyTorch's `.pth`, `.pt`, `.bin` or `.ckpt`, or Hugging Face's
            `.index.json` of several such files.

    Raises:
        UserError: the file does not exist, is incomplete, has another format, is a pickle that
            contains more than tensors, or has 8-bit weights with scales.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Check the path of the weights.")
    if lfs_pointer.is_pointer_file(path):
        raise UserError(f"{path}: {lfs_pointer.REASON}.")
    if path.suffix == ".safetensors":
        tensors = SafetensorsFile(path)
        _check_not_scaled(path, _eight_bit(tensors), tensors)
        return tensors
    if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        archives.check_sizes(path)
        return torchscript.read(path) if torchscript.is_archive(path) else _read_torch(path)
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    raise UserError(
        f"{path}: {path.suffix or 'a file without suffix'} is not a known format of weights. Use "
        "a .safetensors, .pth, .pt, .bin, .ckpt or .index.json file."
    )


def metadata(path: str | Path) -> Mapping[str, str]:
    """Return the metadata of a safetensors file; nothing for other formats and damaged files."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        return SafetensorsFile(Path(path)).metadata
    except UserError:
        return {}  # `read` reports it


def as_float32(array: Any, name: str, path: str | Path) -> np.ndarray:
    """Return a floating-point tensor as float32.

    Args:
        array: the tensor.
        name: of the tensor, for errors.
        path: of the file, for errors.

    Raises:
        UserError: the tensor is not floating-point, or has values that are not finite or that
            float32 cannot hold.
    """
    if array.dtype not in _FLOATS:
        quantized = ", as quantized weights have" if array.dtype in (np.int8, np.uint8) else ""
        raise UserError(
            f"{path}: {name} has type {array.dtype}{quantized}. Use a file of floating-point "
            "weights."
        )
    with np.errstate(over="ignore"):  # reported below
        found = np.asarray(array, np.float32)
    if not np.isfinite(found).all():
        if np.isfinite(np.asarray(array, np.float64)).all():
            raise UserError(
                f"{path}: {name} has values that are too large for float32. Use a file of float32 "
                "weights."
            )
        raise UserError(f"{path}: {name} has values that are not finite. Download the file again.")
    return found


def _eight_bit(tensors: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of 8-bit floats, without reading a safetensors file's."""
    if isinstance(tensors, SafetensorsFile):
        return [name for name, dtype in tensors.dtypes.items() if dtype in _EIGHT_BIT_FLOATS]
    kinds = {np.dtype(one) for one in _EIGHT_BIT_FLOATS.values()}
    return [name for name, array in tensors.items() if array.dtype in kinds]


def _check_not_scaled(path: Path, small: Iterable[str], names: Iterable[str]) -> None:
    """Raise `UserError` if an 8-bit tensor has a scale, without which its values are wrong."""
    names = set(names)
    for name in small:
        folder, dot, leaf = name.rpartition(".")
        for pattern in _SCALES:
            scale = f"{folder}{dot}{pattern.format(leaf)}"
            if scale in names:
                raise UserError(
                    f"{path}: {name} has 8-bit values, to be multiplied by {scale}, which this "
                    "package does not do. Use a file of float32, float16 or bfloat16 weights."
                )


def _read_parts(path: Path) -> Mapping[str, Any]:
    """Return the tensors of all files that a Hugging Face index names."""
    try:
        names = read_json(path)["weight_map"]
        parts = sorted(set(names.values()))
        is_valid = all(isinstance(part, str) and Path(part).name == part for part in parts)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_valid, names, parts = False, {}, []
    if not is_valid or any(part.endswith(".index.json") for part in parts):
        raise UserError(
            f"{path}: is not an index of weights: 'weight_map' must give each tensor the name of a "
            f"file in the same folder. {_REMEDY}"
        )
    every = {part: read(path.with_name(part)) for part in parts}
    for name, part in names.items():
        if name not in every[part]:
            raise UserError(f"{path}: {name} is not in {part}, unlike it says. {_REMEDY}")
    small = [name for part in every.values() for name in _eight_bit(part)]
    _check_not_scaled(path, small, names)
    return _Parts(every, names)


class _Parts(Mapping):
    """The tensors of several files as one mapping, each read on access."""

    def __init__(self, files: Mapping[str, Mapping[str, Any]], part_of: Mapping[str, str]):
        self._files, self._part_of = files, part_of

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._part_of[name]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)


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
    tensors = {
        name: _to_numpy(value, name, path)
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and isinstance(name, str)
    }
    _check_not_scaled(path, _eight_bit(tensors), tensors)
    return tensors


def _to_numpy(tensor: Any, name: str, path: Path) -> np.ndarray:
    """Convert a PyTorch tensor, also of types that NumPy does not have, bit for bit."""
    import torch

    own = _OF_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    try:
        tensor = tensor.detach()
        if own is not None:
            bits = torch.uint8 if np.dtype(own).itemsize == 1 else torch.int16
            return tensor.contiguous().view(bits).numpy().view(own)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:  # quantized, sparse, without values, ...
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path}: {name} is a tensor of type {tensor.dtype} that cannot be read ({reason}). "
            "Use a file of float32 weights."
        ) from None
