"""Recipes: the config files that come with the package, found by name or by path.

A checkout has them in `configs/`; a wheel contains them inside the package.
"""

import difflib
import importlib.util
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from detclipv2_jax.common.errors import UserError

SCRATCH = "scratch"  # a tower that starts random
_PACKAGE = Path(__file__).resolve().parents[1]


def directory() -> Path:
    """Return the folder that holds the shipped recipes."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def resolve(argument: str) -> str:
    """Return a `--config` argument with its file found: FILE.py[:SIZE][,scratch].

    A bare name such as `pretrain.py:nano` works from any directory: if there is no such file, it is
    looked up among the shipped recipes. A path with a folder is taken as it is, because a file of
    the same name elsewhere may have other values.
    """
    file, colon, size = argument.partition(":")
    shipped = directory() / file
    if not Path(file).exists() and Path(file).name == file and shipped.is_file():
        file = str(shipped)
    return file + colon + size


def read(argument: str) -> Any:
    """Return the ConfigDict that a `--config` argument stands for: FILE.py[:SIZE][,scratch].

    Raises:
        UserError: there is no such file or size, or the file fails; names file, line and reason.
    """
    file, colon, size = argument.partition(":")
    module = _execute(Path(file))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(
            f"{file}: has no function get_config. Define get_config() that returns a ConfigDict, "
            "as the shipped recipes do."
        )
    try:
        config = get_config(size) if colon else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explained(Path(file), error)) from None
    if not hasattr(config, "to_dict"):
        raise UserError(
            f"{file}: get_config returns {type(config).__name__}, not a ConfigDict. Return the "
            "ConfigDict of a shipped recipe with changed fields."
        )
    return config


def sizes(file: str | Path) -> tuple[str, ...]:
    """Return the sizes that a config file lists in its constant SIZES; () if it has none."""
    return tuple(getattr(_execute(Path(file)), "SIZES", ()))


def _execute(path: Path) -> ModuleType:
    """Run a config file and return it as a module; `UserError` if it is missing or fails."""
    if not path.is_file() or path.suffix != ".py":
        problem = "no such file"
        if path.exists():
            problem = "a directory" if path.is_dir() else "not a Python file"
        raise UserError(f"{path}: {problem}; {_choices(path)}")
    spec = importlib.util.spec_from_file_location("detclipv2_jax_config", path.absolute())
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: not a Python file; {_choices(path)}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explained(path, error)) from None
    return module


def _choices(path: Path) -> str:
    """Return how to name a config file, with the shipped recipes, the nearest one first."""
    names = sorted(one.name for one in directory().glob("*.py"))
    wanted = path.name if path.suffix else f"{path.name}.py"
    if wanted in names:
        return (
            f"the shipped recipe of this name is found from any directory: --config={wanted}, "
            "without a folder. Or give the path of your own file."
        )
    near = difflib.get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}The shipped recipes are {', '.join(names)}. Or give the path of your own file."


def _explained(path: Path, error: Exception) -> str:
    """Return where a config file fails, and why."""
    if isinstance(error, SyntaxError):  # of this file or of one that it imports
        file, line, reason = error.filename or path, error.lineno, error.msg
        file = path if Path(file) == path.absolute() else file
    else:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
        file, line, reason = path, lines[-1] if lines else None, str(error)
    place = f", line {line}" if line else ""
    return f"{file}{place}: {type(error).__name__}: {reason}. Fix the config file."


def load(name: str) -> ModuleType:
    """Import a shipped recipe by its name without `.py`, such as 'pretrain'."""
    path = directory() / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"detclipv2_jax_recipe_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_size(recipe: str, size: str, sizes: Sequence[str], start: str = "") -> None:
    """Raise `UserError` unless a recipe has this size.

    Args:
        recipe: name of the file without `.py`, for the error message.
        size: what follows the colon of `--config`, without ',scratch' where a recipe allows it.
        sizes: the sizes of the recipe.
        start: what may follow, for the error message.
    """
    if size in sizes:
        return
    near = difflib.get_close_matches(size, sizes, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise UserError(
        f"configs/{recipe}.py:{size}: unknown size {size!r}. {hint}Choose "
        f"{', '.join(sizes)}{start}."
    )


def size_and_start(recipe: str, argument: str, sizes: Sequence[str]) -> tuple[str, bool]:
    """Return the size that a recipe's argument names, and whether the towers start random.

    Args:
        recipe: name of the file without `.py`, for the error message.
        argument: what follows the colon of `--config`: 'SIZE' or 'SIZE,scratch'.
        sizes: the sizes of the recipe.

    Raises:
        UserError: the argument is neither.
    """
    size, comma, start = argument.partition(",")
    known = size if size in sizes and start == (SCRATCH if comma else "") else argument
    after = f"; with ',{SCRATCH}' after it the towers start without pretrained weights"
    check_size(recipe, known, sizes, after)
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
