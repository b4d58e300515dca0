"""Makes the reference packages importable without their compiled parts.

MMDetection imports mmcv's compiled operators, and timm imports torchvision. The parity tests call
neither, so both are replaced by a module that raises an error if it is called.
"""

import contextlib
import enum
import importlib.machinery
import sys
import types

import torch
from transformers import CLIPTextModelWithProjection, SwinBackbone  # noqa: F401  (before the rest)


class _Absent(types.ModuleType):
    """A module and package whose every attribute is a class that cannot be called."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__path__ = []
        self.__version__ = "0.0"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            names = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
            return enum.Enum(name, {n: n.lower() for n in names})

        def refuse(self, *_, **__):
            raise NotImplementedError(f"{self.__class__.__qualname__} is not installed")

        return type(f"{self.__name__}.{name}", (torch.nn.Module,), {"__init__": refuse})


_TORCHVISION = (
    "torchvision",
    *(f"torchvision.{n}" for n in ("ops", "ops.misc", "transforms", "transforms.functional")),
    *(f"torchvision.{n}" for n in ("datasets", "models", "utils")),
)


@contextlib.contextmanager
def _empty_torchvision():
    """Replace torchvision only for some imports: transformers would mistake it for the real one."""
    modules = {name: _Absent(name) for name in _TORCHVISION}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in _TORCHVISION:
            del sys.modules[name]


with _empty_torchvision():
    import open_clip.tokenizer  # noqa: F401
    import open_clip.transformer  # noqa: F401
    import timm  # noqa: F401
sys.modules.setdefault("mmcv._ext", _Absent("mmcv._ext"))
