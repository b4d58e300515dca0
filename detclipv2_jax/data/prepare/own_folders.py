"""Which folders preparation may empty or replace: its own, and no others."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable
from detclipv2_jax.data.index import is_source

STAMP = "stamp.json"  # in TO.partial: what its contents are made from
LOCK = "lock"  # in TO.partial
_FIRST = (LOCK, f".{STAMP}.")  # what is there before the stamp; atomic writes have hidden names


def partial_of(to: Path) -> Path:
    """Return the folder for unfinished work next to `to`."""
    return to.with_name(to.name + ".partial")


def make_partial(to: Path) -> Path:
    """Create `TO.partial`, unless it is left from an earlier preparation, and return it.

    Raises:
        UserError: it is a folder or file of somebody else.
    """
    partial = partial_of(to)
    if os.path.lexists(partial) and not _is_own(partial):
        raise UserError(
            f"{printable(partial)}: is in the way, and was not left by an earlier preparation. "
            "Move it away, or choose another directory with --to."
        )
    partial.mkdir(parents=True, exist_ok=True)
    return partial


def empty_partial(to: Path, made_from: dict[str, Any]) -> Path:
    """Return `TO.partial` with nothing in it but its stamp; `UserError` as `make_partial`."""
    partial = make_partial(to)
    shutil.rmtree(partial)
    partial.mkdir(parents=True)
    stamp(partial, made_from)
    return partial


def stamp(partial: Path, made_from: dict[str, Any]) -> None:
    """Mark `TO.partial` as one of preparation's."""
    write_json(partial / STAMP, made_from)


def read_stamp(partial: Path) -> dict[str, Any]:
    """Return what the contents of `TO.partial` were made from; {} if that is unknown."""
    try:
        found = json.loads((partial / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and "inputs" in found else {}


def refuse_foreign(to: Path) -> None:
    """Refuse to replace what is not a prepared source.

    Raises:
        UserError: `to` is a file, or a directory that is neither empty nor a source.
    """
    if not os.path.lexists(to) or (to.is_dir() and not any(to.iterdir())) or is_source(to):
        return
    what = "not empty and not a prepared source" if to.is_dir() else "not a directory"
    raise UserError(f"{printable(to)}: {what}. Choose another directory with --to.")


def _is_own(partial: Path) -> bool:
    if not partial.is_dir():
        return False
    return bool(read_stamp(partial)) or all(
        path.name.startswith(_FIRST) for path in partial.iterdir()
    )
