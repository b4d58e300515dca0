"""Indices of parts, and how the parts of a source become one (its layout: index.py).

A source is prepared in parts, by processes that know nothing of each other. Beside the records of a
part lies what the index needs to know of them, a `PartIndex`; merging gives the concepts their
local ids. The outcome depends on the parts and their order alone.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt16, UInt64

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import ARRAYS, FORMAT, Source, dataset_name, shard_name
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    from detclipv2_jax.data.records import Record

_SPLIT = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class PartIndex:
    """The records of a part by size and concepts; concepts are numbered as they first appear."""

    height: UInt16[np.ndarray, " n"]
    width: UInt16[np.ndarray, " n"]
    counts: Int32[np.ndarray, " n"]  # concepts of each record
    positives: Int32[np.ndarray, " p"]  # those concepts, record after record
    names: tuple[str, ...]
    keys: UInt64[np.ndarray, " c"]
    tokens: UInt16[np.ndarray, "c 16"]
    mentions: Int64[np.ndarray, " c"]
    vocabulary: Bool[np.ndarray, " c"]

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write it, with `about` (anything that JSON takes), whole or not at all."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays |= {"names": _characters(self.names), "about": _characters(about)}
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "PartIndex":
        """The inverse of `save`."""
        with np.load(path, allow_pickle=False) as arrays:
            fields = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}
        return cls(**fields | {"names": tuple(json.loads(fields["names"].tobytes()))})


def about(path: Path) -> dict[str, Any]:
    """What was saved beside a `PartIndex`, without reading the rest of the file."""
    with np.load(path, allow_pickle=False) as arrays:
        return json.loads(arrays["about"].tobytes())


class Indexer:
    """Makes the `PartIndex` of records that come one by one."""

    def __init__(self, kind: str, names: Iterable[str] = ()):
        """`names`: concepts that come first, whether a record has them or not."""
        self._captioned = kind == "image_text"
        self._concepts = ConceptTable()
        for name in names:
            self._concepts.add(name, count=0)
        self._sizes: list[tuple[int, int]] = []
        self._counts: list[int] = []
        self._positives: list[int] = []

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, record: "Record") -> None:
        """Take in a record. A name counts once for each of its boxes, a text once a record."""
        boxes = np.bincount(record.labels, minlength=len(record.concepts))
        for place, concept in enumerate(record.concepts):
            self._positives.append(
                self._concepts.add(
                    concept,
                    vocabulary=not (self._captioned and place == 0),  # the caption leads
                    count=1 if self._captioned else int(boxes[place]),
                )
            )
        self._counts.append(len(record.concepts))
        self._sizes.append((record.height, record.width))

    def finish(self) -> PartIndex:
        """The index of the records so far."""
        table = self._concepts
        sizes = np.array(self._sizes, np.uint16).reshape(-1, 2)
        texts = [tokenizer_lib.enriched(name, None) for name in table.names]
        return PartIndex(
            height=sizes[:, 0],
            width=sizes[:, 1],
            counts=np.array(self._counts, np.int32),
            positives=np.array(self._positives, np.int32),
            names=tuple(table.names),
            keys=tokenizer_lib.keys(texts),
            tokens=tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(texts)),
            mentions=np.array(table.counts, np.int64),
            vocabulary=np.array(table.vocabulary, bool),
        )


def write_index(directory: Path, parts: Sequence[Path]) -> int:
    """Write the index of saved parts, in their order, to `directory`; the number of its concepts.

    Local ids follow the first appearance. Texts are never all in memory: 13 million captions take
    some 32 bytes each, for their tokens, beside a few for their keys and counts.
    """
    keys = [_array(path, "keys") for path in parts]
    starts = np.cumsum([0] + [len(some) for some in keys])
    ids, first = _local_ids(np.concatenate(keys or [np.zeros(0, np.uint64)]))
    mentions, vocabulary = np.zeros(len(first), np.int64), np.zeros(len(first), bool)
    arrays = {field: [] for field in ("height", "width", "counts", "positives", "tokens", "keys")}
    for start, path in zip(starts, parts):
        part = PartIndex.load(path)
        own = ids[start : start + len(part.keys)]
        mentions[own] += part.mentions  # a part has each concept once
        vocabulary[own] |= part.vocabulary
        new = first[own] == np.arange(start, start + len(own))
        arrays["positives"].append(own[part.positives])
        arrays["tokens"].append(part.tokens[new])
        arrays["keys"].append(part.keys[new])
        for field in ("height", "width", "counts"):
            arrays[field].append(getattr(part, field))
    merged = {field: np.concatenate(some) for field, some in arrays.items()}
    counts = merged.pop("counts")
    merged["positives_offsets"] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    merged["vocabulary"] = vocabulary
    (directory / "index").mkdir(parents=True, exist_ok=True)
    for field, path in ARRAYS.items():
        np.save(directory / path, merged[field], allow_pickle=False)
    _write_concepts(directory / "concepts.jsonl", parts, starts, ids, first, mentions, vocabulary)
    return len(first)


def write_info(
    directory: Path, *, name: str, kind: str, shards: Mapping[str, int], more: Mapping[str, Any]
) -> None:
    """Write info.json. `shards`: records of each file, in their order; `more`: further fields."""
    info = {
        "format": FORMAT,
        "name": name,
        "kind": kind,
        "records": sum(shards.values()),
        "files": list(shards),
        "shards": list(shards.values()),
        "shard_bytes": [(directory / file).stat().st_size for file in shards],
        **more,
    }
    temporary = directory / "info.json.tmp"
    temporary.write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "info.json")


def write_tfds_metadata(directory: Path, name: str, shards: Mapping[str, int]) -> None:
    """Make the directory one that `tfds.builder_from_directory` opens, with one split, "train"."""
    import tensorflow_datasets as tfds  # without TensorFlow itself

    from detclipv2_jax.data.records import features

    template = tfds.core.ShardedFileTemplate(
        data_dir=directory,
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        dataset_name=dataset_name(name),
        split=_SPLIT,
        filetype_suffix="array_record",
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=list(shards.values()),
        num_bytes=sum((directory / file).stat().st_size for file in shards),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(),
        split_infos=[split],
        version="1.0.0",
        filename_template=template,
        check_data=False,  # which would import TensorFlow to read one record
        description=f"{name}, prepared for detclipv2_jax",
    )


def assemble(
    directory: Path, files: Sequence[tuple[Path, int]], parts: Sequence[Path], *, name: str,
    kind: str, info: Mapping[str, Any],
) -> None:  # fmt: skip
    """Make `directory` a source: files of records (moved here) with their counts, saved parts."""
    write_index(directory, parts)
    shards = {shard_name(name, i, len(files)): count for i, (_, count) in enumerate(files)}
    for (path, _), shard in zip(files, shards):
        os.replace(path, directory / shard)
    if shards:  # TFDS knows no dataset without a file
        write_tfds_metadata(directory, name, shards)
    write_info(directory, name=name, kind=kind, shards=shards, more=info)


def refuse_foreign(directory: Path) -> None:
    """`UserError` where a source would replace a directory that holds something else."""
    occupied = directory.is_dir() and any(directory.iterdir())
    if occupied and not (directory / "info.json").is_file():
        raise UserError(f"{directory}: not empty, and no prepared source; choose another")


def put_in_place(new: Path, old: Path) -> Source:
    """Put source `new` in the place of `old`, and open it.

    A reader sees one, the other, or briefly none.
    """
    retired = old.with_name(old.name + ".old")
    shutil.rmtree(retired, ignore_errors=True)
    if old.exists():
        os.replace(old, retired)
    os.replace(new, old)
    shutil.rmtree(retired, ignore_errors=True)
    return Source.open(old)


def _local_ids(keys: UInt64[np.ndarray, " e"]) -> tuple[np.ndarray, np.ndarray]:
    """The local id of each entry, numbered by first appearance, and where each id appears first."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(first), np.int32)
    place[order] = np.arange(len(first), dtype=np.int32)
    return place[inverse], first[order]


def _write_concepts(path, parts, starts, ids, first, mentions, vocabulary) -> None:
    with open(path, "w", encoding="utf-8") as lines:
        for start, part in zip(starts, parts):
            names = json.loads(_array(part, "names").tobytes())
            for entry, name in enumerate(names, start):
                local = ids[entry]
                if first[local] == entry:
                    row = {"name": name, "definition": None, "count": int(mentions[local])}
                    lines.write(json.dumps(row | {"vocabulary": bool(vocabulary[local])}) + "\n")


def _characters(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _array(path: Path, field: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[field]


class ConceptTable:
    """Collects the concepts of one source while it is prepared, and counts them.

    Local ids are given in the order of first appearance. `vocabulary` tells names and phrases,
    which may be drawn as negatives, from whole captions, which may not.
    """

    def __init__(self):
        self._ids: dict[str, int] = {}
        self.names: list[str] = []
        self.counts: list[int] = []
        self.vocabulary: list[bool] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, *, vocabulary: bool = True, count: int = 1) -> int:
        """The local id of a name, made if it is new. Spellings of one normalized text are one."""
        name = normalize(name)
        local = self._ids.setdefault(name, len(self.names))
        if local == len(self.names):
            self.names.append(name)
            self.counts.append(0)
            self.vocabulary.append(False)
        self.counts[local] += count
        self.vocabulary[local] |= vocabulary
        return local
