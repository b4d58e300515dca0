"""Sources that have concepts and no records."""

import json
from pathlib import Path

import numpy as np

from detclipv2_jax.data.index import Source
from detclipv2_jax.text import tokenizer


def source(directory: Path, kind: str, counts: dict[str, int], captions=()) -> Source:
    """A source that has concepts and no records; its strings lie on disk."""
    directory.mkdir(parents=True)
    names = [*counts, *captions]
    rows = [{"name": name, "count": counts.get(name, 1)} for name in names]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "concepts.jsonl").write_text(text, encoding="utf-8")
    none = np.zeros(0, np.int32)
    return Source(
        directory=directory,
        name=directory.name,
        kind=kind,
        info={},
        height=none,
        width=none,
        positives_offsets=np.zeros(1, np.int64),
        positives=none,
        tokens=tokenizer.pack_tokens(tokenizer.tokenize(names)),
        keys=tokenizer.keys(names),
        vocabulary=np.array([name in counts for name in names], bool),
    )
