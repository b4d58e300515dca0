"""The folder of a run: a run replaces files that a run wrote, and no others."""

import json
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable

CONFIG = "config.json"
# What a run writes besides, or removes.
_NAMES = (
    "before.json",
    "categories.json",
    "checkpoints",
    "detections",
    "losses.png",
    "metrics.jsonl",
    "profile",
    "results.json",
    "tensorboard",
    "zero_shot",
)
_SECTIONS = ("data", "model", "optimizer", "train")  # of a run's config, in every version


def refuse_foreign(workdir: Path) -> None:
    """Refuse a folder that has files which a run would replace, and that no run made.

    A folder is a run's if its config.json is a run's config, or if it has a checkpoint of a run.

    Raises:
        UserError: names such a file; or the workdir is not a folder.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={printable(workdir)}: is not a folder. Give another one.")
    # In this order: another process of this run may begin to write here.
    found = [name for name in (CONFIG, *_NAMES) if _is_occupied(workdir / name)]
    if found and not _is_config(_read(workdir / CONFIG)) and not _has_checkpoint(workdir):
        raise UserError(
            f"{printable(workdir / found[0])}: exists, and no training run made this folder. Give "
            f"a folder of its own, such as --workdir={printable(workdir / 'run')}."
        )


def _is_occupied(path: Path) -> bool:
    """Return whether there is a file, or a folder that is not empty."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(n), dict) for n in _SECTIONS)


def _has_checkpoint(workdir: Path) -> bool:
    """Return whether a checkpoint of a run lies here, also one that is damaged or set aside."""
    folders = (workdir / "checkpoints").glob("*/meta")
    return any(folder.is_dir() for folder in folders)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
