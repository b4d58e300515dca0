"""An index of paths that tells whether several of them end in the same folders and name."""

import contextlib
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from detclipv2_jax.common.file_names import loose

_MASK = (1 << 64) - 1


class NameIndex:
    """Paths of many owners (entries or files), 16 bytes for each ending of each path.

    Names are compared in their loose form (`file_names.loose`).
    """

    def __init__(self):
        self._ends, self._owners = array("Q"), array("Q")
        self._shared: np.ndarray | None = None

    @classmethod
    def of_files(cls, roots: Iterable[Path]) -> "NameIndex":
        """Return the index of all files under some folders; one file with two paths counts once.

        Links to folders are followed, and each folder is read once.
        """
        index, seen = cls(), set()
        # Outer folders first: they give the longer paths.
        for root in sorted(map(os.path.abspath, roots), key=len):
            waiting = [(root, ())]
            while waiting:
                folder, inner = waiting.pop()
                with contextlib.suppress(OSError):  # a folder that cannot be read
                    about = os.stat(folder)
                    if (about.st_dev, about.st_ino) in seen:
                        continue
                    seen.add((about.st_dev, about.st_ino))
                    waiting += index._add_folder(folder, inner, about.st_dev)
        return index

    def _add_folder(
        self, folder: str, inner: tuple[str, ...], device: int
    ) -> list[tuple[str, tuple[str, ...]]]:
        """Add the files of a folder, and return its folders."""
        folders = []
        with os.scandir(folder) as entries:
            for entry in entries:
                parts = (*inner, entry.name)
                with contextlib.suppress(OSError):  # a link that leads to itself
                    if entry.is_dir():
                        folders.append((entry.path, parts))
                    elif entry.is_file():
                        owner = (device, entry.inode())
                        if entry.is_symlink():
                            about = entry.stat()
                            owner = (about.st_dev, about.st_ino)
                        self.add(hash(owner), [parts])
        return folders

    def add(self, owner: int, paths: Iterable[Sequence[str]]) -> None:
        """Add the paths of one owner, each as folders and name."""
        for parts in paths:
            parts = _loose(parts)
            for first in range(len(parts)):
                self._ends.append(hash(parts[first:]) & _MASK)
                self._owners.append(owner & _MASK)
        self._shared = None

    def is_shared(self, end: Sequence[str]) -> bool:
        """Return whether paths of several owners end in `end`."""
        if self._shared is None:
            ends = np.frombuffer(self._ends, np.uint64)
            owners = np.frombuffer(self._owners, np.uint64)
            order = np.lexsort((owners, ends))
            ends, owners = ends[order], owners[order]
            different = (ends[1:] == ends[:-1]) & (owners[1:] != owners[:-1])
            self._shared = np.unique(ends[1:][different])
        key = np.uint64(hash(_loose(end)) & _MASK)
        at = np.searchsorted(self._shared, key)
        return bool(at < len(self._shared) and self._shared[at] == key)


def _loose(parts: Sequence[str]) -> tuple[str, ...]:
    if not parts:
        return ()
    return (*(loose(part, False) for part in parts[:-1]), loose(parts[-1], True))
