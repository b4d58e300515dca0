import collections
import dataclasses
import functools
import math
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference import predict as predict_lib
from detclipv2_jax.inference import predictor as predictor_lib
from detclipv2_jax.inference.checkpoint import detect_config
from detclipv2_jax.inference.config import DecodeConfig, DetectConfig
from detclipv2_jax.inference.detections import Detections
from detclipv2_jax.inference.predict import best_regions, predict
from detclipv2_jax.inference.predictor import Predictor, padded_count
from detclipv2_jax.models.atss_head import RegionOutputs
from detclipv2_jax.models.detclip import DetCLIP
from detclipv2_jax.ops import nms
from detclipv2_jax.ops.boxes import AnchorConfig

HEIGHT, WIDTH = 104, 136


class Scripted:
    """A model with given outputs; the text embedding of name n is the n-th unit vector."""

    def __init__(self, logits, deltas, centerness):
        self.cfg = types.SimpleNamespace(anchors=AnchorConfig())
        self._logits = jnp.asarray(logits)
        self._outputs = RegionOutputs(
            jnp.asarray(logits), jnp.asarray(deltas), jnp.asarray(centerness)
        )

    def encode_image(self, images, sizes):
        return self._outputs

    def logits(self, regions, texts):
        columns = jnp.argmax(texts, axis=-1)
        return jnp.where(jnp.any(texts, axis=-1), regions[..., columns], 0.0)


def anchors():
    """Return the anchors (K, 4), computed by loops."""
    rows = []
    for stride in (8, 16, 32, 64, 128):
        for y in range(math.ceil(HEIGHT / stride)):
            for x in range(math.ceil(WIDTH / stride)):
                center = np.array([(x + 0.5) * stride, (y + 0.5) * stride])
                rows.append([*(center - 4 * stride), *(center + 4 * stride)])
    return np.array(rows)


def overlap(a, b):
    side = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    part = np.prod(np.maximum(side, 0))
    return part / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - part)


def reference(logits, deltas, centerness, size, config):
    """Return the detections [(box, score, label)] of one image, computed by loops in float64."""
    sigmoid = lambda v: 1 / (1 + np.exp(-np.float64(v)))
    pairs = []
    for k, anchor in enumerate(anchors()):
        center, side = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
        if center[0] >= size[1] or center[1] >= size[0]:
            continue
        shift = deltas[k] * (0.1, 0.1, 0.2, 0.2)
        middle, half = center + shift[:2] * side, np.exp(shift[2:]) * side / 2
        box = np.clip([*(middle - half), *(middle + half)], 0, [size[1], size[0]] * 2)
        if np.prod(box[2:] - box[:2]) <= 0:
            continue
        for c, logit in enumerate(logits[k]):
            factor = sigmoid(centerness[k]) if "centerness" in config.score else 1.0
            pairs.append((box, sigmoid(logit) * factor, c))
    pairs = sorted(pairs, key=lambda pair: -pair[1])
    entered = collections.Counter()
    best = []
    for pair in pairs:
        entered[pair[2]] += 1
        if entered[pair[2]] <= (config.pre_nms_top_k or len(pairs)):
            best.append(pair)
    kept = []
    for box, score, label in best:
        rivals = [other for other, _, same in kept if same == label]
        clear = all(overlap(box, rival) <= config.nms_iou for rival in rivals)
        if score > config.score_threshold and clear:
            kept.append((box, score, label))
    return kept[: config.max_detections]


def test_best_regions_equal_a_direct_implementation():
    """Per image and phrase, in loops; logits at which probabilities are 1; clipped boxes only."""
    rng = np.random.default_rng(1)
    sizes = np.array([[HEIGHT, WIDTH], [57, 70], [0, 0]])
    count = len(anchors())
    logits, deltas = rng.normal(size=(3, count, 5)), 4 * rng.normal(size=(3, count, 4))
    logits[:, :, 1] = 30 + 30 * rng.random((3, count))
    logits[0, 7, 2] = np.nan
    logits[:, :, 3] = -np.inf
    asked = np.array([[4, 1, 2], [3, 0, 1], [0, 1, 2]])
    mask = np.array([[True, True, True], [True, True, False], [True, True, True]])
    arrays = [np.float32(a) for a in (logits, deltas, np.zeros((3, count)))]
    found = jax.jit(functools.partial(best_regions, Scripted(*arrays)))(
        np.zeros((3, HEIGHT, WIDTH, 3), np.uint8), sizes, np.eye(5, dtype=np.float32)[asked], mask
    )
    exists = np.array([[True, True, True], [False, True, False], [False, False, False]])
    np.testing.assert_array_equal(found.mask, exists)
    for n, row in np.argwhere(exists):
        best, box = -np.inf, None
        for k, anchor in enumerate(anchors()):
            center, side = (anchor[:2] + anchor[2:]) / 2, anchor[2:] - anchor[:2]
            middle = center + deltas[n, k, :2] * (0.1, 0.1) * side
            half = np.exp(deltas[n, k, 2:] * 0.2) * side / 2
            corners = np.clip([*(middle - half), *(middle + half)], 0, [*sizes[n, ::-1]] * 2)
            is_inside = center[0] < sizes[n, 1] and center[1] < sizes[n, 0]
            has_area = np.prod(corners[2:] - corners[:2]) > 0
            if is_inside and has_area and logits[n, k, asked[n, row]] > best:
                best, box = logits[n, k, asked[n, row]], corners
        np.testing.assert_allclose(found.boxes[n, row], box, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.scores[n, row], 1 / (1 + np.exp(-best)), rtol=1e-5)
        # The regions' embeddings are their logits here, so the dot product is the logit.
        if np.isfinite(logits[n]).all():
            np.testing.assert_allclose(found.similarities[n, row], best, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        DecodeConfig(pre_nms_top_k=12, max_detections=12),
        DecodeConfig(pre_nms_top_k=500, max_detections=200, score="alignment", nms_iou=0.3),
        DecodeConfig(pre_nms_top_k=40, max_detections=100, score_threshold=0.4),
        DecodeConfig(max_detections=700),  # five names have more than 100 anchors each
    ],
)
def test_predict_equals_a_direct_implementation(config):
    rng = np.random.default_rng(0)
    sizes = np.array([[HEIGHT, WIDTH], [57, 70], [0, 0]])
    count = len(anchors())
    logits, deltas = rng.normal(size=(3, count, 5)), 4 * rng.normal(size=(3, count, 4))
    arrays = [np.float32(a) for a in (logits, deltas, rng.normal(size=(3, count)))]
    model = Scripted(*arrays)
    found = jax.jit(functools.partial(predict, model, config=config))(
        np.zeros((3, HEIGHT, WIDTH, 3), np.uint8), sizes, np.eye(5, dtype=np.float32)
    )
    assert found.boxes.shape == (3, config.max_detections, 4)
    for n in range(2):
        wanted = reference(*(a[n] for a in arrays), sizes[n], config)
        assert len(wanted) == found.mask[n].sum() > 5
        boxes, scores, labels = zip(*wanted)
        np.testing.assert_allclose(found.boxes[n][found.mask[n]], boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores[n][found.mask[n]], scores, rtol=1e-5)
        np.testing.assert_array_equal(found.labels[n][found.mask[n]], labels)
    assert not found.mask[2].any()  # an empty slot


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300])
def test_result_does_not_depend_on_the_size_of_name_blocks(count, monkeypatch):
    rng = np.random.default_rng(count)
    logits = np.round(rng.normal(size=(1, len(anchors()), count)), 1).astype(np.float32)  # ties
    deltas = rng.normal(size=(1, len(anchors()), 4)).astype(np.float32)
    model = Scripted(logits, deltas, np.zeros((1, len(anchors())), np.float32))
    results = []
    for block in (128, 7, 1000):
        monkeypatch.setattr(predict_lib, "_NAMES_AT_ONCE", block)
        monkeypatch.setattr(nms, "_FIRST_ANCHORS", 20)
        config = DecodeConfig(max_detections=150)
        results.append(
            jax.jit(functools.partial(predict, model, config=config))(
                np.zeros((1, HEIGHT, WIDTH, 3), np.uint8),
                np.array([[90, 120]]),
                np.eye(count, dtype=np.float32),
                np.arange(count) % 5 != 1,
            )
        )
    for result in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, result, results[0])
    assert count < 4 or results[0].mask.all()


def test_exported_program_takes_any_batch_size():
    rng = np.random.default_rng(0)
    model_arrays = [rng.normal(size=(3, len(anchors()), n)).astype(np.float32) for n in (200, 4, 1)]
    ask = lambda logits, deltas, centerness, images, sizes: predict(
        Scripted(logits, deltas, centerness[..., 0]),
        images,
        sizes,
        np.eye(200, dtype=np.float32),
        config=DecodeConfig(max_detections=50),
    )
    arrays = [
        *model_arrays,
        np.zeros((3, HEIGHT, WIDTH, 3), np.uint8),
        np.full((3, 2), 90, np.int32),
    ]
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype) for a in arrays]
    exported = jax.export.export(jax.jit(ask), platforms=("cpu", "cuda", "tpu"))(*shapes)
    for count in (1, 3):
        few = [array[:count] for array in arrays]
        jax.tree.map(np.testing.assert_array_equal, exported.call(*few), jax.jit(ask)(*few))


def test_memory_does_not_grow_with_the_number_of_names():
    class Embedding(Scripted):
        logits = DetCLIP.logits
        logit_bias = np.zeros(1)

        def scale(self):
            return 1.0

    def temporary(count):
        def ask(embeddings, deltas, centerness, images, sizes, texts):
            model = Embedding(embeddings, deltas, centerness)
            return predict(model, images, sizes, texts, config=DecodeConfig())

        shape = (1, len(anchors()))
        arrays = [jax.ShapeDtypeStruct((*shape, *rest), jnp.float32) for rest in [(256,), (4,), ()]]
        arrays.append(jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.uint8))
        arrays.append(jax.ShapeDtypeStruct((1, 2), jnp.int32))
        arrays.append(jax.ShapeDtypeStruct((padded_count(count), 256), jnp.float32))
        return jax.jit(ask).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    # The scores of all names would take 1,000 bytes and more each; four numbers do.
    assert temporary(20_000) - temporary(80) < 16 * 20_000


def test_masked_names_and_non_finite_scores_are_not_detected():
    count = len(anchors())
    logits = np.zeros((1, count, 3), np.float32)
    logits[0, :, 1], logits[0, :, 2], logits[0, : count // 2, 0] = 9.0, np.nan, np.inf
    deltas = np.zeros((1, count, 4), np.float32)
    deltas[0, 3:6] = np.nan
    model = Scripted(logits, deltas, np.zeros((1, count), np.float32))
    ask = jax.jit(
        functools.partial(predict, model, config=DecodeConfig(pre_nms_top_k=400, max_detections=90))
    )
    image, size = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.array([[HEIGHT, WIDTH]])
    found = ask(image, size, np.eye(3), np.array([True, False, True]))
    assert set(np.asarray(found.labels)[found.mask].tolist()) == {0}
    assert np.isfinite(found.boxes).all() and np.isfinite(found.scores).all()
    assert 1 in np.asarray(ask(image, size, np.eye(3)).labels)


@pytest.mark.parametrize(
    "values",
    [
        {"score": "centerness"},
        {"score_threshold": 1.0},
        {"nms_iou": 0.0},
        {"max_detections": 0},
        {"pre_nms_top_k": -1},
    ],
)
def test_invalid_settings_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        DecodeConfig(**values)


def test_padded_counts_are_few_and_large_enough():
    sizes = [padded_count(n) for n in range(1, 2001)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert padded_count(1203) == 1280 and padded_count(80) == 128 and len(set(sizes)) == 13


@pytest.fixture(scope="module")
def tiny():
    graphdef, params = tiny_model.parts()
    config = DecodeConfig(pre_nms_top_k=60, max_detections=20)
    return Predictor(graphdef, params, canvas=tiny_model.CANVAS, config=config, batch_size=2)


def random_images(count, seed=0):
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (64, 48), (50, 40), (30, 90), (128, 128)]
    return [rng.integers(0, 256, (*sizes[n % 5], 3), np.uint8) for n in range(count)]


def test_results_do_not_depend_on_batching(tiny):
    images = random_images(7)
    names = tiny.encode(["cat", "dog", "sofa"])
    together = dict(tiny.stream(images, names))
    assert sorted(together) == list(range(7))
    for number, image in enumerate(images):
        ((_, alone),) = tiny.stream([image], names)
        np.testing.assert_allclose(alone.boxes, together[number].boxes, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(alone.scores, together[number].scores, rtol=1e-4)
        assert alone.size == image.shape[:2] and len(alone) > 0


def test_boxes_are_in_the_pixels_of_the_image(tiny):
    small = random_images(1)[0]
    large = small.repeat(2, axis=0).repeat(2, axis=1)  # halved again, it is the small one
    names = tiny.encode(["cat", "dog"])
    (_, a), (_, b) = sorted(tiny.stream([small, large], names), key=lambda pair: pair[0])
    np.testing.assert_allclose(b.boxes, 2 * a.boxes, rtol=1e-4, atol=1e-2)
    assert (b.boxes >= 0).all() and (b.boxes <= 128).all()
    assert b.boxes[:, 2].max() > 64  # not left in the small one's


def test_broken_images_are_reported_and_the_others_detected(tiny, tmp_path):
    (tmp_path / "bad.jpg").write_text("not an image")
    images = [
        random_images(1)[0],
        tmp_path / "bad.jpg",
        tmp_path / "missing.jpg",
        *random_images(4),
    ]
    results = dict(tiny.stream(iter(images), tiny.encode(["cat"])))
    assert sorted(results) == list(range(7))
    assert [n for n, result in sorted(results.items()) if isinstance(result, UserError)] == [1, 2]


def test_long_streams_are_in_order(tiny):
    same = [np.full((64, 64, 3), n, np.uint8) for n in range(23)]
    numbers = [number for number, _ in tiny.stream(same, tiny.encode(["cat"]))]
    assert numbers == list(range(23))
    assert list(tiny.stream([], tiny.encode(["cat"]))) == []


def test_a_batch_has_images_of_one_canvas_orientation(tiny, monkeypatch):
    calls = []

    def run_batch(self, images, sizes, names, config):
        calls.append((images.shape, sizes.tolist()))
        shape = (len(images), 3)
        boxes = np.tile(np.float32([0, 0, 10, 20]), (*shape, 1))
        best = np.ones(len(images)), np.zeros(len(images), int)
        return Detections(boxes, np.ones(shape), np.zeros(shape, int), np.ones(shape, bool), *best)

    monkeypatch.setattr(Predictor, "run_batch", run_batch)
    graphdef, params = tiny_model.parts()
    wide = Predictor(graphdef, params, canvas=(60, 90), batch_size=2)
    sizes = [(60, 90), (180, 120), (60, 80), (90, 60), (20, 30)]
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    found = dict(wide.stream(images, tiny.encode(["cat"])))
    assert calls == [
        ((2, 60, 90, 3), [[60, 90], [60, 80]]),
        ((2, 90, 60, 3), [[90, 60], [90, 60]]),
        ((2, 60, 90, 3), [[60, 90], [0, 0]]),
    ]
    for number, factor in enumerate((1, 2, 1, 1, 1 / 3)):
        wanted = np.multiply([0, 0, 10, 20], factor)
        np.testing.assert_allclose(found[number].boxes, [wanted] * 3, rtol=1e-6)


def test_names_are_encoded_once_per_set_of_parameters(tiny, monkeypatch):
    calls = []
    encode = predictor_lib._compiled_encode_text
    monkeypatch.setattr(
        predictor_lib, "_compiled_encode_text", lambda *a, **k: calls.append(1) or encode(*a, **k)
    )
    graphdef, params = tiny_model.parts()
    fresh = Predictor(graphdef, params, canvas=(64, 96))
    first = fresh.encode(["Cat", "dog"])
    again = fresh.encode(["dog", "cat", "cat"])
    assert len(calls) == 1
    np.testing.assert_array_equal(again.embeddings[:3], first.embeddings[[1, 0, 0]])
    assert again.mask.tolist() == [True] * 3 + [False] * 5
    fresh.params = jax.tree.map(lambda a: a + 0.1, params)
    assert not np.allclose(fresh.encode(["cat", "dog"]).embeddings[:2], first.embeddings[:2])
    assert len(calls) == 2


def test_names_are_normalized_before_encoding(tiny):
    encoded = tiny.encode([" Traffic  Light"])
    assert encoded.names == (" Traffic  Light",) and encoded.prompts == ("traffic light",)


def test_encoding_many_names_equals_encoding_each_alone(tiny):
    names = [f"thing {n}" for n in range(300)]
    many = tiny.encode(names)
    assert many.embeddings.shape == (512, 8)
    for n in (0, 255, 256, 299):
        np.testing.assert_allclose(
            tiny_fresh().encode([names[n]]).embeddings[0], many.embeddings[n], atol=1e-5
        )


def tiny_fresh():
    graphdef, params = tiny_model.parts()
    return Predictor(graphdef, params, canvas=tiny_model.CANVAS)


def test_new_parameters_need_no_compilation(tiny):
    names = tiny.encode(["cat"])
    list(tiny.stream(random_images(2), names))
    before = predictor_lib._compiled_predict._cache_size()
    graphdef, params = tiny_model.parts()
    other = Predictor(graphdef, params, canvas=(64, 64), config=tiny.config, batch_size=2)
    other.params = jax.tree.map(lambda a: a * 2, params)
    list(other.stream(random_images(2), other.encode(["dog"])))
    assert predictor_lib._compiled_predict._cache_size() == before


@pytest.mark.skipif(
    len(jax.devices()) == 1,
    reason="needs several devices: XLA_FLAGS=--xla_force_host_platform_device_count=4",
)
def test_sharded_results_equal_those_of_one_device(tiny):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    graphdef, params = tiny_model.parts()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    size = max(2, len(jax.devices()))
    spread = Predictor(
        graphdef,
        jax.device_put(params, whole),
        canvas=tiny_model.CANVAS,
        config=tiny.config,
        batch_size=size,
        batch_sharding=sharding,
    )
    images = random_images(3)
    wanted = dict(tiny.stream(images, tiny.encode(["cat"])))
    for number, found in spread.stream(images, spread.encode(["cat"])):
        np.testing.assert_allclose(found.scores, wanted[number].scores, rtol=1e-4)
        np.testing.assert_allclose(found.boxes, wanted[number].boxes, rtol=1e-4, atol=1e-2)
    phrases = [["cat", "dog"], ["dog"], ["red car", "cat", "tree"]]
    aligned = dict(tiny.stream_phrases(images, tiny.encode_each(phrases)))
    for number, best in spread.stream_phrases(images, spread.encode_each(phrases)):
        assert best.phrases == tuple(phrases[number])
        similarities = aligned[number].similarities
        np.testing.assert_allclose(best.similarities, similarities, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(best.boxes, aligned[number].boxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    "names, reason", [([], "no names"), (["cat", "  "], "name 2 of 2 is empty")]
)
def test_invalid_names_are_refused(tiny, names, reason):
    with pytest.raises(UserError, match=reason):
        tiny.encode(names)


def test_detect_config_is_read_from_a_run():
    section = dataclasses.asdict(DetectConfig(nms_iou=0.7, max_detections=9, canvas=(8, 8)))
    assert detect_config(section | {"pictures": 3}).decoding == DecodeConfig(
        nms_iou=0.7, max_detections=9
    )


def test_detect_config_is_read_from_an_old_run():
    found = detect_config({"candidates": 7, "keep": 9, "canvas": [8, 8], "dataset": "val.json"})
    assert found == DetectConfig(pre_nms_top_k=7, max_detections=9, canvas=(8, 8))
