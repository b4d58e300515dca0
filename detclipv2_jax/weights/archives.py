"""Zip archives, which PyTorch's files are: their sizes, checked before anything is read."""

import zipfile
from pathlib import Path

from detclipv2_jax.common.errors import UserError

# Weights hardly compress, and PyTorch does not compress them.
_MAX_RATIO, _SMALL = 20, 64_000_000  # bytes that an archive of any size may have


def check_sizes(path: Path) -> None:
    """Raise `UserError` if a zip archive expands to far more than its size; nothing else does.

    Reading an entry never gives more bytes than the archive's directory says.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            expanded = sum(entry.file_size for entry in archive.infolist())
        size = path.stat().st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # not an archive, or damaged: the reader reports it
    if expanded > _SMALL + _MAX_RATIO * size:
        raise UserError(
            f"{path}: expands from {size:,} to {expanded:,} bytes, which is not an archive of "
            "weights. Download it again."
        )
