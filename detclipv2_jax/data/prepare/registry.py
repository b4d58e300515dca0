"""Find the annotation files of a folder and their formats, and check for an earlier preparation.

Nothing here imports TensorFlow, so a command that has nothing to do ends at once.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import own_folders
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.moved import same_inputs
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.sources import (
    coco,
    conceptual_captions,
    formats,
    goldg,
    imagenet,
    img2dataset,
    lvis,
    objects365,
    odinw,
)
from detclipv2_jax.data.prepare.sources.entries import ROBOFLOW_FILE

#: Format -> (kind of data, reader).
FORMATS: dict[str, tuple[str, Callable[[Path, ImageFolder], Archive]]] = {
    "COCO instances": ("detection", coco.read),
    "MDETR": ("grounding", goldg.read),
    "COCO captions": ("image_text", conceptual_captions.read_coco_captions),
    "JSON lines": ("image_text", conceptual_captions.read_json_lines),
    "TSV": ("image_text", conceptual_captions.read_tsv),
    "img2dataset's shards": ("image_text", lambda path, images: img2dataset.read(path)),
}


def discover(directory: Path) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Find annotation files for training in `directory` and `directory`/annotations.

    Roboflow has one folder per split. A file is skipped if its name, or that of its split, has a
    word such as "val" or "test". A folder without annotation files but with shards of img2dataset
    is itself an archive.

    Returns:
        The files by kind, and the skipped files with the reason.

    Raises:
        UserError: `directory` is not a directory.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory. Check --from.")
    found: dict[str, list[Path]] = {}
    skipped: dict[Path, str] = {}
    places = ("*.*", "annotations/*.*", f"*/{ROBOFLOW_FILE}")
    files = {path for place in places for path in directory.glob(place)}
    # Of pictures that two files have, the first file's boxes stay: copies come last.
    for path in sorted(files, key=lambda path: (formats.is_copy(path), path)):
        if not formats.is_candidate(path) or not path.is_file():
            continue
        name = path.parent.name if path.name == ROBOFLOW_FILE else path.stem
        if why := formats.why_ignored(path):
            skipped[path] = why
        elif word := formats.evaluation_word(name):
            why = f"its name says that it is for evaluation ({word}), so it is not trained on"
            skipped[path] = why
        elif (judgment := _judge(path)).format is None:
            skipped[path] = judgment.why
        else:
            found.setdefault(FORMATS[judgment.format][0], []).append(path)
    if not found and any(
        re.fullmatch(r"\d{5,}", path.name) for path in img2dataset.shards(directory)
    ):
        return {"image_text": [directory]}, {}
    return found, skipped


def _judge(path: Path) -> formats.Judgment:
    """Return the format of a file; an unreadable file has none."""
    try:
        return formats.judge(path)
    except UserError as error:
        return formats.Judgment(None, str(error).removeprefix(f"{path}").lstrip(":, "))


def discover_and_report(directory: Path, used: Collection[Path] = ()) -> dict[str, list[Path]]:
    """Return what `discover` finds, by kind; print the files that it skips and nobody uses."""
    found, skipped = discover(directory)
    for path, reason in skipped.items():
        if path not in used:
            print(f"{path}: skipped, {reason}")
    return found


def open_archives(files: Sequence[Path], images: ImageFolder, kind: str) -> list[Archive]:
    """Open annotation files of one kind.

    Raises:
        UserError: a file is missing or of another kind.
    """
    accepted = [name for name, (of, _) in FORMATS.items() if of == kind]
    archives = []
    for path in files:
        judgment = formats.judge(_existing(path))
        if judgment.is_other:
            raise UserError(f"{path}: {judgment.why}. Give an annotation file.")
        # A file of unknown format (empty, cut off, not JSON) is passed to the reader, whose error
        # message says what is wrong.
        name = judgment.format or accepted[0]
        if name not in accepted:
            raise UserError(
                f"{path}: its fields are those of {name}, but {kind} data must be "
                f"{' or '.join(accepted)}. Give another file."
            )
        archives.append(FORMATS[name][1](path, images))
    return archives


@dataclasses.dataclass(frozen=True)
class ArchiveSource:
    """A type of archive that `detclip prepare` reads: how its files are found and opened."""

    kind: str  # one of `KINDS`
    about: str  # one line for --help
    find: Callable[[Path], list[Path]]  # the annotation files for training in a folder
    read: Callable[..., Archive]  # (annotation file, images, options as keywords)
    #: Options of `read`: name -> keywords of `argparse`'s add_argument.
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def open_all(self, directory: Path) -> list[Archive]:
        """Open the archives of a folder; `UserError` if it has none."""
        images = image_folder(directory, self.kind)
        return [self.read(path, images) for path in self.files(directory)]

    def files(self, directory: Path) -> list[Path]:
        """Return the annotation files of a folder; `UserError` if it has none."""
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory. Check --from.")
        if not (found := self.find(directory)):
            img2dataset.refuse_compressed(directory)
            raise UserError(
                f"{directory}: no {self.kind} file for training here or in annotations/. Give one "
                "with --annotations=FILE."
            )
        return found


def image_folder(directory: Path, kind: str) -> ImageFolder:
    """Return where the images of a folder with annotation files are by default."""
    return ImageFolder(directory / "images" / kind, directory / "images", directory)


def _any_format(kind: str, about: str) -> ArchiveSource:
    """Return a source of any of FORMATS of one kind; the fields of a file tell which."""
    return ArchiveSource(
        kind=kind,
        about=about,
        find=lambda directory: discover_and_report(directory).get(kind, []),
        read=lambda path, images: open_archives([path], images, kind)[0],
    )


#: Files of each kind in any of FORMATS: exports of labeling tools, and the built-in data.
OF_KIND: dict[str, ArchiveSource] = {
    "detection": _any_format("detection", "COCO instances JSON: boxes with category names"),
    "grounding": _any_format("grounding", "MDETR JSON: captions whose phrases have boxes"),
    "image_text": _any_format("image_text", "captions: JSON lines, TSV or COCO captions JSON"),
}
#: Published archives by name: the subcommands of `detclip prepare`, and the builders that
#: tfds_builders.py offers to TensorFlow Datasets.
SOURCES: dict[str, ArchiveSource] = {
    "objects365": ArchiveSource(
        "detection",
        "Objects365 v2 or v1: its JSON and its patches of images",
        objects365.training_files,
        objects365.read,
        {
            "subset": {
                "type": int,
                "metavar": "N",
                "help": "keep N images, chosen by a seeded hash of their ids (the paper: 660000; "
                "default: all images)",
            },
            "seed": {"type": int, "default": 0, "help": "seed of --subset (default: 0)"},
        },
    ),
    "goldg": ArchiveSource(
        "grounding",
        "GoldG: MDETR's JSON of Flickr30k and GQA (mixed), without COCO's images",
        lambda directory: (
            goldg.training_files(directory) or discover_and_report(directory).get("grounding", [])
        ),
        goldg.read_without_coco,
        {
            "keep_coco": {"action": "store_true", "help": "keep the images that are also COCO's"},
            "exclude": {
                "type": Path,
                "metavar": "FILE",
                "action": "append",
                "help": "drop only the images of this COCO or LVIS file; may be repeated "
                "(default: drop all images that are COCO's)",
            },
        },
    ),
    "conceptual_captions": dataclasses.replace(
        OF_KIND["image_text"],
        about="CC3M, CC12M and the like: img2dataset's shards (tar, parquet), TSV or JSON lines",
        find=lambda directory: (
            [directory]
            if img2dataset.shards(directory)  # a TSV next to shards is a list of URLs, not captions
            else discover_and_report(directory).get("image_text", [])
        ),
    ),
    "lvis": ArchiveSource("detection", "LVIS v1 train", lvis.training_files, lvis.read),
    "coco": OF_KIND["detection"],
    "odinw": ArchiveSource(
        "detection", "the 13 sets of ODinW, to fine-tune on", odinw.training_files, odinw.read
    ),
    "imagenet": ArchiveSource(
        "classification",
        "ImageNet-1k, or any folder that has a folder of images for each class",
        imagenet.find,
        imagenet.read,
    ),
    "image_text": OF_KIND["image_text"],
}


def fingerprint(
    files: Iterable[Path], images: ImageFolder, options: PrepareOptions | None
) -> dict[str, Any]:
    """Return what a source is made from: digests of the annotation files, folders, options.

    The images are not read for it. If they change, prepare again with --overwrite.

    Args:
        files: annotation files.
        images: folders of the images.
        options: None where no option changes the records.
    """
    folders = [str(folder.resolve()) for folder in images.folders]
    result: dict[str, Any] = {"images": folders, "files": {}}
    for path in files:
        result["files"][str(path.resolve())] = _digest(path)
    if options is not None:
        result["phrases"] = {"model": options.phrase_model, "limit": options.phrase_limit}
        result["store_side"] = options.store_side
    return result


def _digest(path: Path) -> str:
    """Return a digest of a file's content, or of the names and sizes of a folder's files."""
    if path.is_dir():
        sizes = sorted((str(f.relative_to(path)), f.stat().st_size) for f in path.rglob("*.*"))
        return hashlib.blake2b(json.dumps(sizes).encode()).hexdigest()[:32]
    with open(_existing(path), "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file. Check the path.")
    return path


def prepared_before(to: Path, inputs: Mapping[str, Any], *, overwrite: bool) -> Source | None:
    """Return the source in `to` if it was made from the same inputs, None if it must be made.

    Raises:
        UserError: `to` has a source of other inputs (without `overwrite`), or files that are not a
            source.
    """
    own_folders.refuse_foreign(to)
    if not to.exists() or not any(to.iterdir()):
        return None
    if overwrite:
        return None
    source = Source.open(to)
    if same_inputs(source.info.get("created_from"), inputs):
        return source
    raise UserError(
        f"{to}: holds a source made from other files or options. Add --overwrite to replace it, or "
        "choose another directory with --to."
    )
