"""DetCLIPv2 in JAX: open-vocabulary detection, pre-trained on boxes, phrases and captions.

>>> from detclipv2_jax import Detector
>>> detector = Detector("runs/quickstart")
>>> (found,) = detector("street.jpg", ["cat", "traffic light"])

Importing the package loads nothing else; `Detector` and `__version__` are loaded on first use.
"""

import os
from typing import TYPE_CHECKING, Any

# XLA and TensorFlow read it when they are imported. 2: errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if TYPE_CHECKING:
    from detclipv2_jax.inference.detector import Detector

    __version__: str

__all__ = ["Detector", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Detector":
        from detclipv2_jax.inference.detector import Detector as value
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """Return the version of the installed package; '0+unknown' if it is not installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("detclipv2_jax")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
