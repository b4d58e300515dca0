"""Recipes: the config files that come with the package, found by name or by path.

A checkout has them in `configs/`; a wheel contains them inside the package.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).resolve().parents[1]


def directory() -> Path:
    """Return the folder that holds the shipped recipes."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def resolve(argument: str) -> str:
    """Return a `--config` argument with its file found: FILE.py[:SIZE].

    An existing path stays as it is. Otherwise the file is looked up among the shipped recipes by
    its name, so that `pretrain.py:nano` and `configs/pretrain.py:nano` work from any directory.
    """
    file, colon, size = argument.partition(":")
    shipped = directory() / Path(file).name
    if not Path(file).exists() and shipped.is_file():
        file = str(shipped)
    return file + colon + size


def load(name: str) -> ModuleType:
    """Import a shipped recipe by its name without `.py`, such as 'pretrain'."""
    path = directory() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"detclipv2_jax_recipe_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
