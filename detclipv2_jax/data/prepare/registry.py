"""Which annotation files a folder holds, in which format, and whether they were prepared already.

All of it without TensorFlow, so that a command that finds its work done ends at once.
"""

import dataclasses
import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare.examples import Archive, ImageFolder
from detclipv2_jax.data.prepare.image_encoding import Options
from detclipv2_jax.data.prepare.sources import (
    coco,
    conceptual_captions,
    goldg,
    img2dataset,
    lvis,
    objects365,
    odinw,
)

FORMATS: dict[str, tuple[str, Callable[[Path, ImageFolder], Archive]]] = {
    "COCO instances": ("detection", coco.read),
    "MDETR": ("grounding", goldg.read),
    "COCO captions": ("image_text", conceptual_captions.read_coco_captions),
    "JSON lines": ("image_text", conceptual_captions.read_json_lines),
    "TSV": ("image_text", conceptual_captions.read_tsv),
    "img2dataset's shards": ("image_text", lambda path, images: img2dataset.read(path)),
}
_ROBOFLOW = "_annotations.coco.json"
#: In the name of a file that is not trained on.
EVALUATION_WORDS = {"val", "valid", "validation", "test", "dev", "minival", "eval"}


def format_of(path: Path) -> str | None:
    """Which of FORMATS a file is in, judged by the fields it has; None if none, or if it is LVIS.

    The shards of img2dataset are a folder.

    JSON is searched for the names of its fields, neither parsed nor read into memory: Objects365's
    file has gigabytes.
    """
    if path.is_dir():
        return "img2dataset's shards" if img2dataset.shards(path) else None
    if path.suffix == ".tsv":
        return "TSV"
    if path.suffix == ".jsonl":
        return "JSON lines"
    if path.suffix != ".json" or not path.stat().st_size:
        return None
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for mark, name in (
            (b'"neg_category_ids"', None),  # federated: an unnamed category is not an absent one
            (b'"tokens_positive"', "MDETR"),
            (b'"bbox"', "COCO instances"),
            (b'"caption"', "COCO captions"),
        ):
            if content.find(mark) >= 0:
                return name
    return None


def discover(directory: Path) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Annotation files in DIR and DIR/annotations: by kind, and those left out with the reason.

    Roboflow's lie in a folder a split. A file whose name, or whose split's, has a word such as
    "val" or "test" is not trained on unless it is named. A folder without any, but with shards
    of img2dataset, is an archive itself.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; check --from")
    found: dict[str, list[Path]] = {}
    left_out: dict[Path, str] = {}
    places = ("*.*", "annotations/*.*", f"*/{_ROBOFLOW}")
    for path in sorted(path for place in places for path in directory.glob(place)):
        if path.suffix not in (".json", ".jsonl", ".tsv") or not path.is_file():
            continue
        name = path.parent.name if path.name == _ROBOFLOW else path.stem
        if EVALUATION_WORDS & set(re.split(r"[\W_\d]+", name.lower())):  # "val2017" too
            left_out[path] = "by its name it is for evaluation"
        elif (name := format_of(path)) is None:
            left_out[path] = "it is no JSON with the fields of a known training format"
        else:
            found.setdefault(FORMATS[name][0], []).append(path)
    if not found and any(
        re.fullmatch(r"\d{5,}", path.name) for path in img2dataset.shards(directory)
    ):
        return {"image_text": [directory]}, {}
    return found, left_out


def open_archives(files: Sequence[Path], images: ImageFolder, kind: str) -> list[Archive]:
    """Open annotation files of one kind; `UserError` for a missing file or one of another kind."""
    accepted = [name for name, (of, _) in FORMATS.items() if of == kind]
    archives = []
    for path in files:
        # A file that shows no format (empty, cut off, no JSON) goes to the reader, which says what
        # it lacks.
        name = format_of(_existing(path)) or accepted[0]
        if name not in accepted:
            raise UserError(
                f"{path}: {name} by its fields; {kind} data come as {' or '.join(accepted)}"
            )
        archives.append(FORMATS[name][1](path, images))
    return archives


@dataclasses.dataclass(frozen=True)
class ArchiveSource:
    """A source that people name: how its annotation files are found and opened."""

    kind: str  # "detection" | "grounding" | "image_text"
    about: str  # for people
    find: Callable[[Path], list[Path]]  # the annotation files for training in a folder
    read: Callable[..., Archive]  # (annotation file, images, options as keywords)
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    # what may be asked of `read`: an option's name and how argparse takes it

    def open_all(self, directory: Path) -> list[Archive]:
        """The archives of a folder; `UserError` where it has none."""
        images = image_folder(directory, self.kind)
        return [self.read(path, images) for path in self.files(directory)]

    def files(self, directory: Path) -> list[Path]:
        """The annotation files of a folder; `UserError` where it has none."""
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; check --from")
        if not (found := self.find(directory)):
            raise UserError(
                f"{directory}: no {self.kind} file for training in it or in its annotations/; name "
                "one with --annotations=FILE"
            )
        return found


def image_folder(directory: Path, kind: str) -> ImageFolder:
    """Where the images of a folder with annotation files are, unless they are elsewhere."""
    return ImageFolder(directory / "images" / kind, directory / "images", directory)


def discovered(directory: Path) -> dict[str, list[Path]]:
    """What `discover` finds; what it leaves out is said."""
    found, left_out = discover(directory)
    for path, reason in left_out.items():
        print(f"{path}: left out, {reason}")
    return found


def _of_kind(kind: str, about: str) -> ArchiveSource:
    """Any of FORMATS that is of this kind, told by its fields."""
    return ArchiveSource(
        kind=kind,
        about=about,
        find=lambda directory: discovered(directory).get(kind, []),
        read=lambda path, images: open_archives([path], images, kind)[0],
    )


#: Files of each kind in any of FORMATS: what people export, and the built-in data.
OF_KIND: dict[str, ArchiveSource] = {
    "detection": _of_kind("detection", "COCO instances JSON: boxes with category names"),
    "grounding": _of_kind("grounding", "MDETR JSON: captions whose phrases have boxes"),
    "image_text": _of_kind("image_text", "captions: JSON lines, TSV or COCO captions JSON"),
}
#: Archives by the name that people know them by: the subcommands of prepare_data.py, and what
#: builders.py offers to TensorFlow Datasets.
SOURCES: dict[str, ArchiveSource] = {
    "objects365": ArchiveSource(
        "detection",
        "Objects365, v2 or v1: its JSON, its patches of pictures",
        objects365.training_files,
        objects365.read,
        {
            "subset": {
                "type": int,
                "metavar": "N",
                "help": "keep N pictures, chosen by a seeded rule (the paper has 660000; default: "
                "all)",
            },
            "seed": {"type": int, "default": 0, "help": "of the subset (default: 0)"},
        },
    ),
    "goldg": ArchiveSource(
        "grounding",
        "GoldG: MDETR's JSON of Flickr30k and GQA (mixed), without COCO's pictures",
        lambda directory: (
            goldg.training_files(directory) or discovered(directory).get("grounding", [])
        ),
        goldg.read_without_coco,
        {
            "keep_coco": {"action": "store_true", "help": "keep the pictures that are COCO's"},
            "exclude": {
                "type": Path,
                "metavar": "FILE",
                "action": "append",
                "help": "leave out only the pictures of this COCO or LVIS file; may be repeated "
                "(default: all that are COCO's)",
            },
        },
    ),
    "conceptual_captions": dataclasses.replace(
        OF_KIND["image_text"],
        about="CC3M, CC12M, … as img2dataset left them (tars, parquet), or TSV, JSON lines",
        find=lambda directory: (
            [directory]
            if img2dataset.shards(directory)  # a list of addresses beside them is none of captions
            else discovered(directory).get("image_text", [])
        ),
    ),
    "lvis": ArchiveSource(
        "detection", "LVIS v1's lvis_v1_train.json", lvis.training_files, lvis.read
    ),
    "coco": OF_KIND["detection"],
    "odinw": ArchiveSource(
        "detection", "ODinW's 13 sets, to fine-tune on", odinw.training_files, odinw.read
    ),
    "image_text": OF_KIND["image_text"],
}


def fingerprint(
    files: Iterable[Path], images: ImageFolder, options: Options | None
) -> dict[str, Any]:
    """What a source was made from: digests of the annotation files, folders, and options.

    The images themselves are not read for it; if they change, prepare with --overwrite.
    """
    result: dict[str, Any] = {"images": [str(root.resolve()) for root in images.roots], "files": {}}
    for path in files:
        result["files"][str(path.resolve())] = _digest(path)
    if options is not None:
        result["phrases"] = {"model": options.phrase_model, "limit": options.phrase_limit}
        result["store_side"] = options.store_side
    return result


def _digest(path: Path) -> str:
    """Of a file's content; of a folder that is an archive itself, of its files' names and sizes."""
    if path.is_dir():
        sizes = sorted((str(f.relative_to(path)), f.stat().st_size) for f in path.rglob("*.*"))
        return hashlib.blake2b(json.dumps(sizes).encode()).hexdigest()[:32]
    with open(_existing(path), "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    return path


def prepared_before(to: Path, inputs: Mapping[str, Any], *, overwrite: bool) -> Source | None:
    """The source in `to` if it was made from the same inputs; None if it is to be made.

    `UserError` where `to` holds a source of other inputs (unless `overwrite`) or no source but
    files.
    """
    if not to.exists() or not any(to.iterdir()):
        return None
    if not (to / "info.json").is_file():
        raise UserError(
            f"{to}: not empty, and no prepared source; name another directory with --to"
        )
    if overwrite:
        return None
    source = Source.open(to)
    if source.info.get("created_from") == json.loads(json.dumps(inputs)):
        return source
    raise UserError(
        f"{to}: holds a source made from other files or options; add --overwrite to replace it, or "
        "name another directory with --to"
    )
