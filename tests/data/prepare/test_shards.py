"""Preparation shard by shard: the same bytes whatever the processes, kills and interruptions."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from miniature_archives import coco, jpeg, write_images, write_json

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import records
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.prepare import index_writer, prepare, registry, shards
from detclipv2_jax.data.prepare.examples import ImageFolder
from detclipv2_jax.data.prepare.options import PrepareOptions
from detclipv2_jax.text import tokenizer

# The command with small shards. It prints a line if it or a worker imports TensorFlow. DEADLY and
# WAITING name a function of index_writer.py at which it kills itself or waits.
COMMAND = """
import os, sys, time
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow.python":
            print("imports TensorFlow", file=sys.stderr)
sys.meta_path.insert(0, Watch())
from detclipv2_jax.prepare import main
if __name__ == "__main__":
    from detclipv2_jax.data.prepare import index_writer, prepare
    prepare.SHARD_EXAMPLES["detection"] = 4
    if deadly := os.environ.get("DEADLY"):
        setattr(index_writer, deadly, lambda *args, **options: os.kill(os.getpid(), 9))
    if waiting := os.environ.get("WAITING"):
        setattr(index_writer, waiting, lambda *args, **options: time.sleep(100))
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """62 images, so that the last shard is smaller; two are damaged, one is missing."""
    folder = tmp_path_factory.mktemp("archive")
    names = write_images(folder, 62, 300, 400)
    (folder / "images" / "5.jpg").write_bytes(b"nothing")
    (folder / "images" / "30.jpg").write_bytes(jpeg(300, 400)[:900])
    (folder / "images" / "17.jpg").unlink()
    document = coco(names)
    for entry in document["images"]:
        entry |= {"height": 300, "width": 400}
    write_json(folder / "annotations" / "train.json", document)
    (folder / "command.py").write_text(COMMAND)
    return folder


def start(archive, to, jobs, **environment):
    command = [sys.executable, archive / "command.py", "coco", f"--from={archive}", f"--to={to}"]
    return subprocess.Popen(
        [*map(str, command), "--name=mini", f"--jobs={jobs}"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    assert "imports TensorFlow" not in err  # it takes ten seconds per process and is not needed
    return out


def content(directory) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory):
    to = tmp_path_factory.mktemp("undisturbed") / "out"
    finish(start(archive, to, 1))
    return to


def test_what_is_prepared(undisturbed):
    source = Source.open(undisturbed)
    assert len(source) == 59 and source.info["shards"] == [4, 3, *[4] * 5, 3, *[4] * 7, 1]
    assert source.info["dropped"] == {
        "images: unreadable": 2,
        "images: missing": 1,
        "boxes: crowd": 1,
    }
    assert [path.name for path in undisturbed.parent.iterdir()] == ["out"]


def test_three_processes_write_the_same(archive, undisturbed, tmp_path):
    finish(start(archive, tmp_path / "out", 3))
    assert content(tmp_path / "out") == content(undisturbed)


def finished_shards(to) -> int:
    return len(list((to.parent / "out.partial" / "shards").glob("*.npz")))


def test_killed_again_and_again(archive, undisturbed, tmp_path):
    to, moments = tmp_path / "out", random.Random()
    kills = 0
    for wanted in (1, 5, 9):
        process = start(archive, to, 2)
        while process.poll() is None and finished_shards(to) < wanted:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    for function in ("write_index", "write_info", "put_in_place"):
        process = start(archive, to, 2, DEADLY=function)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not to.exists()
    assert kills
    assert "resuming, 61 images were prepared by an earlier run" in finish(start(archive, to, 3))
    assert content(to) == content(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_damaged_shards_are_prepared_again(archive, undisturbed, tmp_path):
    to = tmp_path / "out"
    start(archive, to, 2, DEADLY="write_index").communicate()
    indices = sorted((tmp_path / "out.partial" / "shards").glob("[0-9]*.npz"))
    for place, path in enumerate(indices[:6]):
        content_ = bytearray(path.read_bytes())
        content_[len(content_) * (place + 1) // 8] ^= 1
        path.write_bytes(content_)
    indices[6].write_bytes(b"PK")
    finish(start(archive, to, 2))
    assert content(to) == content(undisturbed)


def test_killed_when_all_was_done(archive, undisturbed, tmp_path):
    to = tmp_path / "out"
    finish(start(archive, to, 1))
    inputs = Source.open(to).info["created_from"]
    write_json(tmp_path / "out.partial" / "stamp.json", {"inputs": inputs})
    assert "already prepared" in finish(start(archive, to, 1))
    assert content(to) == content(undisturbed)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted(archive, undisturbed, tmp_path):
    process = start(archive, tmp_path / "out", 2, WAITING="write_index")  # or it might be finished
    while process.poll() is None and finished_shards(tmp_path / "out") < 1:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert (
        error.strip().splitlines()[-1] == "stopped by Ctrl-C. Run the same command again to resume."
    )
    assert "Traceback" not in error
    finish(start(archive, tmp_path / "out", 2))
    assert content(tmp_path / "out") == content(undisturbed)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setitem(prepare.SHARD_EXAMPLES, "detection", 4)


def run(archive, to, *, document="train.json", options=None):
    path = archive / "annotations" / document
    images = ImageFolder(archive / "images")
    opened = registry.open_archives([path], images, "detection")
    return prepare.prepare(
        opened,
        to,
        name="mini",
        inputs=registry.fingerprint([path], images, None),
        options=options or PrepareOptions(jobs=1),
    )


def stop_after(monkeypatch, count):
    """Interrupt the run at the image after `count`; return the list that the opened files fill."""
    opened, real = [], shards.encode_image

    def encode_image(file, *args):
        if len(opened) == count:
            raise KeyboardInterrupt
        opened.append(file)
        return real(file, *args)

    monkeypatch.setattr(shards, "encode_image", encode_image)
    return opened


def test_finished_shards_are_not_opened_again(archive, undisturbed, tmp_path, small_shards):
    with pytest.MonkeyPatch.context() as patch:
        first = stop_after(patch, 22)
        with pytest.raises(KeyboardInterrupt):
            run(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(first) == 22
    with pytest.MonkeyPatch.context() as patch:
        rest = stop_after(patch, None)
        run(archive, tmp_path / "out")
    assert len(rest) == 61 - 20
    records_of = [file for file in content(undisturbed) if "array_record" in file]
    written = content(tmp_path / "out")
    assert all(written[file] == content(undisturbed)[file] for file in records_of)


def test_a_lost_file_of_a_finished_shard_is_written_again(
    archive, undisturbed, tmp_path, small_shards
):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 22)
        with pytest.raises(KeyboardInterrupt):
            run(archive, tmp_path / "out")
    lost = tmp_path / "out.partial" / "shards"
    (lost / "000000.array_record").unlink()
    (lost / "000001.array_record").write_bytes(b"short")
    (lost / "000002.npz").write_bytes(b"short")
    (lost / ".000009.array_record.77.partial").write_bytes(b"half written")
    assert len(run(archive, tmp_path / "out")) == 59
    assert set(content(tmp_path / "out")) == set(content(undisturbed))


def test_images_that_appear_between_two_runs(archive, tmp_path, small_shards):
    """The annotations are the same, but the shards have other examples than before."""
    hidden = archive / "images" / "9.jpg"
    content_then = hidden.read_bytes()
    hidden.unlink()
    try:
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 22)
            with pytest.raises(KeyboardInterrupt):
                run(archive, tmp_path / "out")
    finally:
        hidden.write_bytes(content_then)
    with pytest.MonkeyPatch.context() as patch:
        opened = stop_after(patch, None)
        run(archive, tmp_path / "out")
    assert len(opened) == 61 - 8  # two shards come before the new image
    run(archive, tmp_path / "afresh")
    assert content(tmp_path / "out") == content(tmp_path / "afresh")


def test_other_inputs_start_over(archive, tmp_path, small_shards):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 22)
        with pytest.raises(KeyboardInterrupt):
            run(archive, tmp_path / "a")
    document = json.loads((archive / "annotations" / "train.json").read_text())
    document["images"] = document["images"][::-1]
    write_json(archive / "annotations" / "reversed.json", document)
    os.rename(tmp_path / "a.partial", tmp_path / "b.partial")
    run(archive, tmp_path / "b", document="reversed.json")
    run(archive, tmp_path / "c", document="reversed.json")
    assert content(tmp_path / "b") == content(tmp_path / "c")


def test_two_processes_at_once_are_refused(archive, tmp_path, small_shards):
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is preparing this"):
            run(archive, tmp_path / "out")
    assert len(run(archive, tmp_path / "out")) == 59


def test_memory_is_bounded_by_shards(archive, tmp_path, small_shards):
    """Examples are taken from the archive shard by shard, never all at once."""
    opened = registry.open_archives(
        [archive / "annotations" / "train.json"], ImageFolder(archive / "images"), "detection"
    )
    taken = [(number, len(examples)) for number, examples in prepare.split_into_shards(opened, 25)]
    assert taken == [(0, 25), (1, 25), (2, 11)]
    first = iter(range(10**9))
    one = registry.Archive(Path("x"), "detection", 10**9, first, None)
    stream = prepare.split_into_shards([one], 10)
    next(stream)
    assert next(first) == 10


def test_a_shard_without_records_has_no_file(tmp_path):
    folder = tmp_path
    names = write_images(folder, 12)
    for name in names[4:8]:
        (folder / "images" / name).write_bytes(b"nothing")
    write_json(folder / "annotations" / "train.json", coco(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.SHARD_EXAMPLES, "detection", 4)
        source = run(folder, folder / "out")
    assert source.info["shards"] == [4, 4] and len(source.shard_paths) == 2


def test_a_small_source_has_shards_for_many_processes(tmp_path):
    write_json(tmp_path / "annotations" / "train.json", coco(write_images(tmp_path, 130, 8, 8)))
    document = json.loads((tmp_path / "annotations" / "train.json").read_text())
    for entry in document["images"]:
        del entry["height"], entry["width"]
    write_json(tmp_path / "annotations" / "train.json", document)
    assert run(tmp_path, tmp_path / "out").info["shards"] == [64, 64, 2]


@pytest.mark.parametrize("kind", ["detection", "image_text"])
def test_merged_shards_equal_one_table(kind, tmp_path):
    """The ids and counts are those of one ConceptCounter that sees all records in order."""
    rng = np.random.default_rng(0)
    words = [f"word {i}" for i in range(40)]
    table = index_writer.ConceptCounter()
    for name in words[:3]:
        table.add(name, count=0)
    paths, positives = [tmp_path / "names.npz"], []
    index_writer.Indexer(kind, words[:3]).finish().save(paths[0], {})
    for number, count in enumerate((5, 0, 1, 17, 8)):
        indexer = index_writer.Indexer(kind)
        for _ in range(count):
            chosen = tuple(rng.choice(words, rng.integers(0, 5), replace=False).tolist())
            boxes = 0 if kind == "image_text" or not chosen else 6
            labels = rng.integers(0, max(len(chosen), 1), boxes).astype(np.int32)
            empty = np.zeros((boxes, 4), np.float32)
            indexer.add(records.Record(b"", 7, 9, "", empty, labels, chosen))
            for place, word in enumerate(chosen):
                mentions = 1 if kind == "image_text" else int((labels == place).sum())
                named = kind == "detection" or place > 0
                local = table.add(word, vocabulary=named, count=mentions)
                positives.append(local)
        paths.append(tmp_path / f"{number}.npz")
        indexer.finish().save(paths[-1], {"number": number})
        assert index_writer.read_summary(paths[-1]) == {"number": number}
    assert index_writer.write_index(tmp_path / "out", paths) == len(table)
    lines = (tmp_path / "out" / "concepts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["name"] for row in rows] == table.names
    assert [row["count"] for row in rows] == table.counts
    assert [row["vocabulary"] for row in rows] == table.vocabulary
    arrays = {
        "index/positives": positives,
        "keys": tokenizer.keys(table.names),
        "tokens": tokenizer.tokenize(table.names),
        "vocabulary": table.vocabulary,
        "index/height": [7] * 31,
    }
    for file, expected in arrays.items():
        np.testing.assert_array_equal(np.load(tmp_path / "out" / f"{file}.npy"), expected)
