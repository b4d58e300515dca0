"""Read images with one class each: ImageNet-1k, or any folder with a folder of images per class.

    ROOT/ILSVRC/Data/CLS-LOC/train/n01440764/*.JPEG   as Kaggle's archive unpacks
    ROOT/train/n01440764/*.JPEG                       as many copies of it are kept
    ROOT/train/golden_retriever/*.jpg, ROOT/golden_retriever/*.jpg
    ROOT/LOC_synset_mapping.txt                       "n01440764 tench, Tinca tinca"

ImageNet's folders are ids of WordNet; a file says which words they stand for. Other folders are
named like their classes. The name of a class is its first word, and where two classes share that, a
word that only one of them has.
"""

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.text_file import read_lines
from detclipv2_jax.data.prepare.examples import Archive, Drops, Example, ImageFile, ImageFolder
from detclipv2_jax.text.tokenizer import normalize

NAMES = "LOC_synset_mapping.txt"  # Kaggle's file of classes
PLACES = ("ILSVRC/Data/CLS-LOC/train", "Data/CLS-LOC/train", "train", "")  # first match counts
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}
_ID = re.compile(r"n\d{8}")
# WordNet has one word for both; these are the names that CLIP's authors give them.
_CRANES = {"n02012849": "crane bird", "n03126707": "construction crane"}
_REMEDY = (
    f"Put {NAMES} of Kaggle's archive (lines like 'n01440764 tench, Tinca tinca') there, or name "
    "such a file with --annotations=FILE."
)


@dataclasses.dataclass(frozen=True)
class ClassFolder:
    """The images of one class."""

    path: Path
    name: str


def find(directory: Path) -> list[Path]:
    """Return what stands for the annotations of a folder: its file of names, or the folder itself.

    Raises:
        UserError: the names of its folders are ids, and there is no file.
    """
    names = directory / NAMES
    if names.is_file():
        return [names]
    _refuse_ids(_class_folders(ImageFolder(directory / "images", directory)))
    return [directory]


def _refuse_ids(folders: list[Path]) -> None:
    if ids := [folder for folder in folders if _ID.fullmatch(folder.name)]:
        raise UserError(f"{ids[0]}: the class has an id, but no name. {_REMEDY}")


def read(path: Path, images: ImageFolder) -> Archive:
    """Open images with one class each.

    Files that are no images, and folders that the file of names lacks, are counted.

    Args:
        path: a file of lines "ID NAME, OTHER NAME"; or a folder, whose folders have the names.
        images: where `PLACES` are looked for.

    Raises:
        UserError: the file is damaged, or there is no folder with images and a name.
    """
    drops = Drops()
    folders = _named_folders(path, images, drops)
    return Archive(
        path=path,
        kind="classification",
        total=sum(len(_files(folder.path)) for folder in folders),
        examples=_examples(folders, drops),
        drops=drops,
    )


def _examples(folders: list[ClassFolder], drops: Drops) -> Iterator[Example]:
    for folder in folders:
        for file in _files(folder.path):
            path = folder.path / file
            if path.suffix.lower() not in _SUFFIXES:
                why = f"{path}: not one of {', '.join(sorted(_SUFFIXES))}"
                drops.drop("images: another format", why)
                continue
            image_id = f"{folder.path.name}/{file}".encode("utf-8", "backslashreplace").decode()
            yield Example(ImageFile(path), image_id, size=None, caption=folder.name)


def _files(folder: Path) -> list[str]:
    """Return the names of a folder's files, sorted, without the hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_file() and not e.name.startswith("."))


def _named_folders(path: Path, images: ImageFolder, drops: Drops) -> list[ClassFolder]:
    """Return the folders of images below the first of PLACES that has any, with their names."""
    folders = _class_folders(images)
    if not folders:
        raise UserError(
            f"{images}: no folder of images per class here, nor in {', '.join(PLACES[:-1])}. Check "
            "--from, or give their folder with --images=DIR."
        )
    if path.is_dir():
        _refuse_ids(folders)
        return [ClassFolder(folder, folder.name.replace("_", " ").strip()) for folder in folders]
    names = class_names(read_words(path), drops)
    for folder in folders:
        if folder.name not in names:
            for file in _files(folder):
                why = f"{folder / file}: {path} has no name for {folder.name}"
                drops.drop("images: class without a name", why)
    named = [ClassFolder(folder, names[folder.name]) for folder in folders if folder.name in names]
    if not named:
        raise UserError(f"{path}: has no name for {folders[0]}. {_REMEDY}")
    return named


def _class_folders(images: ImageFolder) -> list[Path]:
    for root in images.folders:
        for place in PLACES:
            if (root / place).is_dir():
                inner = (path for path in sorted((root / place).iterdir()) if path.is_dir())
                if found := [path for path in inner if _has_image(path)]:
                    return found
    return []


def _has_image(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(Path(e.name).suffix.lower() in _SUFFIXES and e.is_file() for e in entries)


def read_words(path: Path) -> dict[str, list[str]]:
    """Return id → words of a file of lines "ID WORD, OTHER WORD".

    Raises:
        UserError: the file cannot be read, or a line has not this form.
    """
    words: dict[str, list[str]] = {}
    for number, line in read_lines(path):
        if isinstance(line, ValueError):
            raise UserError(f"{path}, line {number}, {line}.")
        key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
        found = [word.strip() for word in rest.split(",") if word.strip()]
        if not found or key in words:
            what = "is given twice" if key in words else "has no name"
            raise UserError(f"{path}, line {number}: the class {key[:40]!r} {what}. Fix the file.")
        words[key] = found
    return words


def class_names(words: Mapping[str, list[str]], drops: Drops) -> dict[str, str]:
    """Return id → name: a class's first word, or one that no other class has.

    Classes that share their first word and have no word of their own keep it: they become one class
    for the loss. Both cases are counted.

    Args:
        words: id → words, the first one first.
        drops: counts the classes that do not have a first word of their own.
    """
    first = Counter(normalize(own[0]) for own in words.values())
    owners = Counter(word for own in words.values() for word in {normalize(word) for word in own})
    names = {}
    for key, own in words.items():
        names[key] = own[0]
        if first[normalize(own[0])] == 1:
            continue
        other = _CRANES.get(key) or next((w for w in own if owners[normalize(w)] == 1), None)
        if other is not None:
            names[key] = other
            drops.change("classes: other word", f"{key}: {other!r}; other classes: {own[0]!r}")
    left = Counter(map(normalize, names.values()))
    for key, name in names.items():
        if left[normalize(name)] > 1:
            drops.change("classes: same name", f"{key}: another class is called {name!r} too")
    return names
