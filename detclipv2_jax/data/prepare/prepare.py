"""Write the examples of archives as a source of records (layout on disk: data/index.py).

The examples are split into shards of one size. Processes write the shards one by one to
`TO.partial/shards`. At the end the shards are merged, and `TO` appears complete. A run that was
stopped, by Ctrl-C or SIGKILL, is resumed with the missing shards. The same input gives the same
bytes, whatever the number of processes and interruptions.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detclipv2_jax.common import pictures
from detclipv2_jax.common.atomic import write_json
from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import FORMAT, Source
from detclipv2_jax.data.prepare import index_writer, own_folders
from detclipv2_jax.data.prepare import inputs as inputs_lib
from detclipv2_jax.data.prepare.examples import Archive, Drops, Example
from detclipv2_jax.data.prepare.moved import same_inputs
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.data.prepare.repeats import Distinct
from detclipv2_jax.data.prepare.shards import ShardBuilder
from detclipv2_jax.data.prepare.workers import run
from detclipv2_jax.text import phrases as phrases_lib
from detclipv2_jax.text.checked import Meaning

# Largest number of examples per shard: about ten seconds of work and 100 to 200 MB.
SHARD_EXAMPLES = {"detection": 1024, "grounding": 1024, "image_text": 4096, "classification": 2048}
_MIN_SHARDS = 64  # a small source has smaller shards, so that all cores have work,
_MIN_SHARD_EXAMPLES = 64  # but none smaller than this


def prepare(
    archives: Sequence[Archive],
    to: Path,
    *,
    name: str,
    inputs: Mapping[str, Any] | None = None,
    origin: Path = Path(),  # noqa: B008 - immutable
    options: PrepareOptions = PrepareOptions(),  # noqa: B008 - frozen
) -> Source:
    """Write the examples of archives of one kind as a source, and open it.

    `to` appears when everything is written. What an interrupted call has written is used by the
    next call with the same `inputs`; without `inputs` it is removed.

    Args:
        archives: of one kind.
        to: directory of the source.
        name: of the source, in counts and logs.
        inputs: what the source is made from (`registry.fingerprint`), as info.json stores it.
        origin: folder of the archives, to which stored paths are relative.
        options: how examples become records.

    Raises:
        UserError: nothing usable is left, or another process is preparing the same source.
    """
    (kind,) = {archive.kind for archive in archives}
    own_folders.refuse_foreign(to)
    if kind == "image_text":
        phrases_lib.load(options.phrase_model)  # a missing model is reported at once
    size = sum(archive.total for archive in archives) // _MIN_SHARDS
    size = min(max(size, _MIN_SHARD_EXAMPLES), SHARD_EXAMPLES[kind])
    stamp = {"format": FORMAT, "kind": kind, "examples": size, "inputs": inputs}
    stamp["pictures"] = pictures.RULES
    with _workspace(to, stamp) as partial:
        builder = ShardBuilder(partial / "shards", kind, options)
        distinct = Distinct(archives)
        total = sum(archive.total for archive in archives)
        count = _build_shards(builder, distinct, size, total, options.jobs, name)
        totals = _sum_up(builder, archives, count)
        distinct.note_differences(totals.drops)
        _note_twins(_pictures(builder, count), totals.drops)
        try:
            _refuse_unusable(archives, kind, totals)
        except UserError:
            shutil.rmtree(partial)
            raise
        info = _describe(archives, totals, origin) | {"created_from": inputs or {}}
        missing = itertools.chain.from_iterable(archive.drops.missing for archive in archives)
        inputs_lib.write(partial, origin, _pictures(builder, count), missing)
        _merge(builder, archives, distinct.names(), count, name, info)
        os.replace(partial / inputs_lib.FILE, partial / "merged" / inputs_lib.FILE)
        source = index_writer.put_in_place(partial / "merged", to)
        shutil.rmtree(partial)
    return source


def split_into_shards(
    archives: Sequence[Archive], size: int
) -> Iterator[tuple[int, list[Example]]]:
    """Yield (number, examples) of shards of `size` examples; the last one is smaller."""
    return _split(Distinct(archives), size)


def _split(examples: Iterable[Example], size: int) -> Iterator[tuple[int, list[Example]]]:
    examples = iter(examples)
    shards = iter(lambda: list(itertools.islice(examples, size)), [])
    return enumerate(shards)


def joined_meanings(archives: Sequence[Archive]) -> dict[str, Meaning]:
    """Return what the archives say that their names mean; of two meanings of a name the first."""
    found: dict[str, Meaning] = {}
    for archive in archives:
        found = {**archive.meanings, **found}
    return found


def remove_leftovers(to: Path, inputs: Mapping[str, Any]) -> None:
    """Remove `TO.partial` of a run that was killed just after it finished the source `to`."""
    partial = own_folders.partial_of(to)
    if same_inputs(own_folders.read_stamp(partial).get("inputs"), inputs):
        # The lock fails if another process is preparing the source.
        with contextlib.suppress(UserError), _locked(partial):
            shutil.rmtree(partial)


@contextlib.contextmanager
def _workspace(to: Path, stamp: Mapping[str, Any]) -> Iterator[Path]:
    """Lock `TO.partial` and yield it, with the finished shards of an earlier run of this stamp."""
    partial = own_folders.make_partial(to)
    with _locked(partial):
        if stamp["inputs"] is None or not _same_stamp(own_folders.read_stamp(partial), stamp):
            _clear(partial)
            own_folders.stamp(partial, dict(stamp))
        (partial / "shards").mkdir(exist_ok=True)
        _undo_merge(partial)
        for path in (partial / "shards").iterdir():
            if not re.fullmatch(r"\d{6}\.(array_record|npz)", path.name):
                path.unlink()  # a temporary file that was not finished
        try:
            yield partial
        except BaseException:
            if stamp["inputs"] is None:  # a later run could not recognize it
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Lock a directory against other processes; `UserError` if one of them has the lock."""
    with open(partial / own_folders.LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{partial}: another process is preparing this source. Wait for it, or name "
                "another directory with --to."
            ) from error
        yield


def _same_stamp(stored: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    plain = [json.loads(json.dumps({**one, "inputs": None})) for one in (stored, given)]
    return plain[0] == plain[1] and same_inputs(stored.get("inputs"), given["inputs"])


def _clear(partial: Path) -> None:
    """Remove everything but the lock and the stamp, which tells whose folder it is."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (own_folders.LOCK, own_folders.STAMP):
            path.unlink()


def _build_shards(
    builder: ShardBuilder, examples: Iterable[Example], size: int, total: int, jobs: int, name: str
) -> int:
    """Build the shards that are missing, show a progress bar, and return the number of shards."""
    known = [int(path.stem) for path in builder.directory.glob("[0-9]*.npz")]
    done = sum(summary.examples for summary in map(builder.summary, known) if summary)
    if done:
        tqdm.write(f"{name}: resuming, {done:,} images were prepared by an earlier run")
    count = 0

    def missing():
        nonlocal count
        for number, some in _split(examples, size):
            count = number + 1
            if not builder.finished(number, some):
                yield number, some

    with tqdm(desc=name, total=total, initial=done, unit=" images", disable=None) as bar:
        run(builder.build, missing(), jobs, bar.update)
    return count


@dataclasses.dataclass
class _Totals:
    """Sums over all shards of a source."""

    records: int
    boxes: int
    images: dict[str, int]  # see ShardSummary
    archives: list[list[int]]  # records and boxes of each
    drops: Drops


def _sum_up(builder: ShardBuilder, archives: Sequence[Archive], count: int) -> _Totals:
    totals = _Totals(0, 0, {"bytes": 0, "reencoded": 0, "shrunk": 0}, [], Drops())
    totals.archives = [[0, 0] for _ in archives]
    for number in range(count):
        summary = builder.summary(number)
        totals.records += summary.records
        totals.boxes += summary.boxes
        totals.drops.add(Drops.from_json(summary.drops))
        for archive, (records, boxes) in summary.archives.items():
            totals.archives[int(archive)][0] += records
            totals.archives[int(archive)][1] += boxes
        for field in totals.images:
            totals.images[field] += summary.images[field]
    for archive in archives:
        totals.drops.add(archive.drops)
    return totals


def _describe(archives: Sequence[Archive], totals: _Totals, origin: Path) -> dict[str, Any]:
    """Return what info.json says of the contents: counts, in all and per annotation file."""
    files = [
        {"file": os.path.relpath(archive.path, origin), "images": records, "boxes": boxes}
        for archive, (records, boxes) in zip(archives, totals.archives)
    ]
    counts = {"annotation_files": files, "boxes": totals.boxes, "images": totals.images}
    return counts | totals.drops.to_json()


def _pictures(builder: ShardBuilder, count: int) -> Iterator[inputs_lib.Picture]:
    for number in range(count):
        for fields in builder.summary(number).pictures:
            yield inputs_lib.Picture(*fields)


def _note_twins(pictures: Iterable[inputs_lib.Picture], drops: Drops) -> None:
    """Count the pictures that have the same bytes as one of another name; both are kept."""
    first: dict[str, str] = {}
    for picture in pictures:
        if picture.used:
            other = first.setdefault(picture.digest, picture.path)
            if other != picture.path:
                why = f"{picture.path} is {other} under another name; each keeps its boxes"
                drops.note("images: the same bytes as another", why)


def _refuse_unusable(archives: Sequence[Archive], kind: str, totals: _Totals) -> None:
    """Raise `UserError` if there are no records, or if all boxes were dropped."""
    files = ", ".join(str(archive.path) for archive in archives)
    drops = totals.drops
    if not totals.records:
        example = f", for example {drops.first()}" if drops.first() else ""
        remedy = "Check the file"
        if drops.dropped["images: missing"]:
            remedy += ", and give the folder of its images with --images=DIR"
        raise UserError(
            f"{files}: contains nothing usable: {drops.dropped.total()} entries were dropped"
            f"{example}. {remedy}."
        )
    lost = [reason for reason in drops.dropped if reason.startswith("boxes")]
    if kind == "detection" and lost and not totals.boxes:
        raise UserError(
            f"{files}: none of its boxes is usable, for example {drops.explained[lost[0]][0]}. "
            "Fix the file."
        )


def _merge(
    builder: ShardBuilder,
    archives: Sequence[Archive],
    categories: Iterable[str],
    count: int,
    name: str,
    info: dict[str, Any],
) -> None:
    """Merge the shards into the directory `merged`, in a way that `_undo_merge` can revert."""
    names = builder.directory / "names.npz"
    index_writer.Indexer(builder.kind, categories).finish().save(names, {})
    counts = {number: builder.summary(number).records for number in range(count)}
    files = [
        (builder.record_file(number), records) for number, records in counts.items() if records
    ]
    merged = builder.directory.with_name("merged")
    merged.mkdir()
    write_json(merged.with_name("moves.json"), [path.name for path, _ in files])
    index_writer.assemble(
        merged,
        files,
        [names, *(builder.index_file(number) for number in range(count))],
        name=name,
        kind=builder.kind,
        info=info,
        meanings=joined_meanings(archives),
    )


def _undo_merge(partial: Path) -> None:
    """Move back the files of records that an interrupted `_merge` has moved already."""
    merged = partial / "merged"
    for path in merged.glob("*.array_record-*-of-*"):
        number = int(path.name.split("-")[-3])
        moves = json.loads((partial / "moves.json").read_text())
        os.replace(path, partial / "shards" / moves[number])
    shutil.rmtree(merged, ignore_errors=True)
