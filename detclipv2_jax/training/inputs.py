"""Opening the prepared data of a run: its sources, their vocabulary and the plan of its steps."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.data import config as config_lib
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.index import Source
from detclipv2_jax.data.plan import KindPlan, Plan
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text.tokenizer import CONTEXT
from detclipv2_jax.training.config import RunConfig


def open_data(config: RunConfig) -> tuple[Plan, dict[str, Source], list[str]]:
    """The plan, the open sources by name, and the names that detection data knows."""
    root, kinds = Path(config.data_dir), config.data.kinds()
    if config.data.skip_missing:
        kinds = {kind: without_missing(root, c) for kind, c in kinds.items()}
        kinds = {kind: c for kind, c in kinds.items() if c.sources or c.rehearsal}
    try:
        if not any(c.sources for c in kinds.values()):
            raise UserError(f"{root}: none of the config's prepared sources is there")
        sources = {
            name: Source.open(root / name)
            for c in kinds.values()
            for name in c.sources + c.rehearsal
        }
    except UserError as error:
        hint = f"; to make it: {config.data.prepare}" if config.data.prepare else ""
        raise UserError(f"{error}{hint}") from None
    own = sum(len(sources[name]) for c in kinds.values() for name in c.sources)
    plans = [
        KindPlan(
            kind=kind,
            sources=c.sources + c.rehearsal,
            rehearsal=c.rehearsal,
            rehearsal_records=round(c.rehearsal_share * own),
            batch_size=c.batch_size,
            shapes=c.shapes,
            table_size=c.table_size,
            concepts_per_image=c.concepts_per_image,
            max_boxes=c.max_boxes,
            texts_per_image=c.texts_per_image,
            begin=c.begin,
            mosaic=c.mosaic,
        )
        for kind, c in kinds.items()
    ]
    vocabulary = Vocabulary(
        sources,
        Dictionary.open(root / config.data.dictionary) if config.data.dictionary else None,
        defined=[kind for kind, c in kinds.items() if c.definitions],
        template=config.data.template,
    )
    names = vocabulary.names(vocabulary.pool("detection"))
    return Plan(sources, vocabulary, plans, config.seed), sources, names


def without_missing(root: Path, config: config_lib.KindConfig) -> config_lib.KindConfig:
    """Without `sources` if one is not under `root`, and without those to rehearse that are not."""
    there = [name for name in config.rehearsal if (root / name).exists()]
    for name in set(config.rehearsal) - set(there):
        print(f"{root / name} is not there: it is not rehearsed")
    whole = all((root / name).exists() for name in config.sources)
    return dataclasses.replace(
        config, sources=config.sources if whole else (), rehearsal=tuple(there)
    )


def abstract_batch(kind: str, shape: tuple[int, int], config: config_lib.KindConfig) -> Batch:
    """Shapes and types of one global batch."""
    array, images, boxes = jax.ShapeDtypeStruct, config.batch_size, config.max_boxes
    return Batch(
        images=array((images, *shape, 3), np.uint8),
        sizes=array((images, 2), np.int32),
        boxes=array((images, boxes, 4), np.float32),
        labels=array((images, boxes), np.int32),
        texts=array((images, config.texts_per_image), np.int32),
        tokens=array((config.table_size, CONTEXT), np.int32),
        token_mask=array((config.table_size,), np.bool_),
        kind=kind,
    )
