"""The parts of the model have names in a compiled program, by which a profile can be read."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny_model

from detclipv2_jax.models import detclip

ALWAYS = (
    "backbone/patch_embed",
    "backbone/merging",
    "backbone/norm",
    "neck",
    "head/regression_branch",
    "head/regression_branch/outputs",
    "head/deformable_convolution",
    "head/classification_branch",
    "head/outputs",
    "text/embedding",
    "text/projection",
)
WRITTEN_OUT = (
    "backbone/stage0/block1/attention",
    "backbone/stage1/block3/mlp",
    "backbone/stage3/block0/mlp",
    "text/block2/attention",
)
IN_A_LOOP = ("backbone/stage1/loop", "block1/attention", "text/loop", "block0/mlp")


@pytest.mark.parametrize("loop", [False, True])
def test_every_part_is_named_in_the_program(loop):
    config = tiny_model.CONFIG
    config = dataclasses.replace(
        config,
        swin=dataclasses.replace(config.swin, depths=(2, 4, 1, 1)),
        text=dataclasses.replace(config.text, layers=3),
        loop=loop,
    )
    graph, params = detclip.abstract(config)

    def run(params, images, tokens):
        model = detclip.build(graph, params)
        return model.encode_image(images), model.encode_text(tokens)

    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((3, 4), jnp.int32)
    text = jax.jit(run).lower(params, images, tokens).as_text(debug_info=True)
    expected = ALWAYS + (IN_A_LOOP if loop else WRITTEN_OUT)
    assert [name for name in expected if f"/{name}/" not in text] == []
