"""The files of a command line: images, videos, and the images in folders."""

import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator, Sequence

from PIL import Image

from detclipv2_jax.common import outputs
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import printable, valid_text
from detclipv2_jax.inference.video import ANIMATION_SUFFIXES, VIDEO_SUFFIXES, is_animation

_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")
_DRAWN_VIDEO = ".webm"
_LONGEST = 240  # bytes of a part of a path; most file systems allow 255


@dataclasses.dataclass(frozen=True)
class InputFile:
    """An image or a video to detect in.

    Attributes:
      path: as the user wrote it, or below a folder that the user gave.
      is_video: whether it has several frames.
      drawn: path, relative to the output directory, of the drawing.
    """

    path: str
    is_video: bool
    drawn: str


@dataclasses.dataclass
class Inputs:
    """What a command line names.

    Attributes:
      files: what can be looked at.
      failed: arguments that name nothing that can be looked at, and why.
      left_out: what lies in the folders and is not looked at: suffix or reason -> files.
    """

    files: list[InputFile] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def left_out_line(self) -> str | None:
        """Return for example 'left out: 3 .heic, 1 .mov; ...', None if nothing is left out."""
        if not self.left_out:
            return None
        counts = ", ".join(f"{count} {what}" for what, count in self.left_out.most_common())
        line = f"left out: {counts}"
        if any(what.startswith(".") for what in self.left_out):
            line += "; convert other kinds of images to JPEG or PNG"
        if any(what in VIDEO_SUFFIXES for what in self.left_out):
            line += "; give videos by their names"
        return line


def input_files(paths: Sequence[str], *, each: bool = False) -> Inputs:
    """Return the files among `paths`, and the images in the folders among them.

    Folders are searched with their subfolders. Hidden files, and what this command drew there
    earlier, are no images of the user's. A file that is given twice is looked at once. Drawings
    keep the name of their file; a second one of the same name gets '-2' appended, also where the
    names differ only in case, which are the same file on some systems.

    Args:
      paths: files and folders.
      each: the paths are files, and each is looked at, also one that is given twice.

    Raises:
      UserError: an argument is an address on the web or '-', or there is no file to look at.
    """
    found, seen, names = Inputs(), set(), _Names()
    records: dict[pathlib.Path, outputs.OutputFolder] = {}
    for path in paths:
        _check_is_path(path)
        given = pathlib.Path(path)
        in_folder = given.is_dir()
        files = _images_under(given, found.left_out, records) if in_folder else [given]
        if not each and any(c in path for c in "*?[") and not os.path.lexists(given):
            found.failed[path] = (
                f"{printable(path)}: no such file: the pattern matches nothing. Check the path."
            )
            continue
        if given.exists() and not given.is_file() and not in_folder:
            found.failed[path] = (
                f"{printable(path)}: is a pipe or a device. Save the image as a file, and give it."
            )
            continue
        if not files:
            found.failed[path] = f"{printable(path)}: contains no image. Give a folder with images."
        for file in files:
            place = file.parent.resolve() / file.name
            if place in seen and not each:
                found.left_out["given twice"] += 1
                continue
            seen.add(place)
            stem = str(file.relative_to(given).with_suffix("")) if in_folder else file.stem
            is_video = not in_folder and _is_video(file)
            # detections.json names the drawing, and JSON holds only valid text.
            drawn = names.free(valid_text(stem), _DRAWN_VIDEO if is_video else ".png")
            found.files.append(InputFile(str(file), is_video, drawn))
    if not found.files:
        line = found.left_out_line()
        first = next(iter(found.failed.values()), "no IMAGE is given.")
        raise UserError(first + (f" ({line}.)" if line else ""))
    return found


def _check_is_path(path: str) -> None:
    """Raise `UserError` for an argument that cannot be a file."""
    if path == "-":
        raise UserError("-: the standard input is not read. Save the image as a file, and give it.")
    if not path.strip():
        raise UserError("an IMAGE is empty. Give a file or a folder.")
    if _ADDRESS.match(path) and not os.path.lexists(path):
        raise UserError(
            f"{printable(path)}: is an address, and files are read only from this machine. "
            "Download it, and give the file."
        )


def _images_under(
    folder: pathlib.Path,
    left_out: collections.Counter[str],
    records: dict[pathlib.Path, outputs.OutputFolder],
) -> list[pathlib.Path]:
    """Return the images in a folder and its subfolders; count what else lies there."""
    suffixes = _image_suffixes()
    found = []
    for path in _files_under(folder, left_out):
        if path.name.startswith("."):
            left_out["hidden"] += path.suffix.lower() in suffixes
        elif outputs.written_by_a_command(path, records):
            continue
        elif path.suffix.lower() in suffixes:
            found.append(path)
        else:
            left_out[printable(path.suffix.lower()) or "without a suffix"] += 1
    for what in [what for what, count in left_out.items() if not count]:
        del left_out[what]
    return sorted(found)


def _files_under(
    folder: pathlib.Path, left_out: collections.Counter[str]
) -> Iterator[pathlib.Path]:
    """Yield the files of a folder and its subfolders, also of links to folders, each once."""
    seen: set[tuple[int, int]] = set()

    def unreadable(_: OSError) -> None:
        left_out["folders that cannot be read"] += 1

    for root, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # links in a circle, or to a folder seen before
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        hidden = [name for name in folders if name.startswith(".")]
        left_out["hidden folders"] += len(hidden)
        folders[:] = sorted(set(folders) - set(hidden))
        for name in files:
            path = pathlib.Path(root, name)
            if path.is_file():
                yield path
            else:
                is_broken = path.is_symlink() and not path.exists()
                left_out["broken links" if is_broken else "pipes and devices"] += 1


def _image_suffixes() -> set[str]:
    """Return the suffixes of the kinds of images that can be read here, in lower case."""
    kinds = Image.registered_extensions()
    return {suffix for suffix, kind in kinds.items() if kind in Image.OPEN} - set(VIDEO_SUFFIXES)


def _is_video(path: pathlib.Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in VIDEO_SUFFIXES or (suffix in ANIMATION_SUFFIXES and is_animation(path))


class _Names:
    """Gives each drawing a name of its own, also on file systems that ignore case."""

    def __init__(self):
        self._stems: set[str] = set()
        self._files: set[str] = set()
        self._folders: set[str] = set()

    def free(self, stem: str, suffix: str) -> str:
        """Return `stem` + `suffix`, or with '-2', '-3', ... if that is taken."""
        stem = "/".join(map(_shortened, stem.split("/")))
        folders = pathlib.PurePosixPath(_folded(stem)).parents
        if any(str(folder) in self._files for folder in folders):
            stem = stem.replace("/", "_")  # a drawing has the name of its folder
        stems = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
        stem = next(stem for stem in stems if self._is_free(stem, suffix))
        file = pathlib.PurePosixPath(_folded(stem) + suffix)
        self._stems.add(_folded(stem))
        self._files.add(str(file))
        self._folders.update(map(str, file.parents))
        return stem + suffix

    def _is_free(self, stem: str, suffix: str) -> bool:
        return _folded(stem) not in self._stems and _folded(stem) + suffix not in self._folders


def _shortened(part: str) -> str:
    """Return a part of a path, cut where a file system has no room for it, an ending and a number.

    Escaping makes names of other encodings longer: `caf\\xe9` has seven bytes in place of four.
    """
    data = part.encode()
    if len(data) <= _LONGEST:
        return part
    digest = hashlib.sha256(data).hexdigest()[:8]
    return f"{data[: _LONGEST - 9].decode(errors='ignore')}-{digest}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
