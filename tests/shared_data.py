"""Real names and embeddings that lie beside the checkout; a test that needs them skips without."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from detclipv2_jax.text.tokenizer import normalize

ROOT = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def clip_text():
    """The folder of CLIP's embeddings."""
    folder = ROOT / "clip_text"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there (SHARED_DATA names its parent)")
    return folder


def lvis_categories():
    """LVIS's 1203 categories, as its annotation files have them."""
    return json.loads((clip_text() / "lvis_v1_train_cat_info.json").read_text())


def objects365_names():
    """The 365 names as published, corrected."""
    return [row[2] for row in csv.reader(open(clip_text() / "Objects365_names_fix.csv"))]


def embeddings():
    """Normalized name → CLIP's embedding, of LVIS's and Objects365's names."""
    lvis = [category["name"].replace("_", " ") for category in lvis_categories()]
    found = {}
    for file, names in (
        ("lvis_v1_clip_a+cname.npy", lvis),
        ("o365_clip_a+cnamefix.npy", objects365_names()),
    ):
        vectors = np.load(clip_text() / file).astype(np.float32)
        found |= dict(zip(map(normalize, names), vectors, strict=True))
    return found
