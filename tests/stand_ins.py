"""What stands for the encoded names of a model in tests that have no model."""

import numpy as np

from detclipv2_jax.inference.predictor import EncodedNames


def encoded_names(names, prompts=None):
    """Return names that are read as a whole, each with a text of its own, as `EncodedNames`."""
    prompts = tuple(prompts if prompts is not None else names)
    vectors = np.random.default_rng(0).normal(size=(len(prompts), 8)).astype(np.float32)
    return EncodedNames(
        names=tuple(names),
        prompts=prompts,
        embeddings=vectors,
        mask=np.ones(len(prompts), bool),
        is_cut=(False,) * len(names),
        same_as=tuple(range(len(names))),
    )
