"""The losses of each kind, against hand-made values and each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from tiny_batch import LOSS, make_batch

from detclipv2_jax.models import detclip, parameters
from detclipv2_jax.ops import boxes, losses
from detclipv2_jax.ops.assign import atss_assign
from detclipv2_jax.ops.contrastive import ContrastiveConfig
from detclipv2_jax.text.tokenizer import tokenize
from detclipv2_jax.training import objective
from detclipv2_jax.training.objective import LossConfig, ProposalConfig


@functools.cache
def loss_fn(config=LOSS, model=tiny_model.CONFIG):
    graphdef, _ = detclip.abstract(model)

    @jax.jit
    def run(params, batch):
        return objective.loss_function(batch.kind)(
            detclip.build(graphdef, params), batch, config, None
        )

    return run


def loss(batch, **kwargs):
    total, terms = loss_fn(**kwargs)(tiny_model.parts()[1], batch)
    return float(total), {name: float(value) for name, value in terms.items()}


def test_kinds_add_up_as_in_equation_6():
    total, terms = loss(make_batch("detection"))
    assert terms["positives"] > 1
    expected = terms["align"] + 2 * terms["box"] + terms["centerness"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    total, terms = loss(make_batch("grounding"))
    assert set(terms) == {"align", "positives"}
    np.testing.assert_allclose(total, terms["align"])
    total, terms = loss(make_batch("image_text"))
    np.testing.assert_allclose(total, 0.1 * terms["contrastive"], rtol=1e-6)
    total, terms = loss(make_batch("classification"))
    np.testing.assert_allclose(total, 0.1 * terms["classification"], rtol=1e-6)


@pytest.mark.parametrize("kind", ["detection", "image_text", "classification"])
def test_an_empty_slot_and_unused_concepts_do_not_matter(kind):
    batch = make_batch(kind)
    before = loss(batch)

    # The last image becomes an empty slot; without it the batch is one of three.
    def emptied(name, value):
        array = np.array(getattr(batch, name))
        array[-1] = value
        return array

    nothing = {"images": 0, "sizes": 0, "boxes": 0, "labels": -1, "texts": -1}
    empty = {name: emptied(name, value) for name, value in nothing.items()}
    fields = ("images", "sizes", "boxes", "labels", "scored", "texts")
    three = {name: getattr(batch, name)[:3] for name in fields}
    config = LossConfig(proposals=ProposalConfig(group=1, k=6, score="sample"))
    a = loss(dataclasses.replace(batch, **empty), config=config)
    b = loss(dataclasses.replace(batch, **three), config=config)
    np.testing.assert_allclose(a[0], b[0], rtol=2e-5)
    # Masked rows of the table do not matter.
    other = np.array(batch.tokens)
    other[6:] = tokenize(["zebra", "a very different thing"])
    after = loss(dataclasses.replace(batch, tokens=other))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)


def test_a_box_without_a_concept_in_the_table_is_neither_object_nor_background():
    batch = make_batch("detection")
    labels = np.array(batch.labels)
    labels[0, 0] = -1
    dropped = dataclasses.replace(batch, labels=labels)
    model = detclip.build(*tiny_model.parts())
    terms = [loss(b)[1] for b in (batch, dropped)]
    assert terms[0]["positives"] == terms[1]["positives"]
    # The difference by hand: the logits of the anchors matched with this box.
    anchors = jnp.asarray(boxes.anchor_grid(64, 64, model.cfg.anchors))
    inside = boxes.anchors_inside(anchors, batch.sizes)
    levels = boxes.level_sizes(64, 64, model.cfg.anchors)
    matched = atss_assign(anchors, inside[0], levels, batch.boxes[0], batch.labels[0, :, 0] >= 0)
    own = np.asarray(matched) == 0
    assert own.any()
    regions = jax.jit(lambda m: detclip.build(tiny_model.parts()[0], m).encode_image(batch.images))(
        tiny_model.parts()[1]
    )
    logits = model.logits(regions.embeddings[0], model.encode_text(batch.tokens))[:, :6]
    targets = np.arange(6) == batch.labels[0, 0]
    missing = losses.sigmoid_focal(logits, jnp.asarray(targets))[own].sum() / terms[0]["positives"]
    np.testing.assert_allclose(terms[0]["align"] - terms[1]["align"], missing, rtol=1e-3)


def test_candidates_set_how_many_anchors_a_box_is_assigned():
    batch = make_batch("detection")
    positives = [
        float(loss(batch, config=LossConfig(candidates=n))[1]["positives"]) for n in (1, 9)
    ]
    assert positives == [_positives(batch, 1), _positives(batch, 9)]
    assert positives[0] < positives[1]


def _positives(batch, topk):
    grid = tiny_model.CONFIG.anchors
    anchors = jnp.asarray(boxes.anchor_grid(64, 64, grid))
    inside = boxes.anchors_inside(anchors, batch.sizes)
    levels = boxes.level_sizes(64, 64, grid)
    return sum(
        int((atss_assign(anchors, mask, levels, box, label[:, 0] >= 0, topk=topk) >= 0).sum())
        for mask, box, label in zip(inside, batch.boxes, batch.labels)
    )


def test_every_image_is_scored_against_the_concepts_of_all():
    """A concept of another image is a negative here: more concepts, more loss."""
    batch = make_batch("detection")
    fewer = dataclasses.replace(batch, token_mask=np.isin(np.arange(8), batch.labels[:3]))
    assert fewer.token_mask.sum() < 6
    assert loss(batch)[1]["align"] > loss(fewer)[1]["align"]


@functools.cache
def encoded(model=tiny_model.CONFIG):
    """Return a function of (params, images, tokens): the region outputs and the concepts."""
    graphdef, _ = detclip.abstract(model)

    @jax.jit
    def run(params, images, tokens):
        model = detclip.build(graphdef, params)
        return model.encode_image(images), model.encode_text(tokens)

    return run


def matches(batch, image):
    """Return the box of each anchor of an image, -1 for none, and which anchors are inside."""
    grid = tiny_model.CONFIG.anchors
    anchors = jnp.asarray(boxes.anchor_grid(*batch.canvas, grid))
    inside = boxes.anchors_inside(anchors, batch.sizes)[image]
    corners = batch.boxes[image]
    real = corners[:, 2] > corners[:, 0]
    matched = atss_assign(anchors, inside, boxes.level_sizes(*batch.canvas, grid), corners, real)
    return np.asarray(matched), np.asarray(inside)


def reference_align(batch):
    """Return L_align of a batch pair by pair in float64 (Yao et al. 2023, eq. 6)."""
    graphdef, params = tiny_model.parts()
    regions, concepts = encoded()(params, batch.images, batch.tokens)
    model = detclip.build(graphdef, params)
    features, concepts = np.float64(regions.embeddings), np.float64(concepts)
    scale, bias = float(model.scale()), float(model.logit_bias[...])
    total, positives = 0.0, 0
    for b in range(len(features)):
        matched, inside = matches(batch, b)
        positives += (matched >= 0).sum()
        logits = scale * features[b] @ concepts.T + bias
        for k, m in np.ndindex(*logits.shape):
            own = [] if matched[k] < 0 else [x for x in batch.labels[b, matched[k]] if x >= 0]
            ignored = matched[k] >= 0 and not own
            if ignored or not inside[k] or not batch.token_mask[m]:
                continue
            if m in own:
                total += 0.25 * (1 - sigmoid(logits[k, m])) ** 2 * np.logaddexp(0, -logits[k, m])
            elif batch.scored[b, m]:
                total += 0.75 * sigmoid(logits[k, m]) ** 2 * np.logaddexp(0, logits[k, m])
    return total / positives


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def federated_batch():
    """Return a batch of four images, each scored on a few concepts only; boxes have two phrases.

    The second box of image 1 has no row. Image 2 is scored on no concept: its boxes are positives
    of their own phrases all the same.
    """
    batch = make_batch("detection")
    labels = np.concatenate([batch.labels, (batch.labels + 2) % 6], axis=-1)
    labels[batch.labels[..., 0] < 0] = labels[1, 1] = -1
    labels[0, 0, 1] = -1
    scored = np.random.default_rng(0).random(batch.scored.shape) < 0.4
    scored[2] = False
    return dataclasses.replace(batch, labels=labels, scored=scored)


@pytest.mark.parametrize("make", [lambda: make_batch("grounding"), federated_batch])
def test_the_alignment_loss_of_a_batch_equals_plain_loops(make):
    batch = make()
    np.testing.assert_allclose(loss(batch)[1]["align"], reference_align(batch), rtol=1e-5)


def test_a_concept_that_no_image_is_scored_on_only_attracts_its_own_anchors():
    batch = make_batch("detection")
    nothing = dataclasses.replace(batch, scored=np.zeros_like(batch.scored))
    own = dataclasses.replace(nothing, token_mask=np.isin(np.arange(8), batch.labels))
    assert 0 < loss(nothing)[1]["align"] == loss(own)[1]["align"] < loss(batch)[1]["align"]


WITH_SCORES = dataclasses.replace(
    tiny_model.CONFIG,
    head=dataclasses.replace(tiny_model.CONFIG.head, proposal_scores=("iou", "foreground")),
)


def test_the_additional_heads_learn_foreground_and_iou():
    """Both terms by hand. They add to the total with weight 1, and reach the regression branch."""
    graphdef, params = detclip.create(WITH_SCORES, 0)
    batch = make_batch("detection")
    labels = np.array(batch.labels)
    labels[1, 1] = -1  # without a row, but an object
    batch = dataclasses.replace(batch, labels=labels)
    regions, _ = encoded(WITH_SCORES)(params, batch.images, batch.tokens)
    anchors = boxes.anchor_grid(*batch.canvas, WITH_SCORES.anchors)
    predicted = np.asarray(boxes.decode_deltas(anchors, regions.deltas))
    foreground, quality, positives = 0.0, 0.0, 0
    for b in range(len(batch.images)):
        matched, inside = matches(batch, b)
        for k in np.flatnonzero(inside):
            z = float(regions.proposal_logits["foreground"][b, k])
            if matched[k] < 0:
                foreground += 0.75 * sigmoid(z) ** 2 * np.logaddexp(0, z)
                continue
            positives += 1
            foreground += 0.25 * (1 - sigmoid(z)) ** 2 * np.logaddexp(0, -z)
            z = float(regions.proposal_logits["iou"][b, k])
            target = float(boxes.iou(predicted[b, k], batch.boxes[b, matched[k]]))
            quality += target * np.logaddexp(0, -z) + (1 - target) * np.logaddexp(0, z)
    run = loss_fn(model=WITH_SCORES)
    total, terms = run(params, batch)
    np.testing.assert_allclose(terms["foreground"], foreground / positives, rtol=1e-5)
    np.testing.assert_allclose(terms["iou"], quality / positives, rtol=1e-5)
    expected = terms["align"] + 2 * terms["box"] + terms["centerness"]
    np.testing.assert_allclose(total, expected + terms["foreground"] + terms["iou"], rtol=1e-6)
    assert set(run(params, make_batch("grounding"))[1]) == {"align", "foreground", "positives"}

    def added(params):
        terms = objective.dense_loss(detclip.build(graphdef, params), batch, LOSS, None).terms
        return terms["foreground"] + terms["iou"]

    gradient = jax.jit(jax.grad(added))(params)
    moved = {k for k, g in parameters.parameter_paths(gradient).items() if np.abs(g).max() > 0}
    assert {"head/iou/bias", "head/foreground/kernel", "head/reg_convs/0/conv/kernel"} <= moved
    assert not any(path.startswith(("head/box", "head/embed", "text")) for path in moved)


@pytest.mark.parametrize("score", ["foreground", "iou"])
def test_the_additional_heads_rank_the_regions(score):
    graphdef, params = detclip.create(WITH_SCORES, 0)
    batch = make_batch("image_text")
    proposals = ProposalConfig(score=score, k=3, nms_iou=1.0)

    @jax.jit
    def run(params):
        model = detclip.build(graphdef, params)
        regions, concepts = model.encode_image(batch.images), model.encode_text(batch.tokens)
        pools = objective.concept_pools(batch, LossConfig(proposals=proposals))
        arguments = regions, concepts, pools, batch.sizes, batch.canvas, proposals
        return regions.proposal_logits[score], objective.select_regions(model, *arguments)

    logits, selection = run(params)
    best = np.argsort(-np.asarray(logits), axis=1)[:, :3]
    np.testing.assert_array_equal(selection.indices, best)
    assert np.isfinite(
        float(loss_fn(LossConfig(proposals=proposals), WITH_SCORES)(params, batch)[0])
    )


def test_regions_are_clipped_before_suppression_and_before_their_sizes_are_compared():
    graphdef, params = tiny_model.parts()
    batch = make_batch("image_text")
    sizes = np.int32([[64, 64], [40, 56], [64, 24], [0, 0]])
    proposals = ProposalConfig(score="centerness", k=8, nms_iou=0.5)

    @jax.jit
    def run(params):
        model = detclip.build(graphdef, params)
        regions, concepts = model.encode_image(batch.images), model.encode_text(batch.tokens)
        pools = objective.concept_pools(batch, LossConfig(proposals=proposals))
        arguments = concepts, pools, sizes, batch.canvas, proposals
        return regions, objective.select_regions(model, regions, *arguments)

    regions, selection = run(params)
    anchors = boxes.anchor_grid(*batch.canvas, tiny_model.CONFIG.anchors)
    decoded = np.asarray(boxes.decode_deltas(anchors, regions.deltas))
    assert boxes.area(decoded).max() > 4 * 64 * 64  # the flaw: as large as anchors
    for b, (height, width) in enumerate(sizes):
        inside = np.asarray(boxes.anchors_inside(jnp.asarray(anchors), sizes[b : b + 1]))[0]
        clipped = np.clip(decoded[b], 0, [width, height, width, height])
        kept = []
        for k in np.argsort(-np.asarray(regions.centerness[b]), kind="stable"):
            is_region = inside[k] and boxes.area(clipped[k]) > 0
            if is_region and all(boxes.iou(clipped[k], clipped[j]) <= 0.5 for j in kept):
                kept.append(k)
        kept = kept[:8]
        found = np.asarray(selection.indices[b])[np.asarray(selection.mask[b])]
        assert found.tolist() == kept and bool(kept) == (height > 0)
        areas = np.asarray(selection.areas[b])[: len(kept)]
        np.testing.assert_allclose(areas, [boxes.area(clipped[k]) for k in kept], rtol=1e-5)
        assert (areas <= height * width).all()


@pytest.mark.parametrize("deformable", [True, False])
def test_captions_reach_the_regression_branch_through_the_deformable_conv(deformable):
    """The change over DetCLIP v1's head (paper §3.3): without it these gradients are zero."""
    model = dataclasses.replace(
        tiny_model.CONFIG, head=dataclasses.replace(tiny_model.CONFIG.head, deformable=deformable)
    )
    graphdef, params = detclip.create(model, 0)
    batch = make_batch("image_text")
    # The weights of the offsets start at zero, where no gradient passes.
    params = jax.tree.map(lambda p: p + 0.01, params)
    run = lambda p: objective.image_text_loss(detclip.build(graphdef, p), batch, LOSS, None)[0]
    gradients = parameters.parameter_paths(jax.jit(jax.grad(run))(params))
    branch = [np.abs(g).max() for path, g in gradients.items() if path.startswith("head/reg")]
    assert branch
    assert (max(branch) > 0) == deformable


VARIANTS = {
    "direction": [
        LossConfig(word_region=ContrastiveConfig(direction=d)) for d in ("image_to_text", "both")
    ],
    "matching": [
        LossConfig(word_region=ContrastiveConfig(matching=m)) for m in ("soft", "max_size")
    ],
    "temperature": [LossConfig(word_region=ContrastiveConfig(temperature=0.07))],
    "score": [
        LossConfig(proposals=ProposalConfig(score=s))
        for s in ("sample", "step", "centerness", "batch_centerness")
    ],
    "k": [LossConfig(proposals=ProposalConfig(k=1))],
    "weight": [LossConfig(contrastive=1.0)],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_ablations_of_the_paper_are_config_values(name):
    batch = make_batch("image_text")
    seen = {round(loss(batch, config=LOSS)[0], 6)}
    for variant in VARIANTS[name]:
        proposals = dataclasses.replace(variant.proposals, group=2, k=min(variant.proposals.k, 6))
        value = loss(batch, config=dataclasses.replace(variant, proposals=proposals))[0]
        assert np.isfinite(value) and value > 0
        seen.add(round(value, 6))
    assert len(seen) > 1, "the field changes nothing"


@pytest.mark.parametrize(("group", "count"), [(2, 1), (8, 1), (4, 3)])
def test_classes_against_a_float64_reference(group, count):
    """The best regions of an image for the names of its group; its own name among all names."""
    batch = make_batch("classification", images=8)
    sizes, texts = np.array(batch.sizes), np.array(batch.texts)
    sizes[1] = 40, 56
    sizes[5], texts[5] = 0, -1  # an empty slot
    texts[[2, 6]] = texts[3]  # images of one class
    batch = dataclasses.replace(batch, sizes=sizes, texts=texts)
    no_nms = ProposalConfig(group=group, nms_iou=1.0)  # the best k regions, whatever they overlap
    config = LossConfig(proposals=no_nms, classification_k=count, classification=0.3)
    total, terms = loss(batch, config=config)

    graphdef, params = tiny_model.parts()

    @jax.jit
    def encode(params, batch):
        model = detclip.build(graphdef, params)
        regions = model.encode_image(batch.images, None, batch.sizes)
        return regions, model.encode_text(batch.tokens)

    regions, names = encode(params, batch)
    scale = float(detclip.build(graphdef, params).scale())
    dots = scale * np.float64(regions.embeddings) @ np.float64(names).T
    grid = tiny_model.CONFIG.anchors
    inside = boxes.anchors_inside(jnp.asarray(boxes.anchor_grid(64, 64, grid)), sizes)
    expected, used = [], np.flatnonzero(batch.token_mask)
    for image, (own,) in enumerate(texts):
        if own < 0:
            continue
        first = image // group * group
        pool = {int(name) for name in texts[first : first + group, 0] if name >= 0}
        score = np.where(inside[image], dots[image][:, sorted(pool)].max(axis=1), -np.inf)
        best = np.argsort(-score)[:count]
        logits = dots[image, best].max(axis=0)
        expected.append(np.log(np.exp(logits[used]).sum()) - logits[own])
    assert len(expected) == 6
    np.testing.assert_allclose(terms["classification"], np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(total, 0.3 * np.mean(expected), rtol=1e-5)


def test_the_gradient_of_classes_reaches_regions_and_names_but_not_the_choice():
    """Finite differences along the gradient: the regions that are chosen stay the same."""
    batch = make_batch("classification", seed=1)
    _, params = tiny_model.parts()
    run = lambda p: loss_fn()(p, batch)[0]
    gradient = jax.jit(jax.grad(run))(params)
    paths = parameters.parameter_paths(gradient)
    for moved in ("text", "head/embed", "backbone", "logit_scale"):
        assert any(jnp.abs(g).max() > 0 for path, g in paths.items() if path.startswith(moved))
    for still in ("logit_bias", "head/centerness", "head/box"):  # they only rank or place regions
        assert all(jnp.abs(g).max() == 0 for path, g in paths.items() if path.startswith(still))
    for part in ("text", "head"):
        direction = jax.tree.map(jnp.zeros_like, params) | {part: gradient[part]}
        square = sum(float(jnp.vdot(g, g)) for g in jax.tree.leaves(gradient[part]))
        step = 1e-4 / np.sqrt(square)
        ends = []
        for signed in (step, -step):
            moved = jax.tree.map(functools.partial(_moved, signed), params, direction)
            ends.append(run(moved))
        slope = (float(ends[0]) - float(ends[1])) / (2 * step)
        assert slope == pytest.approx(square, rel=2e-2)


def _moved(step, value, direction):
    return value + step * direction
