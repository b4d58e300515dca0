"""An image with a text that says left or right is never flipped."""

import json
import re

import cv2
import numpy as np
import shared_data

from detclipv2_jax.data import pipeline, records
from detclipv2_jax.data.config import KindConfig
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.prepare import record_writer
from detclipv2_jax.data.vocabulary import Vocabulary

PHRASES = [
    ["a man", "the left wall"],
    ["a dog", "a bright lamp"],
    ["rightmost car"],
    ["a bus", "two men"],
    [],
]


def write(directory, kind, texts):
    """A source of images whose left half is bright; record i has the texts `texts[i]`."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40] = 255
    encoded = cv2.imencode(".jpg", pixels)[1].tobytes()
    with record_writer.RecordWriter(directory, name=directory.name, kind=kind, names=()) as writer:
        for i, concepts in enumerate(texts):
            boxed = kind != "image_text"
            boxes = np.tile(np.float32([[4, 6, 24, 30]]), (len(concepts) * boxed, 1))
            labels = np.arange(len(boxes), dtype=np.int32)
            fields = dict(image=encoded, height=60, width=80, image_id=str(i), boxes=boxes)
            writer.write(records.Record(**fields, labels=labels, concepts=tuple(concepts)))
        return writer.finish()


def batches(source, kind, **fields):
    """All batches of one epoch, and the counts at its end."""
    fields = (
        dict(batch_size=5, shapes=((60, 80),), scales=(1.0, 1.0), concepts_per_image=0) | fields
    )
    config = KindConfig(sources=(source.name,), **fields)
    sources = {source.name: source}
    plan = Plan(sources, Vocabulary(sources), {kind: config}, seed=0)
    feed = pipeline.batches(plan, sources, start=0, stop=plan.steps_per_epoch)
    return list(feed), feed.counters()


def is_flipped(image):
    return bool(image[:, :40].mean() < image[:, 40:].mean())


def test_phrases_that_say_a_side_keep_their_image_as_it_is(tmp_path):
    source = write(tmp_path / "phrases", "grounding", PHRASES * 4)
    found, counters = batches(source, "grounding", flip=1.0, mosaic=0.0)
    flipped = set()
    for planned, batch in found:
        for slot, record in enumerate(planned.records):
            turned = is_flipped(batch.images[slot])
            assert turned == (record % 5 in (1, 3, 4))
            flipped.add(turned)
            for box in batch.boxes[slot][(batch.labels[slot] >= 0).any(axis=-1)]:
                assert box.tolist() == ([56, 6, 76, 30] if turned else [4, 6, 24, 30])
    assert flipped == {True, False} and counters["unflipped"] == 8


def test_without_flips_nothing_is_counted(tmp_path):
    source = write(tmp_path / "phrases", "grounding", PHRASES)
    found, counters = batches(source, "grounding", flip=0.0)
    assert not any(is_flipped(image) for image in found[0][1].images)
    assert counters["unflipped"] == 0


def test_real_captions(tmp_path):
    """550 captions of COCO: those that say a side, found by a regular expression."""
    folder = shared_data.folder("photos/annotations")
    entries = json.loads((folder / "captions_train.json").read_text())["annotations"]
    captions = [[entry["caption"], "a thing"] for entry in entries]
    source = write(tmp_path / "pairs", "image_text", captions)
    found, counters = batches(source, "image_text", flip=1.0, texts_per_image=2, max_boxes=0)
    kept = {
        int(record)
        for planned, batch in found
        for slot, record in enumerate(planned.records)
        if record >= 0 and not is_flipped(batch.images[slot])
    }
    says = {i for i, (text, _) in enumerate(captions) if re.search(r"\b(left|right)\b", text, re.I)}
    assert kept == says and len(says) == counters["unflipped"] == 4
