"""Pointers of Git LFS: what a clone without `git lfs pull` has in place of each large file."""

import os

REASON = "it is a pointer of Git LFS, not the file itself; run `git lfs pull` where it was cloned"
LENGTH = 24  # bytes that `is_pointer` needs
_START = b"version https://git-lfs."


def is_pointer(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is a pointer."""
    return head.startswith(_START)


def is_pointer_file(path: str | os.PathLike) -> bool:
    """Return whether a file is a pointer; one that cannot be read is none."""
    try:
        with open(path, "rb") as file:
            return is_pointer(file.read(LENGTH))
    except OSError:
        return False
