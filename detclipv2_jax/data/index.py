"""One prepared source on disk, and its index: arrays that say what each record holds.

    info.json                         kind, number of records, shards, what was dropped and why
    NAME-train.array_record-00000-of-0000N   the shards, named as TFDS names them
    index/height.npy width.npy        uint16 (n,): pixels of each stored image
    index/positives_offsets.npy       int64 (n + 1,)
    index/positives.npy               int32: [offsets[i] : offsets[i + 1]] are the local ids of the
                                      concepts of record i, in the record's own order
    index/absent.npy absent_offsets.npy, partial.npy partial_offsets.npy   of federated sources
                                      (LVIS) in the same form: concepts that are not in the image,
                                      and concepts of which not every object has a box
    concepts.jsonl                    {"name", "definition", "synset", "count", "vocabulary"};
                                      line = local id; what the source says that its names mean
    tokens.npy keys.npy vocabulary.npy   uint16 (c, 16), uint64 (c,), bool (c,)

A record names its concepts by their texts; label k of record i is the local id
`positives[offsets[i] + k]`. `data/prepare/index_writer.py` writes these files. With
dataset_info.json and features.json, written next to them, the directory is also a dataset of
TensorFlow Datasets.

Arrays are memory-mapped. Planning a run needs neither TensorFlow nor strings.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt16, UInt64

from detclipv2_jax.common.errors import UserError

Kind = Literal["detection", "grounding", "image_text", "classification"]
# A new kind goes to the end: random streams and checkpoints number the kinds in this order.
KINDS: tuple[Kind, ...] = ("detection", "grounding", "image_text", "classification")
# Kinds whose images have texts instead of boxes: a caption with its phrases, or a class name.
TEXT_KINDS: frozenset[Kind] = frozenset({"image_text", "classification"})
FORMAT = 2  # of info.json
#: field of `Source` → file
ARRAYS = {
    "height": "index/height.npy",
    "width": "index/width.npy",
    "positives_offsets": "index/positives_offsets.npy",
    "positives": "index/positives.npy",
    "tokens": "tokens.npy",
    "keys": "keys.npy",
    "vocabulary": "vocabulary.npy",
}
#: field of `Source` → files of its lists; only federated sources have them
LISTS = {
    "absent": ("index/absent_offsets.npy", "index/absent.npy"),
    "partial": ("index/partial_offsets.npy", "index/partial.npy"),
}


class IdLists(NamedTuple):
    """A list of local ids for each of n records."""

    offsets: Int64[np.ndarray, " n+1"]
    ids: Int32[np.ndarray, " k"]

    def of(self, record: int) -> Int32[np.ndarray, " l"]:
        """Return the list of one record."""
        return self.ids[self.offsets[record] : self.offsets[record + 1]]

    def of_all(
        self, records: Int[np.ndarray, " r"]
    ) -> tuple[Int[np.ndarray, " m"], Int32[np.ndarray, " m"]]:
        """Return the lists of several records as one.

        Returns:
            For each entry its place in `records`, and its id.
        """
        starts = self.offsets[records]
        counts = self.offsets[records + 1] - starts
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = np.repeat(np.arange(len(records)), counts)
        return owners, self.ids[starts[owners] + within]


def dataset_name(name: str) -> str:
    """Return a source's name as TFDS allows it: letters, digits and _, a letter first."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return plain if plain[:1].isalpha() else f"source_{plain}"


def shard_name(name: str, number: int, count: int) -> str:
    """Return the file name of one of `count` shards of a source."""
    return f"{dataset_name(name)}-train.array_record-{number:05d}-of-{count:05d}"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """An open prepared source of n records and c concepts.

    Record numbers 0 … n - 1 run through the shards in order. Local ids 0 … c - 1 number the
    concepts.
    """

    directory: Path
    name: str
    kind: Kind
    info: Mapping[str, Any]
    height: UInt16[np.ndarray, " n"]  # of the stored images, in pixels
    width: UInt16[np.ndarray, " n"]
    positives_offsets: Int64[np.ndarray, " n+1"]
    # Local ids of each record's concepts, each once; image_text: the caption first;
    # classification: the class name alone.
    positives: Int32[np.ndarray, " p"]
    tokens: UInt16[np.ndarray, "c 16"]
    keys: UInt64[np.ndarray, " c"]  # `tokenizer.key` of each concept
    vocabulary: Bool[np.ndarray, " c"]  # False: a whole caption, never drawn as a negative
    # Of a federated source: the concepts that each image certainly lacks, and those of which not
    # every object has a box. None: what has no box in an image of this source is not in it.
    absent: IdLists | None = None
    partial: IdLists | None = None

    @classmethod
    def open(cls, directory: str | Path) -> "Source":
        """Open a prepared directory.

        Raises:
            UserError: it is missing, damaged or of another format.
        """
        directory = Path(directory)
        info = _read_info(directory)
        arrays = {field: _map(directory, path) for field, path in ARRAYS.items()}
        lists = {}
        if info.get("federated"):
            for field, paths in LISTS.items():
                lists[field] = IdLists(*(_map(directory, path) for path in paths))
        source = cls(directory, info["name"], info["kind"], info, **arrays, **lists)
        _check(source)
        return source

    def __len__(self) -> int:
        return len(self.height)

    @property
    def shard_paths(self) -> tuple[str, ...]:
        """Paths of the shards, in record order."""
        return tuple(str(self.directory / file) for file in self.info["files"])

    @property
    def shard_starts(self) -> Int64[np.ndarray, " shards+1"]:
        """Number of the first record of each shard, then the number of all records."""
        return np.cumsum([0, *self.info["shards"]])

    def positives_of(self, record: int) -> Int32[np.ndarray, " k"]:
        """Return the local ids of the concepts of one record."""
        return self.positives[self.positives_offsets[record] : self.positives_offsets[record + 1]]

    def read_concepts(self, wanted: Bool[np.ndarray, " c"]) -> Iterator[dict[str, Any]]:
        """Yield the wanted rows of concepts.jsonl, which may be too large for memory."""
        if wanted.any():
            with open(self.directory / "concepts.jsonl", encoding="utf-8") as lines:
                yield from map(json.loads, itertools.compress(lines, wanted))

    @functools.cached_property
    def concepts(self) -> list[dict[str, Any]]:
        """Rows of `concepts.jsonl` by local id, read on first use."""
        with open(self.directory / "concepts.jsonl", encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def _remedy(directory: Path, more: str = "") -> str:
    return f"Prepare it with `detclip prepare SOURCE --from=DIR --to={directory}{more}`."


def _remedy_again(directory: Path) -> str:
    return _remedy(directory, " --overwrite")


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "info.json"
    if not path.is_file():
        raise UserError(f"{directory}: no prepared source here. {_remedy(directory)}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        found, kind = info["format"], info["kind"]
        missing = {"name", "records", "files", "shards", "shard_bytes"} - info.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a valid description of a source. {_remedy_again(directory)}"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{path}: has format {found!r}, but this version reads {FORMAT}. "
            f"{_remedy_again(directory)}"
        )
    if kind not in KINDS or missing:
        names = ", ".join(sorted(missing))
        what = f'"kind" is {kind!r}' if kind not in KINDS else f"fields are missing: {names}"
        raise UserError(f"{path}: {what}. {_remedy_again(directory)}")
    return info


def _map(directory: Path, relative: str) -> np.ndarray:
    path = directory / relative
    try:
        # An array without elements (a header of 128 bytes) cannot be mapped, so it is read.
        mode = "r" if path.stat().st_size > 128 else None
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: missing or damaged. {_remedy_again(directory)}") from error


def _check(source: Source) -> None:
    """Raise `UserError` if arrays and shards do not belong together."""
    records, concepts = source.info["records"], len(source.keys)
    claims = {
        ARRAYS["height"]: source.height.shape == (records,),
        ARRAYS["width"]: source.width.shape == (records,),
        **_check_lists(source),
        ARRAYS["tokens"]: source.tokens.shape == (concepts, 16),
        ARRAYS["vocabulary"]: source.vocabulary.shape == (concepts,),
        "info.json": sum(source.info["shards"]) == records
        and len(source.info["files"])
        == len(source.info["shards"])
        == len(source.info["shard_bytes"]),
    }
    for path, size in zip(source.shard_paths, source.info["shard_bytes"]):
        file = Path(path)
        claims[file.name] = file.is_file() and file.stat().st_size == size
    for name, holds in claims.items():
        if not holds:
            raise UserError(
                f"{source.directory / name}: missing or damaged (it does not fit the rest of the "
                f"source). {_remedy_again(source.directory)}"
            )


def _check_lists(source: Source) -> dict[str, bool]:
    """Return whether each file of lists fits the source's records and concepts."""
    records, concepts, claims = source.info["records"], len(source.keys), {}
    positives = IdLists(source.positives_offsets, source.positives)
    stored = [((ARRAYS["positives_offsets"], ARRAYS["positives"]), positives)]
    stored += [(LISTS[field], getattr(source, field)) for field in LISTS]
    for (offsets_path, ids_path), lists in stored:
        if lists is not None:
            offsets, ids = lists
            claims[offsets_path] = (
                offsets.shape == (records + 1,)
                and offsets[0] == 0
                and offsets[-1] == len(ids)
                and bool(np.all(np.diff(offsets) >= 0))
            )
            claims[ids_path] = ids.size == 0 or (ids.min() >= 0 and ids.max() < concepts)
    return claims
