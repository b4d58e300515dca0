"""Find the files that annotations name: one search for preparation, evaluation and captions.

A name in an annotation file often is not the path of the file: tools write Windows paths, URLs,
percent signs, or the folders of the machine that the annotations were made on. The search goes from
the name as it is to names that are further away. A file that another entry may mean as well, or a
file outside the folders that the user gave, is never taken.
"""

import errno
import filecmp
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.file_names import (
    Spelling,
    is_url,
    loose,
    readings,
    without_hash,
)
from detclipv2_jax.common.name_index import NameIndex
from detclipv2_jax.common.printable import printable

_SHOWN = 100  # characters of a name in a message

#: The names of an entry, the best one first: `file_name`, then the end of `coco_url`.
Names = tuple[str, ...]


class Found(NamedTuple):
    """The file that an entry names, or why there is none.

    Attributes:
      path: the file; None if there is none that is certain.
      spelled: how the file's name differs from the name of the entry; "" if it does not. Missing
        leading folders do not count.
      problem: "", "missing", "ambiguous" or "outside the folder".
      why: the problem in words.
    """

    path: Path | None
    spelled: str = ""
    problem: str = ""
    why: str = ""


class ImageFolder:
    """Finds the image files that annotations name, in folders that may be laid out differently."""

    def __init__(self, *roots: str | Path, first: Sequence[str | Path] = ()):
        """Search the folders `first`, then `roots`; those that do not exist are ignored.

        Args:
          roots: equal folders: a name that is a different file in two of them is not certain.
          first: folders whose files go before those of `roots` and of each other.

        Raises:
          UserError: none of them is a directory.
        """
        self.roots = [Path(root) for root in roots if Path(root).is_dir()]
        self.first = [Path(root) for root in first if Path(root).is_dir()]
        if not self.roots and not self.first:
            tried = " or ".join(printable(root) for root in (*first, *roots))
            raise UserError(
                f"{tried}: no such directory. Give the folder of the images with --images=DIR."
            )
        self._expected: list[Callable[[], Iterable[Names]]] = []
        # Each folder is looked up once, not once per image: on a network drive that takes hours.
        self._is_dir = functools.lru_cache(maxsize=4096)(os.path.isdir)
        self._listing = functools.lru_cache(maxsize=16)(_other_spellings)
        self._claims: NameIndex | None = None
        self._files: dict[tuple[Path, ...], NameIndex] = {}

    @property
    def folders(self) -> list[Path]:
        """All folders that are searched, in this order."""
        return list(dict.fromkeys((*self.first, *self.roots)))

    def inside(self, *names: str) -> "ImageFolder":
        """Return an ImageFolder that also searches these folders of each folder, after it."""
        first = (root / name for root in self.first for name in ("", *names))
        more = (root / name for root in self.roots for name in names)
        return self._with((*self.roots, *more), first)

    def also(self, folder: str | Path) -> "ImageFolder":
        """Return an ImageFolder that also searches `folder`, after the roots."""
        return self._with((*self.roots, Path(folder)), self.first)

    def before(self, folder: str | Path) -> "ImageFolder":
        """Return an ImageFolder that searches `folder` before `roots`."""
        return self._with(self.roots, (*self.first, Path(folder)))

    def only(self, *folders: str | Path) -> "ImageFolder":
        """Return an ImageFolder that searches only `folders`, one after the other."""
        return self._with((), map(Path, folders))

    def _with(self, roots: Iterable[Path], first: Iterable[Path]) -> "ImageFolder":
        result = ImageFolder(*dict.fromkeys(roots), first=tuple(dict.fromkeys(first)))
        result._expected = self._expected  # of all annotation files of the source
        return result

    def expect(self, names: Callable[[], Iterable[Names]]) -> None:
        """Register the names of all entries, so that no file is given to the wrong one of them.

        Args:
          names: returns the names of each entry; called only when a name is not a path.
        """
        self._expected.append(names)
        self._claims = None

    def find(self, *names: str, exactly: bool = False) -> Found:
        """Return the file of an entry.

        The search, in this order; in each step `first` before `roots`:

        1. the names as they are, and as they read with "/" for "\\", without a drive, a URL's host
           or a leading "../", and with percent signs decoded;
        2. names that differ in the case of their suffix, or in how accents are composed (macOS);
        3. with leading folders removed one by one: "images/v1/patch8/a.jpg" is found as
           ROOT/v1/patch8/a.jpg, ROOT/patch8/a.jpg or ROOT/a.jpg; then without the hash that Label
           Studio puts in front.

        2 and 3 take a file only if no other entry and no other file has that name.

        Args:
          names: of one entry, the best one first.
          exactly: whether to stop after 1.
        """
        spellings = [s for name in names for s in readings(name)]
        if not spellings:
            return Found(None, problem="missing", why="its file name is empty or no file name")
        searches = (self._as_named, self._as_spelled, self._without_folders)
        for search in searches[:1] if exactly else searches:
            for spelling_set in _by_reading(spellings):
                for roots in ([root] for root in self.first):
                    if found := search(spelling_set, roots, names):
                        return found
                if self.roots and (found := search(spelling_set, self.roots, names)):
                    return found
        return self._missing(names[0], spellings)

    def __str__(self) -> str:
        return " or ".join(map(printable, self.folders))

    # ---- The steps of the search. Each returns None if it finds nothing.

    def _as_named(
        self, spellings: Sequence[Spelling], roots: Sequence[Path], names: Names
    ) -> Found | None:
        hits: dict[Path, Spelling] = {}
        for spelling in spellings:
            for path in self._places(spelling, roots):
                if self._is_file(path):
                    hits.setdefault(path, spelling)
        return _only(hits, names[0])

    def _as_spelled(
        self, spellings: Sequence[Spelling], roots: Sequence[Path], names: Names
    ) -> Found | None:
        hits: dict[Path, Spelling] = {}
        for spelling in spellings:
            for root in roots:
                for path in self._similar(root, spelling.parts):
                    hits.setdefault(path, spelling._replace(is_literal=False))
        if hits and self._claimed(spellings[0].parts):
            return _not_taken(names[0], hits, "another entry has a name that differs as little")
        return _only(hits, names[0])

    def _without_folders(
        self, spellings: Sequence[Spelling], roots: Sequence[Path], names: Names
    ) -> Found | None:
        for change in (lambda name: name, without_hash):
            for exact in (True, False):
                for spelling in spellings:
                    found = self._ending(spelling, change, exact, roots, names)
                    if found:
                        return found
        return None

    def _ending(
        self,
        spelling: Spelling,
        change: Callable[[str], str],
        exact: bool,
        roots: Sequence[Path],
        names: Names,
    ) -> Found | None:
        """Return the file of the longest ending of a name that is a file."""
        *folders, name = spelling.parts
        parts = (*folders, change(name))
        for skipped in range(0 if parts != spelling.parts else 1, len(parts)):
            end = parts[skipped:]
            hits: dict[Path, Spelling] = {}
            for root in roots:
                paths = [root.joinpath(*end)] if exact else self._similar(root, end)
                for path in filter(self._is_file, paths):
                    is_literal = spelling.is_literal and exact and parts[-1] == spelling.parts[-1]
                    hits.setdefault(path, spelling._replace(is_literal=is_literal))
            if not hits:
                continue
            if self._claimed(end):
                return _not_taken(names[0], hits, "other entries end in the same name")
            if self._files_under(roots).is_shared(end):
                return _not_taken(names[0], hits, "several files end in the same name")
            return _only(hits, names[0])
        return None

    # ---- Looking at the disk.

    def _places(self, spelling: Spelling, roots: Sequence[Path]) -> Iterator[Path]:
        """Yield where a file of this name may be, inside the folders of the user."""
        if spelling.is_absolute:
            absolute = Path("/", *spelling.parts)
            if self._is_inside(absolute):
                yield absolute
        for root in roots:
            if spelling.ups:
                path = Path(os.path.normpath(root.joinpath(*[".."] * spelling.ups)))
                if self._is_inside(path := path.joinpath(*spelling.parts)):
                    yield path
            yield root.joinpath(*spelling.parts)

    def _is_inside(self, path: Path) -> bool:
        """Return whether a path is inside the folders that the user gave.

        What symbolic links inside these folders lead to counts as inside.
        """
        plain, (tops, real_tops) = os.path.abspath(path), self._tops
        if any(_below(plain, top) for top in (*tops, *real_tops)):
            return True
        real = os.path.realpath(path)
        return any(_below(real, top) for top in real_tops)

    @functools.cached_property
    def _tops(self) -> tuple[list[str], list[str]]:
        return [os.path.abspath(p) for p in self.folders], [
            os.path.realpath(p) for p in self.folders
        ]

    def _is_file(self, path: Path) -> bool:
        # Without the folder there is no file; folders are remembered, files are not.
        return self._is_dir(str(path.parent)) and _is_regular(path)

    def _similar(self, root: Path, parts: Sequence[str]) -> list[Path]:
        """Return the files whose path differs from root/parts only as `loose` allows."""
        paths = [root]
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            inner = [path / name for path in paths for name in self._alike(path, part, is_last)]
            paths = [path for path in inner if is_last or self._is_dir(str(path))]
            if not paths:
                return []
        return [path for path in paths if self._is_file(path)]

    def _alike(self, folder: Path, part: str, is_last: bool) -> list[str]:
        if os.path.lexists(folder / part):
            return [part]
        return self._listing(str(folder), is_last).get(loose(part, is_last), [])

    # ---- Names and files that may be meant by several entries.

    def _claimed(self, end: Sequence[str]) -> bool:
        """Return whether entries of different names end in `end`."""
        if self._claims is None:
            self._claims = NameIndex()
            for names in (names for some in self._expected for names in some()):
                parts = {s.parts for name in names for s in readings(name)}
                for own in list(parts):
                    parts.add((*own[:-1], without_hash(own[-1])))
                self._claims.add(hash(names), parts)
        return self._claims.is_shared(end)

    def _files_under(self, roots: Sequence[Path]) -> NameIndex:
        """Return an index of all files under some folders; made once, when it is first needed."""
        key = tuple(roots)
        if key not in self._files:
            self._files[key] = NameIndex.of_files(roots)
        return self._files[key]

    # ---- Explanations.

    def _missing(self, name: str, spellings: Sequence[Spelling]) -> Found:
        shown = _shorten(name)
        for spelling in spellings:
            for path in _outside(spelling, self.folders):
                if _is_regular(path) and not self._is_inside(path):
                    why = (
                        f"{shown} lies outside {self}. If it is yours, give its folder with "
                        "--images=DIR"
                    )
                    return Found(None, problem="outside the folder", why=why)
        if is_url(name):
            why = f"{shown} is a URL, not a file; download it and give the file"
            return Found(None, problem="missing", why=why)
        for spelling in spellings:
            for root in self.folders:
                if why := _obstacle(root.joinpath(*spelling.parts)):
                    return Found(None, problem="missing", why=why)
        hint = ' (also with "/" for its "\\")' if "\\" in name else ""
        return Found(None, problem="missing", why=f"no file {shown}{hint} under {self}")


def _by_reading(spellings: Sequence[Spelling]) -> list[list[Spelling]]:
    """Return the spellings in groups of the same distance from the names, the nearest first."""
    groups: dict[int, list[Spelling]] = {}
    for spelling in spellings:
        groups.setdefault(spelling.distance, []).append(spelling)
    return [groups[distance] for distance in sorted(groups)]


def _only(hits: dict[Path, Spelling], name: str) -> Found | None:
    """Return the one file among hits, of which several may be the same or copies."""
    if not hits:
        return None
    (path, spelling), *others = hits.items()
    for other, _ in others:
        if not _same(path, other):
            why = (
                f"{_shorten(name)} may be {_some(hits)}, which differ. Remove one of them, or give "
                "the folder of the images with --images=DIR"
            )
            return Found(None, problem="ambiguous", why=why)
    spelled = "" if spelling.is_literal else f"{_shorten(name)} is taken for {printable(path)}"
    return Found(path, spelled)


def _not_taken(name: str, hits: Iterable[Path], reason: str) -> Found:
    """Return that a name has no file at its place, and that those elsewhere may be another's."""
    why = (
        f"no file {_shorten(name)}; {_some(hits)} is not taken for it, because {reason}. Put the "
        "image at its place, or give the folder of the images with --images=DIR"
    )
    return Found(None, problem="missing", why=why)


def _some(hits: Iterable[Path]) -> str:
    return " or ".join(printable(path) for path in list(hits)[:3])


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:  # missing, a name that is too long, a loop of links
        return False


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _outside(spelling: Spelling, roots: Iterable[Path]) -> Iterator[Path]:
    """Yield where a name leads that is absolute or begins with "../"."""
    if spelling.is_absolute:
        yield Path("/", *spelling.parts)
    if spelling.ups:
        for root in roots:
            up = os.path.normpath(os.path.join(os.path.abspath(root), *[".."] * spelling.ups))
            yield Path(up, *spelling.parts)


def _obstacle(path: Path) -> str:
    """Return why a path that exists is not a file that can be read; "" if it does not exist."""
    try:
        mode = os.stat(path).st_mode
        return f"{printable(path)} is a folder, not a file" if stat.S_ISDIR(mode) else ""
    except OSError as error:
        number = error.errno
        if number == errno.ENOENT and path.is_symlink():
            target = printable(os.readlink(path))
            return f"{printable(path)} is a link to {target}, which does not exist"
        if number == errno.ELOOP:
            return f"{printable(path)} is a link that leads to itself"
        if number == errno.EACCES:
            return f"{printable(path)} cannot be reached (permission denied)"
        return ""


def _other_spellings(folder: str, is_last: bool) -> dict[str, list[str]]:
    """Return the names in a folder by their loose form."""
    names: dict[str, list[str]] = {}
    try:
        for name in sorted(os.listdir(folder)):
            names.setdefault(loose(name, is_last), []).append(name)
    except OSError:
        pass
    return names


def _shorten(name: str) -> str:
    shown = printable(name)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."
