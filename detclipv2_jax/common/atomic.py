"""Atomic writes: a file or directory appears complete or not at all, even if the process is killed.

Content goes to a temporary name in the same directory and is renamed when it is complete.
"""

import contextlib
import contextvars
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from detclipv2_jax.common import outputs
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import valid_json

_NAME_BYTES = 240  # of a temporary file; most file systems allow 255
_unfinished: set[pathlib.Path] = set()  # temporary files and folders of this process
_only_warn = contextvars.ContextVar("only_warn", default=False)


@contextlib.contextmanager
def write_errors_are_warnings() -> Iterator[None]:
    """Within the block, a file that `replacing` cannot write is reported and skipped.

    Training uses it for reports and pictures: a full disk must not end a run because of them.
    """
    token = _only_warn.set(True)
    try:
        yield
    finally:
        _only_warn.reset(token)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a temporary path; rename it to `path` if the block ends without an error.

    The parent directories are created. If the block raises, `path` keeps its old content.

    Raises:
      UserError: the directory cannot be created, the file cannot be written, or it is the user's
        in a guarded output folder (see outputs.py).
    """
    path = pathlib.Path(path)
    temporary = _temporary(path)
    guard = outputs.guard_of(path)
    if guard:
        guard.check_path(path)
    _unfinished.add(temporary)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            if not _only_warn.get():  # else the block fails to write, and that is reported below
                raise
        yield temporary
        if guard:
            guard.add(path, temporary)
        os.replace(temporary, path)
    except BrokenPipeError:  # of the command's output, not of the file
        raise
    except OSError as error:
        problem = f"{path}: cannot be written ({error.strerror})"
        if not _only_warn.get():
            raise UserError(f"{problem}. {remedy(error)}") from error
        print(f"warning: {problem}; continuing without it", flush=True)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
        _unfinished.discard(temporary)


@contextlib.contextmanager
def unfinished(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield the path of a temporary file, which is removed at the end of the block."""
    _unfinished.add(path)
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove the temporary files of this process, which ends without leaving their blocks."""
    for temporary in tuple(_unfinished):
        with contextlib.suppress(OSError):
            if temporary.is_dir():
                shutil.rmtree(temporary)
            else:
                temporary.unlink()


@contextlib.contextmanager
def replacing_directory(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yield a new, empty directory; rename it to `path` if the block ends without an error.

    A directory that `path` names already is replaced, and kept if the block raises. Only one
    process may write a directory at a time.

    Raises:
      UserError: the directory or a file in it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    guard = outputs.guard_of(path)
    if guard:
        guard.check_path(path)
    try:
        _unfinished.add(temporary)
        shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
        temporary.mkdir(parents=True)
        yield temporary
        if guard:
            guard.add(path, temporary)
        replace_directory(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). {remedy(error)}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unfinished.discard(temporary)


def replace_directory(new: pathlib.Path, old: pathlib.Path) -> None:
    """Rename directory `new` to `old`, which may exist.

    A reader sees the old directory, the new one, or for a moment neither.
    """
    retired = old.with_name(f".{old.name}.old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)


def remove_leftovers(directory: str | os.PathLike) -> None:
    """Remove unfinished files that killed processes left. For the directory's only writer."""
    for path in pathlib.Path(directory).glob(".*.partial"):
        if path.is_file():
            with contextlib.suppress(OSError):
                path.unlink()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, atomically. Texts are stored as `printable.valid_text`.

    Raises:
      UserError: the file cannot be written.
      ValueError: `value` contains NaN or infinity.
    """
    write_text(path, valid_json(json.dumps(value, indent=1, allow_nan=False)) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically; `UserError` if it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_new_text(path: str | os.PathLike, text: str, option: str) -> None:
    """Like `write_text`, of a file that `option` names, which may exist only with this content.

    Raises:
      UserError: the file exists with other content, or cannot be written.
    """
    path = pathlib.Path(path)
    if os.path.lexists(path):
        with contextlib.suppress(OSError):
            if path.read_bytes() == text.encode("utf-8"):
                return
        raise UserError(f"{path}: exists. Move it away, or choose another {option}.")
    write_text(path, text)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    """Return a hidden name next to `path`; a name that would be too long is cut."""
    name = f".{path.name}.{os.getpid()}.partial"
    if len(os.fsencode(name)) > _NAME_BYTES:
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        name = f".{digest}.{os.getpid()}.partial"
    return path.with_name(name)


def remedy(error: OSError) -> str:
    """Return how to fix what kept a file from being written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Free disk space, then run the same command again."
    return "Check the path and its permissions."
