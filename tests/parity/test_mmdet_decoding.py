"""Validates decoding, from the head's outputs to detections, against MMDetection's ATSS.

Theirs keeps the `nms_pre` best pairs of anchor and class of each level, all classes together,
ranked without the centerness, and cuts at `score_thr` without the centerness. Ours lets every pair
take part and cuts at the product. So both agree where `nms_pre` cuts nothing off, and where it does
if ours is given no more than what theirs keeps.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from comparing import compare
from mmdet.models.dense_heads import ATSSHead as TheirHead
from mmdet.models.dense_heads import base_dense_head
from mmengine.config import ConfigDict

from detclipv2_jax.inference.config import DecodeConfig
from detclipv2_jax.inference.predict import predict
from detclipv2_jax.models.atss_head import RegionOutputs
from detclipv2_jax.ops import boxes

HEIGHT, WIDTH, CLASSES = 224, 320, 12
ANCHORS = boxes.AnchorConfig(offset=0.0)  # MMDetection's
REFERENCE = "mmdet ATSSHead.predict_by_feat, NMS a float64 loop"


def greedy_nms(corners, scores, labels, nms_cfg, class_agnostic=False):
    """Stand in for `mmcv.ops.batched_nms`, which is compiled: the textbook loop in float64."""
    assert nms_cfg["type"] == "nms" and not class_agnostic
    box, order = corners.double().numpy(), torch.argsort(scores, descending=True, stable=True)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    alive, kept = np.ones(len(box), bool), []
    classes = {int(label): np.flatnonzero(labels.numpy() == label) for label in labels.unique()}
    for i in order.tolist():
        if not alive[i]:
            continue
        kept.append(i)
        rivals = classes[int(labels[i])]
        side = np.minimum(box[i, 2:], box[rivals, 2:]) - np.maximum(box[i, :2], box[rivals, :2])
        part = np.prod(np.maximum(side, 0), axis=1)
        alive[rivals] &= part <= nms_cfg["iou_threshold"] * (area[i] + area[rivals] - part)
    return torch.cat([corners[kept], scores[kept, None]], 1), torch.tensor(kept, dtype=torch.long)


class FixedHead:
    """A model with given outputs of its head."""

    def __init__(self, logits, deltas, centerness):
        self.cfg = type("Config", (), {"anchors": ANCHORS})
        self._regions = RegionOutputs(logits, deltas, centerness)

    def encode_image(self, images, sizes):
        """Return the head's outputs; the logits stand for the embeddings."""
        return self._regions

    def logits(self, regions, texts):
        """Return the logits; the text embedding of class n is the n-th unit vector."""
        return regions @ texts.T


def outputs(kind):
    """Return logits (K, C), deltas (K, 4) and centerness (K,) of a head."""
    rng = np.random.default_rng(0)
    anchors = boxes.anchor_grid(HEIGHT, WIDTH, ANCHORS)
    count = len(anchors)
    logits = rng.normal(-3.5 if kind == "trained" else 0.0, 1.0, (count, CLASSES))
    if kind == "trained":  # six objects, around which anchors of their class score high
        centers = (anchors[:, :2] + anchors[:, 2:]) / 2
        for label, point in enumerate(rng.uniform([0, 0], [WIDTH, HEIGHT], (6, 2))):
            logits[np.linalg.norm(centers - point, axis=1) < 24, label] += 4
    deltas, centerness = rng.normal(0, 1.0, (count, 4)), rng.normal(0, 1.5, count)
    return [x.astype(np.float32) for x in (logits, deltas, centerness)]


def theirs(logits, deltas, centerness, **test_cfg):
    """Return MMDetection's boxes, scores and labels; `test_cfg` is that of its ATSS config."""
    head = TheirHead(
        num_classes=CLASSES,
        in_channels=8,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=list(ANCHORS.strides),
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
    )
    levels = [[], [], []]
    start = 0
    for stride, size in zip(ANCHORS.strides, boxes.level_sizes(HEIGHT, WIDTH, ANCHORS)):
        rows = -(-HEIGHT // stride)
        for level, values in zip(levels, (logits, deltas, centerness[:, None])):
            grid = values[start : start + size].reshape(1, rows, size // rows, -1)
            level.append(torch.from_numpy(np.moveaxis(grid, -1, 1).copy()))
        start += size
    cfg = ConfigDict(min_bbox_size=0, nms=dict(type="nms", iou_threshold=0.6), **test_cfg)
    (found,) = head.predict_by_feat(*levels, [{"img_shape": (HEIGHT, WIDTH)}], cfg=cfg)
    return [x.numpy() for x in (found.bboxes, found.scores, found.labels)]


def ours(logits, deltas, centerness, **config):
    """Return our boxes, scores and labels."""
    model = FixedHead(*(x[None] for x in (logits, deltas, centerness)))
    run = jax.jit(functools.partial(predict, model, config=DecodeConfig(**config)))
    image, sizes = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8), np.array([[HEIGHT, WIDTH]])
    found = run(image, sizes, np.eye(CLASSES, dtype=np.float32))
    return [np.asarray(x[0])[found.mask[0]] for x in (found.boxes, found.scores, found.labels)]


def compare_sets(on, found, expected):
    """Compare detections of equal labels; in order, but for scores that are equal when rounded."""
    difference = np.abs(found[0][:, None] - expected[0]).max(-1)
    difference += 1e6 * (found[2][:, None] != expected[2])
    partner = difference.argmin(axis=1)
    assert len(found[0]) == len(expected[0]) == len(set(partner.tolist())) > 0
    rank = np.abs(partner - np.arange(len(partner)))
    assert np.abs(expected[1][partner] - expected[1])[rank > 0].max(initial=0) < 1e-5
    compare("Decoding", REFERENCE, on, found, [x[partner] for x in expected], 1e-4)


@pytest.fixture(autouse=True)
def reference_nms(monkeypatch):
    monkeypatch.setattr(base_dense_head, "batched_nms", greedy_nms)


@pytest.mark.parametrize("count", [100, 5000])
def test_without_a_threshold(count):
    """Every pair takes part, as for AP."""
    values = outputs("any")
    expected = theirs(*values, score_thr=0.0, nms_pre=10**6, max_per_img=count)
    found = ours(*values, max_detections=count)
    assert len(expected[0]) == 100 or 1000 < len(expected[0]) < 5000
    compare_sets(f"no threshold, {count} boxes an image at most", found, expected)


def test_with_the_settings_of_their_config():
    """score_thr 0.05, nms_pre 1000 a level, 100 boxes an image (configs/atss)."""
    values = outputs("trained")
    expected = theirs(*values, score_thr=0.05, nms_pre=1000, max_per_img=5000)
    pairs = 1 / (1 + np.exp(-values[0])) > 0.05
    assert pairs[: boxes.level_sizes(HEIGHT, WIDTH, ANCHORS)[0]].sum() > 1000  # it cuts
    # Theirs keeps pairs whose product is below the threshold; ours does not.
    above = expected[1] > 0.05
    found = ours(*limited(values, 1000), score_threshold=0.05, max_detections=5000)
    expected = [x[above] for x in expected]
    assert 100 < len(expected[0]) < len(above)
    compare_sets("score_thr 0.05, nms_pre 1000", found, expected)
    best = theirs(*values, score_thr=0.05, nms_pre=1000, max_per_img=100)
    found = ours(*limited(values, 1000), score_threshold=0.05, max_detections=100)
    compare_sets("score_thr 0.05, nms_pre 1000, the 100 best", found, best)


def limited(values, nms_pre):
    """Return the outputs with only the `nms_pre` best pairs of each level, as theirs keeps."""
    logits, start = values[0].copy(), 0
    for size in boxes.level_sizes(HEIGHT, WIDTH, ANCHORS):
        level = logits[start : start + size]
        if level.size > nms_pre:
            level[level < np.sort(level, axis=None)[-nms_pre]] = -200.0  # a probability of 0
        start += size
    return logits, *values[1:]
