"""Validates text tower and tokenizer against Hugging Face, OpenAI (open_clip) and a third."""

import csv
import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import open_clip
import pytest
import torch
from comparing import apply, compare, filled, randomized, to_numpy
from instant_clip_tokenizer import Tokenizer as InstantTokenizer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from detclipv2_jax.models.initializers import Draws
from detclipv2_jax.models.text import TextConfig, TextTower
from detclipv2_jax.text.tokenizer import CONTEXT, END, START, tokenize
from detclipv2_jax.weights import clip as layouts

HOSTILE = [
    "",
    " ",
    "word " * 300,
    "antidisestablishmentarianism" * 20,
    "a 👩‍👩‍👧 family 🏳️‍🌈 and a ⛄",
    "Crème brûlée, naïve façade, Ångström",
    "Cre\u0300me bru\u0302le\u0301e",
    "the cat&#39;s &quot;hat&quot; &amp;amp; tie",
    "a <b>bold</b> &lt;tag&gt;",
    "curly “quotes” and the dog’s ball",
    "don't won't it's we'll I'm they're I'd you've",
    "ALL CAPS and MiXeD",
    "tabs\tand\nnewlines  and   spaces",
    "数字 123 и кириллица ٣",
    "1,234.56 #hashtag @name http://a.b/c?d=e",
    "<|startoftext|> and <|endoftext|> inside",
    "\u200bzero\u200bwidth\ufeff",
    "sch\u00c3\u00b6n",  # UTF-8 read as Latin-1
    "ﬁne ligature",
    "!!!???...---",
    "x" * 1000,
]


def shared_texts():
    root = Path(os.environ.get("SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"{root} with captions and names does not exist. Set SHARED_DATA.")
    names = (root / "clip_text/Objects365_names_fix.csv").read_text().splitlines()
    texts = [text for row in csv.reader(names) for text in row[1:]]
    for info in json.loads((root / "clip_text/lvis_v1_train_cat_info.json").read_text()):
        texts += [info["name"].replace("_", " "), info["def"], *info["synonyms"]]
    annotations = root / "photos" / "annotations"
    for name in ("captions_train.json", "captions_dev_val.json"):
        texts += [a["caption"] for a in json.loads((annotations / name).read_text())["annotations"]]
    content = json.loads((annotations / "instances_train.json").read_text())
    texts += [c["name"] for c in content["categories"]]
    content = json.loads((annotations / "grounding_derived_train.json").read_text())
    texts += [image["caption"] for image in content["images"]]
    lines = (annotations / "image_text.jsonl").read_text().splitlines()
    return texts + [caption for line in lines for caption in json.loads(line)["captions"]]


def theirs_openai(texts):
    return open_clip.tokenizer.SimpleTokenizer(context_length=CONTEXT)(texts).numpy()


def theirs_instant(texts):
    tokenizer = InstantTokenizer()
    rows = np.zeros((len(texts), CONTEXT), np.int32)
    for row, text in zip(rows, texts):
        ids = [START, *tokenizer.encode(text)[: CONTEXT - 2], END]
        row[: len(ids)] = ids
    return rows


def test_tokens_of_hostile_strings():
    ours = tokenize(HOSTILE)
    for text, a, b in zip(HOSTILE, ours, theirs_openai(HOSTILE)):
        np.testing.assert_array_equal(a, b, text[:50])
    compare(
        "Tokenizer",
        "open_clip_torch SimpleTokenizer (OpenAI's)",
        f"{len(HOSTILE)} hostile strings: emoji, accents, HTML, 300 words, empty, …",
        ours,
        theirs_openai(HOSTILE),
        0,
    )


@pytest.mark.parametrize(
    ("reference", "theirs"),
    [
        ("open_clip_torch SimpleTokenizer (OpenAI's)", theirs_openai),
        ("instant-clip-tokenizer (Rust)", theirs_instant),
    ],
)
def test_tokens_of_real_texts(reference, theirs):
    texts = shared_texts()
    ours = tokenize(texts)
    on = f"{len(texts)} real captions, names and definitions"
    compare("Tokenizer", reference, on, ours, theirs(texts), 0)
    assert (ours.max(axis=1) == END).all(), "truncation keeps the end"


def features_texts():
    return [t for t in HOSTILE] + ["a red anchor", "cat"]


def test_features_are_hugging_faces():
    cfg = TextConfig()
    their = CLIPTextConfig(
        vocab_size=cfg.vocab,
        hidden_size=cfg.width,
        intermediate_size=4 * cfg.width,
        projection_dim=cfg.embed_dim,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        max_position_embeddings=77,
        eos_token_id=END,
    )
    model = randomized(CLIPTextModelWithProjection(their))
    graphdef, params = filled(
        lambda: TextTower(cfg, rngs=Draws()), to_numpy(model.state_dict()), layouts.LAYOUTS
    )
    tokens = tokenize(features_texts())
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).text_embeds.numpy()
    ours = apply(graphdef, params, jnp.asarray(tokens))
    reference = "transformers CLIPTextModelWithProjection"
    compare("Text tower", reference, f"{len(tokens)} texts, ViT-B's tower", ours, theirs, 1e-4)


@pytest.mark.parametrize(
    ("activation", "theirs_is"),
    [("quick_gelu", open_clip.transformer.QuickGELU), ("gelu", torch.nn.GELU)],
)
def test_features_are_openais_and_open_clips(activation, theirs_is):
    """open_clip's towers of LAION-2B and DataComp have the exact GELU."""
    cfg = TextConfig(layers=3, activation=activation)
    model = open_clip.transformer.TextTransformer(
        context_length=77,
        vocab_size=cfg.vocab,
        width=cfg.width,
        heads=cfg.heads,
        layers=cfg.layers,
        output_dim=cfg.embed_dim,
        act_layer=theirs_is,
    )
    randomized(model)
    graphdef, params = filled(
        lambda: TextTower(cfg, rngs=Draws()), to_numpy(model.state_dict()), layouts.LAYOUTS
    )
    tokens = tokenize(features_texts())
    whole = np.zeros((len(tokens), 77), np.int64)  # open_clip's towers read all positions
    whole[:, :CONTEXT] = tokens
    with torch.no_grad():
        theirs = model(torch.from_numpy(whole)).numpy()
    ours = apply(graphdef, params, jnp.asarray(tokens))
    reference = "open_clip_torch TextTransformer"
    on = f"{len(tokens)} texts, 3 layers, {activation}"
    compare("Text tower", reference, on, ours, theirs, 1e-4)
