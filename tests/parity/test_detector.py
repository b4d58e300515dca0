"""Validates neck, head, boxes, assignment and losses against MMDetection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from comparing import apply, compare, randomized
from deformable import their_deform_conv
from flax import nnx
from mmdet.models.dense_heads import ATSSHead as TheirHead
from mmdet.models.losses import CrossEntropyLoss, FocalLoss, GIoULoss
from mmdet.models.necks import FPN as TheirNeck
from mmdet.models.task_modules import AnchorGenerator, ATSSAssigner, DeltaXYWHBBoxCoder
from mmengine.structures import InstanceData
from torch.nn import functional

from detclipv2_jax.models.atss_head import ATSSHead, HeadConfig
from detclipv2_jax.models.fpn import FPN
from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.ops import boxes, losses
from detclipv2_jax.ops.assign import atss_assign

# MMDetection's anchors sit on the corners of the patches, ours by default on their centers.
ANCHORS = boxes.AnchorConfig(offset=0.0)
GENERATOR = AnchorGenerator(
    ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=list(ANCHORS.strides)
)
WIDTHS = (16, 32, 64)
SIZES = [(64, 96), (97, 64), (333, 501)]


def maps(height, width, widths, rng):
    strides = (8, 16, 32, 64, 128)[: len(widths)]
    shapes = [(2, c, -(-height // s), -(-width // s)) for c, s in zip(widths, strides)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def nhwc(x):
    return np.moveaxis(np.asarray(x), 1, -1)


def kernel(conv):
    """A PyTorch convolution's weight in Flax's order."""
    return conv.weight.detach().numpy().transpose(2, 3, 1, 0)


def set_params(build, values):
    graphdef, state = nnx.split(nnx.eval_shape(build))
    params = nnx.to_pure_dict(state)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == jax.tree.map(jnp.shape, values), "every parameter has a counterpart"
    return graphdef, values


@pytest.mark.parametrize("size", SIZES)
def test_neck(size):
    theirs = TheirNeck(list(WIDTHS), 24, num_outs=5, start_level=0, add_extra_convs="on_output")
    randomized(theirs, scale=0.5)
    both = lambda conv: {"kernel": kernel(conv), "bias": conv.bias.detach().numpy()}
    out = [both(c.conv) for c in theirs.fpn_convs]
    lateral = [both(c.conv) for c in theirs.lateral_convs]
    values = {
        "lateral": {i: v | {"kernel": v["kernel"][0, 0]} for i, v in enumerate(lateral)},
        "output": dict(enumerate(out[:3])),
        "extra": dict(enumerate(out[3:])),
    }
    graphdef, params = set_params(lambda: FPN(WIDTHS, 24, rngs=Draws()), values)
    x = maps(*size, WIDTHS, np.random.default_rng(0))
    with torch.no_grad():
        expected = [nhwc(m) for m in theirs([torch.from_numpy(m) for m in x])]
    ours = apply(graphdef, params, tuple(jnp.asarray(nhwc(m)) for m in x))
    on = f"maps of {size[0]}×{size[1]}, five levels"
    compare("FPN", "mmdet FPN", on, list(ours), expected, 1e-5)


def their_head(channels=32, classes=24, convs=3):
    norm = dict(type="GN", num_groups=8, requires_grad=True)
    head = TheirHead(
        num_classes=classes,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=convs,
        norm_cfg=norm,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=8,
            scales_per_octave=1,
            strides=list(ANCHORS.strides),
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
        train_cfg=dict(
            assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1
        ),
    )
    return randomized(head, scale=0.3)


def head_values(head):
    module = lambda m: {
        "conv": {"kernel": kernel(m.conv)},
        "norm": {"scale": m.gn.weight.detach().numpy(), "bias": m.gn.bias.detach().numpy()},
    }
    both = lambda conv: {"kernel": kernel(conv), "bias": conv.bias.detach().numpy()}
    return {
        "cls_convs": {i: module(m) for i, m in enumerate(head.cls_convs)},
        "reg_convs": {i: module(m) for i, m in enumerate(head.reg_convs)},
        "embed": both(head.atss_cls),
        "box": both(head.atss_reg),
        "centerness": both(head.atss_centerness),
        "scales": np.stack([s.scale.detach().numpy() for s in head.scales]),
    }


@pytest.mark.parametrize("size", SIZES)
def test_head(size):
    """MMDetection's unchanged head; its classes correspond to our embedding dimensions."""
    theirs = their_head()
    cfg = HeadConfig(channels=32, convs=3, groups=8, embed_dim=24, deformable=False)
    graphdef, params = set_params(lambda: ATSSHead(32, 5, cfg, rngs=Draws()), head_values(theirs))
    x = maps(*size, (32,) * 5, np.random.default_rng(1))
    with torch.no_grad():
        answers = theirs([torch.from_numpy(m) for m in x])
    flat = [
        np.concatenate([nhwc(m).reshape(2, -1, m.shape[1]) for m in level], axis=1)
        for level in answers
    ]
    ours = apply(graphdef, params, [jnp.asarray(nhwc(m)) for m in x])
    on = f"five levels of {size[0]}×{size[1]}: embeddings, deltas, centerness"
    ours = [ours.embeddings, ours.deltas, ours.centerness[..., None]]
    compare("ATSS head", "mmdet ATSSHead", on, ours, flat, 1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_deformable_head(size):
    """MMDetection's head with a deformable convolution before the classification branch."""
    theirs = their_head()
    rng = np.random.default_rng(8)
    draw = lambda *shape: rng.normal(0, 0.1, shape).astype(np.float32)
    dcn = {"offset": {"kernel": draw(3, 3, 32, 27), "bias": draw(27)}, "kernel": draw(3, 3, 32, 32)}
    cfg = HeadConfig(channels=32, convs=3, groups=8, embed_dim=24)
    values = head_values(theirs) | {"dcn": dcn}
    graphdef, params = set_params(lambda: ATSSHead(32, 5, cfg, rngs=Draws()), values)
    x = maps(*size, (32,) * 5, np.random.default_rng(1))
    expected = []
    with torch.no_grad():
        weight = torch.from_numpy(dcn["offset"]["kernel"].transpose(3, 2, 0, 1))
        bias, kernel_ = (torch.from_numpy(a) for a in (dcn["offset"]["bias"], dcn["kernel"]))
        for level in map(torch.from_numpy, x):
            regression = level
            for conv in theirs.reg_convs:
                regression = conv(regression)
            moved = functional.conv2d(regression, weight, bias, padding=1).permute(0, 2, 3, 1)
            region = their_deform_conv(
                level.permute(0, 2, 3, 1), moved[..., :18], moved[..., 18:].sigmoid(), kernel_
            ).permute(0, 3, 1, 2)
            for conv in theirs.cls_convs:
                region = conv(region)
            expected.append(nhwc(theirs.atss_cls(region)).reshape(2, -1, 24))
    ours = apply(graphdef, params, [jnp.asarray(nhwc(m)) for m in x]).embeddings
    on = f"five levels of {size[0]}×{size[1]}, deformable: embeddings"
    reference = "mmdet ATSSHead with torch grid_sample"
    compare("ATSS head", reference, on, ours, np.concatenate(expected, axis=1), 1e-4)


def their_anchors(height, width):
    shapes = [(-(-height // s), -(-width // s)) for s in ANCHORS.strides]
    levels = GENERATOR.grid_priors(shapes, device="cpu")
    return torch.cat(levels), [len(level) for level in levels]


@pytest.mark.parametrize("size", [*SIZES, (800, 1344)])
def test_anchors(size):
    theirs, counts = their_anchors(*size)
    assert list(boxes.level_sizes(*size, ANCHORS)) == counts
    on = f"canvas of {size[0]}×{size[1]}"
    ours = boxes.anchor_grid(*size, ANCHORS)
    compare("Anchors", "mmdet AnchorGenerator", on, ours, theirs.numpy(), 0)


def test_box_coder():
    rng = np.random.default_rng(2)
    anchors, _ = their_anchors(97, 64)
    coder = DeltaXYWHBBoxCoder(target_stds=[0.1, 0.1, 0.2, 0.2])
    # Up to ±15 after the stds: far beyond the clamp of a side's growth at 1000/16.
    deltas = (rng.normal(size=(len(anchors), 4)) * rng.choice([1, 30], (len(anchors), 1))).astype(
        np.float32
    )
    theirs = coder.decode(anchors, torch.from_numpy(deltas)).numpy()
    ours = jax.jit(boxes.decode_deltas)(anchors.numpy(), deltas)
    reference = "mmdet DeltaXYWHBBoxCoder"
    compare("Boxes decoded", reference, "deltas to ±90, clamped", ours, theirs, 1e-5)
    targets = random_boxes(rng, len(anchors), 64, 97, "mixed")
    theirs = coder.encode(anchors, torch.from_numpy(targets)).numpy()
    ours = jax.jit(boxes.encode_deltas)(anchors.numpy(), targets)
    compare("Boxes encoded", reference, "random boxes", ours, theirs, 1e-5)


KINDS = ("mixed", "crowd", "tiny", "huge", "duplicate", "edge", "none")


def random_boxes(rng, count, width, height, kind):
    """Return float32 boxes (count, 4) inside the image."""
    low, high = {"tiny": (1, 6), "huge": (0.7, 1.0), "crowd": (10, 40)}.get(kind, (2, 1.0))
    limit = np.array([width, height])
    low = low * limit if kind == "huge" else np.full(2, low)
    high = high * limit if isinstance(high, float) else np.minimum(high, limit)
    sides = rng.uniform(low, high, (count, 2))
    center = rng.uniform(0, 1, (count, 2)) if kind != "crowd" else rng.normal(0.5, 0.05, (count, 2))
    start = np.clip(center * limit - sides / 2, 0, limit - sides)
    if kind == "edge":
        start = np.where(rng.random((count, 2)) < 0.5, 0, limit - sides)
    found = np.concatenate([start, start + sides], axis=1).astype(np.float32)
    return np.repeat(found[: -(-count // 3)], 3, axis=0)[:count] if kind == "duplicate" else found


def scenes(count=30):
    """210 scenes over two canvases, of every kind, with 1 to 60 boxes."""
    rng = np.random.default_rng(3)
    for number in range(count):
        height, width = ((256, 320), (97, 200))[number % 2]
        for kind in KINDS:
            boxes_in = 0 if kind == "none" else int(rng.integers(1, 60))
            yield kind, height, width, random_boxes(rng, boxes_in, width, height, kind)


@jax.jit
def _assign_small(anchors, found, real):
    return atss_assign(anchors, jnp.ones(len(anchors), bool), SMALL, found, real)


SMALL = boxes.level_sizes(97, 200, ANCHORS)
LARGE = boxes.level_sizes(256, 320, ANCHORS)


@jax.jit
def _assign_large(anchors, found, real):
    return atss_assign(anchors, jnp.ones(len(anchors), bool), LARGE, found, real)


def test_assignment():
    """Every anchor's box, label, box target and centerness target."""
    ours, theirs, count = [], [], 0
    assigner, centerness = ATSSAssigner(topk=9), jax.jit(boxes.centerness_targets)
    for kind, height, width, found in scenes():
        anchors, counts = their_anchors(height, width)
        labels = torch.arange(len(found)) % 7
        result = assigner.assign(
            InstanceData(priors=anchors),
            counts,
            InstanceData(bboxes=torch.from_numpy(found), labels=labels),
        )
        padded = np.zeros((60, 4), np.float32)
        padded[: len(found)] = found
        assign = _assign_small if height == 97 else _assign_large
        matched = assign(anchors.numpy(), padded, np.arange(60) < len(found))
        expected = result.gt_inds.numpy() - 1
        np.testing.assert_array_equal(matched, expected, f"a scene of kind {kind}")
        positive = expected >= 0
        box = padded[np.asarray(matched)[positive]]
        their_box = torch.from_numpy(found)[result.gt_inds[positive] - 1]
        their_center = (
            their_head().centerness_target(anchors[positive], their_box) if positive.any() else []
        )
        our_center = np.asarray(centerness(anchors.numpy(), padded[np.maximum(matched, 0)]))
        ours.append((np.asarray(matched), np.asarray(matched)[positive] % 7, box))
        theirs.append((expected, result.labels.numpy()[positive], their_box.numpy()))
        np.testing.assert_allclose(our_center[positive], their_center, rtol=1e-5)
        count += 1
    assert count >= 200
    on = f"{count} scenes: {', '.join(KINDS)}"
    compare("ATSS assignment, labels, box targets", "mmdet ATSSAssigner", on, ours, theirs, 0)


def test_centerness_targets():
    rng = np.random.default_rng(4)
    anchors, _ = their_anchors(256, 320)
    centers = (anchors[:, :2] + anchors[:, 2:]).numpy() / 2
    reach = rng.uniform(0.5, 80, (len(anchors), 4)).astype(np.float32)
    found = np.concatenate([centers - reach[:, :2], centers + reach[:, 2:]], axis=1)
    theirs = their_head().centerness_target(anchors, torch.from_numpy(found)).numpy()
    ours = jax.jit(boxes.centerness_targets)(anchors.numpy(), found)
    compare("Centerness targets", "mmdet ATSSHead", "boxes around their anchor", ours, theirs, 1e-6)


def gradient_of(loss, *inputs):
    tensors = [torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True) for x in inputs]
    value = loss(*tensors)
    value.sum().backward()
    return [value.detach().numpy(), *(t.grad.numpy() for t in tensors)]


def value_and_gradient(loss, *inputs):
    arguments = tuple(range(len(inputs)))
    run = jax.jit(lambda *a: (loss(*a), jax.grad(lambda *b: loss(*b).sum(), arguments)(*a)))
    value, gradients = run(*(jnp.asarray(x, jnp.float32) for x in inputs))
    return [value, *gradients]


def test_focal_loss():
    rng = np.random.default_rng(5)
    logits = (rng.normal(size=(200, 30)) * 8).astype(np.float32)
    labels = rng.integers(0, 31, 200)  # 30 is background
    hot = np.eye(31)[labels][:, :30]
    their_loss = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25, reduction="none")
    theirs = gradient_of(lambda x: their_loss(x, torch.from_numpy(labels)), logits)
    ours = value_and_gradient(lambda x: losses.sigmoid_focal(x, hot), logits)
    on = "logits to ±30: value and gradient, float64"
    compare("Focal loss", "mmdet FocalLoss", on, ours, theirs, 1e-5)


def test_giou_loss():
    rng = np.random.default_rng(6)
    a, b = (random_boxes(rng, 300, 320, 256, kind) for kind in ("mixed", "tiny"))
    # Random boxes, and touching, nested, equal and distant ones.
    a = np.concatenate([a, [[0, 0, 4, 4], [0, 0, 9, 9], [2, 2, 5, 5]]]).astype(np.float32)
    b = np.concatenate([b, [[4, 0, 8, 4], [3, 3, 4, 4], [900, 2, 905, 5]]]).astype(np.float32)
    their_loss = GIoULoss(eps=0.0, reduction="none")
    theirs = gradient_of(lambda x: their_loss(x, torch.from_numpy(b).double()), a)
    ours = value_and_gradient(lambda x: losses.giou_loss(x, b), a)
    on = "random, touching, nested and distant boxes: value and gradient"
    compare("GIoU loss", "mmdet GIoULoss", on, ours, theirs, 1e-5)


def test_centerness_loss():
    rng = np.random.default_rng(7)
    logits = (rng.normal(size=500) * 10).astype(np.float32)
    target = rng.uniform(size=500)
    their_loss = CrossEntropyLoss(use_sigmoid=True, reduction="none")
    theirs = gradient_of(lambda x: their_loss(x, torch.from_numpy(target)), logits)
    ours = value_and_gradient(lambda x: losses.binary_cross_entropy(x, target), logits)
    on = "logits to ±40: value and gradient"
    compare("Centerness loss", "mmdet CrossEntropyLoss", on, ours, theirs, 1e-5)
