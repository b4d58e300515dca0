"""A random batch with boxes or texts for the tiny model, and a loss config that fits its size."""

import numpy as np

from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.index import TEXT_KINDS
from detclipv2_jax.text.tokenizer import tokenize
from detclipv2_jax.training.objective import LossConfig, ProposalConfig

NAMES = ["cat", "dog", "red bus", "traffic light", "anchor", "umbrella", "tea cup", "kite"]
LOSS = LossConfig(proposals=ProposalConfig(group=4, k=6))


def make_batch(kind, images=4, seed=0):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 40, (images, 3, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 24, (images, 3, 2))], -1)
    labels = rng.integers(0, 6, (images, 3)).astype(np.int32)
    boxes[:, 2], labels[:, 2] = 0, -1  # the last slot is empty
    texts = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (images, 1)), axis=1)[:, :3].copy()
    texts[0, 2] = -1
    captioned = kind in TEXT_KINDS
    if kind == "classification":
        texts = texts[:, 2:]  # the first image has no name
    return Batch(
        images=rng.integers(0, 256, (images, 64, 64, 3), dtype=np.uint8),
        sizes=np.tile(np.int32([64, 64]), (images, 1)),
        boxes=np.zeros((images, 0, 4), np.float32) if captioned else boxes.astype(np.float32),
        labels=np.zeros((images, 0, 1), np.int32) if captioned else labels[..., None],
        scored=np.ones((images, 0 if captioned else 8), bool),
        texts=texts if captioned else np.zeros((images, 0), np.int32),
        tokens=tokenize(NAMES),
        token_mask=np.arange(8) < 6,
        kind=kind,
    )
