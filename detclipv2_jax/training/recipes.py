"""Recipes: the config files that come with the package, found by name or by path.

A checkout has them in `configs/`; a wheel contains them inside the package.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from detclipv2_jax.training.initialize import SCRATCH

_PACKAGE = Path(__file__).resolve().parents[1]


def directory() -> Path:
    """Return the folder that holds the shipped recipes."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def resolve(argument: str) -> str:
    """Return a `--config` argument with its file found: FILE.py[:SIZE][,scratch].

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


def size_and_start(recipe: str, argument: str, sizes: Sequence[str]) -> tuple[str, bool]:
    """Return the size that a recipe's argument names, and whether the towers start random.

    Args:
        recipe: name of the file without `.py`, for the error message.
        argument: what follows the colon of `--config`: 'SIZE' or 'SIZE,scratch'.
        sizes: the sizes of the recipe.

    Raises:
        ValueError: the argument is neither; the command line reports it.
    """
    size, comma, start = argument.partition(",")
    if size not in sizes or start != (SCRATCH if comma else ""):
        raise ValueError(
            f"configs/{recipe}.py:{argument}: unknown size {argument}. Choose "
            f"{', '.join(sizes)}; with ',{SCRATCH}' after it the towers start without pretrained "
            "weights."
        )
    return size, bool(comma)


def start_from_scratch(config: Any) -> None:
    """Change a recipe (`ConfigDict`) of pretrained towers to what random towers need.

    docs/paper_vs_ours.md explains each value. All are ours.
    """
    config.init.backbone = config.init.text = SCRATCH
    config.model.neck_coarse_gain = 0.1
    config.model.similarity = "dot"
    config.model.text.projection_gain = 0.1
    config.optimizer.lr_rules = ((r".*", 1.0),)
    # Captions join after half of the other batches of the first epoch: they teach nothing before
    # regions differ from each other. With pretrained towers they start at once, as in the paper.
    config.data.image_text.begin = 0.5
