"""Write safetensors files, and read them, each tensor on access.

The package `safetensors` returns no 8-bit floats as NumPy arrays and does not see a name that
occurs twice. What it writes only its owner may read, and a full disk is not an `OSError`. The
format: eight bytes with the header's length, the header (JSON: name -> dtype,
shape and position of each tensor), then the tensors without gaps.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detclipv2_jax.common.errors import UserError

_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}
_MAX_HEADER = 100_000_000  # bytes, the limit of the package `safetensors`
_REMEDY = "Download it again."


class SafetensorsFile(Mapping):
    """A safetensors file as a mapping from names to arrays.

    Attributes:
        metadata: the texts under `__metadata__`.
        dtypes: the format's name of each tensor's type, such as "F8_E4M3".
    """

    def __init__(self, path: Path):
        """Read and check the header.

        Raises:
            UserError: the file cannot be read, is incomplete, or is not a safetensors file.
        """
        self._path = path
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(_MAX_HEADER, size - 8):
                    raise _problem(
                        path,
                        f"its {size:,} bytes are fewer than a header of {length:,} bytes needs",
                    )
                header = file.read(length)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). Check the file and its permissions."
            ) from None
        try:
            entries = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise _problem(path, f"its header is not valid: {error}") from None
        if not isinstance(entries, dict):
            raise _problem(path, "its header is not an object")
        self.metadata = _checked_metadata(path, entries.pop("__metadata__", {}))
        self._start = 8 + length
        self._tensors = {name: _checked(path, name, entry) for name, entry in entries.items()}
        self.dtypes = {name: tensor[0] for name, tensor in self._tensors.items()}
        _check_positions(path, self._tensors, size - self._start)

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, begin, end = self._tensors[name]
        if dtype not in _DTYPES:
            raise UserError(
                f"{self._path}: {name} has type {dtype}, which cannot be read. Use a file of "
                "float32, float16 or bfloat16 weights."
            )
        try:
            with open(self._path, "rb") as file:
                file.seek(self._start + begin)
                content = file.read(end - begin)
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be read ({error.strerror}). Check the file."
            ) from None
        if len(content) != end - begin:
            raise _problem(self._path, f"{name} is cut off")
        return np.frombuffer(content, _DTYPES[dtype]).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def write(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: tensors by name, of types that the format has.

    Raises:
        OSError: the file cannot be written.
    """
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    # Large items first, so that every tensor is aligned to its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        array = tensors[name]
        entry = {"dtype": names[array.dtype], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


# What the header says of a tensor: type, shape, first byte and end after the header.
_Tensor = tuple[str, tuple[int, ...], int, int]


def _problem(path: Path, what: str) -> UserError:
    return UserError(f"{path}: not a complete safetensors file ({what}). {_REMEDY}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} occurs twice")
    return found


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise _problem(path, "__metadata__ is not an object of texts")
    return metadata


def _checked(path: Path, name: str, entry: Any) -> _Tensor:
    """Return the header's entry of a tensor; `UserError` if it contradicts itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise _problem(path, f"the header's entry of {name!r} is not valid") from None
    if not isinstance(dtype, str) or not all(type(x) is int and x >= 0 for x in numbers):
        raise _problem(path, f"the header's entry of {name!r} is not valid")
    if dtype in _DTYPES:
        needed = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if end - begin != needed:
            raise _problem(
                path, f"{name} has {end - begin:,} bytes, but {dtype} {shape} needs {needed:,}"
            )
    return dtype, tuple(shape), begin, end


def _check_positions(path: Path, tensors: Mapping[str, _Tensor], size: int) -> None:
    """Raise `UserError` unless the tensors cover the `size` bytes after the header exactly."""
    at = 0
    for name, (_, _, begin, end) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if begin != at or end < begin:
            raise _problem(path, f"{name} begins at byte {begin:,}, expected {at:,}")
        at = end
    if at != size:
        raise _problem(path, f"its tensors have {at:,} bytes, but it contains {size:,}")
