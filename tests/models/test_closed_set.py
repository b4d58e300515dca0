"""A closed label space in place of the text tower: plain ATSS."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.inference.predictor import Predictor
from detclipv2_jax.models import detclip, flops
from detclipv2_jax.models.closed_set import ClosedSet
from detclipv2_jax.models.parameters import parameter_paths
from detclipv2_jax.text.tokenizer import tokenize

NAMES = ("cat", "traffic light", "hot dog")
CONFIG = dataclasses.replace(
    tiny_model.CONFIG,
    classes=NAMES,
    head=dataclasses.replace(tiny_model.CONFIG.head, embed_dim=3, deformable=False),
    text=dataclasses.replace(tiny_model.CONFIG.text, embed_dim=3),
    similarity="dot",
)


@pytest.fixture(scope="module")
def model():
    return detclip.create(CONFIG, 0)


def test_each_class_has_its_unit_vector_and_other_names_have_none():
    tokens = np.concatenate([tokenize(["hot dog", "cat", "dog"]), np.zeros((1, 16), np.int32)])
    features = ClosedSet(NAMES)(jnp.asarray(tokens))
    np.testing.assert_array_equal(features, [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_logits_are_the_channels_of_the_last_convolution(model):
    """As in ATSS: a class's logit is its channel, here plus the bias that starts at the prior."""
    built = detclip.build(*model)
    images = np.random.default_rng(0).integers(0, 255, (1, 64, 64, 3), np.uint8)
    regions = built.encode_image(images)
    logits = built.logits(regions.embeddings, built.encode_text(tokenize(NAMES)))
    prior = np.log(CONFIG.prior / (1 - CONFIG.prior))
    np.testing.assert_allclose(logits, regions.embeddings + prior, rtol=1e-6)


def test_the_model_has_no_text_tower(model):
    assert not [path for path in parameter_paths(model[1]) if path.startswith("text")]
    assert flops.step(CONFIG, "detection", (64, 64), 2, 3)["text"] == 0


def test_other_names_are_refused(model):
    predictor = Predictor(*model, canvas=(64, 64))
    assert predictor.encode(["Cat"]).embeddings[0].tolist() == [1, 0, 0]
    with pytest.raises(UserError, match="closed label space of 3 names, and 'zebra' is not one"):
        predictor.encode(["cat", "zebra"])


def test_an_embedding_of_another_size_or_a_cosine_is_refused():
    with pytest.raises(UserError, match="config.model.classes has 3 names"):
        dataclasses.replace(CONFIG, similarity="cosine")
    with pytest.raises(UserError, match="config.model.classes has 2 names"):
        dataclasses.replace(CONFIG, classes=NAMES[:2])


def test_names_with_equal_tokens_are_refused():
    with pytest.raises(UserError, match="'Cat' and 'cat' have the same tokens"):
        ClosedSet(("cat", "Cat"))


def test_gradient_reaches_each_class_alone(model):
    graphdef, params = model
    images = np.zeros((1, 64, 64, 3), np.uint8)

    def logit(params):
        built = detclip.build(graphdef, params)
        regions = built.encode_image(images)
        return built.logits(regions.embeddings, built.encode_text(tokenize(["cat"])))[..., 0].sum()

    kernel = jax.grad(logit)(params)["head"]["embed"]["kernel"]
    assert np.any(np.asarray(kernel[..., 0]))
    assert not np.any(np.asarray(kernel[..., 1:]))
