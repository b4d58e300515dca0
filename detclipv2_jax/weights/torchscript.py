"""Read the tensors of a TorchScript archive (OpenAI's CLIP files) without executing its code.

PyTorch opens such an archive by loading its code. This module unpickles the archive's `data.pkl`
with every class and function replaced by an inert placeholder, so that it yields only numbers and
tensors.
"""

import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.weights import archives

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


def is_archive(path: Path) -> bool:
    """Return whether a file is a TorchScript archive: a zip archive that contains code."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def code(path: Path) -> str:
    """Return the source code in an archive that `is_archive` recognizes.

    Raises:
        UserError: the archive expands to far more than its size.
    """
    archives.check_sizes(path)
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if "/code/" in n and n.endswith(".py")]
        return "\n".join(archive.read(name).decode("utf-8", "replace") for name in names)


def read(path: Path) -> dict[str, np.ndarray]:
    """Return parameters and buffers by their dotted names, as `state_dict()` does.

    Raises:
        UserError: the archive is incomplete or does not contain a module.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            with archive.open(pickled) as file:
                module = _Reader(file, archive, f"{root}data/").load()
            return dict(_tensors(module, "", ()))
    except UserError:
        raise
    except Exception as error:  # a damaged pickle or archive can raise any type
        raise UserError(
            f"{path}: not a complete TorchScript archive ({error}). Download it again."
        ) from None


class _Inert:
    """Placeholder for an object of any class: it stores the state and has no behavior."""

    def __init__(self, *_: Any):
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Unpickler that builds tensors from the archive's storages, and placeholders otherwise."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, storages: str):
        super().__init__(file)
        self._archive, self._storages = archive, storages
        self._read: dict[tuple[str, Any], np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return our replacement of a class or function, never the one that the file names."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        return _Inert

    def persistent_load(self, pid: Any) -> np.ndarray:
        """Return the storage of an id ('storage', type, key, device, number of elements)."""
        _, dtype, key, _, count = pid
        if not isinstance(dtype, type) or dtype is _Inert:
            raise ValueError(f"storage {key} is of an unknown type")
        if (found := self._read.get((key, dtype))) is not None:
            return found
        name, size = self._storages + key, count * np.dtype(dtype).itemsize
        if self._archive.getinfo(name).file_size < size:
            raise ValueError(f"{name} is shorter than its {count} elements")
        with self._archive.open(name) as file:
            content = file.read(size)  # not what lies behind, which no tensor needs
        self._read[key, dtype] = np.frombuffer(content, dtype)
        return self._read[key, dtype]


def _tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    """Return a strided view of a storage.

    Raises:
        ValueError: it has more elements than the storage, or elements beyond it.
    """
    steps = zip(size, stride, strict=True)
    last = offset + sum((extent - 1) * step for extent, step in steps) if all(size) else offset - 1
    is_inside = min(offset, *size, *stride, 0) >= 0 and last < len(storage)
    if not is_inside or math.prod(size) > len(storage):
        raise ValueError(f"a tensor of shape {size} is not inside its storage")
    strides = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)


def _tensors(node: Any, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, tensor) of a module and the modules in it; `above` are the ids of its parents.

    Raises:
        ValueError: a module contains itself.
    """
    state = node.state if isinstance(node, _Inert) else node
    if isinstance(state, np.ndarray):
        yield prefix, state
    elif isinstance(state, dict):
        if id(state) in above:
            raise ValueError(f"{prefix} contains itself")
        for name, child in state.items():
            path = f"{prefix}.{name}" if prefix else str(name)
            yield from _tensors(child, path, (*above, id(state)))
