import collections
import dataclasses
import hashlib
import io
import json
import logging
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import pipeline, reader, records
from detclipv2_jax.data import transforms as transforms_lib
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.prepare import dictionary_writer, record_writer
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text.checked import Meaning
from detclipv2_jax.text.definitions import Knowledge
from detclipv2_jax.text.tokenizer import fitted, tokenize

NAMES = [f"thing number {i}" for i in range(30)]
AUGMENTATION = {
    "detection": dict(flip=0.5, scales=(0.6, 1.5), crop=True),
    "grounding": dict(flip=0.0, scales=(0.5, 1.0), rungs=(0.5, 1.0)),
    "image_text": dict(flip=0.5, scales=(1.0, 1.0)),
}


def jpeg(height, width, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cv2.resize(coarse, (width, height))).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def record(i, kind, rng, image=None):
    height, width = (int(v) for v in rng.integers(40, 130, 2))
    count = 0 if kind == "image_text" else int(rng.integers(0, 6))
    low = rng.uniform(0, 0.6, (count, 2))
    high = low + rng.uniform(0.1, 0.4, (count, 2))
    boxes = np.concatenate([low, high], 1) * [width, height, width, height]
    named = [NAMES[label] for label in rng.integers(0, len(NAMES), count)]
    concepts = tuple(dict.fromkeys(named))
    if kind == "image_text":
        concepts = (f"caption {i}", *(NAMES[label] for label in rng.choice(len(NAMES), 3, False)))
    return records.Record(
        image=jpeg(height, width, i) if image is None else image,
        height=height,
        width=width,
        image_id=f"{kind}-{i}",
        boxes=boxes.astype(np.float32),
        labels=np.array([concepts.index(name) for name in named], np.int32),
        concepts=concepts,
    )


def write(directory, kind, count, broken=()):
    """A prepared source of several shards; the records in `broken` hold no picture."""
    rng = np.random.default_rng(count)
    with record_writer.RecordWriter(
        directory, name=directory.name, kind=kind, names=NAMES, shard_records=16
    ) as writer:
        for i in range(count):
            writer.write(record(i, kind, rng, b"\xff\xd8 no picture" if i in broken else None))
        return writer.finish()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return {
        "boxes": write(root / "boxes", "detection", 45),
        "more": write(root / "more", "detection", 10),
        "phrases": write(root / "phrases", "grounding", 26),
        "pairs": write(root / "pairs", "image_text", 37),
    }


def make_plan(sources, **changes):
    kinds = {
        "detection": dict(sources=("boxes", "more"), batch_size=8, shapes=((48, 64), (64, 48))),
        "grounding": dict(sources=("phrases",), batch_size=4, shapes=((64, 64),), max_boxes=6),
        "image_text": dict(sources=("pairs",), batch_size=12, shapes=((40, 40),)),
    }
    kinds["detection"] |= dict(table_size=30, concepts_per_image=10, max_boxes=3)
    kinds["grounding"] |= dict(table_size=24, concepts_per_image=5)
    kinds["image_text"] |= dict(table_size=48, texts_per_image=4, concepts_per_image=0, max_boxes=0)
    kinds = {k: f | AUGMENTATION[k] | changes.get(k, {}) for k, f in kinds.items()}
    kinds = {k: KindConfig(**f) for k, f in kinds.items() if set(f["sources"]) <= set(sources)}
    return Plan(sources, Vocabulary(sources), kinds, seed=3)


def collect(plan, sources, start, stop, **options):
    feed = pipeline.batches(plan, sources, start=start, stop=stop, **options)
    return list(feed), feed


FIELDS = ("images", "sizes", "boxes", "labels", "scored", "texts", "tokens", "token_mask")
SHARED = ("tokens", "token_mask")


def assert_same(a, b):
    assert a.kind == b.kind
    for field in FIELDS:
        one, other = getattr(a, field), getattr(b, field)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def run(sources):
    """The batches of two epochs, and the counts at their end."""
    plan = make_plan(sources)
    steps, feed = collect(plan, sources, 0, 2 * plan.steps_per_epoch)
    return plan, steps, feed


def test_batches_come_in_order_in_their_types(run):
    plan, steps, _ = run
    assert [planned.step for planned, _ in steps] == list(range(2 * plan.steps_per_epoch))
    for planned, batch in steps:
        kind = plan.kinds[planned.kind]
        size, boxes, texts = kind.batch_size, kind.max_boxes, kind.texts_per_image
        expected = {
            "images": ((size, *planned.shape, 3), np.uint8),
            "sizes": ((size, 2), np.int32),
            "boxes": ((size, boxes, 4), np.float32),
            "labels": ((size, boxes, kind.labels_per_box), np.int32),
            "scored": ((size, 0 if texts else kind.table_size), np.bool_),
            "texts": ((size, texts), np.int32),
            "tokens": ((kind.table_size, 16), np.int32),
            "token_mask": ((kind.table_size,), np.bool_),
        }
        for field, (shape, dtype) in expected.items():
            assert getattr(batch, field).shape == shape
            assert getattr(batch, field).dtype == dtype
        assert batch.kind == planned.kind


def test_batches_hold_what_the_records_say(run, sources):
    """Every slot of an epoch against a reading of its record by other means."""
    plan, steps, _ = run
    cut = 0
    for planned, batch in steps[: plan.steps_per_epoch]:
        kind = plan.kinds[planned.kind]
        assert batch.token_mask.tolist() == (planned.concepts >= 0).tolist()
        for slot, (index, number) in enumerate(zip(planned.sources, planned.records)):
            if number < 0:
                assert batch.sizes[slot].tolist() == [0, 0]
                assert not batch.images[slot].any()
                assert (batch.labels[slot] == -1).all()
                assert (batch.texts[slot] == -1).all()
                continue
            name = kind.sources[index]
            source = sources[name]
            shard = int(np.searchsorted(source.shard_starts, number, side="right") - 1)
            reader = array_record_module.ArrayRecordReader(source.shard_paths[shard])
            stored = records.decode(reader.read([int(number - source.shard_starts[shard])])[0])
            seeds = transforms_lib.seeds(plan.seed, planned.epoch, name, np.array([number]))
            placement = transforms_lib.place(
                kind,
                planned.shape,
                np.array([stored.height]),
                np.array([stored.width]),
                seeds,
            )
            moved, kept = transforms_lib.move_boxes(placement, stored.boxes[None])
            expected = [
                (*moved[0, i], tokenize([stored.concepts[stored.labels[i]]])[0].tolist())
                for i in np.flatnonzero(kept[0])
            ]
            cut += max(len(expected) - kind.max_boxes, 0)
            expected.sort(key=lambda b: (b[2] - b[0]) * (b[3] - b[1]), reverse=True)
            expected = expected[: kind.max_boxes]
            got = [
                (*box, batch.tokens[label].tolist())
                for box, labels in zip(batch.boxes[slot], batch.labels[slot])
                for label in labels[labels >= 0]
            ]
            assert sorted(got) == sorted(expected)
            texts = stored.concepts if planned.kind == "image_text" else ()
            rows = batch.texts[slot][batch.texts[slot] >= 0]
            assert batch.tokens[rows].tolist() == tokenize(texts).tolist()
            assert batch.sizes[slot].tolist() == placement.size[0].tolist()
            assert_picture(batch.images[slot], stored, placement)
    assert cut


def assert_picture(image, stored, placement):
    if placement.ratio[0] > 1:  # compared with OpenCV in test_transforms
        return
    pixels = cv2.imdecode(np.frombuffer(stored.image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    y, x, height, width = placement.crop[0]
    h, w = (int(v) for v in placement.size[0])
    part = np.ascontiguousarray(pixels[y : y + height, x : x + width])
    expected = cv2.resize(part, (w, h), interpolation=cv2.INTER_LINEAR)
    expected = expected[:, ::-1] if placement.flip[0] else expected
    # A decoder that is given a window has other neighbors at its edge to smooth colors with.
    difference = abs(image[:h, :w].astype(int) - expected)
    assert difference.mean() < 1
    assert not image[h:].any()
    assert not image[:, w:].any()


@pytest.fixture(scope="module")
def mosaics(sources):
    plan = make_plan(sources, detection={"mosaic": 0.5, "max_boxes": 40}, grounding={"mosaic": 1.0})
    steps, feed = collect(plan, sources, 0, plan.steps_per_epoch)
    return plan, steps, feed


def test_a_mosaic_shows_four_records_a_quarter_each(mosaics, sources):
    plan, steps, feed = mosaics
    plain = collect(make_plan(sources), sources, 0, plan.steps_per_epoch)[0]
    seen = {False: 0, True: 0}
    for (planned, batch), (other, alone) in zip(steps, plain):
        # The epoch's own records, and their order, are those of a run without mosaics.
        np.testing.assert_array_equal(planned.records, other.records)
        for slot in np.flatnonzero(planned.records >= 0):
            shared = planned.extra_records[slot] >= 0
            assert shared.all() or not shared.any()
            seen[bool(shared.all())] += 1
            if shared.all():
                check_mosaic(plan, planned, batch, slot, sources)
            else:
                np.testing.assert_array_equal(batch.images[slot], alone.images[slot])
                np.testing.assert_array_equal(batch.sizes[slot], alone.sizes[slot])
    assert min(seen.values()) > 5 and not any(counts(feed, "unreadable").values())
    counted = [(p.records >= 0).sum() + (p.extra_records >= 0).sum() for p, _ in steps]
    assert sum(counts(feed, "read").values()) == sum(counted)


def check_mosaic(plan, planned, batch, slot, sources):
    kind = plan.kinds[planned.kind]
    height, width = np.array(planned.shape) // 2
    numbers = [planned.records[slot], *planned.extra_records[slot]]
    used = [planned.sources[slot], *planned.extra_sources[slot]]
    expected = []
    for quarter, (number, which) in enumerate(zip(numbers, used)):
        source = sources[kind.sources[which]]
        shard = int(np.searchsorted(source.shard_starts, number, side="right") - 1)
        reader = array_record_module.ArrayRecordReader(source.shard_paths[shard])
        stored = records.decode(reader.read([int(number - source.shard_starts[shard])])[0])
        seeds = transforms_lib.seeds(
            plan.seed, planned.epoch, kind.sources[which], np.array([number])
        )
        size = np.array([stored.height]), np.array([stored.width])
        placement = transforms_lib.place(kind, (height, width), *size, seeds)
        y, x = (quarter // 2) * height, (quarter % 2) * width
        assert_picture(batch.images[slot, y:, x:][:height, :width], stored, placement)
        moved, kept = transforms_lib.move_boxes(placement, stored.boxes[None])
        moved += np.array([x, y, x, y])
        for i in np.flatnonzero(kept[0]):
            tokens = tokenize([stored.concepts[stored.labels[i]]])[0].tolist()
            expected.append((*moved[0, i].tolist(), *tokens))
    found = named_boxes(batch, slot)
    assert batch.sizes[slot].tolist() == list(planned.shape)
    assert found <= set(expected) and len(found) == min(len(set(expected)), kind.max_boxes)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_mosaics(mosaics, sources, count):
    plan, steps, _ = mosaics
    parts = [
        collect(plan, sources, 0, 6, process_index=i, process_count=count)[0] for i in range(count)
    ]
    for (_, whole), *slices in zip(steps, *parts):
        for field in FIELDS:
            pieces = [getattr(batch, field) for _, batch in slices]
            joined = pieces[0] if field in SHARED else np.concatenate(pieces)
            np.testing.assert_array_equal(joined, getattr(whole, field))


def test_boxes_of_concepts_that_found_no_room_keep_their_place_without_a_name(run, sources):
    plan, steps, _ = run
    small = make_plan(sources, detection=dict(table_size=4, max_boxes=20))
    large = make_plan(sources, detection=dict(max_boxes=20))
    stop = plan.steps_per_epoch
    tight, feed = collect(small, sources, 0, stop)
    roomy, _ = collect(large, sources, 0, stop)
    assert feed.counters()["dropped_concepts"] > 0
    lost = 0
    for (planned, batch), (_, full) in zip(tight, roomy):
        if planned.kind != "detection":
            assert_same(batch, full)
            continue
        kept = set(map(tuple, batch.tokens[batch.token_mask].tolist()))
        np.testing.assert_array_equal(batch.boxes, full.boxes)
        for slot in range(len(batch.labels)):
            everything = named_boxes(full, slot)
            found = named_boxes(batch, slot)
            assert found == {entry for entry in everything if entry[4:] in kept}
            lost += len(everything) - len(found)
    assert lost > 0


def named_boxes(batch, slot):
    return {
        (*box.tolist(), *batch.tokens[label].tolist())
        for box, labels in zip(batch.boxes[slot], batch.labels[slot])
        for label in labels[labels >= 0]
    }


@pytest.mark.parametrize("room", [1, 2])
def test_a_box_under_two_phrases_has_both_labels(tmp_path, room):
    rng = np.random.default_rng(0)
    with record_writer.RecordWriter(tmp_path / "two", name="two", kind="grounding") as writer:
        for i in range(4):
            twice = np.array([[2, 3, 30, 33], [5, 5, 20, 20], [2, 3, 30, 33]], np.float32)
            one = dataclasses.replace(
                record(i, "grounding", rng, jpeg(40, 60, i)), height=40, width=60, boxes=twice,
                labels=np.array([0, 1, 2], np.int32), concepts=("a man", "a hat", "the player"),
            )  # fmt: skip
            writer.write(one)
        sources = {"two": writer.finish()}
    fields = dict(sources=("two",), scales=(1.0, 1.0), labels_per_box=room)
    plan = make_plan(sources, grounding=fields, detection=dict(sources=("absent",)),
                     image_text=dict(sources=("absent",)))  # fmt: skip
    ((planned, batch),), feed = collect(plan, sources, 0, 1)
    names = np.array(plan.vocabulary.names(planned.concepts))
    for slot in range(4):
        assert ((batch.boxes[slot, :, 2] > 0) == (np.arange(6) < 2)).all()
        named = [names[row[row >= 0]].tolist() for row in batch.labels[slot]]
        assert named == [["a man", "the player"][:room], ["a hat"], [], [], [], []]
    assert feed.counters()["cut_labels"] == (4 if room == 1 else 0)


def counts(feed, name):
    """The counts of each source under one name."""
    found = (key.partition("/") + (count,) for key, count in feed.counters().items())
    return {source: count for first, _, source, count in found if source and first == name}


def test_everything_left_out_is_counted(run, sources):
    plan, steps, feed = run
    assert counts(feed, "unreadable") == dict.fromkeys(sources, 0)
    assert counts(feed, "read") == {name: 2 * len(source) for name, source in sources.items()}
    counters = feed.counters()
    assert counters["cut_boxes"] > 0
    assert counters["dropped_concepts"] == sum(planned.dropped for planned, _ in steps)
    # Every box is in a batch, or was cut or cropped away.
    whole = make_plan(sources, detection=dict(table_size=100), grounding=dict(table_size=100))
    steps, feed = collect(whole, sources, 0, plan.steps_per_epoch)
    kept = sum(int((batch.labels >= 0).sum()) for _, batch in steps)
    stored = sum(stored_boxes(source) for source in sources.values())
    counters = feed.counters()
    assert counters["cropped_boxes"] > 0
    assert kept + counters["cropped_boxes"] + counters["cut_boxes"] == stored


def test_pixels_of_images_and_of_canvases_are_counted(run, mosaics):
    plan, steps, feed = run
    for kind in plan.kinds:
        mine = [batch for planned, batch in steps if planned.kind == kind]
        covered = sum(int(batch.sizes.prod(axis=1).sum()) for batch in mine)
        total = sum(batch.images[..., 0].size for batch in mine)
        assert feed.counters()[f"image_pixels/{kind}"] == covered
        assert feed.counters()[f"canvas_pixels/{kind}"] == total > covered > 0
    # Padding is black, and hardly anything else is.
    plan, steps, feed = mosaics
    mine = [batch.images for planned, batch in steps if planned.kind == "grounding"]
    lit = sum(int(images.any(axis=-1).sum()) for images in mine)
    assert feed.counters()["image_pixels/grounding"] == pytest.approx(lit, rel=0.02)


def stored_boxes(source):
    readers = map(array_record_module.ArrayRecordReader, source.shard_paths)
    return sum(len(records.decode(data).boxes) for r in readers for data in r.read_all())


def test_counts_of_the_processes_add_up_to_the_run_s(sources):
    small = dict(detection=dict(table_size=4))
    whole = collect(make_plan(sources, **small), sources, 0, 12)[1].counters()
    parts = [
        collect(make_plan(sources, **small), sources, 0, 12, process_index=i, process_count=2)[
            1
        ].counters()
        for i in range(2)
    ]
    assert {name: sum(part[name] for part in parts) for name in whole} == whole
    assert whole["dropped_concepts"] > 0


def test_a_second_epoch_augments_differently(run):
    plan, steps, _ = run
    first, second = {}, {}
    for planned, batch in steps:
        for index, number, size in zip(planned.sources, planned.records, batch.sizes):
            where = first if planned.epoch == 0 else second
            where[planned.kind, int(index), int(number)] = size.tolist()
    names = [key for key in first if key[0] == "detection" and key[2] >= 0]
    assert sum(first[key] != second[key] for key in names) > len(names) / 2


def collect_slices(sources, start, stop, count):
    """The steps as `count` processes read them, their slices put together again."""
    parts = [
        collect(make_plan(sources), sources, start, stop, process_index=i, process_count=count)[0]
        for i in range(count)
    ]
    for pieces in zip(*parts, strict=True):
        planned, batches = pieces[0][0], [batch for _, batch in pieces]
        for field in SHARED:
            for batch in batches[1:]:
                np.testing.assert_array_equal(getattr(batch, field), getattr(batches[0], field))
        joined = {
            field: np.concatenate([getattr(batch, field) for batch in batches])
            for field in FIELDS
            if field not in SHARED
        }
        yield planned, dataclasses.replace(batches[0], **joined)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_same_global_batch(run, sources, count):
    plan, steps, _ = run
    stop = plan.steps_per_epoch
    for (_, joined), (_, whole) in zip(
        collect_slices(sources, 0, stop, count), steps[:stop], strict=True
    ):
        assert_same(joined, whole)


@pytest.mark.parametrize(("before", "at", "after"), [(1, 3, 4), (2, 11, 1), (4, 6, 2)])
def test_another_number_of_processes_goes_on_with_the_same_epoch(run, sources, before, at, after):
    plan, steps, _ = run
    stop = plan.steps_per_epoch
    assert at < stop
    seen = collections.Counter()
    found = [
        *collect_slices(sources, 0, at, before),
        *collect_slices(sources, at, stop, after),
    ]
    for (planned, joined), (_, whole) in zip(found, steps[:stop], strict=True):
        assert_same(joined, whole)
        names = plan.kinds[planned.kind].sources
        for slot in np.flatnonzero(joined.sizes[:, 0] > 0):
            seen[names[planned.sources[slot]], int(planned.records[slot])] += 1
    everything = {(name, i) for name, source in sources.items() for i in range(len(source))}
    assert set(seen) == everything and set(seen.values()) == {1}


PROCESS = """
import hashlib, json, sys
import jax
import numpy as np
arguments = json.loads(sys.argv[1])
jax.distributed.initialize(arguments["address"], arguments["count"], arguments["index"])
from jax.experimental import multihost_utils
import test_pipeline
from detclipv2_jax.data import pipeline
from detclipv2_jax.data.index import Source
from detclipv2_jax.training import prefetch, sharding

sources = {name: Source.open(path) for name, path in arguments["sources"].items()}
feed = pipeline.batches(
    test_pipeline.make_plan(sources), sources,
    start=arguments["start"], stop=arguments["stop"],
    process_index=jax.process_index(), process_count=jax.process_count(),
)
for planned, batch in prefetch.prefetch(feed, sharding.make_mesh()):
    if jax.process_count() > 1:
        batch = multihost_utils.process_allgather(batch, tiled=True)
    print("batch", planned.step, test_pipeline.digest(batch), flush=True)
"""


def digest(batch):
    """A hash of everything in a global batch."""
    state = hashlib.sha256(batch.kind.encode())
    for field in FIELDS:
        array = np.asarray(getattr(batch, field))
        state.update(f"{field} {array.dtype} {array.shape}".encode() + array.tobytes())
    return state.hexdigest()


def test_two_real_processes_assemble_the_global_batch_bit_for_bit(run, sources):
    """jax.distributed over loopback, resumed in mid-epoch; each process has two devices."""
    _, steps, _ = run
    start, stop = 9, 17
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    directories = {name: str(source.directory) for name, source in sources.items()}
    arguments = dict(address=address, count=2, sources=directories, start=start, stop=stop)
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parents[1]))),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps(arguments | {"index": index})],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    expected = [f"batch {planned.step} {digest(batch)}" for planned, batch in steps[start:stop]]
    for process in processes:
        out, err = process.communicate(timeout=180)
        assert process.returncode == 0, err[-3000:]
        assert [line for line in out.splitlines() if line.startswith("batch")] == expected


@pytest.mark.parametrize("start", [1, 7, 16, 23])
def test_any_step_can_be_the_first(run, sources, start):
    plan, steps, _ = run
    again, _ = collect(make_plan(sources), sources, start, start + 3)
    assert len(again) == 3
    for (planned, batch), (expected_plan, expected) in zip(again, steps[start:]):
        assert planned.step == expected_plan.step
        assert_same(batch, expected)


@pytest.mark.parametrize("cores", [1, 7])
def test_threads_do_not_matter(run, sources, cores, monkeypatch):
    plan, steps, _ = run
    monkeypatch.setattr(pipeline, "_cores", lambda: cores)
    monkeypatch.setattr(reader, "_THREADS", cores)
    again, _ = collect(make_plan(sources), sources, 0, plan.steps_per_epoch, prefetch=cores)
    for (_, batch), (_, expected) in zip(again, steps):
        assert_same(batch, expected)


def test_no_steps_and_a_step_of_empty_slots_only(sources):
    plan = make_plan({"more": sources["more"]}, detection=dict(sources=("more",), batch_size=16))
    assert collect(plan, sources, 3, 3)[0] == []
    steps, feed = collect(plan, sources, 0, 2, process_index=3, process_count=4)
    # At most ten records a canvas: the last quarter of sixteen slots has none.
    assert len(steps) == 2
    for _, batch in steps:
        assert batch.images.shape[0] == 4
        assert not batch.sizes.any()
        assert not batch.images.any()
        assert batch.token_mask.any()
    assert counts(feed, "read") == {"more": 0}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    return write(root / "spoilt", "detection", 40, broken=(3, 17))


def spoilt_plan(source, **fields):
    fields = dict(batch_size=4, shapes=((48, 64),), table_size=30, max_boxes=6) | fields
    fields |= dict(sources=("spoilt",), concepts_per_image=0) | AUGMENTATION["detection"]
    sources = {"spoilt": source}
    return Plan(sources, Vocabulary(sources), {"detection": KindConfig(**fields)}, 0), sources


def test_an_undecodable_picture_is_an_empty_slot_counted_and_told_once(damaged, caplog):
    plan, sources = spoilt_plan(damaged)
    with caplog.at_level(logging.WARNING):
        steps, feed = collect(plan, sources, 0, 2 * plan.steps_per_epoch, max_broken_share=0.2)
    assert counts(feed, "unreadable") == {"spoilt": 4}
    assert counts(feed, "read") == {"spoilt": 80}
    messages = [r.getMessage() for r in caplog.records if r.name == pipeline.__name__]
    assert len(messages) == 2
    assert any("source 'spoilt', record 17 is skipped: image 'detection-17'" in m for m in messages)
    for planned, batch in steps:
        for slot, number in enumerate(planned.records):
            empty = number in (3, 17)
            assert (batch.sizes[slot] == 0).all() == empty
            assert batch.images[slot].any() != empty
            if empty:
                assert (batch.labels[slot] == -1).all()
                assert not batch.boxes[slot].any()


def test_a_broken_picture_of_a_mosaic_leaves_its_quarter_empty(damaged):
    plan, sources = spoilt_plan(damaged, mosaic=1.0)
    steps, feed = collect(plan, sources, 0, plan.steps_per_epoch, max_broken_share=0.5)
    broken = 0
    for planned, batch in steps:
        numbers = np.concatenate([planned.records[:, None], planned.extra_records], axis=1)
        for slot, bad in enumerate(np.isin(numbers, (3, 17))):
            quarters = batch.images[slot].reshape(2, 24, 2, 32, 3).any(axis=(1, 3, 4)).reshape(-1)
            np.testing.assert_array_equal(quarters, ~bad)
            assert batch.sizes[slot].tolist() == [48, 64]
            broken += bad.sum()
    assert counts(feed, "unreadable")["spoilt"] == broken > 2


def test_batches_of_nothing_but_broken_pictures(damaged):
    plan, sources = spoilt_plan(damaged, batch_size=1)
    steps, _ = collect(plan, sources, 0, plan.steps_per_epoch, max_broken_share=1)
    assert [p.records[0] in (3, 17) for p, _ in steps] == [b.sizes[0, 0] == 0 for _, b in steps]


def test_too_many_broken_records_end_the_run(damaged):
    plan, sources = spoilt_plan(damaged)
    feed = pipeline.batches(
        plan, sources, start=0, stop=plan.steps_per_epoch, max_broken_share=0.04
    )
    message = "source 'spoilt': 2 of .* unreadable.*image 'detection-"
    with pytest.raises(UserError, match=message) as e:
        list(feed)
    assert "max_broken_share" in str(e.value)
    assert next(feed, None) is None
    # The same records are tolerated where the share allows them.
    steps, _ = collect(plan, sources, 0, plan.steps_per_epoch, max_broken_share=0.05)
    assert len(steps) == plan.steps_per_epoch


def test_a_damaged_file_costs_only_the_records_it_holds_there(tmp_path):
    source = write(tmp_path / "spoilt", "detection", 40)
    path = pathlib.Path(source.shard_paths[0])
    content = bytearray(path.read_bytes())
    content[30_000:30_020] = bytes(20)
    path.write_bytes(content)
    plan, sources = spoilt_plan(Source.open(source.directory))
    steps, feed = collect(plan, sources, 0, plan.steps_per_epoch, max_broken_share=0.5)
    assert len(steps) == plan.steps_per_epoch
    assert 1 <= counts(feed, "unreadable")["spoilt"] <= 2
    empty = sum(int((batch.sizes[:, 0] == 0).sum()) for _, batch in steps)
    assert empty == counts(feed, "unreadable")["spoilt"] + 4 * plan.steps_per_epoch - 40


def test_a_file_that_is_no_record_file_is_told(tmp_path):
    source = write(tmp_path / "spoilt", "detection", 5)
    pathlib.Path(source.shard_paths[0]).write_bytes(b"nothing")
    plan, sources = spoilt_plan(source)
    with pytest.raises(UserError, match="spoilt-train.*00000.*cannot be opened"):
        collect(plan, sources, 0, 1)


def test_errors_of_the_reading_thread_reach_the_caller(sources, monkeypatch):
    plan = make_plan(sources)
    real = Plan.plan

    def failing(self, step):
        if step == 2:
            raise UserError("the disk is on fire")
        return real(self, step)

    monkeypatch.setattr(Plan, "plan", failing)
    feed = pipeline.batches(plan, sources, start=0, stop=9)
    assert next(feed)[0].step == 0
    assert next(feed)[0].step == 1
    with pytest.raises(UserError, match="the disk is on fire"):
        next(feed)


def test_a_batch_that_processes_cannot_share_is_refused_at_once(sources):
    with pytest.raises(UserError, match="grounding.batch_size is 4, .* 8 processes"):
        pipeline.batches(make_plan(sources), sources, start=0, stop=1, process_count=8)


def running():
    return [t for t in threading.enumerate() if t.name == "batches"]


@pytest.mark.parametrize("way", ["close", "drop"])
def test_an_iterator_left_early_ends_its_thread(sources, way):
    feed = pipeline.batches(make_plan(sources), sources, start=0, stop=10**6)
    next(feed)
    assert len(running()) == 1
    if way == "close":
        feed.close()
        assert next(feed, None) is None
    del feed
    deadline = time.monotonic() + 20
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running()


def test_tensorflow_waits_for_the_thread_and_ends_with_the_interpreter(sources):
    """The module loads without TensorFlow, and a process that just ends does so in peace."""
    script = f"""
import sys
from detclipv2_jax.data import config, index, pipeline, plan, vocabulary
assert "tensorflow" not in sys.modules
sources = {{"more": index.Source.open({str(sources["more"].directory)!r})}}
kind = config.KindConfig(("more",), batch_size=4, shapes=((48, 64),), table_size=30)
planned = plan.Plan(sources, vocabulary.Vocabulary(sources), {{"detection": kind}}, 0)
feed = pipeline.batches(planned, sources, start=0, stop=1000)
print(next(feed)[1].images.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 48, 64, 3)\n"
    assert "Traceback" not in done.stderr


def test_a_kind_sees_definitions_if_it_is_to(sources, tmp_path):
    opened = dictionary_writer.build(
        tmp_path, NAMES[:20], {}, Knowledge(own=dict.fromkeys(NAMES, Meaning("a kind of sofa")))
    )
    plan = make_plan(sources)
    kinds = {
        kind: dataclasses.replace(config, definitions_drop=0.5)
        for kind, config in plan.kinds.items()
    }
    plan = Plan(sources, Vocabulary(sources, opened, defined=["detection"]), kinds, seed=3)
    seen, bare = set(), 0
    for planned, batch in collect(plan, sources, 0, plan.steps_per_epoch)[0]:
        names = plan.vocabulary.names(planned.concepts[planned.concepts >= 0])
        if planned.kind == "detection":
            # Those that the dictionary lacks have no definition: "thing number 25".
            defined = [opened.definitions.get(name) for name in names]
            assert any(defined)
            dropped = planned.bare[: len(names)]
            bare += sum(bool(text) and is_bare for text, is_bare in zip(defined, dropped))
            names = fitted(names, [text if not b else None for text, b in zip(defined, dropped)])
        np.testing.assert_array_equal(batch.tokens[: len(names)], tokenize(names))
        seen.add(planned.kind)
    assert len(seen) == 3 and bare
