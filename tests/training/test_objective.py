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


@pytest.mark.parametrize("kind", ["detection", "image_text"])
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
        for s in ("sample", "classification", "centerness", "batch_centerness")
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
