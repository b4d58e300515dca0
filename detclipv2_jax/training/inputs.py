"""Opening a run's prepared data: its sources, their vocabulary and the plan of its steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from detclipv2_jax.common.errors import UserError
from detclipv2_jax.common.printable import counted
from detclipv2_jax.data import fill, rungs
from detclipv2_jax.data.batch import Batch
from detclipv2_jax.data.config import AUTO, DataConfig, KindConfig
from detclipv2_jax.data.dictionary import Dictionary
from detclipv2_jax.data.general_names import GeneralNames
from detclipv2_jax.data.index import TEXT_KINDS, Kind, Source
from detclipv2_jax.data.plan import Plan
from detclipv2_jax.data.vocabulary import Vocabulary
from detclipv2_jax.text.checked import read_table
from detclipv2_jax.text.tokenizer import CONTEXT
from detclipv2_jax.training.config import RunConfig


class TrainingData(NamedTuple):
    """The opened data of a run."""

    plan: Plan
    sources: dict[str, Source]  # by name
    names: list[str]  # of all concepts of the detection data

    def summary(self, total_steps: int) -> str:
        """Return lines for people: the steps of the run and of an epoch, and the definitions."""
        plan = self.plan
        batches = ", ".join(f"{count} {kind}" for kind, count in plan.batches.items())
        rehearsal = f"; {n} of them rehearsal" if (n := plan.rehearsal_batches) else ""
        text = f"{total_steps} steps, {plan.steps_per_epoch} per epoch ({batches}{rehearsal})"
        if definitions := plan.vocabulary.definitions("detection"):
            known = sum(bool(definitions.get(name)) for name in self.names)
            text += f"\n{known} of {len(self.names)} detection names have a definition"
        return "\n".join([text, *(self._fill(kind) for kind in plan.kinds), *self._few_names()])

    def sources_of(self, kind: Kind) -> dict[str, Source]:
        """Return the sources of a kind by name; none if the run does not train on it."""
        config = self.plan.kinds.get(kind)
        return {name: self.sources[name] for name in config.all_sources} if config else {}

    def _few_names(self) -> list[str]:
        """Return a line for each source of boxes with images that no negative is drawn for."""
        config = self.plan.kinds.get("detection")
        if config is None or not config.concepts_per_image:
            return []
        lines = []
        for name, source in self.sources_of("detection").items():
            names = int(np.count_nonzero(source.vocabulary))
            without = np.count_nonzero(np.diff(source.positives_offsets) >= names)
            if not without:
                continue
            if config.general_negatives:
                lines.append(
                    f"{name}: {counted(names, 'name')}; the negatives are names of WordNet"
                )
                continue
            lines.append(
                f"warning: {name}: {without} of {len(source)} images have every name of the source "
                f"({names}), so they have no negatives and teach nothing of what the names mean. "
                "Set --config.data.detection.general_negatives=50"
            )
        return lines

    def trained_on(self) -> dict[str, dict[str, int]]:
        """Return the number of records of every source by name, by kind, as a checkpoint has it."""
        return {
            kind: {
                PurePath(name).name: len(self.sources[name].height) for name in config.all_sources
            }
            for kind, config in self.plan.kinds.items()
        }

    def _fill(self, kind: Kind) -> str:
        """Return a line with the canvases of a kind and how full they will be in each phase."""
        config = self.plan.kinds[kind]
        sources = [self.sources[name] for name in config.all_sources]
        heights = np.concatenate([source.height for source in sources])
        widths = np.concatenate([source.width for source in sources])
        shares = []
        for begin, _ in rungs.phases(config):
            share = fill.expected(config, heights, widths, begin).share
            shares.append(f"{share:.0%}" + (f" from epoch {begin:g}" if begin else ""))
        sides = ", ".join(f"{height}×{width}" for height, width in rungs.canvases(config))
        return f"{kind}: canvases {sides}; images cover {', '.join(shares)} of their pixels"


def open_data(config: RunConfig) -> TrainingData:
    """Open the prepared data that a run's config names.

    Raises:
        UserError: a source or the dictionary is missing, damaged or of another kind.
    """
    root = Path(config.data_dir)
    kinds: dict[Kind, KindConfig] = _available_kinds(root, config.data)
    sources = _open_sources(root, kinds, config.data.prepare)
    dictionary = _open_dictionary(root, config.data.dictionary)
    if dictionary is None:
        kinds = {k: dataclasses.replace(data, definitions=False) for k, data in kinds.items()}
    vocabulary = Vocabulary(
        sources,
        dictionary,
        defined=[kind for kind, data in kinds.items() if data.definitions],
        corrections=read_table(root / file) if (file := config.data.definitions_file) else {},
        template=config.data.template,
        general=_general_names(kinds, sources),
    )
    plan = Plan(sources, vocabulary, kinds, config.seed)
    return TrainingData(plan, sources, vocabulary.names(vocabulary.pool("detection")))


def with_classes(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Return the config with the model's classes, if `data.closed_set` asks for them.

    Args:
        config: of the run.
        names: of the detection data.
    """
    if not config.data.closed_set:
        return config
    resize = lambda part: dataclasses.replace(part, embed_dim=len(names))
    model = dataclasses.replace(
        config.model,
        classes=tuple(names),
        head=resize(config.model.head),
        text=resize(config.model.text),
    )
    return dataclasses.replace(config, model=model)


def _available_kinds(root: Path, config: DataConfig) -> dict[Kind, KindConfig]:
    """Return the kinds to train on; with `skip_missing`, without the sources that are missing.

    A kind needs all of its `sources`; of those in `rehearsal` it takes what exists.
    """
    kinds = config.kinds()
    if not config.skip_missing:
        return kinds
    for kind, data in kinds.items():
        rehearsal = tuple(name for name in data.rehearsal if (root / name).exists())
        for name in set(data.rehearsal) - set(rehearsal):
            print(f"{root / name} is missing, so it is not rehearsed")
        is_complete = all((root / name).exists() for name in data.sources)
        sources = data.sources if is_complete else ()
        kinds[kind] = dataclasses.replace(data, sources=sources, rehearsal=rehearsal)
    return {kind: data for kind, data in kinds.items() if data.all_sources}


def _open_sources(root: Path, kinds: Mapping[Kind, KindConfig], prepare: str) -> dict[str, Source]:
    """Open every source of the kinds; an error names `prepare`, the command that makes the data."""
    try:
        if not any(data.sources for data in kinds.values()):
            raise UserError(f"{root}: none of the config's sources exists. Prepare them.")
        names = [name for data in kinds.values() for name in data.all_sources]
        return {name: Source.open(root / name) for name in names}
    except UserError as error:
        prepare = prepare.replace("DATA_DIR", str(root))
        hint = f" The command for this config's data: {prepare}" if prepare else ""
        raise UserError(f"{str(error).rstrip('.')}.{hint}") from None


def _general_names(
    kinds: Mapping[Kind, KindConfig], sources: Mapping[str, Source]
) -> GeneralNames | None:
    """Return the names that are negatives where a source of boxes has few; None if none are."""
    if "detection" not in kinds or not kinds["detection"].general_negatives:
        return None
    used = [sources[name] for name in kinds["detection"].all_sources]
    return GeneralNames(row["name"] for one in used for row in one.read_concepts(one.vocabulary))


def _open_dictionary(root: Path, name: str) -> Dictionary | None:
    """Open the dictionary that `DataConfig.dictionary` names; None if there is none."""
    first, auto, optional = name.partition(f"{AUTO}:")
    if auto and not first:
        if not (root / optional).is_dir():
            print(
                f"{root / optional} does not exist, so names are trained without definitions. Make "
                f"it with `detclip prepare concepts --from={root} --to={root / optional}`"
            )
            return None
        name = optional
    return Dictionary.open(root / name) if name else None


def abstract_batch(kind: Kind, shape: tuple[int, int], config: KindConfig) -> Batch:
    """Return the shapes and types of a global batch with the canvas `shape` (height, width)."""
    array = cast(Any, jax.ShapeDtypeStruct)  # a description takes the place of each array
    images, boxes = config.batch_size, config.max_boxes
    scored = 0 if kind in TEXT_KINDS else config.table_size
    return Batch(
        images=array((images, *shape, 3), np.uint8),
        sizes=array((images, 2), np.int32),
        boxes=array((images, boxes, 4), np.float32),
        labels=array((images, boxes, config.labels_per_box), np.int32),
        scored=array((images, scored), np.bool_),
        texts=array((images, config.texts_per_image), np.int32),
        tokens=array((config.table_size, CONTEXT), np.int32),
        token_mask=array((config.table_size,), np.bool_),
        kind=kind,
    )
