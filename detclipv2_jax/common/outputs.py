"""What a command may replace in its output folder: its own earlier files, and no others.

An output folder has a record, `.detclip_outputs`: one line of JSON for each file that a command
wrote there, with its digest. A file that a command wrote and nobody changed since may be replaced,
also one of an earlier run that was killed. Any other file that stood there before is the user's.
Within `guarded`, `atomic.replacing` keeps to that by itself.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from detclipv2_jax.common import digests
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable

RECORD = ".detclip_outputs"


class OutputFolder:
    """A folder for the results of a command, and which of its files commands wrote.

    Attributes:
      path: the folder. It need not exist.
    """

    def __init__(self, path: str | os.PathLike, option: str = "--output", free: Sequence[str] = ()):
        """Read the record of the folder.

        Args:
          path: the folder.
          option: the option that names it, for messages.
          free: names of folders below it that are not guarded.

        Raises:
          UserError: the path is a file, or the record cannot be read.
        """
        self.path = pathlib.Path(path)
        self._option = option
        self._free = {pathlib.PurePath(name) for name in free}
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise UserError(
                f"{option}={printable(path)}: is not a folder. Give a folder for the results."
            )
        self._digests = _read_record(self.path)

    def name_of(self, path: str | os.PathLike) -> str | None:
        """Return the path relative to the folder; None if it is outside, hidden or not guarded."""
        try:
            name = _absolute(path).relative_to(self.path.resolve())
        except ValueError:
            return None
        if any(part.startswith(".") for part in name.parts) or self._free & set(name.parents):
            return None
        return name.as_posix()

    def is_own(self, path: str | os.PathLike) -> bool:
        """Return whether a command wrote the file or folder, and nobody changed it since."""
        known = self._digests.get(self.name_of(path) or "")
        return bool(known) and _digest(pathlib.Path(path)) in known

    def check(self, names: Iterable[str]) -> None:
        """Raise `UserError` if one of these files exists and no command wrote it as it is."""
        for name in names:
            path = self.path / name
            if os.path.lexists(path) and not self.is_own(path):
                raise UserError(
                    f"{printable(path)}: exists, and this command did not write it as it is. Move "
                    f"it away, or choose another {self._option}."
                )

    def check_path(self, path: str | os.PathLike) -> None:
        """Like `check`, of one file by its path."""
        name = self.name_of(path)
        if name is not None:
            self.check([name])

    def begin(self, names: Iterable[str]) -> None:
        """Check these files, and that the folder can be written, before the work begins.

        Raises:
          UserError: a file is the user's (see `check`), or the folder cannot be written.
        """
        self.check(names)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / RECORD, "a", encoding="utf-8"):
                pass
        except OSError as error:
            raise UserError(
                f"{self._option}={printable(self.path)}: cannot be written ({error.strerror}). "
                "Choose another folder."
            ) from error

    def add(self, path: str | os.PathLike, content: pathlib.Path) -> None:
        """Record that `path` gets this content; call it before the content is moved there."""
        name, digest = self.name_of(path), _digest(content)
        if name is None or digest is None or digest in self._digests.get(name, ()):
            return
        self._digests.setdefault(name, set()).add(digest)
        with open(self.path / RECORD, "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"file": name, "sha256": digest}) + "\n")


_guarded: list[OutputFolder] = []


@contextlib.contextmanager
def guarded(folder: OutputFolder) -> Iterator[OutputFolder]:
    """Within the block, `atomic.replacing` replaces no file of the user's in this folder."""
    _guarded.append(folder)
    try:
        yield folder
    finally:
        _guarded.remove(folder)


def guard_of(path: str | os.PathLike) -> OutputFolder | None:
    """Return the guarded folder that a path lies in, the innermost; None: it may be replaced."""
    folders = [folder for folder in _guarded if folder.name_of(path) is not None]
    return max(folders, key=lambda folder: len(folder.path.resolve().parts), default=None)


def written_by_a_command(path: pathlib.Path, records: dict[pathlib.Path, OutputFolder]) -> bool:
    """Return whether a file is the output of a command, by the record of a folder that it is in.

    Args:
      path: of the file.
      records: of the folders that were looked at before; new ones are added.
    """
    for parent in _absolute(path).parents:
        if parent not in records:
            records[parent] = OutputFolder(parent)
        if records[parent].is_own(path):
            return True
    return False


def _absolute(path: str | os.PathLike) -> pathlib.Path:
    """Return the path with the links of its folders resolved, but not a link that it is itself."""
    path = pathlib.Path(os.path.abspath(path))
    return path.parent.resolve() / path.name


def _read_record(folder: pathlib.Path) -> dict[str, set[str]]:
    """Return the digests of each file of the record; a line that is damaged counts for nothing."""
    found: dict[str, set[str]] = {}
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            found.setdefault(entry["file"], set()).add(entry["sha256"])
    return found


def _digest(path: pathlib.Path) -> str | None:
    """Return the digest of a file or of all files of a folder; None for a link or no such file."""
    if path.is_symlink():
        return None
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if not file.is_dir())
            found = {file.relative_to(path).as_posix(): _digest(file) for file in files}
            return None if None in found.values() else digests.of_json(found)
        return digests.of_file(path)
    except OSError:
        return None
