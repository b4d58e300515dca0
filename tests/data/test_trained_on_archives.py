"""One run over miniatures of all published archives, each prepared from its form on disk."""

import importlib.util
import json
import math

import pytest
import tiny_run
from test_prepare_commands import ARCHIVES

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data.index import Source
from detclipv2_jax.text import phrases

KINDS = {
    "detection": ("objects365", "lvis", "coco", "odinw"),
    "grounding": ("goldg",),
    "image_text": ("conceptual_captions",),
    "classification": ("imagenet",),
}


def script(name, *arguments):
    path = tiny_run.ROOT / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main([*map(str, arguments)]) == 0


@pytest.mark.slow
def test_every_archive_is_trained_on(tmp_path):
    try:
        phrases.load()
    except UserError as error:
        pytest.skip(f"no English spaCy pipeline: {error}")
    data = tmp_path / "data"
    for name, (write, _) in ARCHIVES.items():
        write(tmp_path / name)
        script("prepare_data", name, f"--from={tmp_path / name}", f"--to={data / name}", "--jobs=1")
    script("prepare_concepts", f"--from={data}", f"--to={data / 'concepts'}")
    overrides = {f"data.{kind}.sources": sources for kind, sources in KINDS.items()}
    overrides |= {"data.dictionary": "concepts", "data.detection.definitions": True}
    overrides |= {"eval.dataset": "", "data.image_text.begin": 0.0}
    overrides |= {f"data.{kind}.batch_size": 4 for kind in KINDS}
    overrides |= {"data.classification.repeat": 3, "data.classification.shapes": ((32, 32),)}
    process = tiny_run.run(data, tmp_path / "run", **overrides)
    assert process.returncode == 0, process.stderr[-3000:]

    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = [(line["kind"], line["loss"]) for line in lines]
    assert {kind for kind, _ in losses} == set(KINDS)
    assert all(math.isfinite(loss) for _, loss in losses)
    # Two epochs, the last batch of a kind filled up with empty slots.
    records = {k: sum(len(Source.open(data / name)) for name in KINDS[k]) for k in KINDS}
    passes = {kind: 2 * (3 if kind == "classification" else 1) for kind in KINDS}
    assert len(losses) == sum(passes[k] * math.ceil(count / 4) for k, count in records.items())
    assert "could not be read" not in process.stdout
    assert "detection names have a definition" in process.stdout
