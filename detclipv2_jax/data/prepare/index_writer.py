"""Write the index of a source from the indices of its shards (layout on disk: data/index.py).

Processes that know nothing of each other prepare the shards of a source. Next to the records of
each shard is a `ShardIndex`. Merging them gives every concept its local id. The result depends only
on the shards and their order.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt16, UInt64

from detclipv2_jax.common import digests
from detclipv2_jax.common.atomic import replace_directory, replacing, write_json
from detclipv2_jax.data.index import (
    ARRAYS,
    CONCEPTS,
    FORMAT,
    LISTS,
    TEXT_KINDS,
    IdLists,
    Source,
    dataset_name,
    shard_name,
)
from detclipv2_jax.text import tokenizer as tokenizer_lib
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.tokenizer import normalize

if TYPE_CHECKING:
    from detclipv2_jax.data.records import Record

_SPLIT = "train"


@dataclasses.dataclass(frozen=True, eq=False)
class ShardIndex:
    """Sizes and concepts of a shard's records. Concept ids follow the first appearance in it."""

    height: UInt16[np.ndarray, " n"]  # of the stored images, in pixels
    width: UInt16[np.ndarray, " n"]
    counts: Int32[np.ndarray, " n"]  # concepts of each record
    positives: Int32[np.ndarray, " p"]  # these concepts, record after record
    names: tuple[str, ...]
    keys: UInt64[np.ndarray, " c"]
    tokens: UInt16[np.ndarray, "c 16"]
    mentions: Int64[np.ndarray, " c"]
    vocabulary: Bool[np.ndarray, " c"]  # False: a caption
    absent: IdLists | None = None  # as in `Source`
    partial: IdLists | None = None

    def save(self, path: Path, summary: Mapping[str, Any]) -> None:
        """Write the index atomically, together with `summary` (any JSON object)."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for field in LISTS:
            lists = arrays.pop(field)
            arrays |= (
                {} if lists is None else {f"{field}_{k}": v for k, v in lists._asdict().items()}
            )
        arrays |= {"names": _json_bytes(self.names), "summary": _json_bytes(summary)}
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> "ShardIndex":
        """Read an index that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            names = {field.name for field in dataclasses.fields(cls)} - set(LISTS)
            fields: dict[str, Any] = {name: arrays[name] for name in names}
            for field in LISTS:
                if f"{field}_ids" in arrays:
                    fields[field] = IdLists(arrays[f"{field}_offsets"], arrays[f"{field}_ids"])
        return cls(**fields | {"names": tuple(json.loads(fields["names"].tobytes()))})


def read_summary(path: Path) -> dict[str, Any]:
    """Return the summary that was saved with a `ShardIndex`, without reading the rest."""
    return json.loads(_read_array(path, "summary").tobytes())


class Indexer:
    """Collects the `ShardIndex` of records that are added one by one."""

    def __init__(self, kind: str, names: Iterable[str] = ()):
        """Start an index of records of one kind.

        `names` are concepts that come first, whether or not a record has them.
        """
        self._has_texts = kind in TEXT_KINDS
        self._captioned = kind == "image_text"
        self._concepts = ConceptCounter()
        for name in names:
            self._concepts.add(name, count=0)
        self._sizes: list[tuple[int, int]] = []
        self._counts: list[int] = []
        self._positives: list[int] = []
        #: field of `Source` → local ids of each record, of records that have lists
        self._lists: dict[str, dict[int, list[int]]] = {field: {} for field in LISTS}

    def __len__(self) -> int:
        return len(self._sizes)

    def add(
        self, record: "Record", absent: Sequence[str] | None = None, partial: Sequence[str] = ()
    ) -> None:
        """Add a record. A name counts once per box, a text once per record.

        `absent` and `partial` are as in `Example`. They are kept in the index and not in the
        record: training needs them to plan a step, before it reads a record.
        """
        boxes = np.bincount(record.labels, minlength=len(record.concepts))
        for place, concept in enumerate(record.concepts):
            is_caption = self._captioned and place == 0
            mentions = 1 if self._has_texts else int(boxes[place])
            local_id = self._concepts.add(concept, vocabulary=not is_caption, count=mentions)
            self._positives.append(local_id)
        if absent is not None:
            for field, names in (("absent", absent), ("partial", partial)):
                ids = [self._concepts.add(name, count=0) for name in names]
                self._lists[field][len(self)] = ids
        self._counts.append(len(record.concepts))
        self._sizes.append((record.height, record.width))

    def finish(self) -> ShardIndex:
        """Return the index of all records added so far."""
        table = self._concepts
        sizes = np.array(self._sizes, np.uint16).reshape(-1, 2)
        texts = [tokenizer_lib.enriched(name, None) for name in table.names]
        return ShardIndex(
            height=sizes[:, 0],
            width=sizes[:, 1],
            counts=np.array(self._counts, np.int32),
            positives=np.array(self._positives, np.int32),
            names=tuple(table.names),
            keys=tokenizer_lib.keys(texts),
            tokens=tokenizer_lib.pack_tokens(tokenizer_lib.tokenize(texts)),
            mentions=np.array(table.counts, np.int64),
            vocabulary=np.array(table.vocabulary, bool),
            **{field: _id_lists(lists, len(self)) for field, lists in self._lists.items() if lists},
        )


class ConceptCounter:
    """Collects and counts the concepts of one source during preparation.

    Local ids follow the first appearance. `vocabulary` is True for names and phrases, which may be
    drawn as negatives, and False for whole captions, which may not.
    """

    def __init__(self):
        self._ids: dict[str, int] = {}
        self.names: list[str] = []
        self.counts: list[int] = []
        self.vocabulary: list[bool] = []

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, *, vocabulary: bool = True, count: int = 1) -> int:
        """Count a name and return its local id. Spellings with the same normal form share an id."""
        name = normalize(name)
        local = self._ids.setdefault(name, len(self.names))
        if local == len(self.names):
            self.names.append(name)
            self.counts.append(0)
            self.vocabulary.append(False)
        self.counts[local] += count
        self.vocabulary[local] |= vocabulary
        return local


def _id_lists(lists: Mapping[int, Sequence[int]], records: int) -> IdLists:
    """Return the lists of all records; a record without one has an empty list."""
    every = [lists.get(record, ()) for record in range(records)]
    offsets = np.cumsum([0, *map(len, every)], dtype=np.int64)
    return IdLists(offsets, np.array(list(itertools.chain.from_iterable(every)), np.int32))


def write_index(
    directory: Path,
    shard_indices: Sequence[Path],
    meanings: Mapping[str, Meaning] = MappingProxyType({}),
) -> int:
    """Merge saved shard indices, in their order, into the index of a source.

    Local ids follow the first appearance. The texts are never all in memory at once: 13 million
    captions take about 32 bytes each for their tokens, and a few more for keys and counts.

    Args:
        directory: of the source.
        shard_indices: the saved `ShardIndex` files, in order.
        meanings: normalized name → definition and synset, for names that the source defines.

    Returns:
        The number of concepts.
    """
    keys = [_read_array(path, "keys") for path in shard_indices]
    starts = np.cumsum([0] + [len(some) for some in keys])
    local_ids, first = _number_concepts(np.concatenate(keys or [np.zeros(0, np.uint64)]))
    mentions, vocabulary = np.zeros(len(first), np.int64), np.zeros(len(first), bool)
    lists: dict[str, list[IdLists | None]] = {field: [] for field in LISTS}
    arrays = {field: [] for field in ("height", "width", "counts", "positives", "tokens", "keys")}
    for start, path in zip(starts, shard_indices):
        shard = ShardIndex.load(path)
        ids = local_ids[start : start + len(shard.keys)]
        mentions[ids] += shard.mentions  # `ids` has no duplicates
        vocabulary[ids] |= shard.vocabulary
        new = first[ids] == np.arange(start, start + len(ids))
        arrays["positives"].append(ids[shard.positives])
        arrays["tokens"].append(shard.tokens[new])
        arrays["keys"].append(shard.keys[new])
        for field in ("height", "width", "counts"):
            arrays[field].append(getattr(shard, field))
        for field in LISTS:
            one = getattr(shard, field)
            lists[field].append(None if one is None else IdLists(one.offsets, ids[one.ids]))
    merged = {field: np.concatenate(some) for field, some in arrays.items()}
    counts = merged.pop("counts")
    merged["positives_offsets"] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    merged["vocabulary"] = vocabulary
    (directory / "index").mkdir(parents=True, exist_ok=True)
    for field, path in ARRAYS.items():
        np.save(directory / path, merged[field], allow_pickle=False)
    if any(lists["absent"]):
        _write_lists(directory, lists, [len(some) for some in arrays["height"]])
    with open(directory / CONCEPTS, "w", encoding="utf-8") as lines:
        for start, path in zip(starts, shard_indices):
            names = json.loads(_read_array(path, "names").tobytes())
            for entry, name in enumerate(names, start):
                local = local_ids[entry]
                if first[local] == entry:
                    definition, synset = meanings.get(name, Meaning())
                    row = {"name": name, "definition": definition, "synset": synset}
                    row["count"] = int(mentions[local])
                    lines.write(json.dumps(row | {"vocabulary": bool(vocabulary[local])}) + "\n")
    return len(first)


def _write_lists(
    directory: Path, lists: Mapping[str, Sequence[IdLists | None]], records: Sequence[int]
) -> None:
    """Write the lists of a federated source, given those of each shard; `records` counts them."""
    for field, paths in LISTS.items():
        shards = [one or _id_lists({}, count) for one, count in zip(lists[field], records)]
        counts = np.concatenate([np.diff(one.offsets) for one in shards])
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        for path, array in zip(paths, (offsets, np.concatenate([one.ids for one in shards]))):
            np.save(directory / path, array, allow_pickle=False)


def _number_concepts(
    keys: UInt64[np.ndarray, " e"],
) -> tuple[Int32[np.ndarray, " e"], Int64[np.ndarray, " c"]]:
    """Return the local id of each entry, by first appearance, and the first entry of each id."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    local_ids = np.empty(len(first), np.int32)
    local_ids[order] = np.arange(len(first), dtype=np.int32)
    return local_ids[inverse], first[order]


def _json_bytes(content: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def _read_array(path: Path, field: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[field]


def assemble(
    directory: Path,
    record_files: Sequence[tuple[Path, int]],
    shard_indices: Sequence[Path],
    *,
    name: str,
    kind: str,
    info: Mapping[str, Any],
    meanings: Mapping[str, Meaning] = MappingProxyType({}),
) -> None:
    """Turn `directory` into a source.

    Args:
        directory: an empty directory.
        record_files: (path, number of records) of each file of records; the files are moved.
        shard_indices: the saved `ShardIndex` files, in order.
        name: of the source.
        kind: of the source.
        info: more fields of info.json.
        meanings: what the source says that its names mean (`write_index`).
    """
    write_index(directory, shard_indices, meanings)
    is_federated = (directory / LISTS["absent"][0]).exists()
    count = len(record_files)
    shards = {shard_name(name, i, count): records for i, (_, records) in enumerate(record_files)}
    for (path, _), shard in zip(record_files, shards):
        os.replace(path, directory / shard)
    if shards:  # TFDS cannot open a dataset without files
        write_tfds_metadata(directory, name, shards)
    more = {**info, "federated": True} if is_federated else info
    write_info(directory, name=name, kind=kind, shards=shards, more=more)


def write_info(
    directory: Path, *, name: str, kind: str, shards: Mapping[str, int], more: Mapping[str, Any]
) -> None:
    """Write info.json, with the digests of the index files; call it when they are written.

    Args:
        directory: of the source.
        name: of the source.
        kind: of the source.
        shards: file name -> number of records, in order.
        more: further fields.
    """
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
    write_json(directory / "info.json", with_digests(directory, info))


def with_digests(directory: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of info.json with digests of the index files and of itself."""
    lists = itertools.chain.from_iterable(LISTS.values()) if info.get("federated") else ()
    written = (*ARRAYS.values(), *lists, CONCEPTS)
    every = {path: digests.of_file(directory / path) for path in written}
    info = json.loads(json.dumps({**info, "digests": every}))  # as it will be read
    return info | {"digest": digests.of_json(info)}


def write_tfds_metadata(directory: Path, name: str, shards: Mapping[str, int]) -> None:
    """Write what `tfds.builder_from_directory` needs to open a source; its split is "train"."""
    import tensorflow_datasets as tfds  # does not import TensorFlow

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
        check_data=False,  # the check would import TensorFlow to read one record
        description=f"{name}, prepared for detclipv2_jax",
    )


def put_in_place(new: Path, old: Path) -> Source:
    """Move source `new` to the place of `old` and open it.

    A concurrent reader sees the old source, the new one or, for a moment, none.
    """
    replace_directory(new, old)
    return Source.open(old)
