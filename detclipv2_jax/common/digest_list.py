"""A list of the digests of a directory's files: damage is found before anything is read.

`digests.sha256` has the lines of the tool `sha256sum`, so `sha256sum --check digests.sha256` in the
directory checks it too. Its last line, a comment, is the digest of the lines above. The directory
may be local or in a bucket (any path of etils).
"""

import concurrent.futures
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from detclipv2_jax.common import digests, lfs_pointer

NAME = "digests.sha256"
_MAX_THREADS = 8  # that read a directory


def as_path(path: str | os.PathLike) -> Any:
    """Return the absolute path of a local directory, or the path of one in a bucket."""
    text = os.fspath(path)
    return epath.Path(text) if "://" in text else pathlib.Path(text).absolute()


def write(directory: str | os.PathLike, leave_out: Collection[str] = ()) -> None:
    """Write the digests of all files of a directory that `leave_out` does not name.

    Raises:
      OSError: a file cannot be read, or the list cannot be written.
    """
    root = as_path(directory)
    names = [name for name in _files(root) if name != NAME and name not in leave_out]
    # In one thread: training, which runs meanwhile, needs the cores.
    _write(root, {name: digests.of_file(root / name) for name in names})


def complete(directory: str | os.PathLike) -> None:
    """Add the digests of the files that are not in the list yet; the others are not read.

    Raises:
      OSError: a file cannot be read, or the list cannot be written.
      ValueError: the list is damaged.
    """
    root = as_path(directory)
    listed = _read(root)
    missing = [name for name in _files(root) if name != NAME and name not in listed]
    if missing:
        _write(root, listed | {name: digests.of_file(root / name) for name in missing})


def problem(directory: str | os.PathLike) -> str:
    """Return what is wrong with the first damaged file of a directory; "" if all are intact.

    Files that are not in the list are not read.
    """
    root = as_path(directory)
    try:
        listed = _read(root)
    except OSError as error:
        return f"{NAME} cannot be read ({error.strerror or error})"
    except ValueError:
        return f"{NAME} is damaged"
    threads = min(_MAX_THREADS, os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda name: _file_problem(root / name, listed[name]), listed)
        return next((f"{name} {what}" for name, what in zip(listed, found) if what), "")


def _file_problem(path: Any, expected: str) -> str:
    try:
        if not path.exists():
            return "is missing"
        is_intact = digests.of_file(path) == expected
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    if is_intact:
        return ""
    if lfs_pointer.is_pointer_file(path):
        return f"is not there: {lfs_pointer.REASON}"
    return "has changed since it was written"


def _files(root: Any, prefix: str = "") -> list[str]:
    """Return the files below a directory as paths relative to it, sorted."""
    found: list[str] = []
    for path in sorted(root.iterdir()):
        name = prefix + path.name
        found += _files(path, f"{name}/") if path.is_dir() else [name]
    return found


def _write(root: Any, listed: Mapping[str, str]) -> None:
    text = "".join(f"{listed[name]}  {name}\n" for name in sorted(listed))
    text += f"# {digests.of_bytes(text.encode())}\n"
    if "://" in os.fspath(root):  # a bucket writes an object whole or not at all
        (root / NAME).write_text(text)
        return
    temporary = root / f".{NAME}.partial"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, root / NAME)


def _read(root: Any) -> dict[str, str]:
    """Return the digest of each file of the list; `ValueError` if the list is damaged."""
    *listed, last, end = (root / NAME).read_bytes().decode().split("\n")
    text = "".join(f"{line}\n" for line in listed)
    if end or last != f"# {digests.of_bytes(text.encode())}":
        raise ValueError("its own digest does not fit")
    return {name: digest for digest, name in (line.split("  ", 1) for line in listed)}
