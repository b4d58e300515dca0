"""One prepared source on disk, and its index: arrays that say what each record holds.

    info.json                         kind, number of records, shards, what was dropped and why,
                                      digests of the other files here (not of the shards, whose
                                      records have checksums of their own)
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

Arrays are read into memory and compared with their digests, so that the values in use are those
that were written, whatever happens to the files later. Planning a run needs neither TensorFlow nor
strings.
"""

import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64, UInt16, UInt64

from detclipv2_jax.common import digests
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
CONCEPTS = "concepts.jsonl"


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
        fields = {field: [path] for field, path in ARRAYS.items()}
        if info.get("federated"):
            fields |= {field: list(paths) for field, paths in LISTS.items()}
        arrays = _read_arrays(directory, info, itertools.chain.from_iterable(fields.values()))
        read = {field: [arrays[path] for path in paths] for field, paths in fields.items()}
        values = {field: IdLists(*v) if field in LISTS else v[0] for field, v in read.items()}
        source = cls(directory, info["name"], info["kind"], info, **values)  # pyright: ignore
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
        """Yield the wanted rows of concepts.jsonl, which may be too large for memory.

        Raises:
            UserError: the file is not as it was written.
        """
        if wanted.any():
            with self._open_concepts() as lines:
                yield from map(json.loads, itertools.compress(lines, wanted))

    @functools.cached_property
    def concepts(self) -> list[dict[str, Any]]:
        """Rows of `concepts.jsonl` by local id, read on first use."""
        with self._open_concepts() as lines:
            return [json.loads(line) for line in lines]

    def _open_concepts(self) -> TextIO:
        self._verify_concepts  # noqa: B018 - once; large files are digested only if they are read
        return open(self.directory / CONCEPTS, encoding="utf-8")

    @functools.cached_property
    def _verify_concepts(self) -> None:
        path = self.directory / CONCEPTS
        try:
            digest = digests.of_file(path) if "digests" in self.info else None
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read ({error.strerror}). {_remedy_again(self.directory)}"
            ) from error
        _compare(self.directory, self.info, CONCEPTS, digest)


def _remedy(directory: Path, more: str = "") -> str:
    return f"Prepare it with `detclip prepare SOURCE --from=DIR --to={directory}{more}`."


def _remedy_again(directory: Path) -> str:
    return _remedy(directory, " --overwrite")


def is_source(directory: Path) -> bool:
    """Return whether a directory holds a prepared source, also a damaged one or an old one."""
    try:
        info = json.loads((directory / "info.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except (ValueError, RecursionError):  # damaged
        return any((directory / path).is_file() for path in ARRAYS.values())
    return isinstance(info, dict) and type(info.get("format")) is int and "kind" in info


def _read_info(directory: Path) -> dict[str, Any]:
    path = directory / "info.json"
    if not path.is_file():
        raise UserError(f"{directory}: no prepared source here. {_remedy(directory)}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not a valid description of a source. {_remedy_again(directory)}"
        ) from error
    if (problem := _info_problem(info)) is not None:
        raise UserError(f"{path}: {problem}. {_remedy_again(directory)}")
    return info


def _info_problem(info: Any) -> str | None:
    """Return what is wrong with the content of info.json, or None."""
    if not isinstance(info, dict) or "format" not in info:
        return "not a valid description of a source"
    if info["format"] != FORMAT:
        return f"has format {info['format']!r}, but this version reads {FORMAT}"
    if missing := _INFO_FIELDS.keys() - info.keys():
        return f"fields are missing: {', '.join(sorted(missing))}"
    for field, (holds, what) in _INFO_FIELDS.items():
        if not holds(info[field]):
            return f'"{field}" is {shorten(repr(info[field]), 60)}, not {what}'
    if "digests" in info or "digest" in info:  # sources of older versions have neither
        rest = {field: value for field, value in info.items() if field != "digest"}
        if info.get("digest") != digests.of_json(rest) or not _is_digests(info.get("digests")):
            return "damaged: it does not have the digest that was written"
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_file_names(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and name == Path(name).name and name for name in value
    )


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() >= {*ARRAYS.values(), CONCEPTS}


_INFO_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "name": (lambda value: isinstance(value, str) and value != "", "a text"),
    "records": (_is_count, "a number of records"),
    "files": (_is_file_names, "a list of files in this directory"),
    "shards": (_is_counts, "a list of numbers of records"),
    "shard_bytes": (_is_counts, "a list of numbers of bytes"),
}


def _read_arrays(
    directory: Path, info: Mapping[str, Any], paths: Iterable[str]
) -> dict[str, np.ndarray]:
    """Return the arrays of some files, verified, by path; several files are read at once."""

    def read(relative: str) -> np.ndarray:
        path = directory / relative
        try:
            content = path.read_bytes()
            array = _parse_npy(content)
        except Exception as error:  # a damaged header can raise anything, such as a TokenError
            raise UserError(f"{path}: missing or damaged. {_remedy_again(directory)}") from error
        _compare(
            directory, info, relative, digests.of_bytes(content) if "digests" in info else None
        )
        return array

    paths = list(paths)
    with futures.ThreadPoolExecutor(len(paths)) as pool:
        return dict(zip(paths, pool.map(read, paths)))


def _parse_npy(content: bytes) -> np.ndarray:
    """Return the array of a .npy file, a read-only view of `content`; `ValueError` if it is none.

    `np.load` maps a file, which kills the process if somebody makes it shorter, or copies it.
    """
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of the .npy format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype.hasobject:
        raise ValueError("not a plain array")
    return np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)


def _compare(directory: Path, info: Mapping[str, Any], relative: str, digest: str | None) -> None:
    """Raise `UserError` if the digest of a file is not the one that was written."""
    if digest is not None and digest != info["digests"].get(relative):
        raise UserError(
            f"{directory / relative}: damaged or replaced: its content is not what was prepared "
            f"(info.json has another digest). {_remedy_again(directory)}"
        )


def _check(source: Source) -> None:
    """Raise `UserError` if arrays and shards do not belong together."""
    records, concepts = source.info["records"], len(source.keys)
    claims = {
        ARRAYS["height"]: source.height.shape == (records,) and bool(np.all(source.height > 0)),
        ARRAYS["width"]: source.width.shape == (records,) and bool(np.all(source.width > 0)),
        **_check_lists(source),
        ARRAYS["tokens"]: _are_tokens(source.tokens, concepts),
        ARRAYS["vocabulary"]: source.vocabulary.shape == (concepts,),
        ARRAYS["keys"]: source.keys.ndim == 1,
        "info.json": sum(source.info["shards"]) == records
        and len(source.info["files"])
        == len(source.info["shards"])
        == len(source.info["shard_bytes"]),
    }
    for field, dtype in _DTYPES.items():
        claims[ARRAYS[field]] &= getattr(source, field).dtype == dtype
    for path, size in zip(source.shard_paths, source.info["shard_bytes"]):
        file = Path(path)
        claims[file.name] = file.is_file() and file.stat().st_size == size
    for name, holds in claims.items():
        if not holds:
            raise UserError(
                f"{source.directory / name}: missing or damaged (it does not fit the rest of the "
                f"source). {_remedy_again(source.directory)}"
            )


_DTYPES = {"height": np.uint16, "width": np.uint16, "tokens": np.uint16, "keys": np.uint64}
_DTYPES |= {"positives_offsets": np.int64, "positives": np.int32, "vocabulary": np.bool_}


def _are_tokens(tokens: np.ndarray, concepts: int) -> bool:
    """Return whether each row is a tokenized text: its start first, one end, ids of CLIP's."""
    # Imported here: a machine that only trains on plans may lack what the tokenizer needs.
    from detclipv2_jax.text.tokenizer import CONTEXT, END, START

    if tokens.shape != (concepts, CONTEXT) or not concepts:
        return tokens.shape == (concepts, CONTEXT)
    ends = tokens.max(axis=1) == END  # the largest id: every row has one, and nothing exceeds it
    return bool(np.all(ends) and np.all(tokens[:, 0] == START))


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
                offsets.dtype.kind == "i"
                and offsets.shape == (records + 1,)
                and offsets[0] == 0
                and offsets[-1] == len(ids)
                and bool(np.all(np.diff(offsets) >= 0))
            )
            claims[ids_path] = (
                ids.dtype.kind == "i"
                and ids.ndim == 1
                and (ids.size == 0 or bool(ids.min() >= 0 and ids.max() < concepts))
            )
    return claims
