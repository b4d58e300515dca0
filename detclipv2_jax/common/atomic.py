"""Files that are there whole or not at all."""

import contextlib
import contextvars
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from detclipv2_jax.common.errors import UserError

_only_said = contextvars.ContextVar("only_said", default=False)


@contextlib.contextmanager
def only_said() -> Iterator[None]:
    """Inside it a file that cannot be written is said and left out, and what goes on goes on."""
    token = _only_said.set(True)
    try:
        yield
    finally:
        _only_said.reset(token)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that takes its name if the block ends well.

    Missing directories are made.

    Raises:
      UserError: the directory cannot be made or written to.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            if not _only_said.get():
                raise
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if not _only_said.get():
            room = error.errno in (errno.ENOSPC, errno.EDQUOT)
            way_out = "; make room, then start again with the same command" if room else ""
            raise UserError(f"{path}: cannot be written ({error.strerror}){way_out}.") from error
        print(f"{path}: cannot be written ({error.strerror}): left out", flush=True)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole or not at all; refuses NaN (ValueError)."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
