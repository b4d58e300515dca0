"""Annotation files and a folder of images become a source of records (its layout: index.py).

The examples of the archives are cut into parts of one size, which processes write one by one
to `TO.partial/parts`; at the end the parts are merged and `TO` appears whole. A run that was
stopped, by Ctrl-C or for good, goes on with the parts that are missing. Same input, same bytes,
whatever the number of processes and of interruptions.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import FORMAT, Source
from detclipv2_jax.data.prepare import index_writer
from detclipv2_jax.data.prepare.examples import Archive, Drops, RawExample
from detclipv2_jax.data.prepare.image_encoding import Options
from detclipv2_jax.data.prepare.shards import PartWriter
from detclipv2_jax.data.prepare.workers import run
from detclipv2_jax.text import phrases as phrases_lib

# Examples a part at most, and so records a file: some ten seconds of work, 100 to 200 MB.
PART_EXAMPLES = {"detection": 1024, "grounding": 1024, "image_text": 4096}
_PARTS = 64  # of a smaller source, so that all cores have something to do
_LEAST = 64  # examples a part, however small the source


def prepare(
    archives: Sequence[Archive],
    to: Path,
    *,
    name: str,
    inputs: Mapping[str, Any] | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
) -> Source:
    """Write the examples of archives of one kind as a source; `inputs` goes to info.json as it is.

    `to` appears when all is written. What an interrupted call wrote is used by the next one of the
    same `inputs`, and removed where there are none. `UserError` where nothing usable is left, or
    where another process prepares the same.
    """
    (kind,) = {archive.kind for archive in archives}
    index_writer.refuse_foreign(to)
    if kind == "image_text":
        phrases_lib.load(options.phrase_model)  # a missing model is said at once
    size = sum(archive.total for archive in archives) // _PARTS
    size = min(max(size, _LEAST), PART_EXAMPLES[kind])
    stamp = {"format": FORMAT, "kind": kind, "examples": size, "inputs": inputs}
    with _workplace(to, stamp) as partial:
        writer = PartWriter(partial / "parts", kind, options)
        count = _write_parts(writer, archives, size, options.jobs, name)
        said = _said(writer, archives, count)
        try:
            _refuse_nothing(archives, kind, said)
        except UserError:
            shutil.rmtree(partial)
            raise
        names = partial / "parts" / "names.npz"
        categories = itertools.chain.from_iterable(archive.names for archive in archives)
        index_writer.Indexer(kind, categories).finish().save(names, {})
        info = {
            "images": said.images,
            "dropped": dict(said.drops.dropped),
            "mended": dict(said.drops.mended),
            "explained": said.drops.explained,
            "created_from": dict(inputs or {}),
        }
        _merge(writer, count, names, name, info)
        source = index_writer.put_in_place(partial / "merged", to)
        shutil.rmtree(partial)
    return source


def left_behind(to: Path, inputs: Mapping[str, Any]) -> None:
    """Remove what a run that was stopped at the very end left beside its finished source."""
    partial = _partial(to)
    if _stamp_in(partial).get("inputs") == json.loads(json.dumps(inputs)):
        with contextlib.suppress(UserError), _locked(partial):  # unless somebody is at it again
            shutil.rmtree(partial)


def report(source: Source) -> str:
    """A table for people: what was written, what was left out or mended and why."""
    info, concepts = source.info, len(source.keys)
    left_out = sum(n for reason, n in info["dropped"].items() if not reason.startswith("boxes"))
    rows = [("read", len(source) + left_out), ("records", len(source)), ("concepts", concepts)]
    rows += [("of which captions", concepts - int(np.count_nonzero(source.vocabulary)))]
    images = info.get("images", {})  # TFDS does not count them
    rows += [("images stored anew as JPEG", images.get("reencoded", 0))]
    rows += [("images stored smaller", images.get("shrunk", 0))]
    lines = [f"{source.name} ({source.kind}) in {source.directory}"]
    lines += [f"  {label:<36}{count:>10,}" for label, count in rows if count or label == "records"]
    for title, field in (("dropped", "dropped"), ("mended", "mended")):
        for reason, count in sorted(info[field].items()):
            lines.append(f"  {title + ' ' + reason:<36}{count:>10,}")
            lines += [f"      {sentence}" for sentence in info["explained"].get(reason, ())[:1]]
    return "\n".join(lines)


@contextlib.contextmanager
def _workplace(to: Path, stamp: Mapping[str, Any]) -> Iterator[Path]:
    """`TO.partial`, this process's alone, with what an earlier run of the same stamp finished."""
    partial = _partial(to)
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        if stamp["inputs"] is None or _stamp_in(partial) != json.loads(json.dumps(stamp)):
            _clear(partial)
            (partial / "stamp.json.tmp").write_text(json.dumps(stamp), encoding="utf-8")
            os.replace(partial / "stamp.json.tmp", partial / "stamp.json")
        (partial / "parts").mkdir(exist_ok=True)
        _undo_merge(partial)
        for half_written in (partial / "parts").glob("*.tmp"):
            half_written.unlink(missing_ok=True)
        try:
            yield partial
        except BaseException:
            if stamp["inputs"] is None:  # nothing to recognize it by
                shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """`UserError` while another process has the directory."""
    with open(partial / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{partial}: another process prepares this; wait for it, or name another directory "
                "with --to"
            ) from error
        yield


def _partial(to: Path) -> Path:
    return to.with_name(to.name + ".partial")


def _stamp_in(partial: Path) -> dict[str, Any]:
    """What the parts in `TO.partial` were made from; empty if that is not told."""
    try:
        stamp = json.loads((partial / "stamp.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def cut(archives: Sequence[Archive], size: int) -> Iterator[tuple[int, list[RawExample]]]:
    """Numbered parts of `size` examples, the last one smaller."""
    examples = itertools.chain.from_iterable(archive.examples for archive in archives)
    parts = iter(lambda: list(itertools.islice(examples, size)), [])
    return enumerate(parts)


def _write_parts(
    writer: PartWriter, archives: Sequence[Archive], size: int, jobs: int, name: str
) -> int:
    """Write the parts that are missing, with a bar for people; how many parts there are."""
    known = [int(path.stem) for path in writer.directory.glob("[0-9]*.npz")]
    done = sum(about["examples"] for about in map(writer.about, known) if about)
    if done:
        tqdm.write(f"{name}: going on after {done:,} images that an earlier run has done")
    total, count = sum(archive.total for archive in archives), 0

    def missing():
        nonlocal count
        for number, examples in cut(archives, size):
            count = number + 1
            if not writer.finished(number, examples):
                yield number, examples

    with tqdm(desc=name, total=total, initial=done, unit=" images", disable=None) as bar:
        run(writer.write, missing(), jobs, bar.update)
    return count


@dataclasses.dataclass
class _Said:
    """What the parts and the archives say of themselves, together."""

    records: int
    boxes: int
    images: dict[str, int]
    drops: Drops


def _said(writer: PartWriter, archives: Sequence[Archive], count: int) -> _Said:
    said = _Said(0, 0, {"bytes": 0, "reencoded": 0, "shrunk": 0}, Drops())
    for number in range(count):
        about = writer.about(number)
        said.records += about["records"]
        said.boxes += about["boxes"]
        said.drops.add(Drops.from_json(about["drops"]))
        for field in said.images:
            said.images[field] += about["images"][field]
    for archive in archives:
        said.drops.add(archive.drops)
    return said


def _merge(writer: PartWriter, count: int, names: Path, name: str, info: Mapping[str, Any]) -> None:
    """Make the directory `merged` of the parts, in a way that `_undo_merge` can take back."""
    counts = {number: writer.about(number)["records"] for number in range(count)}
    files = [(writer.shard(number), records) for number, records in counts.items() if records]
    merged = writer.directory.with_name("merged")
    merged.mkdir()
    moves = [path.name for path, _ in files]
    (merged.parent / "moves.json.tmp").write_text(json.dumps(moves))
    os.replace(merged.parent / "moves.json.tmp", merged.parent / "moves.json")
    index_writer.assemble(
        merged,
        files,
        [names, *(writer.index(number) for number in range(count))],
        name=name,
        kind=writer.kind,
        info=info,
    )


def _undo_merge(partial: Path) -> None:
    """Put the files of records back that a merger which was stopped has moved already."""
    merged = partial / "merged"
    for path in merged.glob("*.array_record-*-of-*"):
        number = int(path.name.split("-")[-3])
        moves = json.loads((partial / "moves.json").read_text())
        os.replace(path, partial / "parts" / moves[number])
    shutil.rmtree(merged, ignore_errors=True)


def _refuse_nothing(archives: Sequence[Archive], kind: str, said: "_Said") -> None:
    """A source without records, or boxes that all had to go, is a mistake in the call: say so."""
    files = ", ".join(str(archive.path) for archive in archives)
    drops = said.drops
    if not said.records:
        example = f", for example {drops.first()}" if drops.first() else ""
        raise UserError(
            f"{files}: nothing usable in it, {drops.dropped.total()} entries dropped{example}; "
            "check the file, and --images=DIR for where its images are"
        )
    lost = [reason for reason in drops.dropped if reason.startswith("boxes")]
    if kind == "detection" and lost and not said.boxes:
        raise UserError(
            f"{files}: not one of its boxes is usable, for example {drops.explained[lost[0]][0]}; "
            "mend the file"
        )
