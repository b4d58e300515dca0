"""Loads files of configs/ as the command line does: by path."""

import importlib.util
from pathlib import Path
from types import ModuleType

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{name}", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
