"""Real names, texts and embeddings next to the checkout; without them tests are skipped."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from detclipv2_jax.text.tokenizer import normalize

ROOT = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def folder(name):
    """Return a folder of the shared data."""
    found = ROOT / name
    if not found.is_dir():
        pytest.skip(f"{found} does not exist (SHARED_DATA names its parent)")
    return found


def clip_text():
    """Return the folder of CLIP's embeddings."""
    return folder("clip_text")


def lvis_categories():
    """Return the 1203 categories of LVIS, as in its annotation files."""
    return json.loads((clip_text() / "lvis_v1_train_cat_info.json").read_text())


def objects365_names():
    """Return the 365 names of Objects365 with corrected spelling."""
    return [row[2] for row in csv.reader(open(clip_text() / "Objects365_names_fix.csv"))]


def embeddings():
    """Return normalized name -> CLIP's embedding for the names of LVIS and Objects365."""
    lvis = [category["name"].replace("_", " ") for category in lvis_categories()]
    found = {}
    for file, names in (
        ("lvis_v1_clip_a+cname.npy", lvis),
        ("o365_clip_a+cnamefix.npy", objects365_names()),
    ):
        vectors = np.load(clip_text() / file).astype(np.float32)
        found |= dict(zip(map(normalize, names), vectors, strict=True))
    return found
