"""Validates the FLOPs formulas against the count of XLA for the lowered program."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from detclipv2_jax.models import detclip, flops, sizes


def traced(function, *shapes):
    return jax.jit(function).lower(*shapes).cost_analysis()["flops"]


def model(cfg):
    graphdef, params = detclip.abstract(dataclasses.replace(cfg, dtype="float32", remat="none"))
    return lambda params: detclip.build(graphdef, params), params


def test_an_image_of_swin_t():
    """224×224 fills windows of 7. XLA also counts a few operations that are not products."""
    build, params = model(sizes.SWIN_T)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.uint8)
    counted = flops.backbone(sizes.SWIN_T.swin, 224, 224)
    assert counted == pytest.approx(
        2 * 4.36e9, rel=0.03
    )  # 4.5 G with the classifier (Swin, tab. 1)
    backbone = traced(lambda p, x: build(p).backbone(x.astype(jnp.float32)), params, image)
    assert counted < backbone < 1.06 * counted
    whole = counted + sum(flops.dense_parts(sizes.SWIN_T, 224, 224).values())
    assert whole < traced(lambda p, x: build(p).encode_image(x), params, image) < 1.5 * whole


def test_a_concept():
    build, params = model(sizes.SWIN_T)
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    counted = 8 * flops.text(sizes.SWIN_T.text)
    assert counted < traced(lambda p, t: build(p).text(t), params, tokens) < 1.05 * counted


def test_a_step_by_part():
    parts = flops.step(sizes.SWIN_T, "detection", (800, 1344), 128, 512)
    one = flops.step(sizes.SWIN_T, "detection", (800, 1344), 1, 512)
    assert set(parts) == {"backbone", "neck", "head", "deformable", "text", "alignment loss"}
    assert parts["backbone"] == pytest.approx(128 * one["backbone"])
    assert parts["text"] == one["text"]  # each concept once, whatever the batch
    plain = dataclasses.replace(
        sizes.SWIN_T, head=dataclasses.replace(sizes.SWIN_T.head, deformable=False)
    )
    assert "deformable" not in flops.step(plain, "grounding", (800, 1344), 1, 512)
    named = flops.step(
        sizes.SWIN_T, "classification", (320, 320), 6144, 1024, proposals=1, group=192
    )
    assert named["classification loss"] == 3 * 2 * 6144 * 1024 * sizes.SWIN_T.head.embed_dim
    captioned = flops.step(sizes.SWIN_T, "image_text", (320, 320), 6144, 49152)
    # 192 names of a group score its regions, of captions 49152 / 32.
    ratio = captioned["choice of regions"] / named["choice of regions"]
    assert ratio == 49152 / 32 / 192
    assert "contrastive loss" in captioned and "alignment loss" not in captioned


def test_additional_outputs_of_the_head_count():
    head = dataclasses.replace(sizes.SWIN_T.head, proposal_scores=("foreground", "iou"))
    model = dataclasses.replace(sizes.SWIN_T, head=head)
    more, less = (flops.dense_parts(m, 320, 320)["head"] for m in (model, sizes.SWIN_T))
    anchors = 40**2 + 20**2 + 10**2 + 5**2 + 3**2
    assert more - less == pytest.approx(2 * anchors * 9 * 256 * 2)


def test_encoding_the_concepts_of_a_step_once_saves_work():
    """Fifty-fold in detection, whose names repeat; phrases are drawn from many more.

    Yao et al. 2023, §4.1: 150 concepts per image in detection, 100 in grounding, batch 128."""
    text = flops.text(sizes.SWIN_T.text)
    from detclipv2_jax.training.recipes import load

    data = load("pretrain").get_config("swin_t").data
    for kind, least in (("detection", 30), ("grounding", 1.4)):
        each = 128 * data[kind].concepts_per_image * text
        once = flops.step(sizes.SWIN_T, kind, (800, 1344), 128, data[kind].table_size)["text"] / 3
        assert each / once >= least
